"""TensorBoard scalars of a run, in ``tensorboard/`` of its folder.

In: reports. Out: event files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.report import IterationReport, choice_scalars, validation_scalars


class TensorBoard:
    """Writes scalars under the names that Megatron uses where Megatron has them."""

    def __init__(self, folder: Path, *, iteration: int) -> None:
        """Opens the events of a run that stands at ``iteration``; later ones are hidden."""
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def on_iterations(self, reports: Sequence[IterationReport]) -> None:
        """Does nothing: only whole intervals are shown."""

    def on_log(self, report: IterationReport) -> None:
        """Writes the interval's scalars."""
        self._write(report.scalars(), report.iteration)

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Writes each source's validation."""
        self._write(validation_scalars(losses), iteration)

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes each file's accuracies."""
        self._write(choice_scalars(results), iteration)

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()

    def _write(self, scalars: Mapping[str, float], iteration: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
