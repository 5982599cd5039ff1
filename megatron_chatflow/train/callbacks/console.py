"""The log: a line for the step and a table of its sources, and a progress bar on a terminal.

The columns of the line stand at the same places in every log. What is unusual (skipped updates,
waiting for data, restarts after failures) follows at its end only where there is any. The table
shows at most `MAX_SOURCES` sources; ``metrics.jsonl`` has all of them.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tqdm import tqdm

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.runtime.table import align, format_duration, format_value, shorten
from megatron_chatflow.train.report import IterationReport, SourceReport
from megatron_chatflow.train.straggler import StragglerReport

MAX_SOURCES = 12
MAX_NAME_WIDTH = 24
INDENT = " " * 21
WAITING = 0.01
"""Part of the step from which on waiting for data is shown."""
GROWTH = 1.01
"""Growth of the peak memory from which on it is shown again."""


def iteration_line(report: IterationReport, now: datetime, *, with_memory: bool = True) -> str:
    """The line of a step: what every log has, then what is unusual."""
    width = len(str(report.num_iterations))
    fields = [
        _stamp(now),
        f"iter {report.iteration:{width}d}/{report.num_iterations}",
        "no loss tokens" if report.lm_loss is None else f"loss {report.lm_loss:7.4f}",
        f"grad {_norm(report.grad_norm)}",
        f"lr {report.learning_rate:.2e}",
        f"{_seconds(report.seconds)} s",
        f"{format_value(report.tokens_per_second, 3):>5} tok/s",
        f"{report.tflops_per_gpu:.3g} TFLOP/s"
        if report.mfu is None
        else f"MFU {100 * report.mfu:4.1f}%",
    ]
    if report.seconds_left is not None:
        fields.append(f"ETA {_remaining(report.seconds_left)}")
    notes = []
    if with_memory:
        notes.append(f"peak {report.memory_bytes / 2**30:.3g} GiB")
    wait = report.data_seconds / report.seconds if report.seconds else 0.0
    if wait >= WAITING:
        notes.append(f"waiting for data {100 * wait:.0f}%")
    if report.num_skipped:
        notes.append(f"skipped {report.num_skipped}")
    if report.skipped_no_loss_tokens:
        notes.append(f"without loss tokens {report.skipped_no_loss_tokens}")
    if report.num_rollbacks:
        notes.append(f"rollbacks {report.num_rollbacks}")
    if report.downtime.num_failures:
        lost = format_duration(report.downtime.failure_seconds)
        notes.append(f"failures {report.downtime.num_failures} ({lost} lost)")
    line = "  ".join(fields)
    return f"{line}  | {', '.join(notes)}" if notes else line


def source_lines(report: IterationReport) -> list[str]:
    """A table with what each source gave since the last log."""
    sources = dict(report.sources)
    if len(sources) > MAX_SOURCES:
        most = sorted(sources, key=lambda name: (-sources[name].weight, -sources[name].realised))
        folded = [sources.pop(name) for name in most[MAX_SOURCES:]]
        rows = [_source_cells(name, source) for name, source in sources.items()]
        rows.append(_sum_cells(f"({len(folded)} more)", folded))
    else:
        rows = [_source_cells(name, source) for name, source in sources.items()]
    if len(report.sources) > 1:
        rows.append(_sum_cells("all", list(report.sources.values())))
    head = ["source", "loss", "loss tokens", "share", "planned", "tokens", "epochs"]
    return _table(head, rows, min_widths=(8, 7, 11, 6, 7, 7, 7))


def straggler_lines(report: StragglerReport) -> list[str]:
    """A table with the fastest and the slowest rank of each part, and the slowest ranks."""
    rows = []
    for name, part in report.parts.items():
        unit, factor = (" ms", 1000) if name.endswith("_seconds") else ("", 1)
        rows.append(
            [
                name.removesuffix("_seconds").replace("_", " "),
                f"{factor * part.min:.1f}{unit}",
                f"(rank {part.min_rank})",
                f"{factor * part.median:.1f}{unit}",
                f"{factor * part.max:.1f}{unit}",
                f"(rank {part.max_rank})",
            ]
        )
    slowest = ", ".join(f"{one.rank} on {one.host} x{one.ratio:.2f}" for one in report.slowest)
    head = ["stragglers", "min", "", "median", "max", ""]
    return [*_table(head, rows), f"{INDENT}slowest ranks: {slowest}"]


def validation_lines(iteration: int, losses: Mapping[str, SourceLoss], now: datetime) -> list[str]:
    """A table with each source's validation loss and bits per byte."""
    rows = [
        [
            shorten(name, MAX_NAME_WIDTH),
            f"{loss.loss:.4f}",
            "-" if math.isnan(loss.bits_per_byte) else f"{loss.bits_per_byte:.4f}",
            format_value(loss.num_tokens),
        ]
        for name, loss in losses.items()
    ]
    title = f"{_stamp(now)}  validation at iteration {iteration}"
    head = ["source", "loss", "bits/byte", "loss tokens"]
    return [title, *_table(head, rows, min_widths=(8, 7, 9, 11))]


