"""A process that forms a whole job: gloo, one rank and megatron-core's groups, per session."""

from collections.abc import Iterator

import pytest

from megatron_chatflow.runtime.launch import finalize, initialize
from megatron_chatflow.runtime.ranks import Ranks


@pytest.fixture(scope="session")
def single_rank() -> Iterator[Ranks]:
    yield initialize(seed=1)
    finalize()
