"""Fixtures of the tests that start processes; puts `jobs` and `tiny_run` on the path."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from tiny_run import TinyRun, make_tiny_run  # noqa: E402  (the path is set just above)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_tiny_run(tmp_path_factory.mktemp("tiny_run"))
