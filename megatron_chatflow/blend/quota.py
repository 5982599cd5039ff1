"""Quotas: sums of weights and their inverses in closed form, in exact integers.

The quota ``W_k(i)`` is the sum of source k's weights over the samples before ``i``. `Quota`
evaluates it and its inverse in a few integer operations for any ``i``, without a loop over samples.

A `WeightTable` stores cumulative levels ``C_0 = 0 <= C_1 <= ... <= C_n = 2**32`` instead of
weights. The weight of source k is ``C_{k+1} - C_k`` (sources count from 0). A convex combination of
two monotone rows stays monotone when rounded down, so on a ramp no weight is negative and the sum
is exactly 2**32. The sum of a rounded linear function is a floor sum, which Euclid's algorithm
evaluates.

All numbers are Python integers. This is the reference implementation: the C++ in ``csrc/blend``
must return equal numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

GRID_BITS = 32
GRID = 1 << GRID_BITS
"""The sum of all weights of one sample: weights are multiples of 2**-32."""

NEVER = 1 << 62
"""A sample number beyond every run: the inverse of a quota that is never reached."""


class Interval(NamedTuple):
    """Iterations on which every level is linear, up to the begin of the next interval.

    At iteration ``t`` a level is ``a + floor((e - a) * (step * (t - begin) + phase) / span)``. The
    values ``a`` and ``e`` interpolate between the table's rows ``row_begin`` and ``row_end``, with
    the fractions ``portion_begin / 2**32`` and ``portion_end / 2**32``, rounded down.
    """

    begin: int
    row_begin: int
    row_end: int
    portion_begin: int
    portion_end: int
    step: int
    phase: int
    span: int

    @property
    def is_constant(self) -> bool:
        """Whether the levels are constant throughout the interval."""
        return self.row_begin == self.row_end


@dataclass(frozen=True)
class WeightTable:
    """The weights of a schedule on a grid of iterations."""

    origin: int  # the first sample of iteration 0
    samples_per_iteration: int  # number of samples with the same weights
    # rows of cumulative levels, each of ``num_sources + 1`` integers from 0 to 2**32
    levels: tuple[tuple[int, ...], ...]
    # Consecutive intervals. The first begins at iteration 0, and the last has no end.
    intervals: tuple[Interval, ...]

    @property
    def num_sources(self) -> int:
        """Number of sources."""
        return len(self.levels[0]) - 1


def floor_sum(num_terms: int, modulus: int, factor: int, shift: int) -> int:
    """Returns the exact sum of ``floor((factor * x + shift) / modulus)``, 0 <= x < num_terms.

    The modulus is at least 1; the other arguments are not negative. The sum is the number of
    lattice points under a line. As in Euclid's algorithm, the points are counted by columns, then
    the remaining points by rows, alternately.
    """
    total = 0
    while True:
        if factor >= modulus:
            total += num_terms * (num_terms - 1) // 2 * (factor // modulus)
            factor %= modulus
        if shift >= modulus:
            total += num_terms * (shift // modulus)
            shift %= modulus
        last = factor * num_terms + shift
        if last < modulus:
            return total
        num_terms, shift = divmod(last, modulus)
        modulus, factor = factor, modulus


class Quota:
    """Quotas ``W_k(i)`` of every source from the sample ``begin`` on.

    Args:
        table: The weights.
        begin: The first sample that the quotas count; at least ``table.origin``.
        base: ``W_k(begin)`` in units of 2**-32 samples; zeros by default.
    """

    def __init__(self, table: WeightTable, begin: int = 0, base: Sequence[int] | None = None):
        self.table = table
        self.begin = begin
        self.num_sources = table.num_sources
        self._starts = [interval.begin for interval in table.intervals]
        self._at_begin = list(base or [0] * self.num_sources)
        # Cache of `weights`: the last interval, and the begins and rises of its levels.
        self._lines: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty((2, 0), np.int64))

    def quotas(self, sample: int) -> list[int]:
        """Returns ``W_k(sample)`` of every source, in units of 2**-32 samples."""
        grown = self._sums_before(sample)
        return [base + due for base, due in zip(self._base, grown, strict=True)]

    def weights(self, iteration: int) -> npt.NDArray[np.int64]:
        """Returns the weights of one iteration, int64[num_sources], which sum to 2**32."""
        number = bisect_right(self._starts, iteration) - 1
        if number != self._lines[0]:
            lines = [self._line(number, k) for k in range(self.num_sources + 1)]
            self._lines = (number, np.array(lines, np.int64).T)
        begins, rises = self._lines[1]
        interval = self.table.intervals[number]
        place = interval.step * (iteration - interval.begin) + interval.phase
        if place >> (62 - GRID_BITS):  # the product may overflow int64
            rises = rises.astype(object)
        levels = np.asarray(begins + rises * place // interval.span, np.int64)
        return levels[1:] - levels[:-1]

    def level_array(self, k: int, first: int, last: int) -> npt.NDArray[np.int64]:
        """Returns the levels ``C_k`` of the iterations [first, last), int64[last - first]."""
        parts = []
        number = bisect_right(self._starts, first) - 1
        while first < last:
            end = self._starts[number + 1] if number + 1 < len(self._starts) else last
            end = min(end, last)
            parts.append(self._level_interval(number, k, first, end))
            first, number = end, number + 1
        return np.concatenate(parts)

    def first_at_least(self, k: int, quota: int) -> int:
        """Returns the first sample ``i >= begin`` with ``W_k(i) >= quota``, or `NEVER`."""
        if self._quota(k, self.begin) >= quota:
            return self.begin
        batch = self.table.samples_per_iteration
        first = max((self.begin - self.table.origin) // batch, 0)
        low = bisect_right(self._starts, first) - 1
        high = len(self._starts)
        while high - low > 1:  # the last interval that begins below the quota
            middle = (low + high) // 2
            if self._at_iteration(k, self._starts[middle]) < quota:
                low = middle
            else:
                high = middle
        start = max(self._starts[low], first)
        if self.table.intervals[low].is_constant:
            return self._within(k, start, quota)
        stop = self._starts[low + 1]
        while stop - start > 1:  # the last iteration that begins below the quota
            middle = (start + stop) // 2
            if self._at_iteration(k, middle) < quota:
                start = middle
            else:
                stop = middle
        return self._within(k, start, quota)

    def last_at_most(self, k: int, quota: int) -> int:
        """Returns the last sample ``i`` with ``W_k(i) <= quota``, or ``begin - 1``."""
        return self.first_at_least(k, quota + 1) - 1

    def _within(self, k: int, iteration: int, quota: int) -> int:
        """Returns the inverse, assuming that the weight of ``iteration`` holds from there on."""
        number = bisect_right(self._starts, iteration) - 1
        weight = self._level(number, k + 1, iteration) - self._level(number, k, iteration)
        if weight == 0:
            return NEVER
        missing = quota - self._at_iteration(k, iteration)
        first = self.table.origin + iteration * self.table.samples_per_iteration
        return first - (-missing // weight)

    def _at_iteration(self, k: int, iteration: int) -> int:
        return self._quota(k, self.table.origin + iteration * self.table.samples_per_iteration)

    def _quota(self, k: int, sample: int) -> int:
        iteration, rest = divmod(sample - self.table.origin, self.table.samples_per_iteration)
        number = bisect_right(self._starts, iteration) - 1
        above = self._level_sum(number, k + 1, iteration, rest)
        return self._base[k] + above - self._level_sum(number, k, iteration, rest)

    def _level_sum(self, number: int, k: int, iteration: int, rest: int) -> int:
        """Returns the sum of ``C_k`` from the origin to ``rest`` samples into an iteration."""
        whole = self._sums[number][k] + self._interval_sum(
            number, k, iteration - self._starts[number]
        )
        batch = self.table.samples_per_iteration
        return batch * whole + (rest * self._level(number, k, iteration) if rest else 0)

    def _level(self, number: int, k: int, iteration: int) -> int:
        interval = self.table.intervals[number]
        a, rise = self._line(number, k)
        return (
            a
            + rise
            * (interval.step * (iteration - interval.begin) + interval.phase)
            // interval.span
        )

    def _level_interval(self, number: int, k: int, first: int, last: int) -> npt.NDArray[np.int64]:
        interval = self.table.intervals[number]
        a, rise = self._line(number, k)
        if rise == 0:
            return np.full(last - first, a, np.int64)
        top = interval.step * (last - interval.begin) + interval.phase
        # Rarely, products overflow int64 and Python integers are used.
        dtype: type = np.int64 if abs(rise) * top < 1 << 63 else object
        place: npt.NDArray[Any] = np.arange(first - interval.begin, last - interval.begin).astype(
            dtype
        )
        return np.asarray(
            a + rise * (interval.step * place + interval.phase) // interval.span, np.int64
        )

    def _interval_sum(self, number: int, k: int, num_iterations: int) -> int:
        """Returns the sum of ``C_k`` over the first iterations of an interval."""
        interval = self.table.intervals[number]
        a, rise = self._line(number, k)
        total = a * num_iterations
        if rise > 0:
            total += floor_sum(
                num_iterations, interval.span, rise * interval.step, rise * interval.phase
            )
        elif rise < 0:  # floor(-x / m) is -floor((x + m - 1) / m)
            shift = -rise * interval.phase + interval.span - 1
            total -= floor_sum(num_iterations, interval.span, -rise * interval.step, shift)
        return total

    def _line(self, number: int, k: int) -> tuple[int, int]:
        """Returns a level at the begin of an interval, and the difference to its end."""
        interval = self.table.intervals[number]
        first = self.table.levels[interval.row_begin][k]
        difference = self.table.levels[interval.row_end][k] - first
        begin = first + (difference * interval.portion_begin >> GRID_BITS)
        return begin, first + (difference * interval.portion_end >> GRID_BITS) - begin

    def _sums_before(self, sample: int) -> list[int]:
        """Returns the sum of each source's weights from the table's origin to a sample."""
        iteration, rest = divmod(sample - self.table.origin, self.table.samples_per_iteration)
        number = bisect_right(self._starts, iteration) - 1
        levels = range(self.num_sources + 1)
        sums = [self._level_sum(number, k, iteration, rest) for k in levels]
        return [above - below for below, above in pairwise(sums)]

    @cached_property
    def _base(self) -> list[int]:
        """Quotas minus the sums of weights from the table's origin."""
        before = self._sums_before(self.begin)
        return [base - due for base, due in zip(self._at_begin, before, strict=True)]

    @cached_property
    def _sums(self) -> list[list[int]]:
        """Sums of every level over all iterations before each interval."""
        sums = [[0] * (self.num_sources + 1)]
        for number in range(len(self._starts) - 1):
            length = self._starts[number + 1] - self._starts[number]
            sums.append(
                [s + self._interval_sum(number, k, length) for k, s in enumerate(sums[number])]
            )
        return sums
