"""A run at Weights & Biases; only where ``--wandb-project`` asks for it.

In: reports. Out: what the ``wandb`` package sends, or keeps with ``WANDB_MODE=offline``. A run that
is taken up again goes on there as the same one, by the id in its folder.
"""

import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_chatflow.config import RunConfig
from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.files import write_atomically
from megatron_chatflow.train.report import IterationReport, choice_scalars, validation_scalars

ID_FILE = "wandb_id.txt"


class WeightsAndBiases:
    """Sends scalars under the names that TensorBoard has; iterations are the axis."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Begins the run there, or goes on with it.

        Args:
            config: The run's, which is sent as well.
            folder: The run's folder.
        """
        settings = config.logging
        wandb: Any = import_module("wandb")
        self._run = wandb.init(
            project=settings.wandb_project,
            name=settings.wandb_exp_name or folder.resolve().name,
            entity=settings.wandb_entity,
            dir=str(settings.wandb_save_dir or folder),
            id=_id(folder),
            resume="allow",
            config=config.to_dict(),
        )
        # Steps of wandb's own only rise; a run that was rolled back logs an iteration twice.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def on_iterations(self, reports: Sequence[IterationReport]) -> None:
        """Does nothing: only whole intervals are shown."""

    def on_log(self, report: IterationReport) -> None:
        """Sends the interval's means."""
        self._run.log({"iteration": report.iteration, **report.scalars()})

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Sends the validation."""
        self._run.log({"iteration": iteration, **validation_scalars(losses)})

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Sends the accuracies."""
        self._run.log({"iteration": iteration, **choice_scalars(results)})

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


def _id(folder: Path) -> str:
    """The id under which the run is known there; a new one for a new run."""
    path = folder / ID_FILE
    if path.exists():
        known = path.read_text(encoding="utf-8", errors="replace").strip()
        if known.isalnum() and len(known) <= 64:
            return known
    fresh = uuid.uuid4().hex
    write_atomically(path, fresh + "\n")
    return fresh
