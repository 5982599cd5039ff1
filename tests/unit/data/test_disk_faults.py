"""Tests full and failing disks: one error line, no temporary file left, no partial output."""

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from data_files import write_dataset
from preprocess_jobs import Jobs

from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.data.packing import build_once
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import StagedFile, publish_all
from megatron_chatflow.preprocess import dedup as duplicates
from megatron_chatflow.preprocess.dedup import HASH_RECORD, DuplicateMarks, SeenHashes
from megatron_chatflow.preprocess.merge import merge_datasets


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Limits the file size to ``num_bytes``, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_hashes_that_do_not_fit_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "HASHES_PER_RUN", 100)
    hashes = np.arange(400, dtype=np.uint64).reshape(-1, 2)
    for limit in (0, 1000):
        with largest_file(limit), pytest.raises(UserError, match=f"cannot write: {tmp_path}: "):
            SeenHashes(tmp_path).add(hashes)
    assert SeenHashes(tmp_path).add(hashes).all()
    with pytest.raises(UserError, match="cannot write: .*gone: No such file"):
        SeenHashes(tmp_path / "gone").add(hashes)


def test_repeats_that_do_not_fit_on_the_disk(tmp_path: Path) -> None:
    records = np.zeros(2000, HASH_RECORD)
    records["hash"][:, 0] = np.arange(2000)
    path, folder = tmp_path / "a.hashes", tmp_path / "temporary"
    path.write_bytes(records.tobytes())
    for limit in (0, 100, 30_000):  # fails while writing the marks, or the buckets
        folder.mkdir()
        with largest_file(limit), pytest.raises(UserError, match=f"cannot write: {folder}: "):
            DuplicateMarks([path], [2000], folder)
        folder.rmdir()
    with pytest.raises(UserError, match=f"cannot write: {folder}: No such file"):
        DuplicateMarks([path], [2000], folder)


def test_a_dedup_job_on_a_full_disk(
    tmp_path: Path, tiny_sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "HASHES_PER_RUN", 50)
    jobs = Jobs(tmp_path, tiny_sentencepiece_model)
    path = jobs.lines("a.jsonl", [{"text": f"bana {k}"} for k in range(200)])
    with largest_file(400), pytest.raises(UserError, match="cannot write: "):
        jobs.run(path, dedup=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_writer_that_cannot_spool_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # empty files can still be created on a full disk
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot write: .*No space left"):
        IndexedDatasetWriter(tmp_path / "a_document", np.uint16)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_copied_to_a_full_disk(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(bytes(100_000))

    for num_bytes in (10, 50_000):  # in the first block, which is not aligned, and after it
        with StagedFile(tmp_path / "whole") as file:
            file.write(b"x")
            with largest_file(num_bytes), pytest.raises(UserError, match="cannot write: .*whole"):
                file.append_file(part)
        assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_folder_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    sync = os.fsync

    def sync_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    with StagedFile(tmp_path / "a") as file:
        file.write(b"bytes")
        if code == errno.EINVAL:  # a file system that cannot sync folders
            publish_all([file])
        else:
            message = (
                f"cannot write: {tmp_path}/a: .*error, while the folder was synced: the output is"
            )
            with pytest.raises(UserError, match=message):
                publish_all([file])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"bytes"


def test_a_name_that_a_folder_has(tmp_path: Path) -> None:
    with StagedFile(tmp_path / "a") as file:
        (tmp_path / "a").mkdir()
        with pytest.raises(UserError, match="cannot write: .*/a: Is a directory"):
            publish_all([file])
    with pytest.raises(UserError, match="cannot write: .*/a: is a folder; give the path of a file"):
        StagedFile(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folders_in_place_of_outputs(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    jobs = Jobs(tmp_path, tiny_sentencepiece_model)
    path = jobs.lines("a.jsonl", [{"text": "bana"}])
    (tmp_path / "out_text_document.idx").mkdir()
    with pytest.raises(UserError, match="cannot write: .*out_text_document.idx: is a folder"):
        jobs.run(path)
    given = write_dataset(tmp_path / "b_document", [[1, 2]])
    output = tmp_path / "out_text_document"
    with pytest.raises(UserError, match="cannot write: .*out_text_document.idx: is a folder"):
        merge_datasets([Path(given)], output, overwrite=True)
    left = {"a.jsonl", "b_document.bin", "b_document.idx", "out_text_document.idx"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_a_lock_that_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    with largest_file(0):
        content = build_once(
            tmp_path / "a", load=lambda: None, build=lambda: 5, save=lambda _: None
        )
    assert content == 5
    assert list(tmp_path.iterdir()) == []  # otherwise the next process would wait for a minute
