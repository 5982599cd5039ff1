"""What a resumed run's schedule may change: the future, never the past.

In: the state that a checkpoint carries, and the schedule of the resumed run. Out: the segments of
the whole run and the `Edit`, if there was one; a `UserError` that names the first sample whose
weights differ when that sample has been drawn already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_chatflow.data.schedule import Schedule
from megatron_chatflow.data.segments import (
    FORMAT_VERSION,
    Segment,
    choose_offsets,
    read_segments,
    widen,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.native.quota_reference import GRID, GRID_BITS, NEVER, Quota, WeightTable

ROUNDING = 2
"""Weights that differ by no more units of 2**-32 are the same ones, rounded at other knots: what
two schedules may differ by that draw the same line, as when a knot is put on a ramp."""


@dataclass(frozen=True)
class Edit:
    """An edit that was accepted.

    Attributes:
        begin: The first sample that the new schedule governs.
        error_bound: No count will be this far from the whole run's quota, in samples.
        added: Sources that were not there before.
        removed: Sources that are no longer there.
    """

    begin: int
    error_bound: Fraction
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the log."""
        parts = [f"schedule edited at sample {self.begin}"]
        parts += [f"added {name}" for name in self.added]
        parts += [f"removed {name}" for name in self.removed]
        bound = float(self.error_bound)
        return f"{', '.join(parts)}; every prefix stays within {bound:.4f} samples of its quota"


def resume(schedule: Schedule, state: Mapping[str, Any]) -> tuple[list[Segment], Edit | None]:
    """The segments of a resumed run, and what its schedule changed.

    Sources keep the places that they had; new ones follow, removed ones stay with weight 0.

    Args:
        schedule: The resumed run's schedule.
        state: What `megatron_chatflow.data.blend.Blend.state_at` returned.

    Raises:
        UserError: The schedule changes what was drawn already, or removes a source in use, or the
            state is not one.
    """
    position, counts, in_use, segments = _read(state)
    old = segments[-1].schedule.sources
    added = tuple(name for name in schedule.sources if name not in set(old))
    if added:
        segments = widen(segments, old + added)
        counts += [0] * len(added)
    ordered = schedule
    if schedule.sources != old + added:
        ordered = schedule.with_sources(old + added)
    removed = tuple(name for name in in_use if name not in set(schedule.sources))
    for name in removed:
        _check_removal(segments[-1], name, position, counts)
    absent = [k for k, name in enumerate(old) if name not in set(schedule.sources)]
    _check_past(segments, ordered, _last_weight(segments, absent, position), position)
    segment = next_segment(segments[-1], ordered, position, counts)
    if segment is None:
        return segments, None
    if segments[-1].begin == position:
        segments.pop()
    return [*segments, segment], Edit(position, segment.error_bound, added, removed)


def next_segment(
    last: Segment, schedule: Schedule, sample: int, counts: Sequence[int]
) -> Segment | None:
    """The segment that an edit at ``sample`` begins; None where nothing changes from there on.

    Args:
        last: The segment so far, over the same sources as ``schedule``.
        schedule: The new schedule.
        sample: The edit's place, not before the last segment's begin.
        counts: Draws of each source before ``sample``.
    """
    same_grid = _grid(schedule) == _grid(last.schedule)
    origin = last.origin if same_grid else sample
    table = schedule.table(origin)
    if same_grid and not _differs_from(last.table, table, sample):
        return None
    if not same_grid and _constant_levels(table, sample) == _constant_levels(last.table, sample):
        if _constant_levels(table, sample) is not None:
            return None
    quotas = tuple(last.quotas_at(sample))
    offsets = choose_offsets(table, sample, quotas, counts)
    return Segment(sample, origin, schedule, tuple(counts), quotas, tuple(offsets))


def _read(state: Mapping[str, Any]) -> tuple[int, list[int], Sequence[str], list[Segment]]:
    """Position, counts, sources in use and segments of a recorded state."""
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"blend state: format {version!r}: this version reads format {FORMAT_VERSION}"
        )
    try:
        segments = read_segments(state["segments"])
        position, counts = int(state["position"]), [int(count) for count in state["counts"]]
        in_use = list(state["sources"])
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"blend state: {error!r}: the checkpoint's state is damaged") from error
    if sum(counts) != position or len(counts) != len(segments[-1].counts):
        raise UserError("blend state: the counts do not add up: the checkpoint's state is damaged")
    return position, counts, in_use, segments


def _check_past(segments: Sequence[Segment], schedule: Schedule, begin: int, end: int) -> None:
    """Refuses a schedule that differs in the samples ``[begin, end)``, which were drawn."""
    for number, segment in enumerate(segments):
        stop = segments[number + 1].begin if number + 1 < len(segments) else end
        start = max(begin, segment.begin)
        if start >= stop:
            continue
        batch, _ = grid = _grid(segment.schedule)
        counted = schedule
        if schedule.unit == "iterations":  # compare with iterations of the size that they had
            counted = schedule.with_iterations(*grid)
        table = counted.table(segment.origin, batch)
        sample = first_difference(segment.table, table, start, stop)
        if sample is None:
            continue
        iteration = (sample - segment.origin) // batch
        was, now = (Quota(t, segment.origin).weights(iteration) for t in (segment.table, table))
        k = int(np.argmax(np.abs(np.subtract(now, was))))
        raise UserError(
            f"data.schedule: sample {sample} was drawn with other weights "
            f"({schedule.sources[k]} {was[k] / GRID:.6g}, now {now[k] / GRID:.6g}): "
            f"keep the schedule before sample {end} as it was and edit what comes after"
        )


