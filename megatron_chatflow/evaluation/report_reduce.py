"""Makes long curves drawable: fewer points, less noise, the blend's deviation from its plan.

In: float64 arrays with NaN for gaps. Out: arrays of a few hundred points.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_chatflow.evaluation.report_data import FloatArray, RunMetrics

MAX_POINTS = 360


def condense(
    x: FloatArray,
    y: FloatArray,
    how: Literal["mean", "last", "extreme"] = "mean",
    max_points: int = MAX_POINTS,
) -> tuple[FloatArray, FloatArray]:
    """Cuts a curve into at most `max_points` runs of neighbours and keeps one point of each.

    Args:
        x: float64[n], ascending.
        y: float64[n]; NaN is left out of its run.
        how: `mean` of the run, its `last` value, or the value farthest from 0 (`extreme`).
        max_points: The most points that come back.

    Returns:
        x (each run's last) and y, float64[<= max_points].
    """
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points + 1).astype(np.int64)
    last = edges[1:] - 1
    if how == "last":
        return x[last], y[last]
    runs = [y[begin:end] for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    if how == "mean":
        return x[last], np.array([_mean(run) for run in runs])
    picked = [run[np.argmax(np.nan_to_num(np.abs(run), nan=-1.0))] for run in runs]
    return x[last], np.array(picked)


def smooth(y: FloatArray, window: int) -> FloatArray:
    """Centred moving mean over `window` points (odd), shorter at the ends; NaN stays NaN.

    Args:
        y: float64[n].
        window: Points per mean; 1 changes nothing.

    Returns:
        float64[n].
    """
    if window <= 1 or not len(y):
        return y
    known = np.isfinite(y)
    ones = np.ones(min(window, 2 * len(y) - 1))
    total = np.convolve(np.where(known, y, 0.0), ones, mode="full")
    count = np.convolve(known.astype(np.float64), ones, mode="full")
    start = len(ones) // 2
    total, count = total[start : start + len(y)], count[start : start + len(y)]
    return np.where(known, total / np.maximum(count, 1.0), np.nan)


def smoothing_window(num_points: int) -> int:
    """Odd window for `num_points`: none for short curves, about a thirtieth of long ones."""
    return 1 if num_points < 40 else 2 * (num_points // 60) + 1


TOKENS = "Tokens consumed"
ITERATION = "Iteration"


@dataclass(frozen=True)
class Axis:
    """What a run's curves run along: the tokens consumed, or iterations where no log tells.

    Attributes:
        label: Its name.
        x: float64[n], a value for each logged iteration, ascending.
        iteration: float64[n], the iterations themselves.
    """

    label: str
    x: FloatArray
    iteration: FloatArray

    @classmethod
    def of(cls, run: RunMetrics, column: str = "consumed_tokens", label: str = TOKENS) -> "Axis":
        """The axis along a column that counts; gaps are bridged, and a step back is none."""
        values, known = run.columns[column], np.isfinite(run.columns[column])
        if not known.any():
            return cls(ITERATION, run.iteration, run.iteration)
        x = np.interp(run.iteration, run.iteration[known], values[known])
        return cls(label, np.maximum.accumulate(x), run.iteration)

    def at(self, iterations: FloatArray) -> FloatArray:
        """Where iterations lie, float64[m]; the run began at 0."""
        if not len(self.x) or self.label == ITERATION:
            return iterations
        end = [] if not len(iterations) else [max(float(iterations.max()), self.iteration[-1] + 1)]
        rate = self.x[-1] / max(float(self.iteration[-1]), 1.0)
        beyond = [self.x[-1] + rate * (last - self.iteration[-1]) for last in end]
        known = np.concatenate(([0.0], self.iteration, end))
        return np.interp(iterations, known, np.concatenate(([0.0], self.x, beyond)))


def samples_per_record(run: RunMetrics) -> FloatArray:
    """Samples consumed between each logged iteration and the one before it, float64[n]."""
    consumed = run.columns["consumed_samples"]
    if not len(consumed):
        return consumed
    steps = np.diff(consumed, prepend=0.0)
    covered = float(np.nan_to_num(run.columns["interval"][0], nan=1.0))
    if run.iteration[0] != covered and len(consumed) > 1:
        steps[0] = steps[1]  # the file begins later than the run
    return np.asarray(steps, dtype=np.float64)


def realised_shares(run: RunMetrics) -> dict[str, FloatArray]:
    """Each source's share of what was drawn since the last logged iteration.

    `realised` is of the logged iteration alone; the running token counts know of those between.

    Args:
        run: The run.

    Returns:
        Source to float64[n].
    """
    total = np.diff(run.columns["consumed_tokens"], prepend=0.0)
    shares = {}
    for name, block in run.sources.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.diff(np.nan_to_num(block["tokens"]), prepend=0.0) / total
        is_counted = np.isfinite(share) & np.isfinite(block["tokens"])
        shares[name] = np.where(is_counted, share, block["realised"])
    return shares


def deviation_from_plan(run: RunMetrics) -> dict[str, FloatArray]:
    """Samples drawn minus samples planned, per source, after every iteration.

    Only a log without holes tells: one whose rows cover every iteration from the first on.

    Args:
        run: The run.

    Returns:
        Source to float64[n], in samples; {} where the log has holes.
    """
    interval = run.columns["interval"]
    covered = np.cumsum(np.where(np.isfinite(interval), interval, 1.0))
    if not len(covered) or not np.array_equal(run.iteration, covered):
        return {}
    drawn, shares = samples_per_record(run), realised_shares(run)
    return {
        name: np.cumsum((np.nan_to_num(shares[name]) - np.nan_to_num(block["weight"])) * drawn)
        for name, block in run.sources.items()
    }


def _mean(values: FloatArray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=RuntimeWarning)  # a run of nothing but gaps
        return float(np.nanmean(values))
