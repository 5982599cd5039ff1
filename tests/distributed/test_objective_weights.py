"""Tests weights of sources in the objective at every kind of layout, and across a resume.

`tests/unit/model/test_objective.py` compares the gradients with an explicitly weighted loss.
"""

import json
from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml
from tiny_run import TinyRun

TOLERANCE = 2e-5
LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "interleaved": [
        *("--pipeline-model-parallel-size", "2"),
        *("--num-virtual-stages-per-pipeline-rank", "2"),
    ],
    "context": ["--context-parallel-size", "2"],
    "data": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
}


def weighted(
    config: Path, path: Path, weights: dict[str, float], last: dict[str, float] | None = None
) -> Path:
    """Writes a configuration in which the weights change to ``last`` along the schedule's ramp."""
    values: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name, weight in weights.items():
        values["data"]["sources"][name]["objective_weight"] = weight
    if last is not None:
        values["data"]["schedule"]["knots"][1]["objective_weights"] = last
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    folder = tiny_run.folder / "objective"
    folder.mkdir()
    four = weighted(
        tiny_run.config, folder / "four.yaml", {"first": 4.0, "second": 0.5}, {"second": 2.5}
    )
    scaled = weighted(
        tiny_run.config, folder / "scaled.yaml", {"first": 8.0, "second": 1.0}, {"second": 5.0}
    )
    equal = weighted(tiny_run.config, folder / "equal.yaml", {"first": 3.0, "second": 3.0})

    def job(config: Path, name: str, *flags: str) -> list[str]:
        places = ["--save", str(folder / name), "--load", str(folder / name)]
        return ["--config", str(config), *places, "--exit-interval", "5", *flags]

    one_stop = job(four, "resumed", "--exit-interval", "3")
    commands = [
        job(tiny_run.config, "unweighted"),
        job(equal, "equal"),
        job(four, "single"),
        job(scaled, "scaled"),
        one_stop,
        job(four, "resumed"),
    ]
    # In choice questions, the sources of tokens are their choices.
    question = {"question": "bana", "choices": ["kedo", "luno", "sima"], "answer": 0}
    (folder / "quiz.jsonl").write_text(f"{json.dumps(question)}\n" * 3, encoding="utf-8")
    quiz = ["--choice-questions", str(folder / "quiz.jsonl"), "--choice-interval", "2"]
    commands.append(job(four, "asked", *quiz, "--choice-scoring", "continuation"))
    jobs.run_layouts(1, commands, folder)
    jobs.run_layouts(2, [job(four, name, *flags) for name, flags in LAYOUTS.items()], folder)
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    return jobs.read_metrics(folder)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*LAYOUTS, "scaled", "asked"])
def test_losses_equal_a_single_process(runs: Path, name: str) -> None:
    found, expected = steps(runs / name), steps(runs / "single")
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.distributed
def test_a_resume_is_exact(runs: Path) -> None:
    for key in ("lm_loss", "grad_norm"):
        found = [step[key] for step in steps(runs / "resumed")]
        assert found == [step[key] for step in steps(runs / "single")]


@pytest.mark.distributed
def test_weights_of_each_step_are_in_the_metrics(runs: Path) -> None:
    found = [
        [source["objective_weight"] for source in step["sources"].values()]
        for step in steps(runs / "single")
    ]
    assert found == [[4.0, 0.5 + 2.0 * 8 * iteration / 64] for iteration in range(5)]
    assert "objective_weight" not in steps(runs / "equal")[0]["sources"]["first"]


@pytest.mark.distributed
def test_weights_change_gradients_and_not_the_reported_losses(runs: Path) -> None:
    plain, weighted, equal = (steps(runs / name) for name in ("unweighted", "single", "equal"))
    # The first loss is that of the same weights, whatever the objective.
    assert weighted[0]["lm_loss"] == plain[0]["lm_loss"]
    for name, source in plain[0]["sources"].items():
        added = {"objective_weight": {"first": 4.0, "second": 0.5}[name]}
        assert weighted[0]["sources"][name] == {**source, **added}
    # Later steps draw both sources.
    assert weighted[-1]["grad_norm"] != pytest.approx(plain[-1]["grad_norm"], rel=1e-3)
    assert [step["lm_loss"] for step in equal] == [step["lm_loss"] for step in plain]
