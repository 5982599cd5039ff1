"""Schedules that are hard to blend, and the check that every one of them must pass.

`schedules` is a hypothesis strategy. `worst_error` returns the largest distance of a count from its
quota.
"""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from megatron_chatflow.blend.quota import GRID
from megatron_chatflow.blend.schedule import Schedule

RAMPS = ("step", "linear", "cosine")


def weights_of_family(draw: Any, family: str, num_sources: int, knot: int) -> list[int]:
    """Draws the weights of one knot from a family of adversarial schedules."""
    small = st.integers(0, 9)
    match family:
        case "random":
            weights = [draw(small) for _ in range(num_sources)]
        case "zeros for long":  # most sources have no weight until the last knots
            weights = [draw(small) if k < 2 or knot > 2 else 0 for k in range(num_sources)]
        case "one-hot":  # one source at a time has all the weight
            weights = [0] * num_sources
            weights[draw(st.integers(0, num_sources - 1))] = 1
        case "late":  # one more source at each knot
            weights = [1 if k <= knot else 0 for k in range(num_sources)]
        case "shrinking":  # uniform over fewer and fewer sources
            weights = [1 if k < max(1, num_sources - knot) else 0 for k in range(num_sources)]
        case "filler":  # one source has nearly all the weight
            weights = [draw(st.integers(0, 2)) for _ in range(num_sources)]
            weights[-1] = draw(st.sampled_from([10**3, 10**6, 10**9]))
        case "phase":  # two groups alternate
            weights = [1 if (k + knot) % 2 else 0 for k in range(num_sources)]
        case _:  # "plateau": dyadic weights reach whole quotas exactly, then stay at 0
            weights = [draw(st.sampled_from([0, 0, 1, 2, 4])) for _ in range(num_sources)]
    if not any(weights):
        weights[knot % num_sources] = 1
    return weights


FAMILIES = (
    "random",
    "zeros for long",
    "one-hot",
    "late",
    "shrinking",
    "filler",
    "phase",
    "plateau",
)


@st.composite
def schedules(draw: Any, max_sources: int = 9, max_step: int = 70) -> Schedule:
    """Draws a schedule of up to eight knots from one of the families."""
    num_sources = draw(st.integers(2, max_sources))
    family = draw(st.sampled_from(FAMILIES))
    names = [f"s{k}" for k in range(num_sources)]
    at, knots = draw(st.integers(0, 5)), []
    for knot in range(draw(st.integers(1, 8))):
        weights = weights_of_family(draw, family, num_sources, knot)
        ramp = draw(st.sampled_from(RAMPS))
        knots.append({"at": at, "weights": dict(zip(names, weights, strict=True)), "ramp": ramp})
        at += draw(st.integers(1, max_step))
    batch = draw(st.sampled_from([1, 1, 2, 3, 7, 16, 64]))
    return Schedule.from_dict({"knots": knots}, names, batch)


def weights_matrix(schedule: Schedule, begin: int, end: int) -> np.ndarray:
    """Returns the weights of the samples ``[begin, end)``, int64[end - begin, num_sources]."""
    batch = schedule.samples_per_iteration
    first, last = begin // batch, -(-end // batch)
    rows = np.stack([schedule.weights(t * batch) for t in range(first, last)])
    return np.repeat(rows, batch, axis=0)[begin - first * batch : end - first * batch]


def worst_error(
    weights: np.ndarray,
    source: np.ndarray,
    counts: Any = 0,
    quotas: Any = 0,
) -> int:
    """Returns the largest ``|count * 2**32 - quota|`` over all prefixes and sources.

    Args:
        weights: Weights of the samples, int64[n, num_sources].
        source: Source of each draw, int16[n].
        counts: Counts before the first of these draws.
        quotas: Quotas before the first of these draws, in units of 2**-32.
    """
    drawn = np.cumsum(source[:, None] == np.arange(weights.shape[1])[None, :], axis=0)
    start = np.asarray(counts, np.int64) * GRID - np.asarray(quotas, np.int64)
    return int(np.abs(start + drawn * GRID - np.cumsum(weights, axis=0)).max())


def brute_index(source: np.ndarray, num_sources: int) -> np.ndarray:
    """Returns, by counting, the index of each draw within its source."""
    counts = [0] * num_sources
    index = []
    for k in source.tolist():
        index.append(counts[k])
        counts[k] += 1
    return np.array(index, np.int64)
