"""Prints the log: one line per step, a table of its sources, and a progress bar on a terminal.

The columns of the line are the same in every log. Unusual values (skipped updates, waiting for
data, restarts after failures) and changed settings (batch size, weight decay, weights of sources in
the objective) follow on separate lines, only if there are any. No line is longer
than `MAX_WIDTH`. The table shows at most `MAX_SOURCES` sources; ``metrics.jsonl`` has all of them.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tqdm import tqdm

from megatron_chatflow.evaluation.probes import headline_numbers
from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.runtime.table import (
    align,
    display_width,
    format_duration,
    format_value,
    shorten,
)
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.callbacks.straggler import StragglerReport
from megatron_chatflow.training.report import IterationReport, SourceReport

MAX_WIDTH = 124
"""Columns of the longest line: a step in a run of 100,000 iterations or more."""
MAX_SOURCES = 12
MAX_NAME_WIDTH = 24
INDENT = " " * 21
WAITING = 0.01
"""Waiting for data is shown from this share of the step on."""
GROWTH = 1.01
"""The peak memory is shown again when it has grown by this factor."""


def iteration_lines(
    report: IterationReport,
    now: datetime,
    *,
    with_memory: bool = True,
    previous: IterationReport | None = None,
) -> list[str]:
    """Formats the line of a step, followed by lines of unusual and changed values if any.

    ``previous`` is the report of the previous log; None for the first.
    """
    width = len(str(report.num_iterations))
    loss_and_grad = [f"loss {_loss(report.lm_loss)}", f"grad {_fit(report.grad_norm, 6, 3)}"]
    if report.lm_loss is None:  # and so no gradient
        loss_and_grad = ["no loss tokens".ljust(display_width("  ".join(loss_and_grad)))]
    if report.params_norm is not None:
        loss_and_grad.append(f"params {_fit(report.params_norm, 7, 2)}")
    fields = [
        _stamp(now),
        f"iter {report.iteration:{width}d}/{report.num_iterations}",
        *loss_and_grad,
        f"lr {report.learning_rate:.2e}",
        f"{_fit(report.seconds, 5, 3)} s",
        f"{format_value(report.tokens_per_second, 3):>5} tok/s",
        f"{_teraflops(report.tflops_per_gpu)} TFLOP/s"
        if report.mfu is None
        else f"MFU {100 * report.mfu:4.1f}%",
    ]
    if report.seconds_left is not None:
        fields.append(f"ETA {_remaining(report.seconds_left)}")
    notes = [] if previous is None else _changes(previous, report)
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
    return [*_fill(fields, "  "), *(INDENT + line for line in _fill(notes, ", ", len(INDENT)))]


def _changes(before: IterationReport, report: IterationReport) -> list[str]:
    """Returns what schedules have changed since a report."""
    notes = []
    if report.global_batch_size != before.global_batch_size:
        notes.append(f"batch {report.global_batch_size}")
    if (decay := f"{report.weight_decay:.3g}") != f"{before.weight_decay:.3g}":
        notes.append(f"weight decay {decay}")
    weights = {
        name: [f"{one.sources[name].objective_weight or 0:.3g}" for one in (before, report)]
        for name in report.sources
    }
    changed = [(name, now) for name, (was, now) in weights.items() if was != now]
    if len(changed) > MAX_SOURCES:
        notes.append(f"{len(changed)} sources count otherwise in the objective")
    else:
        notes += [
            f"{shorten(name, MAX_NAME_WIDTH)} counts {now} in the objective"
            for name, now in changed
        ]
    return notes


def source_lines(report: IterationReport) -> list[str]:
    """Formats a table of the sources since the last log."""
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
    """Formats a table of the fastest and slowest rank of each quantity, and the slowest ranks."""
    rows = []
    for name, part in report.parts.items():
        unit, factor = (" ms", 1000) if name.endswith("_seconds") else ("", 1)
        rows.append(
            [
                name.removesuffix("_seconds").replace("_", " "),
                f"{_one_decimal(factor * part.min)}{unit}",
                f"(rank {part.min_rank})",
                f"{_one_decimal(factor * part.median)}{unit}",
                f"{_one_decimal(factor * part.max)}{unit}",
                f"(rank {part.max_rank})",
            ]
        )
    head = ["stragglers", "min", "", "median", "max", ""]
    slowest = [
        f"{one.rank} on {shorten(one.host, MAX_NAME_WIDTH)} x{one.ratio:.2f}"
        for one in report.slowest
    ]
    title = f"{INDENT}slowest ranks: "
    first, *others = _fill(slowest, ", ", len(title)) or [""]
    return [*_table(head, rows), title + first, *(" " * len(title) + line for line in others)]


def validation_lines(iteration: int, losses: Mapping[str, SourceLoss], now: datetime) -> list[str]:
    """Formats a table of each source's validation loss and bits per byte."""
    rows = [
        [
            shorten(name, MAX_NAME_WIDTH),
            _loss(loss.loss).strip(),
            "-" if math.isnan(loss.bits_per_byte) else _loss(loss.bits_per_byte).strip(),
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
    """Formats a title and a line for each file of choice questions."""
    title = f"{_stamp(now)}  choice questions at iteration {iteration}"
    return [
        title,
        *(
            f"{INDENT}{shorten(name, MAX_NAME_WIDTH)}: accuracy {result['accuracy']:.4f} of "
            f"{result['num_questions']} (chance {result['chance']:.4f})"
            for name, result in results.items()
        ),
    ]


def probe_lines(
    iteration: int,
    results: Mapping[str, Mapping[str, float]],
    seconds: float,
    now: datetime,
) -> list[str]:
    """Formats a title and a line for each number of each probe, with its standard error."""
    took = format_duration(seconds)
    rows = [
        [
            shorten(label, MAX_NAME_WIDTH),
            shorten(name.replace("_", " "), 2 * MAX_NAME_WIDTH),
            _loss(value).strip(),
            _loss(result.get(f"{name}_stderr")).strip(),
        ]
        for label, result in results.items()
        for name, value in headline_numbers(result).items()
    ]
    title = f"{_stamp(now)}  probes at iteration {iteration}, in {took}"
    table = align([["probe", "number", "value", "stderr"], *rows], [True, True, False, False])
    return [title, *(INDENT + line for line in table)]


class Console(Callback):
    """Prints reports, and shows a progress bar on a terminal."""

    def __init__(self, *, num_iterations: int, iteration: int) -> None:
        """Starts the progress bar at ``iteration`` of ``num_iterations``."""
        self._bar = tqdm(
            total=num_iterations,
            initial=iteration,
            unit="it",
            dynamic_ncols=True,
            disable=None,  # disabled unless standard error is a terminal
        )
        self._shown_bytes = 0.0
        self._previous: IterationReport | None = None

    def on_log(self, report: IterationReport) -> None:
        """Prints the step and its sources, and updates the bar."""
        has_grown = report.memory_bytes > GROWTH * self._shown_bytes
        if has_grown:
            self._shown_bytes = report.memory_bytes
        lines = iteration_lines(
            report, datetime.now(), with_memory=has_grown, previous=self._previous
        )
        self._previous = report
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

    def on_probes(
        self, iteration: int, results: Mapping[str, Mapping[str, float]], seconds: float
    ) -> None:
        """Prints the table."""
        self._print(probe_lines(iteration, results, seconds, datetime.now()))

    def close(self) -> None:
        """Removes the progress bar."""
        self._bar.close()

    @staticmethod
    def _print(lines: Sequence[str]) -> None:
        tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()


def _stamp(now: datetime) -> str:
    return f"{now:%Y-%m-%d %H:%M:%S}"


def _remaining(seconds: float) -> str:
    """Formats a duration in its two largest units: 3d16h, 5h02m, 4m19s, 8s."""
    whole = round(seconds)
    for unit, size, below, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{below}"
    return f"{whole}s"


def _fill(parts: Sequence[str], separator: str, indent: int = 0) -> list[str]:
    """Joins parts into lines of at most `MAX_WIDTH` columns including the indentation."""
    lines: list[str] = []
    for part in parts:
        joined = f"{lines[-1]}{separator}{part}" if lines else part
        if lines and indent + display_width(joined) <= MAX_WIDTH:
            lines[-1] = joined
        else:
            lines.append(part)
    return lines


def _fit(value: float, width: int, decimals: int) -> str:
    """Formats a number in ``width`` columns, with fewer decimals if it is large."""
    texts = [f"{value:{width}.{number}f}" for number in range(decimals, -1, -1)]
    return next((text for text in texts if len(text) <= width), f"{value:{width}.0e}")


def _loss(loss: float | None) -> str:
    return "-".rjust(7) if loss is None else _fit(loss, 7, 4)


def _teraflops(value: float) -> str:
    """Formats three significant digits, two below 0.1, in five columns."""
    return f"{value:5.3g}" if value >= 0.1 else f"{value:5.2g}"


def _one_decimal(value: float) -> str:
    return f"{value:.1f}" if value < 1e6 else format_value(value)


def _source_cells(name: str, source: SourceReport) -> list[str]:
    return [
        shorten(name, MAX_NAME_WIDTH),
        _loss(source.loss).strip(),
        format_value(source.loss_tokens),
        f"{100 * source.realised:.1f}%",
        f"{100 * source.weight:.1f}%",
        format_value(source.tokens),
        f"{source.epochs:.3f}" if source.epochs < 10_000 else format_value(source.epochs),
    ]


def _sum_cells(name: str, sources: Sequence[SourceReport]) -> list[str]:
    """Sums several sources; their number of epochs has no meaning and is left empty."""
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
    """Formats indented lines; the first column is left-aligned, the others right-aligned."""
    is_left = [column == 0 for column in range(len(head))]
    return [INDENT + line for line in align([head, *rows], is_left, min_widths)]
