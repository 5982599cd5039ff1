"""Tests runs that branch off a stable phase, and runs that start another cycle."""

from pathlib import Path

import jobs
import pytest
import torch
from tiny_run import TinyRun

from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.convert.distributed import DistributedReader

WSD = ["--lr-decay-style", "WSD", "--lr-wsd-decay-style", "minus_sqrt"]
GROWING = ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.01"]
SHARDED = ["--use-distributed-optimizer"]


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Trains all runs in one process, or on two ranks."""
    folder = tiny_run.folder / "learning_rate"
    folder.mkdir()
    base = ["--config", tiny_run.config, "--lr", "3e-3", "--lr-warmup-iters", "2"]
    stable = [*base, *WSD, "--train-iters", "40", "--lr-wsd-decay-iters", "30"]
    branch = [*base, *WSD, "--train-iters", "9", "--lr-wsd-decay-iters", "4"]
    growing = [*base, *GROWING, "--end-weight-decay", "0.3", "--train-iters", "6"]

    def own(name: str) -> list[object]:
        return ["--save", folder / name, "--load", folder / name]

    commands: list[list[object]] = [
        [*branch, *own("whole")],
        [*stable, *own("branch"), "--exit-interval", 5],
        [*branch, *own("branch")],
        [*base, *own("cycles"), "--train-iters", 5, "--min-lr", 1e-4],
        [*base, *own("cycles"), "--train-iters", 11, "--lr-cycle-start-iters", 5],
        [*growing, *own("growing")],
        [*growing, *own("growing_again"), "--exit-interval", 3],
        [*growing, *own("growing_again")],
        [*base, *own("constant"), "--weight-decay", "0.01", "--train-iters", "6"],
    ]
    jobs.run_layouts(1, [list(map(str, one)) for one in commands], folder)
    on_two: list[list[object]] = [
        [*growing, *SHARDED, *own("growing_sharded")],
        [*branch, *SHARDED, *own("branch_sharded"), "--exit-interval", 5],
        [*branch, *SHARDED, *own("branch_sharded")],
    ]
    jobs.run_layouts(2, [list(map(str, one)) for one in on_two], folder)
    return folder


def column(folder: Path, key: str) -> list[float]:
    return [step[key] for step in jobs.read_metrics(folder)[0]]


@pytest.mark.distributed
def test_a_decay_from_the_stable_phase_is_the_uninterrupted_run(runs: Path) -> None:
    for key in ("lm_loss", "grad_norm", "learning_rate"):
        assert column(runs / "branch", key) == column(runs / "whole", key)
    found, expected = (
        DistributedReader(iteration_folder(runs / name, 9)) for name in ("branch", "whole")
    )
    assert set(found.tensors) == set(expected.tensors) and "exp_avg" in str(found.tensors)
    for name in expected.tensors:
        assert torch.equal(found.read_whole(name), expected.read_whole(name)), name
    rates = column(runs / "whole", "learning_rate")
    assert rates[2:6] == [3e-3] * 4  # stable up to the iteration before the decay's first
    assert rates[6:] == pytest.approx([3e-3 * (1 - (k / 4) ** 0.5) for k in (1, 2, 3)])


@pytest.mark.distributed
def test_another_cycle_begins_with_a_warmup(runs: Path) -> None:
    rates = column(runs / "cycles", "learning_rate")
    assert rates[:3] == [0.0, 1.5e-3, 3e-3] and rates[4] < 1e-3
    assert rates[5:8] == [0.0, 1.5e-3, 3e-3]
    assert rates[8:] == sorted(rates[8:], reverse=True)


@pytest.mark.distributed
def test_a_growing_weight_decay_resumes_and_does_not_depend_on_the_layout(runs: Path) -> None:
    losses = column(runs / "growing", "lm_loss")
    assert column(runs / "growing_again", "lm_loss") == losses
    assert column(runs / "growing_sharded", "lm_loss") == pytest.approx(losses, abs=2e-5)
    for name in ("growing", "growing_again", "growing_sharded"):
        decays = column(runs / name, "weight_decay")
        assert decays == pytest.approx([0.01 + 0.29 * k / 6 for k in range(6)])
    # The first update has the first weight decay, and the later ones more.
    constant = column(runs / "constant", "lm_loss")
    assert constant[:2] == losses[:2] and constant[-1] != losses[-1]


@pytest.mark.distributed
def test_a_branch_does_not_depend_on_the_layout(runs: Path) -> None:
    expected = column(runs / "whole", "lm_loss")
    assert column(runs / "branch_sharded", "lm_loss") == pytest.approx(expected, abs=2e-5)
