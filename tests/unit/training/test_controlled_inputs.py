"""Tests what a run with a controller checks before it starts, and what a resume may change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import TinyRun, write_checkpoint_state

from megatron_chatflow.blend.adaptive import AdaptiveBlend
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
