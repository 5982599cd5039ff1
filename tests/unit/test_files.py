"""Tests that published files are complete or unchanged, after kills and on failing disks."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    FileLock,
    host_name,
    new_folder,
    scratch_folder,
    write_atomically,
    write_output_file,
)
from megatron_chatflow.tokenizer.small_files import write_small_files

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove")


def start(work: Callable[[], object], kill_at: int | None = None) -> Any:
    """Starts a process that SIGKILL ends before its ``kill_at``-th change to the disk."""

    def run() -> None:
        num_changes = 0

        def before(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal num_changes
            if event not in CHANGES or (event == "open" and not arguments[2] & os.O_ACCMODE):
                return
            num_changes += 1
            if num_changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(before)
        work()
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def ended(child: Any) -> int | None:
    child.join(60)
    return child.exitcode


def test_a_kill_at_any_moment_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for kill_at in range(1, 50):
        write_atomically(path, "old")
        status = ended(start(lambda: write_atomically(path, "new" * 1000), kill_at))
        assert path.read_text() in ("old", "new" * 1000)
        write_atomically(path, "next")
        assert path.read_text() == "next"
        assert list(tmp_path.iterdir()) == [path]
        if status == 0:
            break
    assert 1 < kill_at < 49


def test_processes_that_write_one_file_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(number: int) -> None:
        rng = random.Random(number)
        for _ in range(40):
            write_atomically(path, str(number) * rng.randint(1, 5000))

    writers = [start(lambda number=number: write(number)) for number in (1, 2, 3)]
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert len(set(path.read_text())) == 1
    assert [ended(writer) for writer in writers] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_what_another_user_left_is_no_hindrance() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        file, output = folder / "file", folder / "output"
        for kill_at in (1, 2, 3, 4):
            ended(start(lambda: write_atomically(file, "root"), kill_at))
            ended(start(lambda: write_folder(output, b"root"), kill_at))
        assert any(path.name.endswith(".lock") for path in folder.iterdir())

        def as_nobody() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            write_atomically(file, "nobody")
            write_folder(output, b"nobody")

        assert ended(start(as_nobody)) == 0
        assert file.read_text() == "nobody" and (output / "a").read_text() == "nobody"


def test_without_locks_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    for content in ("first", "second"):
        write_atomically(tmp_path / "file", content)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["second"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_folder_of_another_user_is_named_as_the_reason() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)

        def as_nobody() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            for write in (write_atomically, lambda path, _: FileLock.acquire(path)):
                with pytest.raises(PermissionError):
                    write(Path(name) / "file", "nobody")

        assert ended(start(as_nobody)) == 0


def test_machines_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = []
    for machine in ("1f", "2f"):
        (tmp_path / machine).write_text(f"{machine}\n")
        (tmp_path / "empty").write_text("\n")
        files = ("gone", "empty", machine)
        names.append(host_name(tuple(str(tmp_path / file) for file in files)))
    assert names[0] != names[1] and names[0].rpartition("-")[0] == names[1].rpartition("-")[0]
    assert "." not in names[0] and host_name((str(tmp_path / "gone"),)) in names[0]


def test_scratch_folders_of_killed_processes_are_removed(tmp_path: Path) -> None:
    def begin() -> None:
        with scratch_folder("scratch_", tmp_path) as folder:
            (folder / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert ended(start(begin)) == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/weights"))) == 1
    kept = {f"scratch_{host_name()}x.abc", f"other_{host_name()}.abc", f"scratch_{host_name()}"}
    for name in kept:
        (tmp_path / name).mkdir()
    with scratch_folder("scratch_", tmp_path) as living:
        assert {path.name for path in tmp_path.iterdir()} == kept | {living.name}
        (living / "weights").write_text("whole")
        with scratch_folder("scratch_", tmp_path) as second:
            assert second != living and (living / "weights").exists()
    assert {path.name for path in tmp_path.iterdir()} == kept
    with pytest.raises(UserError, match=r"cannot write: .*gone: No such file"):
        with scratch_folder("scratch_", tmp_path / "gone"):
            raise AssertionError("the block must not begin")


def write_folder(path: Path, content: bytes) -> None:
    with new_folder(path, overwrite=True, mark="a", num_bytes=0) as folder:
        (folder / "a").write_bytes(content)


WRITERS: dict[str, Callable[[Path, bytes], None]] = {
    "file": write_output_file,
    "small files": lambda path, content: write_small_files(path.parent, {path.name: content}),
    "folder": write_folder,
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a file system of 64 KiB, or skips the test if mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_nothing_else(disk: Path, name: str) -> None:
    WRITERS[name](disk / "output", b"old")
    before = {path: path.is_dir() or path.read_bytes() for path in disk.rglob("*")}
    with pytest.raises(UserError, match="(?i)no space left"):
        WRITERS[name](disk / "output", bytes(1 << 17))
    assert {path: path.is_dir() or path.read_bytes() for path in disk.rglob("*")} == before
    WRITERS[name](disk / "output", b"new")


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
