"""What restarts have cost a run, as its own metrics tell.

In: ``metrics.jsonl`` of a run that is taken up again. Out: `Downtime`: how often that happened, and
the wall time between the last logged iteration that counts and the moment when training goes on.
That includes the iterations which have to be trained a second time.
"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Downtime:
    """What restarts have cost.

    Attributes:
        num_restarts: How often the run was taken up again.
        seconds: Wall time lost to it.
    """

    num_restarts: int = 0
    seconds: float = 0.0


def read_downtime(path: Path, now: float) -> Downtime:
    """Adds the restart at hand to what the metrics say of those before.

    Args:
        path: The metrics, cut at the checkpoint that the run goes on from.
        now: Unix time in seconds.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return Downtime(1)
    for line in reversed(lines):
        entry = json.loads(line)
        if "lm_loss" not in entry:
            continue
        return Downtime(
            num_restarts=int(entry.get("num_restarts", 0)) + 1,
            seconds=float(entry.get("seconds_lost", 0.0)) + max(0.0, now - entry.get("time", now)),
        )
    return Downtime(1)
