"""Tests runs whose weights are decided by a controller: layouts, resumes, prefetching and replay.

`tests/unit/blend/test_controllers.py` compares the decisions with independent references.
"""

from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml
from tiny_run import TinyRun
from tool_calls import call_tool

from megatron_chatflow.blend.schedule import Schedule

LAYOUTS = {
    "interleaved": [
        *("--pipeline-model-parallel-size", "2"),
        *("--num-virtual-stages-per-pipeline-rank", "2"),
    ],
    "data": ["--use-distributed-optimizer", "--micro-batch-size", "1"],
    "tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "context": ["--context-parallel-size", "2"],
}
HORIZON = 16  # two iterations


def write_config(tiny: TinyRun, file: str, **controller: Any) -> Path:
    values = yaml.safe_load(tiny.config.read_text(encoding="utf-8"))
    knot = {"at": 0, "weights": {"first": 0.5, "second": 0.5}}
    values["data"]["schedule"] = {"knots": [knot], "controller": controller}
    path = tiny.folder / "controllers" / f"{file}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    folder = tiny_run.folder / "controllers"
    folder.mkdir()
    bounds = {"floor": 0.1, "cap": {"first": 0.8}}
    odm = write_config(tiny_run, "odm", name="odm", horizon=HORIZON, smoothing=0.0, **bounds)
    references = {"first": 5.0, "second": 5.2}
    shearing = write_config(
        tiny_run, "shearing", name="shearing", horizon=HORIZON, reference_loss=references, **bounds
    )
    replay = write_config(tiny_run, "replay", name="replay", run=str(folder / "odm"))

    def job(config: Path, name: str, *flags: str) -> list[str]:
        places = ["--save", str(folder / name), "--load", str(folder / name)]
        return ["--config", str(config), *places, "--eval-interval", "3", *flags]

    # The gradient norm of the second iteration is 3.7.
    rolling = ["--on-nan", "rollback", "--grad-norm-limit", "3.3", "--save-interval", "1"]
    # Batches of 4, 6 and 8 samples: a horizon ends within a batch.
    growing = ["--rampup-batch-size", "4", "2", "30", "--train-samples", "80"]
    growing += ["--lr-warmup-iters", "0", "--lr-warmup-samples", "8"]
    commands = [
        job(odm, "odm"),
        job(shearing, "shearing", "--save-interval", "3"),
        # Iteration 3 is in the middle of a horizon.
        job(odm, "resumed", "--exit-interval", "3"),
        job(odm, "resumed", "--num-prefetch", "5"),
        job(replay, "replay", "--micro-batch-size", "4"),
        job(odm, "growing", *growing),
        job(odm, "rolled_back", *rolling),
        job(odm, "rolled_back_resumed", *rolling, "--exit-interval", "3"),
        job(odm, "rolled_back_resumed", *rolling),
    ]
    jobs.run_layouts(1, commands, folder)
    jobs.run_layouts(2, [job(shearing, name, *flags) for name, flags in LAYOUTS.items()], folder)
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    return jobs.read_metrics(folder)[0]


def decisions(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [yaml.safe_load(line) for line in lines if '"decision"' in line]
    return [{"iteration": entry["iteration"], **entry["decision"]} for entry in entries]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["odm", "shearing"])
def test_weights_follow_the_decisions(runs: Path, name: str) -> None:
    made = decisions(runs / name)
    # Horizon h is decided when horizon h - 2 is consumed.
    assert [(one["horizon"], one["iteration"]) for one in made] == [
        (0, 0), (1, 0), (2, 2), (3, 4), (4, 6), (5, 8), (6, 10)
    ]  # fmt: skip
    assert [one["begin"] for one in made] == [HORIZON * number for number in range(7)]
    for step in steps(runs / name):
        decision = made[(step["iteration"] - 1) // 2]
        for source, found in step["sources"].items():
            assert found["weight"] == decision["weights"][source] / 2**32
            assert abs(found["realised"] - found["weight"]) < 2 / 8
    last = made[-1]["weights"]
    assert len({tuple(one["weights"].values()) for one in made}) > 2
    assert last["first"] <= 0.8 * 2**32 + 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "whole"), [("resumed", "odm"), ("rolled_back_resumed", "rolled_back")]
)
def test_a_resume_is_exact(runs: Path, name: str, whole: str) -> None:
    found, expected = steps(runs / name), steps(runs / whole)
    assert len(found) == len(expected) == 10
    for key in ("batch_digest", "lm_loss", "num_rollbacks"):
        assert [step[key] for step in found] == [step[key] for step in expected]
    assert decisions(runs / name) == decisions(runs / whole)
    assert (expected[-1]["num_rollbacks"] > 0) == (whole == "rolled_back")


@pytest.mark.distributed
def test_decisions_with_a_growing_batch_size(runs: Path) -> None:
    ends = [0, *(step["consumed_samples"] for step in steps(runs / "growing"))]
    assert ends[:3] == [0, 4, 8] and any(end % HORIZON for end in ends if end > HORIZON)
    for decision in decisions(runs / "growing")[2:]:
        # The first iteration that completes horizon h - 2 decides.
        due = decision["begin"] - HORIZON
        assert ends[decision["iteration"] - 1] < due <= ends[decision["iteration"]]


@pytest.mark.distributed
def test_a_replay_draws_the_same_samples(runs: Path) -> None:
    for ours, theirs in zip(steps(runs / "replay"), steps(runs / "odm"), strict=True):
        assert ours["batch_digest"] == theirs["batch_digest"]
        assert ours["sources"]["first"]["weight"] == theirs["sources"]["first"]["weight"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_decide_alike(runs: Path, name: str) -> None:
    """Decisions follow from losses, which layouts round differently; the draws are the same."""
    for ours, theirs in zip(steps(runs / name), steps(runs / "shearing"), strict=True):
        assert ours["batch_digest"] == theirs["batch_digest"]
    for ours, theirs in zip(decisions(runs / name), decisions(runs / "shearing"), strict=True):
        for source, weight in theirs["weights"].items():
            assert ours["weights"][source] / 2**32 == pytest.approx(weight / 2**32, abs=1e-4)


@pytest.mark.distributed
def test_the_fixed_schedule_of_a_run(runs: Path) -> None:
    done = call_tool("plan_blend.py", "--from-run", runs / "odm")
    assert done.returncode == 0, done.stderr
    schedule = Schedule.from_dict(
        yaml.safe_load(done.stdout)["data"]["schedule"], ["first", "second"], 8
    )
    for decision in decisions(runs / "odm"):
        weights = schedule.weights(decision["begin"]).tolist()
        assert weights == list(decision["weights"].values())
    # A run keeps its controller, and a plan of it shows what was decided.
    done = call_tool("plan_blend.py", "--config", runs / "odm.yaml", "--load", runs / "odm")
    assert done.returncode == 0 and "96 to 112" in done.stdout
    plain = yaml.safe_load((runs / "odm.yaml").read_text(encoding="utf-8"))
    del plain["data"]["schedule"]["controller"]
    (runs / "plain.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    done = call_tool("plan_blend.py", "--config", runs / "plain.yaml", "--load", runs / "odm")
    assert done.returncode == 2
    assert "data.schedule.controller: is missing, but the checkpoint's run has" in done.stderr
