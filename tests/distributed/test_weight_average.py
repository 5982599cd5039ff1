"""Tests the moving average of the weights: its values, its evaluation, its export and a resume."""

from pathlib import Path

import jobs
import pytest
import torch
from tiny_run import TinyRun

from megatron_chatflow.convert.distributed import (
    AVERAGE_PREFIX,
    MASTER_PREFIXES,
    DistributedReader,
)
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.errors import UserError

DECAY = 0.75
TOLERANCE = 2e-5
BF16 = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "interleaved": [
        *("--pipeline-model-parallel-size", "2"),
        *("--num-virtual-stages-per-pipeline-rank", "2"),
    ],
    "sharded": ["--use-distributed-optimizer", "--context-parallel-size", "2"],
}


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    folder = tiny_run.folder / "weight_average"
    folder.mkdir()

    def job(name: str, *flags: str, decay: float | None = DECAY) -> list[str]:
        places = ["--save", str(folder / name), "--load", str(folder / name)]
        average = [] if decay is None else ["--ema-decay", str(decay)]
        lengths = ["--exit-interval", "5", "--eval-interval", "2", "--save-interval", "1"]
        return ["--config", str(tiny_run.config), *places, *lengths, *average, *flags]

    commands = [
        job("plain", decay=None),
        job("single"),
        job("resumed", "--exit-interval", "3"),
        job("resumed"),
        # The average starts at the weights of a checkpoint without one.
        job("later", "--exit-interval", "3", decay=None),
        job("later"),
    ]
    jobs.run_layouts(1, commands, folder)
    commands = [job(name, *flags) for name, flags in LAYOUTS.items()]
    commands += [
        job("bf16", *BF16),
        job("bf16_plain", *BF16, decay=None),
        # Another layout continues the average.
        job("moved", "--load", str(folder / "single" / "iter_0000003"), *LAYOUTS["interleaved"]),
    ]
    jobs.run_layouts(2, commands, folder)
    return folder


def stored(folder: Path, iteration: int, prefix: str) -> dict[str, torch.Tensor]:
    reader = DistributedReader(folder / f"iter_{iteration:07d}")
    return {
        name.removeprefix(prefix): reader.read_whole(name)
        for name in reader.tensors
        if name.startswith(prefix) and (prefix or not name.startswith("optimizer."))
    }


def assert_averaged(folder: Path, prefix: str, first: int = 0) -> None:
    """Checks the averages of all checkpoints against those of their weights."""
    expected = None
    for iteration in range(first + 1, 6):
        weights, averages = stored(folder, iteration, prefix), None
        averages = stored(folder, iteration, AVERAGE_PREFIX)
        assert averages.keys() == weights.keys()
        if expected is not None:
            for name, weight in weights.items():
                after = expected[name] * DECAY + weight * (1 - DECAY)
                torch.testing.assert_close(averages[name], after, rtol=1e-6, atol=1e-7)
        expected = averages
    assert expected is not None
    assert any(not torch.equal(expected[name], weights[name]) for name in weights)


@pytest.mark.distributed
def test_the_average_is_that_of_the_weights(runs: Path) -> None:
    assert_averaged(runs / "single", "")
    assert_averaged(runs / "sharded", "")
    assert_averaged(runs / "bf16", MASTER_PREFIXES[0])


@pytest.mark.distributed
def test_the_weights_do_not_know_of_the_average(runs: Path) -> None:
    for name, plain in (("single", "plain"), ("bf16", "bf16_plain")):
        found, expected = jobs.read_metrics(runs / name), jobs.read_metrics(runs / plain)
        assert [e["lm_loss"] for e in found[0]] == [e["lm_loss"] for e in expected[0]]
        for ours, theirs in zip(found[1], expected[1], strict=True):
            assert ours["validation"].items() >= theirs["validation"].items()
        for weight, other in zip(
            stored(runs / name, 5, "").values(), stored(runs / plain, 5, "").values(), strict=True
        ):
            assert torch.equal(weight, other)


def averages(folder: Path) -> list[dict[str, float]]:
    """Returns the losses of the average in every validation after the first."""
    return [
        {name: loss["loss"] for name, loss in entry["validation"].items() if "(ema)" in name}
        for entry in jobs.read_metrics(folder)[1]
        if entry["iteration"]
    ]


@pytest.mark.distributed
def test_every_layout_evaluates_the_same_average(runs: Path) -> None:
    expected = averages(runs / "single")
    assert expected and all(losses for losses in expected)
    for name in LAYOUTS:
        for found, losses in zip(averages(runs / name), expected, strict=True):
            assert found == pytest.approx(losses, rel=TOLERANCE), name


@pytest.mark.distributed
def test_a_resume_continues_the_average(runs: Path) -> None:
    assert averages(runs / "resumed") == averages(runs / "single")
    for name, average in stored(runs / "single", 5, AVERAGE_PREFIX).items():
        assert torch.equal(stored(runs / "resumed", 5, AVERAGE_PREFIX)[name], average)
    assert averages(runs / "moved")[-1] == pytest.approx(averages(runs / "single")[-1], rel=1e-5)
    assert_averaged(runs / "later", "", first=3)


@pytest.mark.distributed
def test_the_average_is_exported(runs: Path, tmp_path: Path) -> None:
    done = export_checkpoint(runs / "single", tmp_path / "ema", average=True)
    assert "the moving average of the weights" in str(done)
    other = export_checkpoint(runs / "single", tmp_path / "last")
    assert other.num_bytes == done.num_bytes
    from safetensors.torch import load_file

    [exported], [last] = (sorted(p.glob("*.safetensors")) for p in (done.folder, other.folder))
    tensors, weights = load_file(exported), load_file(last)
    norm = stored(runs / "single", 5, AVERAGE_PREFIX)["decoder.final_layernorm.weight"]
    assert torch.equal(tensors["model.norm.weight"], norm)
    assert any(not torch.equal(tensors[name], weights[name]) for name in weights)
    with pytest.raises(UserError, match="holds no moving average .* train with --ema-decay"):
        export_checkpoint(runs / "plain", tmp_path / "none", average=True)
