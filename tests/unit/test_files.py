"""Tests how files are published where locks or durable names are missing."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    host_name,
    new_folder,
    write_atomically,
    write_output_file,
)
from megatron_chatflow.tokenizer.small_files import write_small_files


def test_without_locks_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    for content in ("first", "second"):
        write_atomically(tmp_path / "file", content)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["second"]


def test_machines_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = []
    for machine in ("1f", "2f"):
        (tmp_path / machine).write_text(f"{machine}\n")
        (tmp_path / "empty").write_text("\n")
        files = ("gone", "empty", machine)
        names.append(host_name(tuple(str(tmp_path / file) for file in files)))
    assert names[0] != names[1] and names[0].rpartition("-")[0] == names[1].rpartition("-")[0]
    assert "." not in names[0] and host_name((str(tmp_path / "gone"),)) in names[0]


def write_folder(path: Path, content: bytes) -> None:
    with new_folder(path, overwrite=True, mark="a", num_bytes=0) as folder:
        (folder / "a").write_bytes(content)


WRITERS: dict[str, Callable[[Path, bytes], None]] = {
    "file": write_output_file,
    "small files": lambda path, content: write_small_files(path.parent, {path.name: content}),
    "folder": write_folder,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOTSUP])
def test_a_folder_whose_names_cannot_be_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    sync = os.fsync

    def sync_all_but_parent(descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode) and os.path.samestat(status, tmp_path.stat()):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_all_but_parent)
    if code == errno.ENOTSUP:  # a file system that cannot sync folders
        WRITERS[name](tmp_path / "output", b"bytes")
    else:
        with pytest.raises(UserError, match="complete under its final name, but a crash"):
            WRITERS[name](tmp_path / "output", b"bytes")
    (output,) = tmp_path.iterdir()
    assert (output / "a" if output.is_dir() else output).read_bytes() == b"bytes"
