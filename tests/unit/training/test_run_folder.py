"""Tests that a run folder that cannot be made is named."""

from pathlib import Path

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.training.run_folder import lock_folder


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"checkpoint\.save: .*file/run"):
        lock_folder(tmp_path / "file" / "run")
