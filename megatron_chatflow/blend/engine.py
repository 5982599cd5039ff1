"""The engine of the blend: draws the samples of one segment with every error below one.

Given the quotas of a segment and the counts at its first sample, an engine finds the source of
every later sample such that, at each sample ``i`` and for each source ``k``, the number of draws
differs from ``W_k(i) / 2**32`` by less than one. Such a sequence is known to exist (R. Tijdeman,
"The chairman assignment problem", Discrete Mathematics 32, 1980). The construction below is new: it
gives random access without replaying the sequence. `make_engine` returns the C++ engine of
``csrc/blend``, or `ReferenceEngine` if the extension is not built. Both draw the same sequence.

**Jobs.** The error is below one if and only if every count is its quota rounded down or up. Draw
number j of source k is therefore a unit job for one slot ``i`` with ``W_k(i + 1) > j`` and
``W_k(i) < j + 1`` (in samples). The release of the job is the last ``i`` with ``W_k(i) <= j``, the
deadline is the first ``i`` with ``W_k(i) >= j + 1``, and the window is the range of slots between
them. The state at a boundary is the set U of sources with a fractional quota and a count that is
rounded up. The fractional parts of all quotas sum to an integer ``m``, and U has ``m`` members.

**Select.** Let U_L and U_R be states at L and R that are connected by some sequence with errors
below one. `select` computes a state at T, L < T < R, that is connected to both. It uses only these
states and the quotas, not the sequence between them. A source must be in U if its current job at T
was done before L, and must not be in U if this job is still open at R. For every deadline d, the
number of members with a window that ends at d or later is limited to the sum of the fractional
parts of these windows at T, rounded up (`Caps`). The remaining members are added in the order of
release as long as the caps allow.

**Why this works.** Connecting L to R means matching unit jobs to slots, so Hall's theorem for
intervals applies. Intervals strictly inside [L, R] always have enough slots and jobs; only those
that touch L or R can fail.

- *Not too many jobs after T.* The jobs due before b fit into the slots before b if the number of
  members of U with a window that ends after b is within the limit given by the fractional parts of
  these windows at b. Fractional parts only grow inside a window, so the caps at T imply this for
  every later b.
- *Enough jobs before T.* The slots from a to T can be filled if the number of sources that were
  released before a and are outside U is within the limit at a. If sources are added in the order of
  release, this number is at most the larger of two quantities: the number of these sources outside
  U_R, and the sum of the fractions that are still missing in their windows at T. Both are within
  the limit at a.

Adding sources by deadline or by fraction fails. With weights (0, 0, 1/2, 1/2) followed by
(1/2, 1/2, 0, 0), the first sample must not be drawn from source 0 or 1.

**Tree.** The root covers 2**40 samples from the segment's begin. The state at its right end is
selected without a boundary on the right. The root is halved repeatedly down to leaves of 2**p
samples (`leaf_bits`). Within a leaf, the job with the earliest deadline is drawn first, which meets
all deadlines if any order does. Sizes and tie-breaking rules are part of the definition of the
sequence. An engine stores one count per source for each of at most 27 boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from megatron_chatflow.blend.quota import GRID, GRID_BITS, NEVER, Quota, WeightTable
from megatron_chatflow.runtime import load_extension

extension = load_extension("blend")


ROOT_BITS = 40
"""A segment's tree, and so a run, spans at most 2**40 samples."""


def leaf_bits(num_sources: int) -> int:
    """Returns the binary logarithm of the number of samples in a leaf."""
    if num_sources <= 128:
        return 14
    return 16 if num_sources <= 2048 else 20


