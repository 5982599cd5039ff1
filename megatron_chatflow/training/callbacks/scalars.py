"""Writes the scalars of every report to TensorBoard and to Weights & Biases."""

import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_chatflow.config import RunConfig
from megatron_chatflow.evaluation.probes import headline_numbers
from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.files import write_atomically
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.report import IterationReport

ID_FILE = "wandb_id.txt"


class ScalarLogger(Callback):
    """Passes the scalars of every report to `write`, under Megatron's names where it has them."""

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Writes scalars by name."""
        raise NotImplementedError

    def on_log(self, report: IterationReport) -> None:
        """Writes the interval's scalars."""
        self.write(report.scalars(), report.iteration)

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Writes each source's validation loss."""
        scalars = {}
        for name, loss in losses.items():
            scalars[f"validation loss/{name}"] = loss.loss
            scalars[f"validation bits per byte/{name}"] = loss.bits_per_byte
        self.write(scalars, iteration)

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the accuracies of each question file."""
        scalars = {}
        for name, result in results.items():
            for key in ("accuracy", "accuracy_per_byte"):
                if result.get(key) is not None:
                    scalars[f"choice {key.replace('_', ' ')}/{name}"] = result[key]
        self.write(scalars, iteration)

    def on_probes(
        self, iteration: int, results: Mapping[str, Mapping[str, float]], seconds: float
    ) -> None:
        """Writes each probe's numbers and their time, without standard errors and counts."""
        scalars = {
            f"probe {name.replace('_', ' ')}/{label}": value
            for label, result in results.items()
            for name, value in headline_numbers(result).items()
        }
        self.write({**scalars, "probe seconds": seconds}, iteration)


class TensorBoard(ScalarLogger):
    """Writes TensorBoard events to ``tensorboard/`` in the run's folder."""

    def __init__(self, folder: Path, *, iteration: int) -> None:
        """Opens the event file and hides events after ``iteration``, where the run resumes."""
        from torch.utils.tensorboard.writer import SummaryWriter  # takes seconds to import

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Adds events."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()


class WeightsAndBiases(ScalarLogger):
    """Logs to Weights & Biases if ``--wandb-project`` is given.

    The ``wandb`` package sends the scalars, or stores them with ``WANDB_MODE=offline``. A resumed
    run continues the same W&B run, whose id is stored in the run's folder.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        """Starts or continues the W&B run."""
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

    def write(self, scalars: Mapping[str, float], iteration: int) -> None:
        """Sends the scalars with the iteration as their step."""
        self._run.log({"iteration": iteration, **scalars})

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
