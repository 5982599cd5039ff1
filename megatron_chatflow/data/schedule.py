"""The schedule: every source's weight at every sample, as exact integers.

In: the ``data.schedule`` block of a run's configuration. Out: `Schedule.weights`, integers on a
grid of 2**32 that sum to 2**32 exactly, and `Schedule.table`, from which the blend works.

**Which weights hold when.** Samples ``[t * B, (t + 1) * B)`` form iteration t, where B is
``samples_per_iteration``. The schedule is evaluated once for an iteration, at its first sample
``x = t * B``, and holds for all its samples. Before the first knot and after the last the weights
are constant. Between knots at a and b, for ``a <= x < b``:

- ``step``: the weights of the knot at a; those of b hold from ``x = b`` on;
- ``linear``: the cumulative levels are ``C_a + floor((C_b - C_a) * (x - a) / (b - a))``;
- ``cosine``: the same along 64 chords, whose ends lie at ``(x - a) / (b - a) = j / 64``
  and whose levels come from a frozen table (`megatron_chatflow.data.cosine`).

So a knot inside an iteration takes effect from the first iteration that begins at or after it, and
a ramp between such knots is still read at the exact place of each iteration's first sample.

**Rounding.** The level of source k at a knot is ``floor(2**32 * (p_0 + ... + p_k) / sum p)`` in
exact rationals; a number written 0.1 means one tenth. Its weight is the difference of neighbouring
levels, so a weight is off by less than 2**-32 for each rounding, and one below that may become 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.cosine import COSINE_PORTIONS, NUM_CHORDS
from megatron_chatflow.data.schedule_block import Knot, ScheduleBlock
from megatron_chatflow.native.quota_reference import GRID, Piece, Quota, WeightTable


class Schedule:
    """Weights of every source as a function of the sample; immutable.

    Attributes:
        sources: The names, in the order of `weights`.
        samples_per_iteration: Samples that share one evaluation of the weights.
        unit: What the written knots count: samples, tokens or iterations.
        seq_length: Tokens per sample; None where it is not known.
        iteration_origin: The sample from which knots in iterations count; see `ScheduleBlock`.
        knots: The knots, at samples, with their cumulative integer levels.
    """

    def __init__(self, block: ScheduleBlock):
        """Builds the schedule; use `from_dict` on anything that a user wrote."""
        self._block = block
        self.sources: tuple[str, ...] = block.sources
        self.samples_per_iteration: int = block.samples_per_iteration
        self.unit: str = block.unit
        self.seq_length: int | None = block.seq_length
        self.iteration_origin: int = block.iteration_origin
        self.knots: tuple[Knot, ...] = block.knots
        # Where iterations begin: at 0 as long as all have been of one size.
        self._origin = block.iteration_origin % block.samples_per_iteration
        self._quota = Quota(self.table(self._origin), self._origin)

    @classmethod
    def from_dict(
        cls,
        block: Mapping[str, Any],
        sources: Sequence[str] | None = None,
        samples_per_iteration: int | None = None,
        seq_length: int | None = None,
        iteration_origin: int | None = None,
    ) -> Schedule:
        """Reads a schedule as it stands in YAML, or as `to_dict` wrote it.

        Args:
            block: ``{unit, knots}``; `to_dict` adds the other arguments to it.
            sources: Every source's name, in order. A source that a knot does not name weighs 0.
            samples_per_iteration: Samples that share one evaluation of the weights: the global
                batch size that the run began with.
            seq_length: Tokens per sample, for knots in tokens.
            iteration_origin: The sample from which knots in iterations count; 0 when left out.

        Returns:
            The schedule.

        Raises:
            UserError: The block is not a schedule; the message names the path within it.
        """
        given = {
            "sources": sources,
            "samples_per_iteration": samples_per_iteration,
            "seq_length": seq_length,
            "iteration_origin": iteration_origin,
        }
        return cls(ScheduleBlock.parse(block, given))

    def weights(self, sample: int) -> npt.NDArray[np.int64]:
        """The weights of a sample, int64[num_sources]: they sum to 2**32, none is negative."""
        if sample < 0:
            raise ValueError(f"sample {sample}: samples count from 0")
        return self._quota.weights(max(sample - self._origin, 0) // self.samples_per_iteration)

    def weights_at(self, sample: int) -> npt.NDArray[np.int64]:
        """The weights at exactly this place, int64[num_sources], wherever iterations begin."""
        return Quota(self.table(sample, 1), sample).weights(0)

    def position(self, sample: int, unit: str | None = None) -> int:
        """The first position in a unit, by default the schedule's own, not before a sample.

        Of a knot's sample this is the position that was written.
        """
        unit = unit or self.unit
        if unit == self.unit:
            for knot, written in zip(self.knots, self._block.written, strict=True):
                if knot.at == sample:
                    return int(written["at"])
        if unit == "iterations":
            return -((self.iteration_origin - sample) // self.samples_per_iteration)
        return sample * self.seq_length if unit == "tokens" and self.seq_length else sample

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs to create this schedule again, exactly; JSON can hold it."""
        return self._block.to_dict()

    def fingerprint(self) -> str:
        """SHA-256 in hex of what the weights depend on: the same for 0.5 and 1/2, K and 1000."""
        knots: list[list[Any]] = []
        for number, knot in enumerate(self.knots):
            knots.append([knot.at, list(knot.levels), knot.ramp if number else "step"])
            if knot.towards is not None:
                knots[-1].append([knot.towards.at, list(knot.towards.levels)])
        content = {
            "sources": self.sources,
            "samples_per_iteration": self.samples_per_iteration,
            "knots": knots,
        }
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def with_sources(self, sources: Sequence[str]) -> Schedule:
        """The same schedule with its sources in another order, or with more of weight 0."""
        return Schedule.from_dict({**self.to_dict(), "sources": list(sources)})

    def with_iterations(self, samples_per_iteration: int, iteration_origin: int) -> Schedule:
        """The same schedule where iterations have another size; knots in iterations move."""
        grid = {
            "samples_per_iteration": samples_per_iteration,
            "iteration_origin": iteration_origin,
        }
        return Schedule.from_dict({**self.to_dict(), **grid})

    def table(self, origin: int = 0, samples_per_iteration: int | None = None) -> WeightTable:
        """The weights on a grid of iterations, as the blend reads them.

        Args:
            origin: The sample with which iteration 0 of the grid begins.
            samples_per_iteration: The grid's step; the schedule's own when left out.

        Returns:
            Pieces on which every level is linear in the iteration.
        """
        builder = _TableBuilder(origin, samples_per_iteration or self.samples_per_iteration)
        builder.add(None, None, self.knots[0], self.knots[0])
        for first, last in pairwise(self.knots):
            goal = last.towards or last
            if last.ramp == "step":
                builder.add(first.at, last.at, first, first)
            elif last.ramp == "linear":
                builder.add(first.at, goal.at, first, goal)
            else:
                # Chords beyond the knot exist only where an edit cut the ramp short.
                num_chords = -((first.at - last.at) * NUM_CHORDS // (goal.at - first.at))
                for chord in range(num_chords):
                    builder.add(first.at, goal.at, first, goal, chord, NUM_CHORDS)
        builder.add(self.knots[-1].at, None, self.knots[-1], self.knots[-1])
        return builder.build()


class _TableBuilder:
    """Collects pieces in order of their samples; pieces that hold no iteration's begin vanish."""

    def __init__(self, origin: int, samples_per_iteration: int):
        self._origin = origin
        self._batch = samples_per_iteration
        self._rows: dict[tuple[int, ...], int] = {}
        self._row_of: dict[int, int] = {}  # by the knot's identity: levels are long to hash
        self._pieces: list[Piece] = []

    def add(
        self,
        begin: int | None,
        end: int | None,
        first: Knot,
        last: Knot,
        chord: int = 0,
        num_chords: int = 1,
    ) -> None:
        """Adds what lies between two knots, or one of the equal chords between them."""
        row, last_row = self._row(first), self._row(last)
        portions = (0, GRID)
        if num_chords > 1:
            portions = (COSINE_PORTIONS[chord], COSINE_PORTIONS[chord + 1])
        if begin is None:
            start = 0
        elif end is None:
            start = self._iteration(begin)
        else:
            start = self._iteration(begin - (begin - end) * chord // num_chords)
        if row == last_row:
            self._append(Piece(start, row, row, 0, 0, 0, 0, 1))
            return
        assert begin is not None and end is not None
        # Place within the chord at iteration t: ((x_t - begin) * num_chords / span - chord).
        span = end - begin
        step = self._batch * num_chords
        phase = (self._origin + start * self._batch - begin) * num_chords - chord * span
        shared = gcd(step, phase, span)
        place = (step // shared, phase // shared, span // shared)
        self._append(Piece(start, row, last_row, *portions, *place))

    def build(self) -> WeightTable:
        """The table."""
        return WeightTable(self._origin, self._batch, tuple(self._rows), tuple(self._pieces))

    def _append(self, piece: Piece) -> None:
        if self._pieces and self._pieces[-1].begin >= piece.begin:
            self._pieces.pop()
        if self._pieces and self._pieces[-1][1:] == piece[1:] and piece.is_constant:
            return
        self._pieces.append(piece)

    def _row(self, knot: Knot) -> int:
        if id(knot) not in self._row_of:
            self._row_of[id(knot)] = self._rows.setdefault((0, *knot.levels), len(self._rows))
        return self._row_of[id(knot)]

    def _iteration(self, sample: int) -> int:
        """The first iteration that begins at or after a sample."""
        return max(-((self._origin - sample) // self._batch), 0)
