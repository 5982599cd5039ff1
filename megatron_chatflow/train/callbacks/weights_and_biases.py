"""Logs a run to Weights & Biases if ``--wandb-project`` is given.

The ``wandb`` package sends the scalars, or stores them with ``WANDB_MODE=offline``. A resumed run
continues the same W&B run, whose id is stored in the run's folder.
"""

import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_chatflow.config import RunConfig
from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.files import write_atomically
from megatron_chatflow.train.callbacks import Callback
from megatron_chatflow.train.report import IterationReport, choice_scalars, validation_scalars

ID_FILE = "wandb_id.txt"


class WeightsAndBiases(Callback):
    """Logs scalars under the same names as TensorBoard, with the iteration as their step."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Starts or continues the W&B run.

        Args:
            config: Configuration of the run, which is sent as well.
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
        # wandb's own steps must increase, but a run that was rolled back logs an iteration twice.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def on_log(self, report: IterationReport) -> None:
        """Logs the interval's scalars."""
        self._run.log({"iteration": report.iteration, **report.scalars()})

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Logs each source's validation loss."""
        self._run.log({"iteration": iteration, **validation_scalars(losses)})

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Logs the accuracies of each question file."""
        self._run.log({"iteration": iteration, **choice_scalars(results)})

    def close(self) -> None:
        """Finishes the W&B run."""
        self._run.finish()


def _id(folder: Path) -> str:
    """Returns the run's W&B id, a new one for a new run."""
    path = folder / ID_FILE
    if path.exists():
        known = path.read_text(encoding="utf-8", errors="replace").strip()
        if known.isalnum() and len(known) <= 64:
            return known
    fresh = uuid.uuid4().hex
    write_atomically(path, fresh + "\n")
    return fresh
