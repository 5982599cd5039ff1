"""Writes ``metrics.jsonl``: a JSON object per iteration or log interval, and per evaluation.

Lines that do not fit on a full disk are kept and written once there is room. A resume first drops
the lines after its checkpoint, so that every iteration is in the file once.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint.decisions import METRICS_FILE
from megatron_chatflow.checkpoint.files import write_unless_disk_full
from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.files import fsync_path
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.report import IterationReport, finite


@dataclass(frozen=True)
class Truncation:
    """What `truncate_metrics` kept and dropped."""

    # the last logged iteration that was kept; None if none was
    last_kept: dict[str, Any] | None = None
    # the first logged iteration that was dropped; None if none was
    first_dropped: dict[str, Any] | None = None
    last_dropped: dict[str, Any] | None = None  # the last logged iteration that was dropped


def truncate_metrics(path: Path, iteration: int) -> Truncation:
    """Drops the lines of iterations after ``iteration`` and an incomplete last line.

    Unless the file is damaged in the middle, these lines are at its end, and truncation works on a
    full disk as well.
    """
    if not path.exists():
        return Truncation()
    kept: list[bytes] = []
    last_kept = first_dropped = last_dropped = None
    content = path.read_bytes()
    for line in content.splitlines():
        try:
            entry = json.loads(line)
            stays = entry["iteration"] <= iteration
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if stays:
            kept.append(line + b"\n")
        if "lm_loss" not in entry:
            continue
        if stays:
            last_kept = entry
        else:
            first_dropped = first_dropped or entry
            last_dropped = entry
    whole = b"".join(kept)
    if content.startswith(whole):
        os.truncate(path, len(whole))
        fsync_path(path)
    else:
        write_unless_disk_full(
            path, whole.decode(errors="replace"), otherwise="some iterations are listed twice in it"
        )
    return Truncation(last_kept, first_dropped, last_dropped)


class MetricsFile(Callback):
    """Appends to ``metrics.jsonl``; each line reaches the system before training continues.

    With ``every_iteration``, each iteration has a row instead of each log interval.
    """

    def __init__(self, folder: Path, *, every_iteration: bool) -> None:
        """Opens the file, which `truncate_metrics` has truncated."""
        self._every_iteration = every_iteration
        path = folder / METRICS_FILE
        self._file = open(path, "ab", buffering=0)
        self._backlog: list[bytes] = []
        # End of the last complete line.
        self._end = self._file.tell()

    def on_iterations(self, reports: Sequence[IterationReport]) -> None:
        """Appends the iterations."""
        if self._every_iteration:
            self._append(*(report.to_dict() for report in reports))

    def on_log(self, report: IterationReport) -> None:
        """Appends the interval unless every iteration has a row."""
        if not self._every_iteration:
            self._append(report.to_dict())

    def on_validation(self, iteration: int, losses: Mapping[str, SourceLoss]) -> None:
        """Appends the validation."""
        found = {
            name: {"loss": finite(loss.loss), "bits_per_byte": finite(loss.bits_per_byte)}
            for name, loss in losses.items()
        }
        self._append({"iteration": iteration, "validation": found})

    def on_decision(self, iteration: int, decision: Mapping[str, Any]) -> None:
        """Appends the decision."""
        self._append({"iteration": iteration, "decision": decision})

    def on_choice(self, iteration: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Appends the results."""
        self._append({"iteration": iteration, "choice": results})

    def on_probes(
        self, iteration: int, results: Mapping[str, Mapping[str, float]], seconds: float
    ) -> None:
        """Appends the numbers and the seconds."""
        found = {
            label: {name: finite(value) for name, value in result.items()}
            for label, result in results.items()
        }
        self._append({"iteration": iteration, "probes": found, "probe_seconds": seconds})

    def on_upload(self, iteration: int, result: Mapping[str, Any]) -> None:
        """Appends the outcome."""
        self._append({"iteration": iteration, "upload": result})

    def close(self) -> None:
        """Writes pending lines and flushes the file to disk.

        Raises:
            OSError: The disk is full or gone.
        """
        try:
            self._write_backlog()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _append(self, *entries: dict[str, object]) -> None:
        self._backlog += [json.dumps(entry).encode() + b"\n" for entry in entries]
        self._write_backlog()

    def _write_backlog(self) -> None:
        """Writes complete lines; lines that do not fit wait for the next report."""
        while self._backlog:
            line = self._backlog[0]
            written = 0
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._file.fileno(), self._end)
                raise
            self._end += written
            self._backlog.pop(0)