def choice_lines(
    iteration: int, results: Mapping[str, Mapping[str, Any]], now: datetime
) -> list[str]:
    """A line for each file of choice questions."""
    return [
        f"{_stamp(now)}  choice questions at iteration {iteration}  {name}: accuracy "
        f"{result['accuracy']:.4f} of {result['num_questions']} (chance {result['chance']:.4f})"
        for name, result in results.items()
    ]


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
        self._shown_bytes = 0.0

    def on_iterations(self, reports: Sequence[IterationReport]) -> None:
        """Does nothing: only whole intervals are shown."""

    def on_log(self, report: IterationReport) -> None:
        """Prints the step and its sources, and moves the bar."""
        has_grown = report.memory_bytes > GROWTH * self._shown_bytes
        if has_grown:
            self._shown_bytes = report.memory_bytes
        lines = [iteration_line(report, datetime.now(), with_memory=has_grown)]
        lines += source_lines(report)
        if report.stragglers is not None:
            lines += straggler_lines(report.stragglers)
        self._print(lines)
        self._bar.update(report.iteration - self._bar.n)

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Prints the table."""
        self._print(validation_lines(iteration, losses, datetime.now()))

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Prints the lines."""
        self._print(choice_lines(iteration, results, datetime.now()))

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()

    @staticmethod
    def _print(lines: Sequence[str]) -> None:
        tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()


def _stamp(now: datetime) -> str:
    return f"{now:%Y-%m-%d %H:%M:%S}"


def _remaining(seconds: float) -> str:
    """The two largest units without spaces: 3d16h, 5h02m, 4m19s, 8s."""
    whole = round(seconds)
    for unit, size, below, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{below}"
    return f"{whole}s"


def _norm(norm: float) -> str:
    """Six columns, whatever the size."""
    return f"{norm:6.3f}" if norm < 100 else f"{norm:6.3g}"


def _seconds(seconds: float) -> str:
    """Four significant digits in five columns."""
    decimals = 3 if seconds < 10 else 2 if seconds < 100 else 1
    return f"{seconds:5.{decimals}f}"


def _source_cells(name: str, source: SourceReport) -> list[str]:
    return [
        shorten(name, MAX_NAME_WIDTH),
        "-" if source.loss is None else f"{source.loss:.4f}",
        format_value(source.loss_tokens),
        f"{100 * source.realised:.1f}%",
        f"{100 * source.weight:.1f}%",
        format_value(source.tokens),
        f"{source.epochs:.3f}",
    ]


def _sum_cells(name: str, sources: Sequence[SourceReport]) -> list[str]:
    """Several sources as one; passes over them are no number that means anything."""
    loss_tokens = sum(source.loss_tokens for source in sources)
    loss = sum((source.loss or 0.0) * source.loss_tokens for source in sources)
    merged = SourceReport(
        loss=loss / loss_tokens if loss_tokens else None,
        weight=sum(source.weight for source in sources),
        realised=sum(source.realised for source in sources),
        tokens=sum(source.tokens for source in sources),
        loss_tokens=loss_tokens,
        epochs=0.0,
    )
    return [*_source_cells(name, merged)[:-1], ""]


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], min_widths: Sequence[int] = ()
) -> list[str]:
    """Indented lines: the first column stands left, the others right."""
    is_left = [column == 0 for column in range(len(head))]
    return [INDENT + line for line in align([head, *rows], is_left, min_widths)]
