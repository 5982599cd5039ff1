"""Tests stages of training with real ranks: frozen values keep their bits, and resumes are exact.

A run trains everything, then one layer and some rows of the vocabulary, which the tensor-parallel
ranks share, then everything again.
"""

from pathlib import Path

import jobs
import pytest
import torch
import yaml
from tiny_run import TinyRun

from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.convert.distributed import DistributedReader

FIRST, LAST = 300, 450  # TP 2 holds 384 rows on each rank
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
STAGES = [
    {"at": 0, "trainable": ["all"]},
    {
        "at": 3,
        "trainable": [f"rows.{FIRST}-{LAST}", "layers.1"],
        "lr_multipliers": {"layers.1": 0.5},
    },
    {"at": 6, "trainable": ["all"]},
]
REST = [f"rows.0-{FIRST - 1}", f"rows.{LAST + 1}-", "layers.0", "layers.2-3", "*final_layernorm*"]
TIED = ["--no-untie-embeddings-and-output-weights"]
SHARDED = ["--use-distributed-optimizer"]
LAYOUTS: dict[str, list[str]] = {
    "tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel", *SHARDED],
    "interleaved": [
        *("--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", "1"),
    ],
    "tied": [*TIED, "--pipeline-model-parallel-size", "2", "--bf16"],
    "overlapped": [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather", "--bf16"],
    "context": ["--context-parallel-size", "2"],
}


def command(folder: Path, config: str, name: str, *flags: object) -> list[str]:
    save = ["--save", folder / name, "--load", folder / name]
    return list(map(str, ["--config", folder / f"{config}.yaml", *save, *flags]))


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Trains an uninterrupted and a killed run in one process, and one on two ranks."""
    folder = tiny_run.folder / "stages"
    folder.mkdir()
    values = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
    values["data"]["schedule"] = {
        "unit": "iterations",
        "knots": [{"at": 0, "weights": {"first": 1, "second": 1}}],
    }
    values["optimizer"] |= {"lr_decay_style": "constant", "lr_warmup_iters": 0}
    values["train"] |= {"train_iters": 9, "micro_batch_size": 1, "eval_interval": None}
    values["checkpoint"] = {"save_interval": 3}
    variants = {
        "staged": STAGES,
        "edited": [*STAGES[:2], {"at": 6, "trainable": ["layers.0-3"]}],
        "all": [],
        "part": [{**STAGES[1], "at": 0, "lr_multipliers": {}}],
        "rest": [{"at": 0, "trainable": REST}],
    }
    for name, stages in variants.items():
        values["train"]["stages"] = stages
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    one = [
        command(folder, "staged", "whole", "--save-interval", 1),
        command(folder, "staged", "killed", "--exit-interval", 4),
        command(folder, "staged", "killed"),
    ]
    jobs.run_layouts(1, one, folder)
    jobs.run_layouts(2, [command(folder, "staged", "tensor", *LAYOUTS["tensor"])], folder)
    return folder


@pytest.fixture(scope="module")
def more_runs(runs: Path) -> Path:
    """Trains runs at the other layouts, and runs of which only the first iteration counts."""
    one = [
        command(runs, "edited", "edited", "--exit-interval", 4),
        command(runs, "staged", "edited"),
        *(command(runs, name, name, "--train-iters", 1) for name in ("all", "part", "rest")),
    ]
    jobs.run_layouts(1, one, runs)
    two = [command(runs, "staged", name, *LAYOUTS[name]) for name in LAYOUTS if name != "tensor"]
    two += [command(runs, "staged", "moved", *LAYOUTS["tensor"], "--exit-interval", 4)]
    two += [command(runs, "staged", "moved", *LAYOUTS["interleaved"])]
    jobs.run_layouts(2, two, runs)
    return runs


def column(folder: Path, key: str) -> list[float]:
    return [step[key] for step in jobs.read_metrics(folder)[0]]


def tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Returns weights and optimizer state of a checkpoint; layers are one tensor."""
    reader = DistributedReader(iteration_folder(folder, iteration))
    kinds = ("optimizer.state.fp32_param.", "optimizer.state.exp_avg.")
    return {
        name: reader.read_whole(name)
        for name in reader.tensors
        if name.startswith(kinds) or not name.startswith("optimizer")
    }


