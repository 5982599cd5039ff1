"""Files of a run's folder: whole or absent, and found again."""

from pathlib import Path

import pytest

from megatron_chatflow.checkpoint.files import (
    iteration_folder,
    latest_iteration,
    resolve_checkpoint,
    write_atomically,
)
from megatron_chatflow.errors import UserError


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
