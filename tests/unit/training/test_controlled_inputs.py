"""Tests what a run with a controller checks before it starts, and what a resume may change."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import TinyRun, write_checkpoint_state
from tool_calls import call_tool

from megatron_chatflow.blend.adaptive import AdaptiveBlend
from megatron_chatflow.blend.controllers import controlled_blend
from megatron_chatflow.checkpoint.decisions import read_decisions
from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.config import RunConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.training.dry_run import dry_run
from megatron_chatflow.training.inputs import open_inputs

HORIZON = 32


def config_of(tiny_run: TinyRun, folder: Path | None = None, **changes: Any) -> RunConfig:
    """Returns the configuration of a controlled run; keys of ``data`` are dotted with ``__``."""
    values = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
    values["data"]["schedule"] = {
        "knots": [{"at": 0, "weights": {"first": 3, "second": 1}}],
        "controller": {"name": "odm", "horizon": HORIZON},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[key] = value
    if folder is not None:
        values["checkpoint"] = {"load": str(folder), "save": str(folder)}
    return RunConfig.from_dict(values)


CONTROLLER = "data__schedule__controller"


def test_a_dry_run_describes_the_controller(tiny_run: TinyRun) -> None:
    text = dry_run(config_of(tiny_run, **{f"{CONTROLLER}__floor": 0.05}))
    assert "odm decides the weights of first, second every 32 samples, 32 samples ahead" in text
    assert "first 0.05 to 1, second 0.05 to 1" in text
    row = next(line for line in text.splitlines() if line.startswith("0 to 64"))
    assert row.split() == ["0", "to", "64", "75.0000%", "25.0000%"]


def test_limits_that_cannot_hold_are_refused(tiny_run: TinyRun) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        (
            {f"{CONTROLLER}__horizon": 7},
            "data.schedule.controller.horizon: 7 samples are less than one global batch of 8",
        ),
        (
            {
                "data__sources__first__max_epochs": 0.1,
                "data__sources__second__max_epochs": 0.1,
            },
            "data.sources: max_epochs allow ",
        ),
        (
            {
                "data__holdout_every": None,
                CONTROLLER: {
                    "name": "shearing",
                    "horizon": HORIZON,
                    "reference_loss": {"first": 2.0, "second": 2.0},
                },
            },
            "data.schedule.controller: shearing needs the validation loss of every source, and "
            "first, second has no held-out samples",
        ),
    ]
    for changes, message in refused:
        with pytest.raises(UserError) as caught:
            open_inputs(config_of(tiny_run, **changes))
        assert str(caught.value).startswith(message)


def test_what_a_resume_may_change(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = config_of(tiny_run, tmp_path)
    inputs = open_inputs(config)
    assert isinstance(inputs.blend, AdaptiveBlend) and inputs.control is not None
    state = {**inputs.blend.state_at(40), "controller": inputs.control.state()}
    write_checkpoint_state(config, tmp_path, blend=state)

    resumed = open_inputs(config)
    assert resumed.blend.counts(40).sum() == 40
    assert resumed.blend.take(40, 64)[0].tolist() == inputs.blend.take(40, 64)[0].tolist()
    assert not resumed.changes and resumed.control is not None

    changed = open_inputs(config_of(tiny_run, tmp_path, **{f"{CONTROLLER}__cap": 0.9}))
    assert [row["consequence"] for row in changed.changes] == ["decisions differ from sample 64 on"]
    assert changed.control is not None and changed.control.is_due(40)

    values = config.to_dict()
    del values["data"]["schedule"]["controller"]
    plain = RunConfig.from_dict(values)
    added = {**values["data"]["sources"], "third": values["data"]["sources"]["first"]}
    refused: list[tuple[RunConfig, str]] = [
        (plain, "data.schedule.controller: is missing, but the checkpoint's run has the contro"),
        (
            config_of(tiny_run, tmp_path, **{f"{CONTROLLER}__horizon": 64}),
            "data.schedule.controller.horizon: 64 samples here and 32 in the checkpoint",
        ),
        (
            config_of(
                tiny_run,
                tmp_path,
                data__schedule__knots=[{"at": 0, "weights": {"first": 1, "second": 1}}],
            ),
            "data.schedule.knots: the weights of a run with a controller cannot be edited",
        ),
        (
            config_of(tiny_run, tmp_path, data__sources=added),
            "data.sources: a run with a controller keeps its sources and their order",
        ),
        (
            config_of(tiny_run, tmp_path, **{CONTROLLER: {"name": "replay", "run": str(tmp_path)}}),
            "data.schedule.controller.name: replay here and odm in the checkpoint",
        ),
    ]
    for other, message in refused:
        with pytest.raises(UserError) as caught:
            open_inputs(other)
        assert str(caught.value).startswith(message)

    # The weights of such a run may start another one, also one that replays its decisions.
    fresh = replace(plain.checkpoint, finetune=True, save=None)
    assert open_inputs(replace(plain, checkpoint=fresh)).resumed is None
    replay = config_of(tiny_run, **{CONTROLLER: {"name": "replay", "run": str(tmp_path)}})
    replayed = open_inputs(replay)
    assert replayed.control is None
    assert replayed.blend.take(0, 64)[0].tolist() == inputs.blend.take(0, 64)[0].tolist()
    assert "replays recorded decisions" in dry_run(replay)


def test_a_run_cannot_get_a_controller_when_it_resumes(tiny_run: TinyRun, tmp_path: Path) -> None:
    values = config_of(tiny_run, tmp_path).to_dict()
    del values["data"]["schedule"]["controller"]
    plain = RunConfig.from_dict(values)
    write_checkpoint_state(plain, tmp_path)
    with pytest.raises(UserError, match="the checkpoint's run has none, and a run cannot get one"):
        open_inputs(config_of(tiny_run, tmp_path))


@pytest.fixture
def run(tiny_run: TinyRun, tmp_path: Path) -> Path:
    """Returns the folder of a controlled run with a checkpoint after 40 samples."""
    return write_run(tiny_run, tmp_path / "run")


def write_run(tiny_run: TinyRun, folder: Path, **changes: Any) -> Path:
    config = config_of(tiny_run, folder, **changes)
    inputs = open_inputs(config)
    assert isinstance(inputs.blend, AdaptiveBlend)
    found = {"name": "replay"} if inputs.control is None else inputs.control.state()
    write_checkpoint_state(config, folder, blend={**inputs.blend.state_at(40), "controller": found})
    return folder


def test_a_replay_takes_any_batch_size(tiny_run: TinyRun, run: Path, tmp_path: Path) -> None:
    """Nothing is decided, so the recorded horizon may be shorter than a batch."""
    changes = {
        CONTROLLER: {"name": "replay", "run": str(run)},
        "train__global_batch_size": 2 * HORIZON,
    }
    folder = write_run(tiny_run, tmp_path / "replay", **changes)
    resumed = open_inputs(config_of(tiny_run, folder, **changes))
    assert resumed.resumed is not None and not resumed.changes
    # Whatever changes in the schedule, a replay has the same decisions.
    knot = {"at": 0, "weights": {"first": 0.75, "second": 0.25}, "objective_weights": {"first": 3}}
    moved = run.rename(tmp_path / "moved")
    changes[CONTROLLER]["run"] = str(moved)
    resumed = open_inputs(config_of(tiny_run, folder, **changes, data__schedule__knots=[knot]))
    assert [row["consequence"] for row in resumed.changes] == [
        "the same decisions; sources count otherwise in the objective from now on"
    ]


def test_objective_weights_do_not_change_decisions(tiny_run: TinyRun, run: Path) -> None:
    knot = {"at": 0, "weights": {"first": 3, "second": 1}, "objective_weights": {"first": 3}}
    resumed = open_inputs(config_of(tiny_run, run, data__schedule__knots=[knot]))
    assert [row["consequence"] for row in resumed.changes] == [
        "the same decisions; sources count otherwise in the objective from now on"
    ]


def test_decided_weights_keep_max_epochs(tiny_run: TinyRun, run: Path) -> None:
    """64 samples are decided, 48 of them of the first source; a replay has 60 of the run's 80."""
    size = open_inputs(config_of(tiny_run)).sources[0].num_samples
    replay = {CONTROLLER: {"name": "replay", "run": str(run)}}
    limit = "data__sources__first__max_epochs"

    def start(num_samples: float, folder: Path | None = None, **changes: Any) -> None:
        open_inputs(config_of(tiny_run, folder, **{limit: (num_samples + 0.5) / size}, **changes))

    start(48, run)
    with pytest.raises(UserError, match=r"first.max_epochs: allows 47 samples, .* 64 draw 48.0; r"):
        start(47, run)
    start(60, **replay)
    with pytest.raises(UserError, match=r"first.max_epochs: allows 59 samples, .* 80 draw 60.0; r"):
        start(59, **replay)


