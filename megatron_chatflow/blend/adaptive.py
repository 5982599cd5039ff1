"""A blend with weights that are determined during the run, one horizon ahead.

`AdaptiveBlend` requests weights from a `WeightsProvider` once per horizon of samples, in order, and
draws samples through the interface of `megatron_chatflow.blend.blend.Blend`. It is the extension
point for controllers that set weights from losses. The package contains no such controller.

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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_chatflow.blend.engine import index_within_source
from megatron_chatflow.blend.quota import GRID
from megatron_chatflow.errors import UserError

FORMAT_VERSION = 1


class WeightsProvider(Protocol):
    """Provides the weights one horizon, which is a number of samples, ahead."""

    horizon: int

    def weights(self, begin: int, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the weights of ``[begin, begin + horizon)``, int64[num_sources] of sum 2**32.

        ``begin`` is a multiple of ``horizon``; every multiple is requested once, in order.
        ``counts`` are the draws of each source before it, int64[num_sources].
        """


class AdaptiveBlend:
    """A sequence of draws that follows a `WeightsProvider`.

    All provided weights are recorded, so that any drawn part of the sequence can be drawn again.
    `sources` and `take` are those of `megatron_chatflow.blend.blend.Blend`.
    """

    def __init__(
        self,
        sources: Sequence[str],
        provider: WeightsProvider,
        state: Mapping[str, Any] | None = None,
    ):
        """Starts a run, or resumes it from a state that `state_at` returned.

        Raises:
            UserError: The state has other sources or another horizon, or is damaged.
        """
        self.sources = tuple(sources)
        self.horizon = provider.horizon
        self._provider = provider
        self._weights: list[npt.NDArray[np.int64]] = []
        # Counts and lags (quota minus count, in units of 2**-32) at the begin of each horizon.
        self._counts = [np.zeros(len(sources), np.int64)]
        self._lags = [np.zeros(len(sources), np.int64)]
        self._drawn: tuple[int, npt.NDArray[np.int16]] = (-1, np.empty(0, np.int16))
        if state is not None:
            self._restore(state)

    def take(self, begin: int, end: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Draws the samples ``[begin, end)``; see `Blend.take`.

        Raises:
            UserError: The range is invalid, or the provider returned invalid weights.
        """
        if not 0 <= begin <= end:
            raise UserError(
                f"take({begin}, {end}): the samples must be non-negative and in increasing order"
            )
        sources, indices = [np.empty(0, np.int16)], [np.empty(0, np.int64)]
        while begin < end:
            number, offset = divmod(begin, self.horizon)
            drawn = self._horizon(number)
            stop = min(self.horizon, offset + end - begin)
            indices.append(index_within_source(drawn, self._counts[number])[offset:stop])
            sources.append(drawn[offset:stop])
            begin += stop - offset
        return np.concatenate(sources), np.concatenate(indices)

    def counts(self, sample: int) -> npt.NDArray[np.int64]:
        """Returns the draws of each source before ``sample``, int64[num_sources]."""
        number, offset = divmod(sample, self.horizon)
        if offset == 0 and number < len(self._counts):
            return self._counts[number].copy()
        drawn = self._horizon(number)[:offset]
        return self._counts[number] + np.bincount(drawn, minlength=len(self.sources))

    def state_at(self, sample: int) -> dict[str, Any]:
        """Returns the JSON-compatible state after ``sample`` samples, with all weights so far."""
        answers = self._weights[: -(-sample // self.horizon)]
        return {
            "format_version": FORMAT_VERSION,
            "position": sample,
            "sources": list(self.sources),
            "horizon": self.horizon,
            "weights": [weights.tolist() for weights in answers],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        if state.get("format_version") != FORMAT_VERSION or "weights" not in state:
            raise UserError(
                f"adaptive blend state: unknown format; this version reads {FORMAT_VERSION}"
            )
        if list(state["sources"]) != list(self.sources) or state["horizon"] != self.horizon:
            raise UserError("adaptive blend state: its sources or its horizon differ")
        for number, weights in enumerate(state["weights"]):
            self._weights.append(np.array(weights, np.int64))
            self._horizon(number)

    def _horizon(self, number: int) -> npt.NDArray[np.int16]:
        """Returns the draws of one horizon, int16[horizon]. Earlier horizons are drawn first."""
        while len(self._counts) <= number:
            self._horizon(len(self._counts) - 1)
        if self._drawn[0] == number:
            return self._drawn[1]
        if number == len(self._weights):
            answer = self._provider.weights(number * self.horizon, self._counts[number].copy())
            self._weights.append(np.array(answer, np.int64))
        weights = self._weights[number]
        if weights.shape != (len(self.sources),) or weights.min() < 0 or weights.sum() != GRID:
            raise UserError(
                f"weights at sample {number * self.horizon}: must be {len(self.sources)} "
                f"non-negative integers with the sum {GRID}"
            )
        drawn, lags = draw_horizon(weights, self._lags[number], self.horizon)
        if number + 1 == len(self._counts):
            added = np.bincount(drawn, minlength=len(self.sources))
            self._counts.append(self._counts[number] + added)
            self._lags.append(lags)
        self._drawn = (number, drawn)
        return drawn


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
