"""Tests a resume with another global batch size.

Learning rate, run length, intervals and blend continue from where they were.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml
from tiny_run import TinyRun

from megatron_chatflow.blend import Blend, Schedule

RATES = [0.0, 3e-3, 2.866e-3, 2.492e-3, 1.95e-3, 1.35e-3, 8.077e-4, 4.337e-4]
"""Cosine from 3e-3 to 3e-4 over 8 iterations, one of them warmup."""


LAYOUTS = {
    "pipeline": ["--pipeline-model-parallel-size", 2],
    "interleaved": [
        *("--pipeline-model-parallel-size", 2),
        *("--num-virtual-stages-per-pipeline-rank", 2),
    ],
    "tensor": ["--tensor-model-parallel-size", 2, "--sequence-parallel"],
    "context": ["--context-parallel-size", 2],
    "data": ["--use-distributed-optimizer"],
}


def _stages(config: Path, folder: Path, *stages: list[object]) -> list[list[str]]:
    base = ["--config", config, "--save", folder, "--load", folder]
    return [list(map(str, [*base, *stage])) for stage in stages]


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Iterator[Path]:
    """Trains runs whose global batch size changes, all in one process."""
    folder = tiny_run.folder / "batch_size"
    folder.mkdir()
    values = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
    values["optimizer"] = {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 1}
    values["train"] |= {"eval_interval": 3, "train_iters": 8}
    weights = {"first": 0.9, "second": 0.1}, {"first": 0.2, "second": 0.8}
    values["data"]["schedule"] = {
        "unit": "iterations",
        "knots": [
            {"at": 0, "weights": weights[0]},
            {"at": 6, "weights": weights[1], "ramp": "linear"},
        ],
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    in_samples = folder / "samples.yaml"
    values["train"] |= {"train_iters": None, "train_samples": 64}
    values["data"]["schedule"] = yaml.safe_load(tiny_run.config.read_text())["data"]["schedule"]
    in_samples.write_text(yaml.safe_dump(values), encoding="utf-8")

    def batch(size: int, exit_interval: int = 1000) -> list[object]:
        return ["--global-batch-size", size, "--exit-interval", exit_interval]

    commands = [
        *_stages(config, folder / "constant", batch(8)),
        *_stages(config, folder / "smaller", batch(16, 4), [*batch(8), "--save-interval", 3]),
        *_stages(config, folder / "larger", batch(8, 4), batch(16)),
        *_stages(config, folder / "twice", batch(16, 2), batch(8, 5), batch(12)),
        *_stages(in_samples, folder / "samples", batch(8)),
        *_stages(in_samples, folder / "samples_larger", batch(8, 4), batch(16)),
        *_stages(in_samples, folder / "samples_smaller", batch(8, 4), batch(4)),
        *_stages(in_samples, folder / "samples_twice", batch(8, 2), batch(16, 3), batch(8)),
    ]
    ramp = ["--global-batch-size", 16, "--rampup-batch-size", 4, 4, 24]
    ramp += ["--micro-batch-size", 2, "--save-interval", 2]
    ramp += ["--lr-warmup-iters", 0, "--lr-warmup-samples", 8]
    commands += _stages(in_samples, folder / "ramp", ramp)
    commands += _stages(in_samples, folder / "ramp_resumed", [*ramp, "--exit-interval", 3], ramp)
    # A ramp may be set, changed or removed on resume; only the sizes of later iterations change.
    commands += _stages(in_samples, folder / "ramp_later", batch(8, 1), ramp)
    jobs.run_layouts(1, commands, folder)
    base = ["--config", in_samples, "--load", folder / "ramp" / "iter_0000002", *ramp]
    others = [[*base, "--save", folder / f"ramp_{name}", *flags] for name, flags in LAYOUTS.items()]
    jobs.run_layouts(2, [list(map(str, other)) for other in others], folder)
    yield folder


def _rates(folder: Path) -> list[float]:
    return [entry["learning_rate"] for entry in jobs.read_metrics(folder)[0]]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["constant", "smaller", "larger", "twice"])
def test_with_train_iters_everything_counts_iterations(runs: Path, name: str) -> None:
    iterations, validations = jobs.read_metrics(runs / name)
    assert _rates(runs / name) == pytest.approx(RATES, rel=1e-3)
    assert [entry["iteration"] for entry in validations] == [0, 3, 6, 8]
    # The data schedule also counts iterations: it has a ramp over the first six.
    shares = [entry["sources"]["second"]["weight"] for entry in iterations]
    assert shares == pytest.approx([0.1 + 0.7 * min(i, 6) / 6 for i in range(8)], abs=1e-6)


@pytest.mark.distributed
def test_a_ramp_changes_sizes_and_no_draw(runs: Path) -> None:
    iterations, _ = jobs.read_metrics(runs / "ramp")
    assert [entry["consumed_samples"] for entry in iterations] == [4, 8, 16, 28, 44, 60]
    assert [entry["global_batch_size"] for entry in iterations] == [4, 4, 8, 12, 16, 16]
    # The blend knows the global batch size after the ramp, and nothing of the ramp.
    data = yaml.safe_load((runs / "samples.yaml").read_text(encoding="utf-8"))["data"]
    sources, seq_length = list(data["sources"]), data["seq_length"]
    blend = Blend(Schedule.from_dict(data["schedule"], sources, 16, seq_length))
    for entry in iterations:
        drawn = [entry["sources"][name]["tokens"] for name in sources]
        assert drawn == (blend.counts(entry["consumed_samples"]) * seq_length).tolist()
    later = [entry["consumed_samples"] for entry in jobs.read_metrics(runs / "ramp_later")[0]]
    assert later == [8, 16, 28, 44, 60]


@pytest.mark.distributed
def test_a_ramp_continues_on_resume(runs: Path) -> None:
    expected, _ = jobs.read_metrics(runs / "ramp")
    resumed, _ = jobs.read_metrics(runs / "ramp_resumed")
    exact = ("lm_loss", "grad_norm", "learning_rate", "batch_digest", "consumed_samples")
    assert [[entry[key] for key in exact] for entry in resumed] == [
        [entry[key] for key in exact] for entry in expected
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_ramp_does_not_depend_on_the_layout(runs: Path, layout: str) -> None:
    expected = jobs.read_metrics(runs / "ramp")[0][2:]
    found, _ = jobs.read_metrics(runs / f"ramp_{layout}")
    for key in ("batch_digest", "consumed_samples", "global_batch_size"):
        assert [entry[key] for entry in found] == [entry[key] for entry in expected]
    losses = [entry["lm_loss"] for entry in expected]
    assert [entry["lm_loss"] for entry in found] == pytest.approx(losses, rel=2e-5)


@pytest.mark.distributed
def test_samples_and_checkpoints_of_a_run_in_iterations(runs: Path) -> None:
    consumed: dict[str, Any] = {
        name: [entry["consumed_samples"] for entry in jobs.read_metrics(runs / name)[0]]
        for name in ("smaller", "larger", "twice")
    }
    assert consumed["smaller"] == [16, 32, 48, 64, 72, 80, 88, 96]
    assert consumed["larger"] == [8, 16, 24, 32, 48, 64, 80, 96]
    assert consumed["twice"] == [16, 32, 40, 48, 56, 68, 80, 92]
    folders = sorted(path.name for path in (runs / "smaller").glob("iter_*"))
    assert folders == ["iter_0000004", "iter_0000006", "iter_0000008"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name, consumed",
    [
        ("samples_larger", [8, 16, 24, 32, 48, 64]),
        ("samples_smaller", [8, 16, 24, 32, 36, 40, 44, 48, 52, 56, 60, 64]),
        ("samples_twice", [8, 16, 32, 40, 48, 56, 64]),
    ],
)
def test_with_train_samples_everything_counts_samples(
    runs: Path, name: str, consumed: list[int]
) -> None:
    iterations, validations = jobs.read_metrics(runs / name)
    assert [entry["consumed_samples"] for entry in iterations] == consumed
    # The learning rate of an iteration is that of its first sample, whatever the batch sizes before
    # it.
    constant = dict(zip(range(0, 64, 8), _rates(runs / "samples"), strict=True))
    rates = dict(zip([0, *consumed], _rates(runs / name), strict=False))
    shared = constant.keys() & rates.keys()
    assert len(shared) >= 6
    assert {at: rates[at] for at in shared} == {at: constant[at] for at in shared}
    assert list(rates.values())[1:] == sorted(list(rates.values())[1:], reverse=True)
    last = len(consumed)
    assert [entry["iteration"] for entry in validations] == sorted({0, *range(3, last, 3), last})
    # Each source has the same draws as without a change.
    found, expected = (
        jobs.read_metrics(runs / folder)[0][-1]["sources"] for folder in (name, "samples")
    )
    assert {k: v["tokens"] for k, v in found.items()} == {
        k: v["tokens"] for k, v in expected.items()
    }
