"""Segments: a blend whose schedule is edited while the run goes on.

In: a new schedule, and the counts at the sample where it sets in. Out: a `Segment`: its schedule,
its first sample, what had been drawn by then and what was due; as JSON and back.

An edit at sample ``i`` keeps every draw before ``i``. From there on the quotas grow with the new
weights: ``W_k(i)`` is what the whole run owed source k so far. The counts at ``i`` were chosen with
the old weights ahead, and may not suit the new ones: with counts (1, 1, 0, 0) after two samples of
weights (1/4, 1/4, 1/4, 1/4), the third sample of (0, 0, 1/2, 1/2) leaves an error of 1 whatever is
drawn. So the new segment follows shifted quotas ``Z_k = W_k + o_k`` with constant whole numbers
``o_k`` of sum 0, the smallest of three kinds that `choose_offsets` finds to be feasible:

1. ``o = 0``: the error of the whole run stays below 1;
2. ``o_k`` = theta times the present error, theta = 1/16, 2/16, ... (theta = 1 always serves);
3. whole samples: the best feasible state for ``W`` is selected, and ``o_k`` is what separates the
   counts from it.

The error against ``W`` is below ``1 + max |o_k|``, which `Segment.error_bound` says; it is below 2
after one edit. The error against ``Z`` is below 1 as in any segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from megatron_chatflow.data.schedule import Schedule
from megatron_chatflow.native.blend import window_ends
from megatron_chatflow.native.blend_reference import Caps
from megatron_chatflow.native.quota_reference import GRID, GRID_BITS, Quota, WeightTable

FORMAT_VERSION = 1
NUM_OFFSET_STEPS = 16


@dataclass(frozen=True)
class Segment:
    """A stretch of the run under one schedule.

    Attributes:
        begin: Its first sample.
        origin: The sample from which its iterations count.
        schedule: Its schedule, over every source that the run has had.
        counts: Draws of each source before ``begin``.
        quotas: ``W_k(begin)``, in units of 2**-32 samples.
        offsets: ``o_k``, in the same units.
    """

    begin: int
    origin: int
    schedule: Schedule
    counts: tuple[int, ...]
    quotas: tuple[int, ...]
    offsets: tuple[int, ...]

    @cached_property
    def table(self) -> WeightTable:
        """The weights on the segment's own grid of iterations."""
        return self.schedule.table(self.origin)

    @cached_property
    def _quota(self) -> Quota:
        return Quota(self.table, self.begin, self.quotas)

    @property
    def base(self) -> list[int]:
        """``Z_k(begin)``."""
        return [quota + offset for quota, offset in zip(self.quotas, self.offsets, strict=True)]

    @property
    def error_bound(self) -> Fraction:
        """No count is this far from the whole run's quota, in samples."""
        return 1 + Fraction(max(map(abs, self.offsets)), GRID)

    def quotas_at(self, sample: int) -> list[int]:
        """``W_k(sample)``, for a sample of this segment or its end."""
        return self._quota.quotas(sample)

    def to_dict(self) -> dict[str, Any]:
        """The segment as JSON can hold it."""
        return {
            "begin": self.begin,
            "origin": self.origin,
            "schedule": self.schedule.to_dict(),
            "counts": list(self.counts),
            "offsets": list(self.offsets),
        }


def first_segment(schedule: Schedule) -> Segment:
    """The segment of a run that begins."""
    zeros = (0,) * len(schedule.sources)
    return Segment(0, 0, schedule, zeros, zeros, zeros)


def read_segments(entries: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Reads what `Segment.to_dict` wrote; sources that came later get weight 0 in earlier ones."""
    sources = Schedule.from_dict(entries[-1]["schedule"]).sources
    num_sources = len(sources)
    segments: list[Segment] = []
    for entry in entries:
        schedule = Schedule.from_dict(entry["schedule"]).with_sources(sources)
        begin = int(entry["begin"])
        quotas = segments[-1].quotas_at(begin) if segments else [0] * num_sources
        segments.append(
            Segment(
                begin,
                int(entry["origin"]),
                schedule,
                _padded(entry["counts"], num_sources),
                tuple(quotas),
                _padded(entry["offsets"], num_sources),
            )
        )
    return segments


def widen(segments: Sequence[Segment], sources: Sequence[str]) -> list[Segment]:
    """The same segments over more sources, which have had no weight."""
    num_sources = len(sources)
    return [
        Segment(
            segment.begin,
            segment.origin,
            segment.schedule.with_sources(sources),
            _padded(segment.counts, num_sources),
            _padded(segment.quotas, num_sources),
            _padded(segment.offsets, num_sources),
        )
        for segment in segments
    ]


def choose_offsets(
    table: WeightTable, begin: int, quotas: Sequence[int], counts: Sequence[int]
) -> list[int]:
    """The offsets ``o_k`` with which a segment may follow its schedule from these counts.

    Args:
        table: The new weights.
        begin: The first sample that they govern.
        quotas: ``W_k(begin)``, in units of 2**-32 samples.
        counts: Draws of each source before ``begin``.

    Returns:
        Whole numbers of sum 0 in units of 2**-32 samples.
    """
    errors = [(count << GRID_BITS) - quota for count, quota in zip(counts, quotas, strict=True)]
    for step in range(NUM_OFFSET_STEPS + 1):
        offsets, total, before = [], 0, 0
        for error in errors:
            total += error
            share = total * step // NUM_OFFSET_STEPS
            offsets.append(share - before)
            before = share
        if _is_feasible(
            table, begin, [q + o for q, o in zip(quotas, offsets, strict=True)], counts
        ):
            break
    if not any(offsets):
        return offsets
    whole = _whole_offsets(table, begin, quotas, counts, errors)
    return min(offsets, whole, key=lambda candidate: max(map(abs, candidate)))


def _is_feasible(
    table: WeightTable, begin: int, base: Sequence[int], counts: Sequence[int]
) -> bool:
    """Whether counts are quotas rounded down or up, and the rounded-up ones are within the caps."""
    floors = [value >> GRID_BITS for value in base]
    ahead = [count - floor for count, floor in zip(counts, floors, strict=True)]
    members = [k for k, value in enumerate(base) if value & (GRID - 1)]
    inside = set(members)
    if any(up not in ((0, 1) if k in inside else (0,)) for k, up in enumerate(ahead)):
        return False
    caps = _caps(table, begin, base, members)
    return all(caps.admit(member) for member, k in enumerate(members) if ahead[k])


def _whole_offsets(
    table: WeightTable,
    begin: int,
    quotas: Sequence[int],
    counts: Sequence[int],
    errors: Sequence[int],
) -> list[int]:
    """What separates the counts from a feasible state for the quotas, in whole samples."""
    members = [k for k, value in enumerate(quotas) if value & (GRID - 1)]
    caps = _caps(table, begin, quotas, members)
    state = [value >> GRID_BITS for value in quotas]
    wanted = sum(counts) - sum(state)
    for member in sorted(range(len(members)), key=lambda m: (-errors[members[m]], m)):
        if wanted and caps.admit(member):
            state[members[member]] += 1
            wanted -= 1
    return [(count - other) << GRID_BITS for count, other in zip(counts, state, strict=True)]


def _caps(table: WeightTable, begin: int, base: Sequence[int], members: Sequence[int]) -> Caps:
    ends = window_ends(table, begin, base)
    deadlines = [ends[k] for k in members]
    return Caps(deadlines, [base[k] & (GRID - 1) for k in members])


def _padded(values: Sequence[int], num_sources: int) -> tuple[int, ...]:
    return (*map(int, values), *[0] * (num_sources - len(values)))
