"""A blend with weights that are decided during the run, one horizon ahead.

A horizon is a number of samples with the same weights. `AdaptiveBlend.append` gives the weights of
one horizon after the other, and draws are made through the interface of
`megatron_chatflow.blend.blend.Blend`. `megatron_chatflow.blend.controllers` decides the weights.

Weights beyond the current horizon are unknown, so the tree of `megatron_chatflow.blend.engine`
cannot be built. Instead, the algorithm assumes that the current weights stay constant forever. Draw
j of source k is open from the slot in which the quota exceeds j until the quota reaches j + 1. If
some sources lag by one sample or more, the slot is assigned to the source with the largest lag.
Otherwise it is assigned to the open draw that reaches its full quota first. Ties are resolved in
favor of the source with the lower number.

**Bounds, for any sequence of weights.** No source is ever a whole sample ahead of its quota,
because a draw is made only after its quota has begun. For n sources, every lag is below
``H_n = 1 + 1/2 + ... + 1/n`` samples. Proof: let ``A_j`` be the largest mean lag of any j sources.
If some source lags by a sample or more, the slot is assigned to the source with the largest lag, so
``A_j(t + 1) <= max(A_j(t), A_{j+1}(t) + 1 / (j + 1))``. In any other slot all lags are below 1.
Hence ``A_j < 1 + H_n - H_j``, and j = 1 is the claim. No rule without knowledge of the future can
guarantee less than ``H_n - 1``. If the weights change moderately, the error stays below 1.

**Random access.** The weights of all horizons and the counts at one sample determine everything
from this sample on, because a lag is the sum of the weights minus the count. The state in a
checkpoint therefore holds both: one integer per source and horizon, and one per source. Samples
before it are drawn again from the beginning of the run.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.blend.blend import MAX_SAMPLES
from megatron_chatflow.blend.engine import index_within_source
from megatron_chatflow.blend.quota import GRID, GRID_BITS
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.errors import UserError

FORMAT_VERSION = 2
"""Differs from that of `megatron_chatflow.blend.edits`, so that neither reads the other's state."""
_MAX_PLACES = 4096


