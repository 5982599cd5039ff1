"""Tests that outputs are complete or absent, whenever the process that writes them is killed."""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from output_folders import content_of, write_folder

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    FileLock,
    host_name,
    new_folder,
    scratch_folder,
    write_atomically,
)

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


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


def in_child(output: Path, content: str, kill_at: int | None) -> int | None:
    """Writes a folder in another process and returns its exit status, -9 if it was killed."""
    return ended(start(lambda: write_folder(output, content), kill_at))


def test_a_kill_at_any_moment_leaves_nothing_for_the_next_process(tmp_path: Path) -> None:
    output, number = tmp_path / "output", 0
    rng = random.Random(14)
    write_folder(output, "0")
    seen = set()
    for kill_at in range(1, 200):
        before, number = content_of(output), number + 1
        status = in_child(output, str(number), kill_at)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        between = content_of(output)
        assert between in (before, str(number), None)
        seen.add("old" if between == before else "new" if between else "absent")
        if rng.random() < 0.3:  # consecutive kills
            number += 1
            assert in_child(output, str(number), rng.randint(1, kill_at)) == -signal.SIGKILL
        number += 1
        write_folder(output, str(number))
        assert content_of(output) == str(number)
        assert list(tmp_path.iterdir()) == [output], f"left by a kill before change {kill_at}"
    else:
        raise AssertionError("it never ended")
    assert seen == {"old", "new", "absent"}


def test_a_folder_whose_replacement_was_killed_gets_its_name_back(tmp_path: Path) -> None:
    output = tmp_path / "output"
    for kill_at in range(1, 200):
        write_folder(output, "old")
        assert in_child(output, "new", kill_at) == -signal.SIGKILL
        if not output.exists():
            break
    with pytest.raises(UserError, match="already exists; use --overwrite"):
        with new_folder(output, overwrite=False, mark="mark", num_bytes=1):
            raise AssertionError("the block must not begin")
    assert content_of(output) == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_what_a_kill_left_is_removed_by_a_process_with_another_output(tmp_path: Path) -> None:
    assert in_child(tmp_path / "killed", "half", 5) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "a half-written folder and its lock"
    write_folder(tmp_path / "output", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


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
            ended(start(lambda: write_folder(output, "root"), kill_at))
        assert any(path.name.endswith(".lock") for path in folder.iterdir())

        def as_nobody() -> None:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            write_atomically(file, "nobody")
            write_folder(output, "nobody")

        assert ended(start(as_nobody)) == 0
        assert file.read_text() == "nobody" and content_of(output) == "nobody"


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