def _last_weight(segments: Sequence[Segment], columns: Sequence[int], position: int) -> int:
    """The sample from which some sources have had no weight, up to ``position``.

    A schedule without these sources cannot say what the weights were before.
    """
    begin = 0
    for k in columns:
        due = segments[-1].quotas_at(position)[k]
        for segment in reversed(segments):
            if segment.quotas[k] < due:
                quota = Quota(segment.table, segment.begin, segment.quotas)
                begin = max(begin, quota.first_at_least(k, due))
                break
    return begin


def _check_removal(last: Segment, name: str, sample: int, counts: Sequence[int]) -> None:
    """Refuses to remove a source that has weight, or of which a draw is still owed.

    Raises:
        UserError: The source must stay; the message says what to do.
    """
    k = last.schedule.sources.index(name)
    iteration = (sample - 1 - last.origin) // last.schedule.samples_per_iteration
    weight = Quota(last.table, last.origin).weights(iteration)[k]
    if weight:
        raise UserError(
            f"data.sources.{name}: removed at sample {sample}, where its weight is still "
            f"{weight / GRID:.6g}: keep it until a knot has brought its weight to 0"
        )
    owed = last.quotas_at(sample)[k] - (counts[k] << GRID_BITS)
    if owed > 0:
        raise UserError(
            f"data.sources.{name}: removed at sample {sample}, where {owed / GRID:.6g} of a sample "
            "is still owed to it: keep it with weight 0"
        )


def first_difference(old: WeightTable, new: WeightTable, begin: int, end: int) -> int | None:
    """The first sample of ``[begin, end)`` at which two tables on one grid give other weights.

    Differences of up to `ROUNDING` units of 2**-32 do not count.
    """
    batch = old.samples_per_iteration
    iteration = (begin - old.origin) // batch
    stop = -(-(end - old.origin) // batch)
    while iteration < stop:
        lines = [_line(table, iteration) for table in (old, new)]
        following = min(stop, *(line[1] for line in lines))
        if lines[0][0] != lines[1][0]:
            found = _first_in_piece(old, new, iteration, following)
            if found is not None:
                return max(begin, old.origin + found * batch)
        iteration = following
    return None


def _first_in_piece(old: WeightTable, new: WeightTable, first: int, last: int) -> int | None:
    """The first iteration of ``[first, last)`` whose weights differ by more than rounding."""
    quotas = Quota(old, old.origin), Quota(new, new.origin)
    size = 64
    while first < last:
        end = min(first + size, last)
        size = min(2 * size, 1 << 16)
        differs = np.zeros(end - first, bool)
        below = np.zeros(end - first, np.int64)
        for k in range(1, old.num_sources + 1):
            one, other = (quota.level_array(k, first, end) for quota in quotas)
            above = one - other
            differs |= np.abs(above - below) > ROUNDING
            below = above
        if differs.any():
            return first + int(np.argmax(differs))
        first = end
    return None


def _grid(schedule: Schedule) -> tuple[int, int]:
    """What decides where iterations begin."""
    return schedule.samples_per_iteration, schedule.iteration_origin


def _constant_levels(table: WeightTable, sample: int) -> tuple[int, ...] | None:
    """The levels of every sample from ``sample`` on; None if they change."""
    (first, last, *_), end = _line(table, (sample - table.origin) // table.samples_per_iteration)
    return first if end == NEVER and first == last else None


def _differs_from(old: WeightTable, new: WeightTable, sample: int) -> bool:
    """Whether two tables on one grid are other functions from the iteration of ``sample`` on."""
    iteration = (sample - old.origin) // old.samples_per_iteration
    while True:
        lines = [_line(table, iteration) for table in (old, new)]
        if lines[0][0] != lines[1][0]:
            return True
        iteration = min(line[1] for line in lines)
        if iteration == NEVER:
            return False


def _line(table: WeightTable, iteration: int) -> tuple[tuple[Any, ...], int]:
    """The line that the levels follow at an iteration, and the iteration at which it ends."""
    number = max(n for n, piece in enumerate(table.pieces) if piece.begin <= iteration)
    piece = table.pieces[number]
    end = table.pieces[number + 1].begin if number + 1 < len(table.pieces) else NEVER
    place = (piece.step, piece.phase - piece.step * piece.begin, piece.span)
    first, last = table.levels[piece.row_begin], table.levels[piece.row_end]
    return (first, last, piece.portion_begin, piece.portion_end, *place), end
