"""Tests collectives through shared memory: equal to gloo's, with an error when a rank is lost."""

import sys
from pathlib import Path

import jobs
import pytest

from megatron_chatflow.kernels import shared_group

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shared_group.MAX_SIZE == 0 or sys.platform != "linux",
        reason="csrc/kernels/cpu is not built (make build), or this is no Linux",
    ),
]
WORKER = Path(__file__).with_name("shared_memory_worker.py")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_same_as_gloo(num_ranks: int) -> None:
    output = jobs.run_ranks(num_ranks, WORKER, "compare")
    assert output.count("equal") == num_ranks


@pytest.mark.parametrize(
    ("mode", "error"),
    [
        ("kill", "a process of this group has ended"),
        ("late", "a process of this group did not come to a collective in time"),
        ("other", "the processes of this group came with different collectives"),
    ],
)
def test_a_rank_that_is_gone_is_an_error(mode: str, error: str) -> None:
    output = jobs.run([*jobs.torchrun(2), WORKER, mode], expect=1)
    assert f"rank 0 of 2: {error}" in output


def test_ranks_that_cannot_share_go_through_gloo() -> None:
    """All ranks use gloo and report it if one rank lacks the extension."""
    output = jobs.run_ranks(2, WORKER, "apart")
    assert output.count("gloo: ") == 2
