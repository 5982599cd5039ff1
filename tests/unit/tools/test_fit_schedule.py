"""Tests ``tools/fit_schedule.py`` on runs whose metrics are made up."""

import json
import math
import random
from pathlib import Path

import pytest
import yaml
from tiny_run import TinyRun
from tool_calls import call_tool

from megatron_chatflow.blend.fit import read_runs
from megatron_chatflow.blend.schedule import Schedule

ITERATIONS, BATCH_TOKENS = 40, 8 * 64
TOKENS = ITERATIONS * BATCH_TOKENS


def write_run(folder: Path, number: int, ends: tuple[float, float] | None = None) -> Path:
    """Writes metrics whose loss on ``second`` is lower the later it was read.

    ``ends`` are the shares of ``second`` at both ends; they are random by default.
    """
    rng = random.Random(number)
    begin, end = ends or (rng.random(), rng.random())
    lines, drawn, recent = [], 0.0, 0.0
    for n in range(1, ITERATIONS + 1):
        share = begin + (end - begin) * n / ITERATIONS
        drawn += share * BATCH_TOKENS
        recent = 0.9 * recent + share * BATCH_TOKENS
        sources = {"first": n * BATCH_TOKENS - int(drawn), "second": int(drawn)}
        lines.append(
            {
                "iteration": n,
                "lm_loss": 2.0,
                "learning_rate": 1e-3,
                "sources": {name: {"tokens": count} for name, count in sources.items()},
            }
        )
    losses = {"first": 2.0 + 1e-5 * drawn, "second": 3.0 * math.exp(-0.1 * recent / BATCH_TOKENS)}
    values = {name: {"loss": 1.0, "bits_per_byte": value} for name, value in losses.items()}
    lines.append({"iteration": ITERATIONS, "validation": values})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"run_{number}", number) for number in range(16)]


def test_a_schedule_is_proposed_for_the_goal(
    runs: list[Path], tiny_run: TinyRun, tmp_path: Path
) -> None:
    output, path = tmp_path / "schedule.yaml", tmp_path / "run.yaml"
    config = yaml.safe_load(tiny_run.config.read_text())
    config["train"]["train_iters"] = ITERATIONS
    config["optimizer"] = {"lr": 1e-3, "lr_decay_style": "constant"}
    path.write_text(yaml.safe_dump(config))
    done = call_tool(
        *("fit_schedule.py", *runs, "--config", path, "--goal", "second=1"),
        *("--max-tokens", f"second={TOKENS // 2}", "--output", output),
    )
    assert done.returncode == 0, done.stderr
    assert "16 runs" in done.stdout and f"put it into {path}" in done.stdout
    assert "note:" not in done.stdout
    # The best run is one that keeps the bound, and the proposal is far better.
    records = [record for path in runs for record in read_runs(path)]
    allowed = [
        record
        for record in records
        if sum(part["tokens"]["second"] for part in record.parts) <= TOKENS // 2
    ]
    best = min(allowed, key=lambda record: record.losses["second"])
    measured = f"the best run, {best.name}, has {math.log(best.losses['second']):.4f}\n"
    assert measured in done.stdout
    # Without the bound, a run has almost only the second source, and is as good as anything.
    done = call_tool("fit_schedule.py", *runs, *runs[:2], "--config", path, "--goal", "second=1")
    assert "18 runs, 16 different ones; losses" in done.stdout
    best = min(records, key=lambda record: record.losses["second"])
    measured = f"the best run, {best.name}, has {math.log(best.losses['second']):.4f}"
    assert f"{measured}, so the proposal is not known to be better\n" in done.stdout
    block = yaml.safe_load(output.read_text())["data"]["schedule"]
    schedule = Schedule.from_dict(block, ["first", "second"], 8)
    shares = [schedule.weights(8 * t)[1] / 2**32 for t in range(ITERATIONS)]
    assert sum(shares) / ITERATIONS < 0.53  # the bound
    assert shares[-1] > 0.8  # and what there is comes late
    assert sum(shares[:20]) < sum(shares[20:])
    printed = call_tool(
        "fit_schedule.py", *runs, "--config", tiny_run.config, "--goal", "second=1"
    ).stdout
    assert "schedule:" in printed and "tokens: first" in printed
    assert "goal, the mean of log losses: predicted" in printed and "best run" not in printed
    assert "note: the highest learning rate is 3 times that of the runs" in printed