def test_a_replay_needs_the_same_sources(tiny_run: TinyRun, run: Path) -> None:
    values = config_of(tiny_run).to_dict()["data"]["sources"]
    swapped = {name: values[name] for name in ("second", "first")}
    replay = {CONTROLLER: {"name": "replay", "run": str(run)}}
    config = config_of(tiny_run, data__sources=swapped, **replay)
    with pytest.raises(UserError, match="has the sources first, second, and a replay needs the sa"):
        controlled_blend(config, decisions=read_decisions(run))
    # The knot has no effect, as the recorded weights hold from the first sample on.
    knots = [{"at": 0, "weights": {"first": 1, "second": 1}}]
    blend = open_inputs(config_of(tiny_run, data__schedule__knots=knots, **replay)).blend
    assert blend.planned_shares(0).tolist() == [0.75, 0.25]


def test_a_damaged_state_of_a_controller_is_refused(tiny_run: TinyRun, run: Path) -> None:
    path = iteration_folder(run, 5) / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    for key, value in (("controller", [1]), ("sources", 3), ("horizon", "x"), ("segments", [])):
        blend = {**state["blend"], key: value}
        path.write_text(json.dumps({**state, "blend": blend}), encoding="utf-8")
        with pytest.raises(UserError, match=f"blend state: {key}: .* damaged; load another"):
            open_inputs(config_of(tiny_run, run))


def test_the_fixed_schedule_keeps_weights_in_the_objective(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    knot = {"at": 0, "weights": {"first": 3, "second": 1}, "objective_weights": {"second": 2.5}}
    run = write_run(tiny_run, tmp_path / "run", data__schedule__knots=[knot])
    done = call_tool("plan_blend.py", "--from-run", run)
    assert done.returncode == 0, done.stderr
    block = yaml.safe_load(done.stdout)["data"]["schedule"]
    assert [one["objective_weights"] for one in block["knots"]] == [{"second": 2.5}]
    # The block is valid as it is.
    config = config_of(tiny_run, data__schedule=block)
    assert open_inputs(config).objective.at(0)[1] == 2.5
