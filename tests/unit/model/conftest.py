"""A process that forms a whole job: gloo, one rank and megatron-core's groups, per module."""

from collections.abc import Iterator

import pytest

from megatron_chatflow.runtime.launch import finalize, initialize
from megatron_chatflow.runtime.ranks import Ranks


@pytest.fixture(scope="module")
def single_rank() -> Iterator[Ranks]:
    """Yields the only rank of a job; other modules may start and end jobs in the same process."""
    yield initialize(seed=1)
    finalize()
