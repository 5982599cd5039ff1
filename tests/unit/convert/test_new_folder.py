"""Tests that output folders are complete or absent, however the process that writes them ends."""

import errno
import logging
import multiprocessing
import os
import random
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import host_name, new_folder

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
FILES = ("mark", "weights", "inner/file")


def write_folder(output: Path, content: str) -> None:
    """Writes an output folder whose files all hold ``content``."""
    with new_folder(output, overwrite=True, mark="mark", num_bytes=1) as folder:
        (folder / "inner").mkdir()
        for name in FILES:
            (folder / name).write_text(content)


def content_of(output: Path) -> str | None:
    """Returns the content of a complete folder, or None if there is no folder."""
    if not output.exists():
        return None
    (content,) = {(output / name).read_text() for name in FILES}
    assert len(list(output.rglob("*"))) == len(FILES) + 1
    return content


def in_child(output: Path, content: str, kill_at: int | None) -> int | None:
    """Writes a folder in another process, which SIGKILL ends before its ``kill_at``-th change.

    Returns:
        Its exit status, -9 if it was killed.
    """

    def work() -> None:
        num_changes = 0

        def before(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal num_changes
            if event not in CHANGES or (event == "open" and not arguments[2] & os.O_ACCMODE):
                return
            num_changes += 1
            if num_changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(before)
        write_folder(output, content)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


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
