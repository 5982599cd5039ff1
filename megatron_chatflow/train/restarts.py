"""What restarts have cost a run, as its own records tell.

In: the folder of a run that is taken up again, its metrics cut at the checkpoint. Out: `Downtime`:
how often that happened, and the wall time between the last logged iteration that counts and the
moment when training goes on, which includes the iterations that have to be trained a second time;
and a line in ``restarts.jsonl``, from which the page of `tools/plot_run.py` marks them.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.checkpoint.files import write_atomically
from megatron_chatflow.train.downtime import Downtime
from megatron_chatflow.train.hooks.metrics_file import Cut

RESTARTS_FILE = "restarts.jsonl"

logger = logging.getLogger(__name__)


def forget_restarts(folder: Path) -> None:
    """Removes the record of a run whose place a fresh one takes."""
    (folder / RESTARTS_FILE).unlink(missing_ok=True)


def record_restart(folder: Path, cut: Cut, iteration: int, now: float) -> Downtime:
    """Adds the restart at hand to those before, also in the run's folder.

    A disk that refuses the record is a warning: the run goes on without it.

    Args:
        folder: The run's.
        cut: What was kept and dropped of its metrics.
        iteration: Of the checkpoint that it goes on from; 0 where there was none yet.
        now: Unix time in seconds.
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
    }
    try:
        lines = "".join(json.dumps(one) + "\n" for one in [*earlier, record])
        write_atomically(folder / RESTARTS_FILE, lines)
    except OSError as error:
        logger.warning("%s: %s; the restart is not recorded", folder / RESTARTS_FILE, error)
    return Downtime(num_restarts, lost)


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