class Caps:
    """Limits how many sources may be ahead of their quota in windows that end late.

    ``deadlines`` are the ends of the current windows of all sources with a fractional quota, and
    ``fractions`` the fractional parts of these quotas in units of 2**-32.
    """

    def __init__(self, deadlines: Sequence[int], fractions: Sequence[int]):
        ends = sorted(set(deadlines))
        group_of = {end: group for group, end in enumerate(ends)}
        self._group = [group_of[end] for end in deadlines]
        gathered = [0] * (len(ends) + 1)
        for group, fraction in zip(self._group, fractions, strict=True):
            gathered[group] += fraction
        for group in range(len(ends) - 1, -1, -1):
            gathered[group] += gathered[group + 1]
        caps = [-(-fraction >> GRID_BITS) for fraction in gathered]
        self._free = [cap - later for cap, later in pairwise(caps)]
        self._next = list(range(len(ends) + 1))

    def admit(self, member: int) -> bool:
        """Returns whether a member's group or a later one has a free slot, and occupies it."""
        group, path = self._group[member], []
        while True:
            while self._next[group] != group:
                path.append(group)
                group = self._next[group]
            for passed in path:
                self._next[passed] = group
            if group == len(self._free):
                return False
            if self._free[group] > 0:
                self._free[group] -= 1
                return True
            self._next[group] = group + 1


def select(
    quota: Quota, left: int, before: Sequence[int], right: int, after: Sequence[int] | None, at: int
) -> list[int]:
    """Selects the counts of every source at the sample ``at``, connected to both boundaries.

    ``before`` and ``after`` are the counts at ``left < at`` and ``right > at``. If there is no
    boundary on the right, these are `NEVER` and None. All counts are quotas rounded down or up.
    """
    quotas = quota.quotas(at)
    counts = [value >> GRID_BITS for value in quotas]
    members = [k for k, value in enumerate(quotas) if value & (GRID - 1)]
    deadlines = [min(quota.first_at_least(k, counts[k] + 1 << GRID_BITS), right) for k in members]
    releases = [max(quota.last_at_most(k, counts[k] << GRID_BITS), left) for k in members]
    fractions = [quotas[k] & (GRID - 1) for k in members]
    caps = Caps(deadlines, fractions)
    wanted = sum(fractions) >> GRID_BITS

    forced, free = [], []
    for member, k in enumerate(members):
        if before[k] == counts[k] + 1:  # already drawn in the window that contains `at`
            forced.append(member)
        elif after is None or after[k] != counts[k]:  # otherwise undrawn until `right`
            free.append((releases[member], deadlines[member], member))
    for member in forced + [entry[2] for entry in sorted(free)]:
        if wanted == 0:
            break
        if caps.admit(member):
            counts[members[member]] += 1
            wanted -= 1
    assert wanted == 0, "no state connects the two boundaries"
    return counts


