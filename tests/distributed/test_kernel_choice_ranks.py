"""Tests that ranks with different measurements choose the same kernels."""

from pathlib import Path

import jobs
import pytest

WORKER = Path(__file__).with_name("kernel_choice_worker.py")


@pytest.mark.distributed
def test_ranks_that_measure_other_times_choose_alike(tmp_path: Path) -> None:
    jobs.run_ranks(2, WORKER, tmp_path)
    first, second = ((tmp_path / f"rank_{rank}").read_text().splitlines() for rank in range(2))
    assert [line.split(":")[0] for line in first] == ["torch", "b", "b"]
    assert [line.split(":")[0] for line in second] == ["torch", "b", "b"]
    # The slowest rank counts, and all ranks report the same figures.
    assert first[0] == second[0]
    assert "torch 1,500,000 us, a 2,000,000 us, b 2,000,000 us" in first[0]
    # The rank that found an error reports it.
    assert "a: left out: it is 0.5 from fp32's result" in second[1]
    assert first[1].endswith("a: not usable on another rank")
    assert first[2].endswith("a: is not here")
    assert second[2].endswith("a: not usable on another rank")
