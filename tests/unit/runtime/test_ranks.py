"""Tests that ranks are read from the launcher's environment."""

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.ranks import ProcessRank


def test_without_a_launcher_there_is_one_process() -> None:
    assert ProcessRank.from_environment({}) == ProcessRank(0, 1, 0, 1)


def test_torchrun_variables() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert ProcessRank.from_environment(environment) == ProcessRank(5, 8, 1, 4)


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "one"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "-1"}, {"RANK": ""}],
)
def test_a_broken_environment_is_refused_by_name(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="environment variable (RANK|WORLD_SIZE)"):
        ProcessRank.from_environment(environment)
