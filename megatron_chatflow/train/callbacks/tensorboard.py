"""Writes TensorBoard scalars to ``tensorboard/`` in the run's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.callbacks import Callback
from megatron_chatflow.train.report import IterationReport, choice_scalars, validation_scalars


class TensorBoard(Callback):
    """Writes scalars under the names that Megatron uses where Megatron has them."""

    def __init__(self, folder: Path, *, iteration: int) -> None:
        """Opens the event file and hides events after ``iteration``, where the run resumes."""
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def on_log(self, report: IterationReport) -> None:
        """Writes the interval's scalars."""
        self._write(report.scalars(), report.iteration)

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Writes each source's validation loss."""
        self._write(validation_scalars(losses), iteration)

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the accuracies of each question file."""
        self._write(choice_scalars(results), iteration)

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()

    def _write(self, scalars: Mapping[str, float], iteration: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
