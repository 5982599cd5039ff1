"""Reads the weights that a controller decided, from a checkpoint or the metrics of its run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_chatflow.blend.controllers import Decisions
from megatron_chatflow.checkpoint.files import read_state, resolve_checkpoint
from megatron_chatflow.errors import UserError

METRICS_FILE = "metrics.jsonl"


def read_decisions(run: Path) -> Decisions:
    """Reads the decisions from the latest checkpoint of a run, or from its metrics.

    ``run`` is the folder of a run or of one of its checkpoints.

    Raises:
        UserError: The folder does not exist, or its decisions do not, or are damaged.
    """
    if not run.is_dir():
        raise UserError(
            f"{run}: is not a folder; give the folder of a run with a controller, or of one of its "
            "checkpoints"
        )
    folder = resolve_checkpoint(run)
    if folder is None:
        folder, blend = run, _of_metrics(run / METRICS_FILE)
    else:
        blend = read_state(folder).get("blend")
    if not isinstance(blend, Mapping) or "horizon" not in blend:
        raise UserError(f"{folder}: contains no decisions; its run had no controller")
    try:
        sources, horizon = tuple(blend["sources"]), int(blend["horizon"])
        weights = [[int(weight) for weight in row] for row in blend["weights"]]
        is_valid = horizon > 0 and bool(weights)
        is_valid = is_valid and all(len(row) == len(sources) for row in weights)
    except (KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{folder}: the decisions are damaged; use another checkpoint")
    return Decisions(folder, sources, horizon, weights)


def _of_metrics(path: Path) -> dict[str, Any] | None:
    """Collects the decisions in a metrics file, as a checkpoint has them; None without any."""
    found: dict[int, dict[str, Any]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            decision = json.loads(line)["decision"]
            found[int(decision["horizon"])] = decision
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    if sorted(found) != list(range(len(found))) or not found:
        return None
    ordered = [found[number] for number in range(len(found))]
    try:
        return {
            "sources": list(ordered[0]["weights"]),
            "horizon": ordered[0]["end"] - ordered[0]["begin"],
            "weights": [list(decision["weights"].values()) for decision in ordered],
        }
    except (KeyError, TypeError, AttributeError):
        return None
