"""Tests that files of a run's folder are either complete or absent, and can be found again."""

from pathlib import Path

import pytest

from megatron_chatflow.checkpoint.files import (
    iteration_folder,
    latest_iteration,
    prune,
    resolve_checkpoint,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_atomically


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_and_its_iteration_folders_mean_checkpoints(tmp_path: Path) -> None:
    assert resolve_checkpoint(tmp_path) is None
    assert resolve_checkpoint(tmp_path / "nowhere") is None
    iteration_folder(tmp_path, 20).mkdir()
    iteration_folder(tmp_path, 30).mkdir()
    write_atomically(tmp_path / "latest_checkpointed_iteration.txt", "20\n")
    assert latest_iteration(tmp_path) == 20
    assert resolve_checkpoint(tmp_path) == tmp_path / "iter_0000020"
    assert resolve_checkpoint(tmp_path / "iter_0000030") == tmp_path / "iter_0000030"


def test_a_latest_that_is_gone_is_named(tmp_path: Path) -> None:
    write_atomically(tmp_path / "latest_checkpointed_iteration.txt", "20\n")
    with pytest.raises(UserError, match="names iteration 20"):
        resolve_checkpoint(tmp_path)


def _checkpoints(root: Path, *iterations: int, latest: int) -> None:
    for iteration in iterations:
        iteration_folder(root, iteration).mkdir()
        (iteration_folder(root, iteration) / "shard").write_text("weights")
    write_atomically(root / "latest_checkpointed_iteration.txt", f"{latest}\n")


def test_old_checkpoints_go_and_milestones_stay(tmp_path: Path) -> None:
    _checkpoints(tmp_path, 10, 20, 30, 40, 50, latest=50)
    assert prune(tmp_path, retain=2, keep_every=20) == [10, 30]
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == ["iter_0000020", "iter_0000040", "iter_0000050"]


def test_the_latest_stays_even_if_newer_folders_are_there(tmp_path: Path) -> None:
    _checkpoints(tmp_path, 10, 20, 30, latest=10)
    assert prune(tmp_path, retain=1, keep_every=None) == [20]
    assert resolve_checkpoint(tmp_path) == tmp_path / "iter_0000010"