class ReferenceEngine:
    """The reference implementation of `Engine`; see `make_engine`."""

    def __init__(
        self,
        table: WeightTable,
        begin: int,
        base: Sequence[int],
        counts: Sequence[int],
        num_leaf_bits: int | None = None,
    ):
        self.num_sources = table.num_sources
        self.begin = begin
        self._quota = Quota(table, begin, base)
        if num_leaf_bits is None:
            num_leaf_bits = leaf_bits(self.num_sources)
        self._leaf_size = 1 << num_leaf_bits
        end = begin + (1 << ROOT_BITS)
        root = select(self._quota, begin, counts, NEVER, None, end)
        self._root = ((begin, list(counts)), (end, root))
        self._left: tuple[int, list[int]]
        self._stack: list[tuple[int, list[int]]]  # right ends of all ancestors, nearest last
        self._source: npt.NDArray[np.int16]
        self._index: npt.NDArray[np.int64]
        self._reset()

    def take(self, begin: int, end: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Draws the samples ``[begin, end)``; see `Engine.take`."""
        source = np.empty(end - begin, np.int16)
        index = np.empty(end - begin, np.int64)
        at = begin
        while at < end:
            self._seek(at)
            leaf = self._left[0]
            stop = min(end, leaf + self._leaf_size)
            source[at - begin : stop - begin] = self._source[at - leaf : stop - leaf]
            index[at - begin : stop - begin] = self._index[at - leaf : stop - leaf]
            at = stop
        return source, index

    def counts(self, sample: int) -> npt.NDArray[np.int64]:
        """Returns the draws of each source before ``sample``, int64[num_sources]."""
        end, at_end = self._root[1]
        if sample == end:
            return np.array(at_end, np.int64)
        self._seek(sample)
        drawn = self._source[: sample - self._left[0]]
        return np.asarray(self._left[1], np.int64) + np.bincount(drawn, minlength=self.num_sources)

    def find(self, source: int, index: int) -> int:
        """Returns the sample of a draw; see `Engine.find`."""
        (left, _), (right, after) = self._root
        if after[source] <= index:
            return -1
        self._reset()
        while right - left > self._leaf_size:
            at = (left + right) // 2
            counts = self._split(left, right, at)
            if counts[source] > index:
                right = at
                self._stack.append((at, counts))
            else:
                left = at
                self._left = (at, counts)
        self._draw_leaf()
        here = (self._source == source) & (self._index == index)
        return left + int(np.flatnonzero(here)[0])

    def _reset(self) -> None:
        """Discards the current leaf. The next `_seek` starts at the root."""
        self._left = self._root[0]
        self._stack = [self._root[1]]
        self._source = np.empty(0, np.int16)
        self._index = np.empty(0, np.int64)

    def _seek(self, sample: int) -> None:
        """Moves to the leaf that contains ``sample``."""
        if sample < self._left[0]:
            self._reset()
        if sample < self._left[0] + len(self._source):
            return
        while self._stack[-1][0] <= sample:
            self._left = self._stack.pop()
        while self._stack[-1][0] - self._left[0] > self._leaf_size:
            at = (self._left[0] + self._stack[-1][0]) // 2
            state = (at, self._split(self._left[0], self._stack[-1][0], at))
            if sample < at:
                self._stack.append(state)
            else:
                self._left = state
        self._draw_leaf()

    def _split(self, left: int, right: int, at: int) -> list[int]:
        return select(self._quota, left, self._left[1], right, self._stack[-1][1], at)

    def _draw_leaf(self) -> None:
        """Draws the leaf between the current boundaries, earliest deadline first."""
        left, before = self._left
        right, after = self._stack[-1]
        release, deadline, owner = self._leaf_jobs(left, right, before, after)
        order = np.argsort(release, kind="stable")
        releases = [*release[order].tolist(), right]
        bits = 15  # a source is an int16
        keys = (deadline[order] << bits | owner[order]).tolist()
        heap: list[int] = []
        drawn = np.empty(right - left, np.int16)
        job = 0
        for slot in range(right - left):
            while releases[job] <= slot:
                heappush(heap, keys[job])
                job += 1
            assert heap, "a slot without a job"
            key = heappop(heap)
            assert key >> bits > slot, "a job after its deadline"
            drawn[slot] = key & ((1 << bits) - 1)
        self._source = drawn
        self._index = index_within_source(drawn, before)

    def _leaf_jobs(
        self, left: int, right: int, before: Sequence[int], after: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns the releases, deadlines (relative to ``left``) and sources of a leaf's jobs."""
        table = self._quota.table
        first = (left - table.origin) // table.samples_per_iteration
        last = -(-(right - table.origin) // table.samples_per_iteration)
        edges = table.origin + np.arange(first, last + 1) * table.samples_per_iteration - left
        edges = np.clip(edges, 0, right - left)
        lengths = np.diff(edges)
        releases, deadlines, owners = [], [], []
        below = self._quota.level_array(0, first, last)
        for k, value in enumerate(self._quota.quotas(left)):
            above = self._quota.level_array(k + 1, first, last)
            weights, below = above - below, above
            if after[k] == before[k]:
                continue
            floor = value >> GRID_BITS  # values relative to the floor fit into int64
            due = (value & (GRID - 1)) + np.concatenate(([0], np.cumsum(weights * lengths)))
            job = np.arange(before[k] - floor, after[k] - floor, dtype=np.int64) << GRID_BITS
            deadlines.append(_first_at_least(due, weights, edges, job + GRID))
            releases.append(np.maximum(_first_at_least(due, weights, edges, job + 1) - 1, 0))
            owners.append(np.full(len(job), k, np.int64))
        return np.concatenate(releases), np.concatenate(deadlines), np.concatenate(owners)


def index_within_source(
    source: npt.NDArray[np.int16], before: Sequence[int] | npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Returns the number of every draw within its source, int64[n], from the sources, int16[n].

    ``before`` are the draws of each source before the first.
    """
    order = np.argsort(source, kind="stable")
    counts = np.bincount(source, minlength=len(before))
    rank = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    index = np.empty(len(source), np.int64)
    index[order] = rank + np.asarray(before, np.int64)[source[order]]
    return index


def _first_at_least(
    due: npt.NDArray[np.int64],
    weights: npt.NDArray[np.int64],
    edges: npt.NDArray[np.int64],
    target: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Returns the first samples of a leaf at which a piecewise linear quota reaches each target.

    Args:
        due: int64[p + 1], the quota at every edge.
        weights: int64[p], the slope of the quota between edges.
        edges: int64[p + 1], from 0 to the leaf's size.
        target: int64[n], the targets.
    """
    at = np.searchsorted(due, target, side="left")
    inside = (at > 0) & (at < len(due))
    interval = np.where(inside, at, 1) - 1
    missing = target - due[interval]
    steps = -(-missing // np.maximum(weights[interval], 1))
    return np.where(inside, edges[interval] + steps, np.where(at == 0, 0, edges[-1]))


class Engine(Protocol):
    """Draws the samples of one segment."""

    def take(self, begin: int, end: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Draws the samples ``[begin, end)``.

        Returns:
            ``(source, index)``: int16[end - begin] and int64[end - begin], the number of each
            sample within its source.
        """

    def counts(self, sample: int) -> npt.NDArray[np.int64]:
        """Returns the draws of each source before ``sample``, int64[num_sources]."""

    def find(self, source: int, index: int) -> int:
        """Returns the sample of the ``index``-th draw of a source, or -1 if it is beyond the tree.

        ``index`` must be at least the source's count at the segment's begin.
        """


def make_engine(
    table: WeightTable,
    begin: int,
    base: Sequence[int],
    counts: Sequence[int],
    num_leaf_bits: int | None = None,
) -> Engine:
    """Creates the engine of a segment, in C++ if the extension is built.

    Args:
        table: The weights.
        begin: The segment's first sample.
        base: ``Z_k(begin)``: quotas including offsets, in units of 2**-32 samples.
        counts: Draws of each source before ``begin``, each ``base`` rounded down or up.
        num_leaf_bits: Leaf size for tests; `leaf_bits` by default.
    """
    if extension is None:
        return ReferenceEngine(table, begin, base, counts, num_leaf_bits)
    native = extension.BlendEngine(
        *_arguments(table, begin, base),
        np.array(counts, np.int64),
        -1 if num_leaf_bits is None else num_leaf_bits,
    )
    return cast(Engine, native)


def window_ends(table: WeightTable, begin: int, base: Sequence[int]) -> list[int]:
    """Returns the first sample at which each source's quota reaches its next whole number.

    ``base`` are the quotas at ``begin`` in units of 2**-32 samples. A quota that never reaches it
    has the sample `NEVER`.
    """
    if extension is not None:
        ends: list[int] = extension.window_ends(*_arguments(table, begin, base)).tolist()
        return ends
    quota = Quota(table, begin, base)
    return [
        quota.first_at_least(k, ((value >> GRID_BITS) + 1) << GRID_BITS)
        for k, value in enumerate(base)
    ]


def _arguments(table: WeightTable, begin: int, base: Sequence[int]) -> tuple[Any, ...]:
    """Converts the table and the quotas to the arguments of the extension."""
    return (
        table.origin,
        table.samples_per_iteration,
        np.array(table.levels, np.int64),
        np.array(table.intervals, np.int64),
        begin,
        np.array([value >> GRID_BITS for value in base], np.int64),
        np.array([value & (GRID - 1) for value in base], np.int64),
    )
