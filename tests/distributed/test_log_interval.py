"""Tests logs over several iterations: their means, and the effect of a resume and of a failure."""

import json
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
import yaml
from tiny_run import TinyRun

FAULTY = Path(__file__).with_name("faulty_worker.py")
INTERVALS = [(0, 4), (4, 6), (6, 8), (8, 10)]
"""Logs at multiples of 4, at the end, and before the save at 6."""


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Trains the same run with a row per iteration, a row per log, and an interruption."""
    folder = tiny_run.folder / "log_interval"
    folder.mkdir()
    base = ["--config", tiny_run.config, "--log-interval", 4, "--save-interval", 6]
    coarse = [*base, "--no-metrics-every-iteration"]
    parts = [*coarse, "--save", folder / "parts", "--load", folder / "parts"]
    commands = [
        [*base, "--save", folder / "fine"],
        [*coarse, "--save", folder / "coarse"],
        [*parts, "--exit-interval", 7],
        parts,
    ]
    jobs.run_layouts(2, commands, folder)
    return folder


def _check_interval(row: dict[str, Any], members: list[dict[str, Any]]) -> None:
    assert row["interval"] == len(members)
    assert {member["interval"] for member in members} == {1}
    for key in ("iteration", "consumed_samples", "learning_rate", "batch_digest"):
        assert row[key] == members[-1][key], key
    assert row["grad_norm"] == pytest.approx(_mean(m["grad_norm"] for m in members))
    total = 0.0
    for name, source in row["sources"].items():
        own = [member["sources"][name] for member in members]
        loss_tokens = sum(one["loss_tokens"] for one in own)
        loss = sum((one["loss"] or 0.0) * one["loss_tokens"] for one in own)
        total += loss
        assert source["loss_tokens"] == loss_tokens
        assert source["loss"] == pytest.approx(loss / loss_tokens)
        assert source["realised"] == pytest.approx(_mean(one["realised"] for one in own))
        assert source["weight"] == pytest.approx(_mean(one["weight"] for one in own))
        assert (source["tokens"], source["epochs"]) == (own[-1]["tokens"], own[-1]["epochs"])
    num_tokens = sum(source["loss_tokens"] for source in row["sources"].values())
    assert row["lm_loss"] == pytest.approx(total / num_tokens)


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.distributed
def test_a_log_speaks_for_all_iterations_since_the_last(runs: Path) -> None:
    fine, _ = jobs.read_metrics(runs / "fine")
    coarse, _ = jobs.read_metrics(runs / "coarse")
    assert [row["iteration"] for row in fine] == list(range(1, 11))
    assert len({row["batch_digest"] for row in fine}) == 10
    assert [row["iteration"] for row in coarse] == [end for _, end in INTERVALS]
    for row, (begin, end) in zip(coarse, INTERVALS, strict=True):
        _check_interval(row, fine[begin:end])


@pytest.mark.distributed
def test_a_resume_in_the_middle_of_an_interval(runs: Path) -> None:
    parts, _ = jobs.read_metrics(runs / "parts")
    fine, _ = jobs.read_metrics(runs / "fine")
    assert [row["iteration"] for row in parts] == [4, 6, 7, 8, 10]
    for row, begin in zip(parts, (0, 4, 6, 7, 8), strict=True):
        _check_interval(row, fine[begin : row["iteration"]])


@pytest.mark.distributed
def test_rows_stand_before_the_validation_of_their_iteration(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "fine" / "metrics.jsonl").open()]
    kinds = [(line["iteration"], "validation" in line) for line in lines]
    assert kinds == sorted(kinds)


@pytest.mark.distributed
def test_a_failure_loses_no_iteration_of_the_interval(tiny_run: TinyRun, tmp_path: Path) -> None:
    flags = ["--config", tiny_run.config, "--save", tmp_path / "run", "--log-interval", 10]
    command = [sys.executable, FAULTY, json.dumps({"nan": [4]}), *flags]
    output = jobs.run(command, expect=2)
    rows, _ = jobs.read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    line = next(line for line in output.splitlines() if "  iter  3/10  " in line)
    total = sum(row["lm_loss"] * _loss_tokens(row) for row in rows)
    assert f"loss {total / sum(map(_loss_tokens, rows)):7.4f}" in line


@pytest.mark.distributed
def test_a_skipped_step_is_left_out_of_the_means(tiny_run: TinyRun, tmp_path: Path) -> None:
    flags = ["--config", tiny_run.config, "--save", tmp_path / "run", "--log-interval", 5]
    flags += ["--on-nan", "skip", "--no-tensorboard"]
    output = jobs.run([sys.executable, FAULTY, json.dumps({"nan": [3]}), *flags])
    rows, _ = jobs.read_metrics(tmp_path / "run")
    assert [row["lm_loss"] is None for row in rows] == [k == 3 for k in range(1, 11)]
    good = [row for row in rows[:5] if row["lm_loss"] is not None]
    total = sum(row["lm_loss"] * _loss_tokens(row) for row in good)
    lines = output.splitlines()
    number, line = next(pair for pair in enumerate(lines) if "  iter  5/10  " in pair[1])
    assert f"loss {total / sum(map(_loss_tokens, good)):7.4f}" in line
    assert "skipped 1" in lines[number + 1]


@pytest.mark.distributed
def test_nothing_is_printed_of_a_validation_without_data(tiny_run: TinyRun, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    del values["data"]["holdout_every"]
    values["train"] |= {"train_iters": 2, "eval_interval": 1}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    output = jobs.run(jobs.pretrain("--config", config, "--save", tmp_path / "run"))
    assert output.count("no source has held-out samples, so validation is skipped") == 1
    assert "validation at iteration" not in output
    rows, validations = jobs.read_metrics(tmp_path / "run")
    assert len(rows) == 2 and not validations


def _loss_tokens(row: dict[str, Any]) -> int:
    return sum(source["loss_tokens"] for source in row["sources"].values())
