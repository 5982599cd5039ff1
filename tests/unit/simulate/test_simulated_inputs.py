"""Tests the configuration that a simulation runs instead of the user's."""

from pathlib import Path

import yaml
from tiny_run import TinyRun

from megatron_chatflow.config import RunConfig
from megatron_chatflow.simulate.inputs import prepare
from megatron_chatflow.training.inputs import open_inputs


def test_everything_is_trained_with_fixed_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    """New rows and decisions need the weights and the run that a simulation leaves out."""
    values = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
    values["train"]["stages"] = [{"at": 0, "trainable": ["new_rows"]}]
    controller = {"name": "replay", "run": str(tmp_path / "elsewhere")}
    values["data"]["schedule"]["controller"] = controller
    values["data"]["schedule"]["knots"] = values["data"]["schedule"]["knots"][:1]
    simulated = prepare(RunConfig.from_dict(values), 2, tmp_path)
    assert open_inputs(simulated.config).stages.is_trivial
    assert [note.partition(":")[0] for note in simulated.notes[1:3]] == [
        "trains everything",
        "has the weights of the knot",
    ]
    plain = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
    assert len(prepare(RunConfig.from_dict(plain), 2, tmp_path).notes) == len(simulated.notes) - 2