def check_frozen(folder: Path, *, is_bf16: bool) -> None:
    """Compares checkpoints before and after the stage that freezes something."""
    before, after = tensors(folder, 3), tensors(folder, 6)
    assert is_bf16 == any("fp32_param" in tensor for tensor in before)
    num_frozen = 0
    for tensor, old in before.items():
        new = after[tensor]
        if tensor.endswith(VOCABULARY):
            row = torch.arange(len(old))
            is_trained = (row >= FIRST) & (row <= LAST)
            assert not torch.equal(new[is_trained], old[is_trained]), tensor
            old, new = old[~is_trained], new[~is_trained]
        elif "decoder.layers." in tensor:
            assert not torch.equal(new[1], old[1]), tensor
            old, new = old[[0, 2, 3]], new[[0, 2, 3]]
        num_frozen += old.numel()
        assert torch.equal(new.view(torch.uint8), old.view(torch.uint8)), tensor
        if tensor.startswith("optimizer.state.exp_avg."):
            assert old.any(), "moments are not 0, and yet move nothing"
    assert num_frozen > 100_000


def check_equal(runs: Path, name: str) -> None:
    """Compares a run with the uninterrupted one, which must be the same bit for bit."""
    for key in ("lm_loss", "grad_norm", "learning_rate", "stage"):
        assert column(runs / name, key) == column(runs / "whole", key)
    found = tensors(runs / name, 9)
    for tensor, values in tensors(runs / "whole", 9).items():
        assert torch.equal(found[tensor], values), tensor


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["whole", "tensor"])
def test_what_is_frozen_keeps_its_bits(runs: Path, name: str) -> None:
    check_frozen(runs / name, is_bf16=False)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "tensor"])
def test_what_is_frozen_keeps_its_bits_at_every_layout(more_runs: Path, name: str) -> None:
    check_frozen(more_runs / name, is_bf16="--bf16" in LAYOUTS[name])


@pytest.mark.distributed
def test_a_run_does_not_depend_on_the_layout(runs: Path) -> None:
    for key in ("lm_loss", "grad_norm"):
        expected = column(runs / "whole", key)
        assert column(runs / "tensor", key) == pytest.approx(expected, rel=2e-4)
    assert column(runs / "tensor", "stage") == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["interleaved", "context", "moved"])
def test_a_run_does_not_depend_on_other_layouts(more_runs: Path, name: str) -> None:
    for key in ("lm_loss", "grad_norm"):
        expected = column(more_runs / "whole", key)
        assert column(more_runs / name, key) == pytest.approx(expected, rel=2e-4)


@pytest.mark.distributed
def test_a_killed_run_continues_exactly(runs: Path) -> None:
    check_equal(runs, "killed")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_future_stage_may_be_edited(more_runs: Path) -> None:
    check_equal(more_runs, "edited")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_norm_counts_trained_gradients_only(more_runs: Path) -> None:
    names = ("all", "part", "rest")
    whole, part, rest = (column(more_runs / name, "grad_norm")[0] for name in names)
    assert 0 < part < whole and 0 < rest < whole
    assert (part**2 + rest**2) ** 0.5 == pytest.approx(whole, rel=1e-5)
    losses = [column(more_runs / name, "lm_loss")[0] for name in names]
    assert losses == losses[:1] * 3


@pytest.mark.distributed
def test_what_thaws_begins_like_a_new_parameter(runs: Path) -> None:
    """Its first update is one learning rate in the direction of the gradient; see `stages`."""
    name = "decoder.layers.mlp.linear_fc2.weight"
    before, after = (tensors(runs / "whole", iteration)[name] for iteration in (6, 7))
    lr = 3e-3
    moved = (after - before * (1 - lr * 0.1)) / lr
    assert moved[0].abs().median() == pytest.approx(1, abs=1e-2)
    assert moved[0].abs().max() < 1.01
    assert moved[1].abs().median() < 0.9  # it was trained before, with moments
    slow = tensors(runs / "whole", 4)[name] - tensors(runs / "whole", 3)[name] * (1 - lr / 2 * 0.1)
    assert slow[1].abs().max() < lr
