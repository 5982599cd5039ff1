"""Every parallel layout trains the same run: losses equal a single process's to rounding.

Tolerance: all runs compute in fp32 and start from the same weights; what differs is the order in
which sums over ranks are taken, an error of some 1e-7 relative a reduction, which ten steps of
AdamW at 3e-3 amplify. Observed: at most 2e-6 on losses of about 6. A wrong gradient, mask or batch
shows in the first digits.
"""

from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

TOLERANCE = 2e-5

LAYOUTS = {
    "tp2": ["--tensor-model-parallel-size", "2"],
    "tp2_sequence_parallel": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "dp2": [],
    "dp2_distributed_optimizer": ["--use-distributed-optimizer"],
    "cp2": ["--context-parallel-size", "2"],
    "dp2_other_micro_batch": ["--micro-batch-size", "1"],
    "tp2_recompute": [
        "--tensor-model-parallel-size",
        "2",
        "--recompute-granularity",
        "full",
        "--recompute-method",
        "uniform",
        "--recompute-num-layers",
        "1",
    ],
}


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """A folder with one run a layout, all fine-tuned from the same weights."""
    folder = tiny_run.folder / "layouts"
    folder.mkdir()
    base = ["--config", tiny_run.config]
    jobs.run(jobs.pretrain(*base, "--train-iters", 2, "--save", folder / "start"))
    start = [*base, "--load", folder / "start", "--finetune"]
    jobs.run_layouts(1, [[*start, "--save", folder / "single"]], folder)
    jobs.run_layouts(
        2, [[*start, "--save", folder / name, *flags] for name, flags in LAYOUTS.items()], folder
    )
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_a_single_process(runs: Path, layout: str) -> None:
    expected, expected_validation = jobs.read_metrics(runs / "single")
    found, found_validation = jobs.read_metrics(runs / layout)
    assert len(found) == len(expected) == 10
    assert expected[-1]["lm_loss"] < expected[0]["lm_loss"] - 0.3, "the run has to learn something"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch_digest"] == theirs["batch_digest"]
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name, source in theirs["sources"].items():
            assert ours["sources"][name]["loss_tokens"] == source["loss_tokens"]
            assert ours["sources"][name]["loss"] == pytest.approx(source["loss"], abs=TOLERANCE)
    assert len(found_validation) == len(expected_validation) == 3
    for ours, theirs in zip(found_validation, expected_validation, strict=True):
        for name, source in theirs["validation"].items():
            assert ours["validation"][name]["loss"] == pytest.approx(source["loss"], abs=TOLERANCE)
            assert ours["validation"][name]["bits_per_byte"] == pytest.approx(
                source["bits_per_byte"], abs=TOLERANCE
            )


@pytest.mark.distributed
def test_every_layout_sees_the_same_batches(runs: Path) -> None:
    digests = {
        name: [entry["batch_digest"] for entry in jobs.read_metrics(runs / name)[0]]
        for name in ("single", *LAYOUTS)
    }
    assert all(found == digests["single"] for found in digests.values())
    assert len(set(digests["single"])) == 10