class AdaptiveBlend:
    """A sequence of draws under weights that are appended horizon by horizon.

    All weights are kept, so that any drawn part of the sequence can be drawn again. `take`,
    `counts`, `quotas`, `planned_shares` and `weights` are those of
    `megatron_chatflow.blend.blend.Blend`.

    Attributes:
        schedule: The schedule whose weights hold until the first decision.
        sources: Names of the sources, in the order of the numbers that `take` returns.
        horizon: Number of samples per horizon.
        edit: None; the schedule of such a run cannot be edited.
    """

    edit = None

    def __init__(
        self, schedule: Schedule, horizon: int, *, state: Mapping[str, Any] | None = None
    ) -> None:
        """Starts a run without any weights, or resumes it from a state that `state_at` returned.

        Raises:
            UserError: The state has other sources or another horizon, or is damaged.
        """
        self.schedule = schedule
        self.sources = schedule.sources
        self.horizon = horizon
        self._weights: list[npt.NDArray[np.int64]] = []
        # Sums of the weights at the begin of each horizon, in units of 2**-32 samples.
        self._quotas = [[0] * len(self.sources)]
        # Counts at some samples, from which draws can continue.
        self._places = [0]
        self._counts = {0: np.zeros(len(self.sources), np.int64)}
        self._is_complete = False
        if state is not None:
            self._restore(state)

    @property
    def num_decided(self) -> int:
        """Number of horizons with weights."""
        return len(self._weights)

    @property
    def decided_samples(self) -> int:
        """Number of samples whose draws are known."""
        return MAX_SAMPLES if self._is_complete else len(self._weights) * self.horizon

    def append(self, weights: npt.NDArray[np.int64] | Sequence[int]) -> None:
        """Sets the weights of the next horizon, int64[num_sources] of sum 2**32.

        Raises:
            UserError: They are negative or have another sum.
        """
        row = np.array(weights, np.int64)
        if row.shape != (len(self.sources),) or row.min() < 0 or row.sum() != GRID:
            raise UserError(
                f"weights at sample {self.num_decided * self.horizon}: must be "
                f"{len(self.sources)} non-negative integers with the sum {GRID}"
            )
        self._weights.append(row)
        grown = zip(self._quotas[-1], row.tolist(), strict=True)
        self._quotas.append([quota + self.horizon * weight for quota, weight in grown])

    def complete(self) -> None:
        """Keeps the last weights for all later horizons, which are not decided any more."""
        self._is_complete = True

    def decisions(self) -> list[list[int]]:
        """Returns the weights of all horizons so far, each int[num_sources]."""
        return [row.tolist() for row in self._weights]

    def take(self, begin: int, end: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Draws the samples ``[begin, end)``; see `Blend.take`.

        Raises:
            UserError: The range is invalid, or its weights are not decided yet.
        """
        if not 0 <= begin <= end:
            raise UserError(
                f"take({begin}, {end}): the samples must be non-negative and in increasing order"
            )
        before = self.counts(begin)
        source, after = self._draw(begin, end, before)
        self._keep(end, after)
        return source, index_within_source(source, before)

    def counts(self, sample: int) -> npt.NDArray[np.int64]:
        """Returns the draws of each source before ``sample``, int64[num_sources]."""
        place = self._places[bisect_right(self._places, sample) - 1]
        if place != sample:
            _, counts = self._draw(place, sample, self._counts[place])
            self._keep(sample, counts)
        return self._counts[sample].copy()

    def quotas(self, sample: int) -> list[int]:
        """Returns the sums of the weights before ``sample``, in units of 2**-32 samples."""
        number = min(sample // self.horizon, len(self._weights))
        offset = sample - number * self.horizon
        if not offset:
            return list(self._quotas[number])
        grown = zip(self._quotas[number], self.weights(sample - 1).tolist(), strict=True)
        return [quota + offset * weight for quota, weight in grown]

    def weights(self, sample: int) -> npt.NDArray[np.int64]:
        """Returns the weights of a sample, int64[num_sources], which sum to 2**32."""
        if sample >= self.decided_samples:
            raise UserError(f"sample {sample}: its weights are not decided yet")
        return self._weights[min(sample // self.horizon, len(self._weights) - 1)]

    def planned_shares(self, sample: int) -> npt.NDArray[np.float64]:
        """Returns the weights of a sample as shares, float64[num_sources]."""
        return self.weights(sample) / GRID

    def state_at(self, sample: int) -> dict[str, Any]:
        """Returns the JSON-compatible state after ``sample`` samples, with all decisions so far."""
        first = {
            "begin": 0,
            "origin": 0,
            "schedule": self.schedule.to_dict(),
            "counts": [0] * len(self.sources),
            "offsets": [0] * len(self.sources),
        }
        return {
            "format_version": FORMAT_VERSION,
            "position": sample,
            "sources": list(self.sources),
            "counts": self.counts(sample).tolist(),
            "segments": [first],  # as in any other run, so that the first batch size is found there
            "horizon": self.horizon,
            "weights": self.decisions(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"blend state: format {state.get('format_version')!r}: a run with a controller "
                f"has format {FORMAT_VERSION}"
            )
        try:
            names, horizon = list(state["sources"]), int(state["horizon"])
            position = int(state["position"])
            rows = [np.array(row, np.int64) for row in state["weights"]]
            counts = np.array(state["counts"], np.int64)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"blend state: {error!r}: the checkpoint's state is damaged") from error
        if names != list(self.sources) or horizon != self.horizon:
            raise UserError("blend state: its sources or its horizon differ")
        for row in rows:
            self.append(row)
        if counts.shape != (len(names),) or counts.sum() != position or counts.min() < 0:
            raise UserError(
                "blend state: the counts do not add up: the checkpoint's state is damaged"
            )
        self._keep(position, counts)

    def _keep(self, sample: int, counts: npt.NDArray[np.int64]) -> None:
        """Remembers the counts at a sample; forgets those that are furthest back but the first."""
        if sample not in self._counts:
            insort(self._places, sample)
            self._counts[sample] = counts
            if len(self._places) > _MAX_PLACES:
                del self._counts[self._places.pop(1)]

    def _draw(
        self, begin: int, end: int, counts: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Draws samples that follow ``counts``; returns their sources and the counts after them."""
        parts = [np.empty(0, np.int16)]
        # Lags are below H_n samples, so their difference fits into int64 where quotas may not.
        due = zip(self.quotas(begin), counts.tolist(), strict=True)
        lags = np.array([quota - (count << GRID_BITS) for quota, count in due], np.int64)
        while begin < end:
            stop = min(end, (begin // self.horizon + 1) * self.horizon)
            drawn, lags = draw_horizon(self.weights(begin), lags, stop - begin)
            parts.append(drawn)
            begin = stop
        source = np.concatenate(parts)
        return source, counts + np.bincount(source, minlength=len(counts))


def draw_horizon(
    weights: npt.NDArray[np.int64], lags: npt.NDArray[np.int64], num_samples: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Draws samples under constant weights, int64[num_sources] of sum 2**32.

    Takes and returns the lags before the first and after the last sample, int64[num_sources]: quota
    minus count in units of 2**-32.

    Returns:
        ``(source, lags)``, with the source of every sample, int16[num_samples].
    """
    never = np.int64(1) << 62
    lags = lags.copy()
    divisor = np.maximum(weights, 1)
    source = np.empty(num_samples, np.int16)
    for slot in range(num_samples):
        lags += weights
        chosen = int(lags.argmax())
        if lags[chosen] < GRID:
            # Slots until the quota of the open draw is complete.
            left = np.where(weights > 0, -((lags - GRID) // divisor), never - 1)
            chosen = int(np.where(lags > 0, left, never).argmin())
        lags[chosen] -= GRID
        source[slot] = chosen
    return source, lags
