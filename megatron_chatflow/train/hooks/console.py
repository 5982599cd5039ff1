"""The log line of an iteration in Megatron's form, and a progress bar on a terminal.

In: reports. Out: lines on standard output.
"""

import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tqdm import tqdm

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.report import IterationReport


def iteration_line(report: IterationReport, now: datetime) -> str:
    """One line, Megatron's fields first."""
    mfu = "n/a" if report.mfu is None else f"{100 * report.mfu:.1f}%"
    mixture = " ".join(
        f"{name} {100 * source.realised:.0f}%/{100 * source.weight:.0f}%"
        for name, source in report.sources.items()
    )
    width = len(str(report.num_iterations))
    fields = [
        f"[{now:%Y-%m-%d %H:%M:%S}] iteration {report.iteration:{width}d}/{report.num_iterations}",
        f"consumed samples: {report.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {1000 * report.seconds:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {report.tflops_per_gpu:.3f}",
        f"learning rate: {report.learning_rate:.6E}",
        f"global batch size: {report.global_batch_size:5d}",
        f"lm loss: {report.lm_loss:.6E}",
        f"grad norm: {report.grad_norm:.3f}",
        f"tokens/s: {report.tokens_per_second:.0f}",
        f"MFU: {mfu}",
        f"mixture (realised/planned): {mixture}",
    ]
    return " | ".join(fields) + " |"


def validation_line(iteration: int, losses: Mapping[str, SourceLoss]) -> str:
    """One line with each source's validation loss and bits per byte."""
    parts = [
        f"{name}: {loss.loss:.4f} ({loss.bits_per_byte:.4f} bits/byte)"
        for name, loss in losses.items()
    ]
    return f"validation at iteration {iteration} | " + " | ".join(parts)


class Console:
    """Prints reports; on a terminal a bar shows how far the run is."""

    def __init__(self, *, num_iterations: int, iteration: int) -> None:
        """Starts the bar at ``iteration`` of ``num_iterations``; none where output is a file."""
        self._bar = tqdm(
            total=num_iterations,
            initial=iteration,
            unit="it",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def on_iteration(self, report: IterationReport) -> None:
        """Prints the line and moves the bar."""
        self._print(iteration_line(report, datetime.now()))
        self._bar.update(report.iteration - self._bar.n)

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Prints the line."""
        self._print(validation_line(iteration, losses))

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Prints the line."""
        parts = [
            f"{name}: {result['accuracy']:.4f} of {result['num_questions']} (chance "
            f"{result['chance']:.4f})"
            for name, result in results.items()
        ]
        self._print(f"choice questions at iteration {iteration} | " + " | ".join(parts))

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()

    @staticmethod
    def _print(line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
