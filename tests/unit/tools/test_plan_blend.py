"""Tests the command plan, called in this process."""

import json
from pathlib import Path

import pytest
import yaml
from tool_calls import call_tool

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.edits import run_schedule
from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.config import load_config


def run(*arguments: object) -> tuple[int, str, str]:
    done = call_tool("plan_blend.py", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_without_data_the_epochs_are_left_out(tiny_run, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    for source in values["data"]["sources"].values():
        source["paths"] = [str(tmp_path / "not_there")]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    status, table, errors = run("--config", config)
    assert status == 0
    assert "not showing epochs: " in errors and "realised" in table


def test_mistakes_are_one_line(tiny_run, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    name = next(iter(values["data"]["sources"]))
    values["data"]["sources"][name]["max_epochs"] = 0.001
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    status, _, errors = run("--config", config)
    assert status == 2
    assert errors.startswith(f"error: data.sources.{name}.max_epochs: 0.001 epochs of ")
    assert "at iteration 1 (sample " in errors and errors.count("\n") == 1
    status, _, errors = run("--config", tmp_path / "missing.yaml")
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1


def write_checkpoint(config: Path, folder: Path, iteration: int) -> int:
    """Writes the state saved after this many iterations. Returns the number of consumed samples."""
    settings = load_config(config)
    blend = Blend(run_schedule(settings, list(settings.data.sources)))
    samples = iteration * settings.train.global_batch_size
    state = {
        "iteration": iteration,
        "consumed_samples": samples,
        "blend": blend.state_at(samples),
        "schedule": blend.schedule.to_dict(),
    }
    checkpoint = iteration_folder(folder, iteration)
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state))
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    return samples


def test_at_prints_the_knot_to_paste(tiny_run, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    batch, seq_length = values["train"]["global_batch_size"], values["data"]["seq_length"]
    knots = values["data"]["schedule"]["knots"]
    values["data"]["schedule"]["unit"] = "tokens"
    for knot in knots:
        knot["at"] *= seq_length
    knots[-1]["ramp"] = "cosine"
    values["checkpoint"] = {"load": str(tmp_path / "run")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    status, _, errors = run("--config", config, "--at", "now")
    assert status == 2 and errors.startswith("error: --at: now needs a run with a checkpoint")
    samples = write_checkpoint(config, tmp_path / "run", 3)
    status, shown, errors = run("--config", config, "--at", "now")
    assert status == 0, errors
    knot = f"{{at: {samples * seq_length}, weights: as_planned}}"
    assert f"      - {knot}\n" in shown
    assert f"weights at sample {samples} ({samples * seq_length:,} tokens): first 0." in shown
    status, later, _ = run("--config", config, "--at", samples + batch)
    assert status == 0 and f"at: {(samples + batch) * seq_length}, weights: as_planned" in later
    assert run("--config", config, "--at", "soon")[0] == 2
    # The printed knot, followed by an edit.
    edit = {"at": 100 * seq_length, "weights": {"second": 1}, "ramp": "linear"}
    values["data"]["schedule"]["knots"] = [yaml.safe_load(knot), edit]
    config.write_text(yaml.safe_dump(values))
    status, table, errors = run("--config", config, "--train-iters", 20)
    assert status == 0, errors
    assert f"schedule edited at sample {samples}; " in table
    assert "phase (tokens)" in table and table.startswith(f"{20 * batch * seq_length:,} tokens (")
    assert f"0 to {samples * seq_length:,} " in table
    # Without a checkpoint, as_planned has no weights to refer to.
    status, _, errors = run("--config", config, "--load", tmp_path / "another")
    assert status == 2 and "knots[0].weights: as_planned takes the weights from" in errors


@pytest.mark.parametrize("ramp", ["step", "linear"])
def test_the_knot_in_numbers_changes_nothing(tiny_run, tmp_path: Path, ramp: str) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    values["data"]["schedule"]["knots"][-1] |= {"ramp": ramp, "at": 1000}
    values["checkpoint"] = {"load": str(tmp_path / "run")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    samples = write_checkpoint(config, tmp_path / "run", 31)
    status, shown, errors = run("--config", config, "--at", "now")
    assert status == 0, errors
    hint, numbers = shown.splitlines()[-2:]
    assert hint == "the same knot with numeric weights (keep the knots before it):"
    first = values["data"]["schedule"]["knots"][0]
    tail = {"at": samples + 100, "weights": {"second": 1}}
    values["data"]["schedule"]["knots"] = [first, *yaml.safe_load(numbers), tail]
    config.write_text(yaml.safe_dump(values))
    status, table, errors = run("--config", config)
    assert status == 0, errors
    assert f"schedule edited at sample {samples}" in table


def test_a_cycle_that_begins_after_the_checkpoint_is_refused(tiny_run, tmp_path: Path) -> None:
    write_checkpoint(tiny_run.config, tmp_path / "run", 2)
    resumed = ["--config", tiny_run.config, "--load", tmp_path / "run"]
    status, _, errors = run(*resumed, "--lr-cycle-start-iters", 3)
    assert status == 2 and "the cycle begins after 3 iterations" in errors
    assert run(*resumed, "--lr-cycle-start-iters", 2)[0] == 0


def test_weights_in_the_objective_are_shown(tiny_run, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    values["data"]["schedule"]["knots"][1]["objective_weights"] = {"second": 3}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    status, table, _ = run("--config", config)
    assert status == 0
    rows = table.partition("weights in the objective:\n")[2].splitlines()[:5]
    assert [row.split() for row in rows if row[:1].isdigit()][:3] == [
        ["0", "1", "1"],
        ["64", "1", "3"],
        ["79", "1", "3"],
    ]
    status, shown, _ = run("--config", config, "--at", 32)
    assert status == 0
    knot = yaml.safe_load(shown.partition("numeric weights:")[2].strip().splitlines()[0])[0]
    assert knot["objective_weights"] == {"first": 1, "second": 2}


@pytest.mark.parametrize("ramp", ["linear", "cosine"])
def test_weights_in_the_objective_that_a_knot_changes_are_warned_of(
    tiny_run, tmp_path: Path, ramp: str
) -> None:
    """The objective has no recorded weights, so the printed knot is a knot like any other."""
    values = yaml.safe_load(tiny_run.config.read_text())
    knots = values["data"]["schedule"]["knots"]
    knots[-1] |= {"ramp": ramp, "at": 1000, "objective_weights": {"second": 3}}
    values["checkpoint"] = {"load": str(tmp_path / "run")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    samples = write_checkpoint(config, tmp_path / "run", 31)
    restarts, begins_early = "starts another one to the next knot", f"from sample {samples} on alre"
    now, later = (run("--config", config, "--at", at)[1] for at in ("now", samples + 100))
    assert (restarts in now) == (restarts in later) == (ramp == "cosine")
    assert begins_early not in now and begins_early in later
    at_knot = run("--config", config, "--at", 1000)[1]
    assert restarts not in at_knot and begins_early in at_knot
