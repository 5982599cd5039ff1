"""TensorBoard scalars of a run, in ``tensorboard/`` of its folder.

In: reports. Out: event files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard.writer import SummaryWriter

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.report import IterationReport


class TensorBoard:
    """Writes scalars under the names that Megatron uses where Megatron has them."""

    def __init__(self, folder: Path, *, iteration: int) -> None:
        """Opens the events of a run that stands at ``iteration``; later ones are hidden."""
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)

    def on_iteration(self, report: IterationReport) -> None:
        """Writes the iteration's scalars."""
        scalars: dict[str, float | None] = {
            "lm loss": report.lm_loss,
            "learning-rate": report.learning_rate,
            "grad-norm": report.grad_norm,
            "iteration-time": report.seconds,
            "tokens-per-second": report.tokens_per_second,
            "throughput": report.tflops_per_gpu,
            "mfu": report.mfu,
        }
        for name, source in report.sources.items():
            scalars[f"loss/{name}"] = source.loss
            scalars[f"weight/{name}"] = source.weight
            scalars[f"realised/{name}"] = source.realised
            scalars[f"epochs/{name}"] = source.epochs
        self._write(scalars, report.iteration)

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Writes each source's validation."""
        scalars: dict[str, float | None] = {}
        for name, loss in losses.items():
            scalars[f"validation loss/{name}"] = loss.loss
            scalars[f"validation bits per byte/{name}"] = loss.bits_per_byte
        self._write(scalars, iteration)

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes each file's accuracies."""
        scalars: dict[str, float | None] = {}
        for name, result in results.items():
            scalars[f"choice accuracy/{name}"] = result["accuracy"]
            scalars[f"choice accuracy per byte/{name}"] = result.get("accuracy_per_byte")
        self._write(scalars, iteration)

    def close(self) -> None:
        """Flushes the events."""
        self._writer.close()

    def _write(self, scalars: Mapping[str, float | None], iteration: int) -> None:
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, iteration)
