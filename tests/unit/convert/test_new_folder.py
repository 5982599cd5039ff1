"""Tests that output folders appear complete, and that one process at a time writes a folder."""

import errno
import logging
import os
import stat
from pathlib import Path

import pytest
from output_folders import content_of, write_folder

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import host_name, new_folder


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    output, other = tmp_path / "output", tmp_path / "other"
    with new_folder(output, overwrite=False, mark="mark", num_bytes=1) as folder:
        (folder / "mark").write_text("first")
        with pytest.raises(UserError, match="output: another process is writing it"):
            write_folder(output, "second")
        write_folder(other, "beside")
        assert (folder / "mark").exists(), "a living process loses nothing"
    assert (output / "mark").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "output"]


def test_leftovers_of_other_hosts_and_versions_are_only_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = [
        f".output.{host_name()}x.0123abcd.partial",
        f".output.x{host_name()}.0123abcd.old",
        ".output.4321.partial",
        f".output.{host_name()}.partial",
    ]
    for name in foreign:
        (tmp_path / name).mkdir()
    with caplog.at_level(logging.WARNING):
        write_folder(tmp_path / "output", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, "output"])
    (message,) = (record.getMessage() for record in caplog.records)
    assert all(name in message for name in foreign[:3]) and "another host" in message


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_parent_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    output, sync = tmp_path / "output", os.fsync
    write_folder(output, "old")

    def sync_all_but_parent(descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode) and os.path.samestat(status, tmp_path.stat()):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync_all_but_parent)
        if code == errno.EINVAL:  # a file system that cannot sync folders
            write_folder(output, "new")
        else:
            with pytest.raises(
                UserError, match="complete under its final name.*the replaced folder is in"
            ):
                write_folder(output, "new")
            assert len(list(tmp_path.iterdir())) == 2
    assert content_of(output) == "new"
    write_folder(output, "newer")
    assert list(tmp_path.iterdir()) == [output]
