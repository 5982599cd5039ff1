"""Tests background saves: the progress that they report, and the files after a disk failure."""

import errno
import os
import stat
import threading
import time
from pathlib import Path

import pytest
import torch

from megatron_chatflow.checkpoint.direct_file import FileHash
from megatron_chatflow.checkpoint.files import LATEST, find_damage
from megatron_chatflow.checkpoint.writer import BackgroundSave, OnProgress, Publication, SaveReports


def test_waiting_tells_of_every_part(monkeypatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr("megatron_chatflow.checkpoint.writer._get_default_store", lambda: store)
    gates = [threading.Event() for _ in range(3)]

    def write(progress: OnProgress) -> dict[str, FileHash]:
        for gate in gates:
            gate.wait()
            progress()
        return {}

    box = SaveReports("a save")
    save = BackgroundSave(7, write, box, 1, None)
    told = []
    results = []
    waiting = threading.Thread(target=lambda: results.append(save.wait(lambda: told.append(1))))
    waiting.start()
    _until(lambda: len(told) == 1)  # the report of the start
    for number, gate in enumerate(gates[:2], 1):
        gate.set()
        _until(lambda expected=number + 1: len(told) == expected)
        time.sleep(0.5)
        assert len(told) == number + 1, "a writer that stands still is told of"
    gates[2].set()
    seen = len(told)
    _until(lambda: len(told) > seen + 5)  # wait for rank 0, which publishes
    assert not results
    box.end()
    waiting.join(60)
    assert results == [True]


def _until(is_true) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTSUP])
def test_a_run_folder_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / LATEST).write_text("10\n")
    final, beside = tmp_path / "iter_0000020", tmp_path / ".iter_0000020.saving"
    beside.mkdir()
    files = {"state.json": b"{}", "tokenizer/model": b"model"}
    publication = Publication(tmp_path, beside, final, 20, files, None, None)
    sync = os.fsync

    def sync_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    if code == errno.ENOTSUP:  # a file system that cannot sync folders
        publication.run([], [])
        assert find_damage(final) == []
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            publication.run([], [])
    assert (tmp_path / LATEST).read_text() == ("20\n" if code == errno.ENOTSUP else "10\n")
