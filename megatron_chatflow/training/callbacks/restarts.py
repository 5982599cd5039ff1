"""Records how a run ended and what its restarts have cost.

``status.json`` tells whether the run is running or how it ended. ``restarts.jsonl`` has a line for
each resume: why the run had ended, what the resume changed, and the wall time between the last
logged iteration that counts and the resume. This time includes iterations that are trained a second
time. The page of `tools/plot_run.py` marks the restarts.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_chatflow.files import write_atomically
from megatron_chatflow.training.callbacks import Callback, ExitStatus
from megatron_chatflow.training.callbacks.metrics_file import Truncation
from megatron_chatflow.training.report import Downtime

RESTARTS_FILE = "restarts.jsonl"
STATUS_FILE = "status.json"
Status = Literal["running", "finished", "exit_interval", "stop_requested", "failed"]
"""A run that was killed stays ``running``."""
Cause = Literal[
    "finished", "exit_interval", "stop_requested", "failed", "another_folder", "unknown"
]
"""Why a run was resumed: ``failed`` if it failed or was killed, ``another_folder`` if it continues
a checkpoint elsewhere, ``unknown`` if an earlier version left no status."""

logger = logging.getLogger(__name__)


class StatusFile(Callback):
    """Writes ``status.json`` when the run starts and when it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        write_status(folder, "running")

    def on_exit(self, status: ExitStatus) -> None:
        """Writes how the run ended."""
        write_status(self._folder, status)


def write_status(folder: Path, status: Status) -> None:
    """Writes the status of a run; logs a warning if the disk refuses."""
    record = {"status": status, "time": time.time()}
    try:
        write_atomically(folder / STATUS_FILE, json.dumps(record) + "\n")
    except OSError as error:
        logger.warning("%s: %s; the run's status is not recorded", folder / STATUS_FILE, error)


def read_status(folder: Path) -> Status | None:
    """Returns the status of a run; None if none can be read."""
    records = _read(folder / STATUS_FILE)
    status = records[0].get("status") if records else None
    return status if status in get_args(Status) else None


def delete_restarts(folder: Path) -> None:
    """Deletes the restarts of an earlier run in a folder that a new run uses."""
    (folder / RESTARTS_FILE).unlink(missing_ok=True)


def record_restart(
    folder: Path, cut: Truncation, iteration: int, now: float, changes: Sequence[str] = ()
) -> Downtime:
    """Appends this restart to ``restarts.jsonl``; logs a warning if the disk refuses.

    Args:
        folder: The run's folder.
        cut: What was kept and dropped of its metrics.
        iteration: Iteration of the checkpoint; 0 if the run had none yet.
        now: Unix time in seconds.
        changes: Human-readable changes of the schedule and its sources by this resume.

    Returns:
        The cost of all restarts including this one.
    """
    earlier = _read(folder / RESTARTS_FILE)
    before = earlier[-1] if earlier else {}
    kept = cut.last_kept or {}
    if cut.last_kept is not None:
        lost = _number(kept, "seconds_lost") + now - _number(kept, "time", now)
    elif before:
        lost = _number(before, "seconds_lost_in_all") + now - _number(before, "time", now)
    else:
        first = cut.first_dropped or {}
        lost = now - (_number(first, "time", now) - _number(first, "seconds"))
    lost = max(lost, _number(before, "seconds_lost_in_all"), 0.0)
    num_restarts = max(len(earlier), int(_number(kept, "num_restarts"))) + 1
    reached = cut.last_dropped or kept
    record = {
        "attempt": num_restarts + 1,
        "iteration": iteration,
        "reached": max(int(_number(reached, "iteration")), iteration),
        "time": now,
        "seconds_lost": lost - _number(before, "seconds_lost_in_all"),
        "seconds_lost_in_all": lost,
        "cause": _cause(folder, cut, earlier),
        "changes": list(changes),
    }
    try:
        lines = "".join(json.dumps(one) + "\n" for one in [*earlier, record])
        write_atomically(folder / RESTARTS_FILE, lines)
    except OSError as error:
        logger.warning("%s: %s; the restart is not recorded", folder / RESTARTS_FILE, error)
    failures = [one for one in [*earlier, record] if one.get("cause") == "failed"]
    failure_seconds = sum(_number(one, "seconds_lost") for one in failures)
    return Downtime(num_restarts, lost, len(failures), failure_seconds)


def _cause(folder: Path, cut: Truncation, earlier: Sequence[Mapping[str, Any]]) -> Cause:
    """Returns why the run had ended before this restart."""
    status = read_status(folder)
    if status is None:
        is_known = cut.last_kept or cut.first_dropped or earlier
        return "unknown" if is_known else "another_folder"
    return "failed" if status == "running" else status


def _read(path: Path) -> list[dict[str, Any]]:
    """Returns all readable records."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _number(record: Mapping[str, Any], key: str, default: float = 0.0) -> float:
    """Returns a number of a record that may be damaged."""
    value = record.get(key, default)
    is_number = isinstance(value, int | float) and abs(value) < 1e15
    return float(value) if is_number else default
