"""What restarts have cost a run and why it was restarted, as its own records tell.

``restarts.jsonl`` has a line for each time that the run was resumed: why it had ended before, what
the resume changed, and the wall time between the last logged iteration that counts and the moment
when training goes on, which includes the iterations that are trained a second time. The page of
`tools/plot_run.py` marks them. ``status.json`` says whether the run is running or how it ended.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_chatflow.files import write_atomically
from megatron_chatflow.train.callbacks.metrics_file import Truncation
from megatron_chatflow.train.report import Downtime

RESTARTS_FILE = "restarts.jsonl"
STATUS_FILE = "status.json"
Status = Literal["running", "finished", "exit_interval", "stop_requested", "failed"]
"""How a run ended; one that was killed stays ``running``."""
Cause = Literal[
    "finished", "exit_interval", "stop_requested", "failed", "another_folder", "unknown"
]
"""Why a run had to be resumed: ``failed`` if it failed or was killed, ``another_folder`` if it was
continued from a checkpoint elsewhere, ``unknown`` if an earlier version left no status."""

logger = logging.getLogger(__name__)


def write_status(folder: Path, status: Status) -> None:
    """Records in a run's folder how the run stands; a disk that refuses is a warning."""
    record = {"status": status, "time": time.time()}
    try:
        write_atomically(folder / STATUS_FILE, json.dumps(record) + "\n")
    except OSError as error:
        logger.warning("%s: %s; the run's status is not recorded", folder / STATUS_FILE, error)


def read_status(folder: Path) -> Status | None:
    """How the run stands, or None if nothing readable tells."""
    records = _read(folder / STATUS_FILE)
    status = records[0].get("status") if records else None
    return status if status in get_args(Status) else None


def delete_restarts(folder: Path) -> None:
    """Removes the record of a run whose place a fresh one takes."""
    (folder / RESTARTS_FILE).unlink(missing_ok=True)


def record_restart(
    folder: Path, cut: Truncation, iteration: int, now: float, changes: Sequence[str] = ()
) -> Downtime:
    """Adds the restart at hand to those before, also in the run's folder.

    A disk that refuses the record is a warning: the run goes on without it.

    Args:
        folder: The run's.
        cut: What was kept and dropped of its metrics.
        iteration: Of the checkpoint that it goes on from; 0 where there was none yet.
        now: Unix time in seconds.
        changes: What this resume changed in the schedule and its sources, for people to read.
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
    """Why the run had ended before this restart."""
    status = read_status(folder)
    if status is None:
        is_known = cut.last_kept or cut.first_dropped or earlier
        return "unknown" if is_known else "another_folder"
    return "failed" if status == "running" else status


def _read(path: Path) -> list[dict[str, Any]]:
    """The records that can be read."""
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
    """A number that may have been damaged."""
    value = record.get(key, default)
    is_number = isinstance(value, int | float) and abs(value) < 1e15
    return float(value) if is_number else default
