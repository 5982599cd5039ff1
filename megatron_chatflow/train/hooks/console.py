"""The log lines of an iteration, the first in Megatron's form, and a progress bar on a terminal.

In: reports. Out: lines on standard output.
"""

import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tqdm import tqdm

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.report import IterationReport
from megatron_chatflow.train.straggler import StragglerReport


def iteration_line(report: IterationReport, now: datetime) -> str:
    """One line, Megatron's fields first."""
    mfu = "n/a"
    if report.mfu is not None and report.mfu_causal is not None:
        mfu = f"{100 * report.mfu:.1f}% ({100 * report.mfu_causal:.1f}% causal)"
    wait = report.data_seconds / report.seconds if report.seconds else 0.0
    width = len(str(report.num_iterations))
    fields = [
        f"[{now:%Y-%m-%d %H:%M:%S}] iteration {report.iteration:{width}d}/{report.num_iterations}",
        f"consumed samples: {report.consumed_samples:12d}",
        f"consumed tokens: {report.consumed_tokens:d}",
        f"elapsed time per iteration (ms): {1000 * report.seconds:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {report.tflops_per_gpu:.3f}",
        f"learning rate: {report.learning_rate:.6E}",
        f"global batch size: {report.global_batch_size:5d}",
        "no loss tokens" if report.lm_loss is None else f"lm loss: {report.lm_loss:.6E}",
        f"grad norm: {report.grad_norm:.3f}",
        f"tokens/s: {report.tokens_per_second:.0f}",
        f"tokens/s per GPU: {report.tokens_per_second_per_gpu:.0f}",
        f"MFU: {mfu}",
        f"loader wait: {100 * wait:.1f}%",
        f"memory (GiB): {report.memory_bytes / 2**30:.2f}",
        f"skipped: {report.num_skipped}",
        f"skipped without loss tokens: {report.skipped_no_loss_tokens}",
        f"rollbacks: {report.num_rollbacks}",
        f"restarts: {report.downtime.num_restarts}, {report.downtime.seconds:.0f} s lost",
    ]
    return " | ".join(fields) + " |"


def sources_line(report: IterationReport) -> str:
    """One line with what each source gave: loss, share drawn and planned, tokens, epochs."""
    parts = [
        f"{name}: loss {'-' if source.loss is None else format(source.loss, '.4f')}, "
        f"{100 * source.realised:.1f}% of {100 * source.weight:.1f}% planned, "
        f"{source.tokens} tokens, {source.epochs:.3f} epochs"
        for name, source in report.sources.items()
    ]
    return " sources | " + " | ".join(parts) + " |"


def stragglers_line(report: StragglerReport) -> str:
    """One line with the fastest and the slowest rank of each part."""
    parts = []
    for name, part in report.parts.items():
        unit, factor = (" ms", 1000) if name.endswith("_seconds") else ("", 1)
        parts.append(
            f"{name.removesuffix('_seconds')}: min {factor * part.min:.1f}{unit} (rank "
            f"{part.min_rank}), median {factor * part.median:.1f}{unit}, max "
            f"{factor * part.max:.1f}{unit} (rank {part.max_rank})"
        )
    slowest = ", ".join(f"{one.rank} on {one.host} x{one.ratio:.2f}" for one in report.slowest)
    return " stragglers | " + " | ".join(parts) + f" | slowest ranks: {slowest} |"


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
        self._print(sources_line(report))
        if report.stragglers is not None:
            self._print(stragglers_line(report.stragglers))
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