def test_what_weakens_a_fit_is_said(runs: list[Path], tiny_run: TinyRun, tmp_path: Path) -> None:
    alone = write_run(tmp_path / "alone", 1, ends=(1.0, 1.0))
    metrics = alone / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"bits_per_byte": 2.', '"bits_per_byte": 9.'))
    goal = ("--config", tiny_run.config, "--goal", "second=1")
    expected = call_tool("fit_schedule.py", *runs, *goal).stdout
    printed = call_tool("fit_schedule.py", *runs, alone, *goal).stdout
    assert (
        printed == f"note: {alone}: reads a single source, so it is left out of the fit\n{expected}"
    )
    # An outlier that nothing explains: each of the others is predicted from it.
    strange = write_run(tmp_path / "strange", 99)
    metrics = strange / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"bits_per_byte": 2.', '"bits_per_byte": 9.'))
    printed = call_tool("fit_schedule.py", *runs, strange, *goal).stdout
    assert "note: the fit predicts first no better than the mean of the runs does" in printed


def test_runs_are_read_in_parts(runs: list[Path], tmp_path: Path) -> None:
    [record] = read_runs(runs[0])
    assert len(record.parts) == ITERATIONS and record.read == {"first", "second"}
    assert sum(sum(part["tokens"].values()) for part in record.parts) == TOKENS
    study = {
        f"{model}/x": {
            "model": model,
            "trajectory": record.parts,
            "final": record.losses,
        }
        for model in ("a", "b")
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"runs": study}))
    [again] = read_runs(path, "b")
    assert (again.parts, again.losses) == (record.parts, record.losses)


def test_mistakes_are_one_line(runs: list[Path], tiny_run: TinyRun, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    untold = tmp_path / "untold"
    untold.mkdir()
    (untold / "metrics.jsonl").write_text('{"lm_loss": 1}\n')
    alone = write_run(tmp_path / "alone", 1, ends=(0.0, 0.0))
    both = tmp_path / "results.json"
    both.write_text('{"runs": {"x": {"model": "a"}, "y": {"model": "b"}}}')
    good = ["--goal", "second=1"]
    for arguments, message in (
        ([alone, *good], "no run reads more than one source; give runs of different mixtures"),
        ([*runs[:4], *good], "4 runs cannot determine a fit with 2 sources; give at least 12"),
        ([empty, *good], "metrics.jsonl: cannot be read (No such file or directory)"),
        ([untold, *good], "is not of a finished run (KeyError('sources'))"),
        ([both, *good], "name one of its models with --model: a, b"),
        ([*runs, "--goal", "second"], "--goal: 'second' is not SOURCE=NUMBER"),
        ([*runs, "--goal", "second=-1"], "--goal: 'second=-1' must have a number of at least 0"),
        ([*runs, "--goal", "third=1"], "goal: third was not evaluated; known: first, second"),
        ([*runs, *good, "--max-tokens", "third=5K"], "the source third is not one that both"),
        ([*runs, *good, "--model", "a"], "--model: chooses among the models of a results.json"),
        ([*runs, *good, "--knots", "0"], "--knots: must be at least 1, not 0"),
        ([*runs, *good, "--knots", "41"], "41 knots: a run has 10 parts; use at most as many"),
        ([*runs, *good, "--caution", "nan"], "--caution: must be from 0 to 100, not nan"),
    ):
        done = call_tool("fit_schedule.py", "--config", tiny_run.config, *arguments)
        assert done.returncode == 2
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
