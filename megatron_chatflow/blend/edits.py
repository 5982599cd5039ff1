"""Edits of a running schedule: samples that were already drawn must keep their weights.

When a run resumes, `resume` compares its schedule with the state in the checkpoint. It returns the
segments of the run and the `Edit`, which is None if the schedule is unchanged. If the schedule
changes the weights of samples that were already drawn, `resume` raises a `UserError` that names the
first of them.

**Segments.** An edit at sample ``i`` keeps every draw before ``i`` and starts a `Segment` there.
From ``i`` on, the quotas grow with the new weights, starting from ``W_k(i)``, the sum of all
weights before ``i``. The counts at ``i`` were chosen for the old weights and may be infeasible for
the new ones. Example: after two samples with weights (1/4, 1/4, 1/4, 1/4) the counts are
(1, 1, 0, 0). If the weights change to (0, 0, 1/2, 1/2), the error is 1 after the third sample, no
matter which source is drawn. The new segment therefore follows shifted quotas ``Z_k = W_k + o_k``
with constant integers ``o_k`` that sum to 0. `choose_offsets` selects the smallest feasible offsets
of three kinds:

1. ``o = 0``: the error of the whole run stays below 1.
2. ``o_k`` = theta times the current error, theta = 1/16, 2/16, ...; theta = 1 is always feasible.
3. Whole samples: select the best feasible state for ``W``; ``o_k`` is the difference between the
   counts and that state.

The error against ``Z`` is below 1 as in any segment, so the error against ``W`` is below
``1 + max |o_k|`` (`Segment.error_bound`). It is below 2 after one edit.

**as_planned.** A knot with ``weights: as_planned`` keeps the recorded schedule up to its sample.
`resumed_schedule` replaces this knot, and every knot before it, by the recorded knots up to its
sample. If the knot ends a recorded ramp early, the original end of the ramp is recorded as
``towards``. The part before the knot then remains exactly the same function, without rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from megatron_chatflow.blend.engine import Caps, window_ends
from megatron_chatflow.blend.quota import GRID, GRID_BITS, NEVER, Quota, WeightTable
from megatron_chatflow.blend.schedule import (
    AS_PLANNED,
    PATH,
    Knot,
    Positions,
    Schedule,
    TokenCounts,
    read_block,
)
from megatron_chatflow.config import RunConfig, to_plain
from megatron_chatflow.config.fields import differing_numbers
from megatron_chatflow.errors import UserError

FORMAT_VERSION = 1
NUM_OFFSET_STEPS = 16
ROUNDING = 2
"""Weights that differ by at most this many units of 2**-32 are treated as equal. Two schedules that
define the same line by different knots do not differ by more."""


@dataclass(frozen=True)
class Segment:
    """A part of the run with one schedule."""

    begin: int  # first sample of the segment
    origin: int  # first sample of iteration 0 of the segment
    schedule: Schedule  # schedule of the segment, with all sources that the run has had
    counts: tuple[int, ...]  # draws of each source before ``begin``
    quotas: tuple[int, ...]  # ``W_k(begin)``, in units of 2**-32 samples
    offsets: tuple[int, ...]  # ``o_k``, in units of 2**-32 samples

    @cached_property
    def table(self) -> WeightTable:
        """The weights on the segment's own grid of iterations."""
        return self.schedule.table(self.origin)

    @cached_property
    def _quota(self) -> Quota:
        return Quota(self.table, self.begin, self.quotas)

    @property
    def base(self) -> list[int]:
        """The shifted quotas ``Z_k(begin)``, in units of 2**-32 samples."""
        return [quota + offset for quota, offset in zip(self.quotas, self.offsets, strict=True)]

    @property
    def error_bound(self) -> Fraction:
        """Exclusive bound of the error against the whole run's quota, in samples."""
        return 1 + Fraction(max(map(abs, self.offsets)), GRID)

    def quotas_at(self, sample: int) -> list[int]:
        """Returns ``W_k(sample)`` in units of 2**-32, for a sample of this segment or its end."""
        return self._quota.quotas(sample)

    def to_dict(self) -> dict[str, Any]:
        """Returns the segment as a JSON-compatible mapping."""
        return {
            "begin": self.begin,
            "origin": self.origin,
            "schedule": self.schedule.to_dict(),
            "counts": list(self.counts),
            "offsets": list(self.offsets),
        }


@dataclass(frozen=True)
class Edit:
    """An edit that was accepted."""

    begin: int  # the first sample with the new schedule
    error_bound: Fraction  # exclusive bound of the error against the whole run's quota, in samples
    added: tuple[str, ...] = ()  # sources that are only in the new schedule
    removed: tuple[str, ...] = ()  # sources that are only in the recorded schedule

    def __str__(self) -> str:
        """Returns one line for the log."""
        parts = [f"schedule edited at sample {self.begin}"]
        parts += [f"added {name}" for name in self.added]
        parts += [f"removed {name}" for name in self.removed]
        bound = float(self.error_bound)
        return f"{', '.join(parts)}; every prefix stays within {bound:.4f} samples of its quota"


def resume(schedule: Schedule, state: Mapping[str, Any]) -> tuple[list[Segment], Edit | None]:
    """Returns the segments of a resumed run and the edit that its schedule makes, or None.

    Existing sources keep their positions, new sources are appended, and removed sources remain with
    weight 0. ``state`` is a result of `megatron_chatflow.blend.blend.Blend.state_at`.

    Raises:
        UserError: The schedule changes samples that were already drawn or removes a source in
            use, or the state is damaged.
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
    _check_past(segments, ordered, _end_of_weights(segments, absent, position), position)
    segment = next_segment(segments[-1], ordered, position, counts)
    if segment is None:
        return segments, None
    if segments[-1].begin == position:
        segments.pop()
    return [*segments, segment], Edit(position, segment.error_bound, added, removed)


def next_segment(
    last: Segment, schedule: Schedule, sample: int, counts: Sequence[int]
) -> Segment | None:
    """Creates the segment of an edit at ``sample``; returns None if no later weight changes.

    The last segment has the same sources as ``schedule`` and does not begin after ``sample``.
    ``counts`` are the draws of each source before it.
    """
    same_grid = _grid(schedule) == _grid(last.schedule)
    origin = last.origin if same_grid else sample
    table = schedule.table(origin)
    if same_grid:
        if not _differs_from(last.table, table, sample):
            return None
    elif levels := _constant_levels(table, sample):
        if levels == _constant_levels(last.table, sample):
            return None
    quotas = tuple(last.quotas_at(sample))
    offsets = choose_offsets(table, sample, quotas, counts)
    return Segment(sample, origin, schedule, tuple(counts), quotas, tuple(offsets))


def choose_offsets(
    table: WeightTable, begin: int, quotas: Sequence[int], counts: Sequence[int]
) -> list[int]:
    """Returns the smallest offsets ``o_k`` with which a segment can continue from these counts.

    ``quotas`` are ``W_k(begin)`` and ``counts`` the draws before ``begin``, the first sample with
    the new weights. Quotas and offsets, of sum 0, are in units of 2**-32 samples.
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
    """Returns whether a segment can begin with these counts.

    Every count must be its quota rounded down or up, and `Caps` must admit all those rounded up.
    """
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
    """Returns the counts minus a feasible state of the quotas: whole samples in units of 2**-32.

    The sources that are rounded up in this state are chosen greedily, by descending error.
    """
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


def read_segments(entries: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """Creates segments from `Segment.to_dict`. Later sources have weight 0 in earlier segments."""
    sources = Schedule.from_dict(entries[-1]["schedule"]).sources
    segments: list[Segment] = []
    for entry in entries:
        begin = int(entry["begin"])
        quotas = tuple(segments[-1].quotas_at(begin)) if segments else ()
        counts, offsets = (tuple(map(int, entry[name])) for name in ("counts", "offsets"))
        schedule = Schedule.from_dict(entry["schedule"])
        segment = Segment(begin, int(entry["origin"]), schedule, counts, quotas, offsets)
        segments += widen([segment], sources)
    return segments


def widen(segments: Sequence[Segment], sources: Sequence[str]) -> list[Segment]:
    """Returns the same segments with additional sources of weight 0."""

    def padded(values: tuple[int, ...]) -> tuple[int, ...]:
        return (*values, *[0] * (len(sources) - len(values)))

    return [
        replace(
            segment,
            schedule=segment.schedule.with_sources(sources),
            counts=padded(segment.counts),
            quotas=padded(segment.quotas),
            offsets=padded(segment.offsets),
        )
        for segment in segments
    ]


def _read(state: Mapping[str, Any]) -> tuple[int, list[int], Sequence[str], list[Segment]]:
    """Returns the position, counts, sources in use and segments of a recorded state."""
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
    """Raises `UserError` if a schedule changes weights of the drawn samples ``[begin, end)``."""
    for number, segment in enumerate(segments):
        stop = segments[number + 1].begin if number + 1 < len(segments) else end
        start = max(begin, segment.begin)
        if start >= stop:
            continue
        batch, _ = grid = _grid(segment.schedule)
        counted = schedule
        if schedule.unit == "iterations":  # use the iteration size of the segment
            counted = schedule.with_iterations(*grid)
        table = counted.table(segment.origin, batch)
        sample = first_difference(segment.table, table, start, stop)
        if sample is None:
            continue
        iteration = (sample - segment.origin) // batch
        what = _difference(schedule.sources, segment.table, table, iteration)
        last = segments[-1].schedule
        unit, shown, with_flags = schedule.unit, schedule, ""
        if unit != "iterations" == last.unit and len({_grid(one.schedule) for one in segments}) > 1:
            # Only iterations express a ramp whose iterations had several sizes.
            unit, shown = "iterations", last
        if len(schedule.knots) == 1:  # --data-path creates such schedules
            with_flags = (
                "; flags alone cannot do this: with --data-path, use the weights that the run "
                "started with, or add the knot to a copy of the run's config.yaml and pass that "
                "as --config"
            )
        raise UserError(
            f"data.schedule: sample {sample} was drawn with other weights ({what}): keep the "
            f"schedule before sample {end} unchanged and edit only what follows; to do this, "
            f"{'' if unit == schedule.unit else f'keep unit: {unit} and '}replace all knots up to "
            f"there by {as_planned_knot(shown, end)} (unit: {unit}{with_flags})"
        )


def _end_of_weights(segments: Sequence[Segment], columns: Sequence[int], position: int) -> int:
    """Returns the sample from which the sources ``columns`` have no weight up to ``position``.

    A schedule without these sources cannot express the weights before this sample.
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
    """Raises `UserError` if a removed source has weight or an outstanding draw."""
    k = last.schedule.sources.index(name)
    iteration = (sample - 1 - last.origin) // last.schedule.samples_per_iteration
    weight = Quota(last.table, last.origin).weights(iteration)[k]
    if weight:
        raise UserError(
            f"data.sources.{name}: removed at sample {sample}, where its weight is still "
            f"{weight / GRID:.6g}: keep it until a knot sets its weight to 0"
        )
    deficit = last.quotas_at(sample)[k] - (counts[k] << GRID_BITS)
    if deficit > 0:
        raise UserError(
            f"data.sources.{name}: removed at sample {sample}, where its count is still "
            f"{deficit / GRID:.6g} samples below its quota: keep it with weight 0"
        )


def run_schedule(
    config: RunConfig,
    sources: Sequence[str],
    recorded: Mapping[str, Any] | None = None,
    iteration: int = 0,
    consumed_samples: int = 0,
    epochs: Mapping[str, tuple[int, int]] | None = None,
) -> Schedule:
    """Creates the schedule of a new or resumed run.

    ``recorded`` is the schedule in the checkpoint, before which there were ``iteration`` iterations
    and ``consumed_samples`` samples; None for a new run. ``epochs`` are the tokens that weights
    count, and the samples, in an epoch of each source; needed unless weights count samples.

    Raises:
        UserError: ``data.schedule`` is invalid; see `resumed_schedule`.
    """
    block = to_plain(config.data.schedule)
    positions = run_positions(config, recorded, iteration, consumed_samples)
    arguments: dict[str, Any] = {
        "sources": list(sources),
        "samples_per_iteration": positions.samples_per_iteration,
        "seq_length": config.data.seq_length,
        "epochs": None if config.data.schedule.count == "samples" else epochs,
    }
    if recorded is None:
        return Schedule.from_dict(block, **arguments)
    arguments["iteration_origin"] = positions.iteration_origin
    plan = Schedule.from_dict(recorded)
    _check_same_count(config, plan, arguments["epochs"])
    return resumed_schedule(block, plan, arguments)


def _check_same_count(
    config: RunConfig, recorded: Schedule, epochs: Mapping[str, tuple[int, int]] | None
) -> None:
    """Raises `UserError` if a resume changes what weights count, or how many there are."""
    count = config.data.schedule.count
    if count != recorded.count:
        raise UserError(
            f"data.schedule.count: {count} here and {recorded.count} in the checkpoint; what the "
            "weights of a run count cannot change"
        )
    for name, was in (recorded.tokens.epochs if recorded.tokens else {}).items():
        now = (epochs or {}).get(name, was)
        if tuple(now) != was:
            raise UserError(
                f"data.sources.{name}: has {now[0]:,} {count.replace('_', ' ')} in {now[1]:,} "
                f"samples here and {was[0]:,} in {was[1]:,} in the checkpoint, on which the "
                "weights of the run depend; restore loss and boundaries of the source"
            )


def run_positions(
    config: RunConfig,
    recorded: Mapping[str, Any] | None = None,
    iteration: int = 0,
    consumed_samples: int = 0,
) -> Positions:
    """Returns how the positions of ``data.schedule`` convert to samples; see `run_schedule`."""
    batch, origin = config.train.global_batch_size, 0
    unit = config.data.schedule.unit
    if recorded is not None and config.train.train_iters is not None and unit == "iterations":
        # Future iterations have the current batch size; past iterations keep their samples.
        origin = consumed_samples - iteration * batch
    elif recorded is not None:
        # Weights still change at multiples of the original batch size of the run.
        plan = Schedule.from_dict(recorded)
        batch, origin = plan.samples_per_iteration, plan.iteration_origin
    return Positions(unit, batch, origin, config.data.seq_length)


def resumed_schedule(
    block: Mapping[str, Any], recorded: Schedule, arguments: Mapping[str, Any]
) -> Schedule:
    """Creates the schedule of a resumed run and replaces ``as_planned`` knots by recorded ones.

    ``arguments`` are the other arguments of `Schedule.from_dict`, by name.

    Raises:
        UserError: The block is not a valid schedule, or a knot before an ``as_planned`` knot
            differs from the recorded schedule.
    """
    unset = dict.fromkeys(("samples_per_iteration", "seq_length", "iteration_origin", "epochs"))
    parsed, sources, positions, tokens = read_block(block, {"sources": None, **unset, **arguments})
    if all(knot.weights != AS_PLANNED for knot in parsed.knots):
        return Schedule(parsed, sources, positions, tokens)
    if positions.unit == recorded.unit == "iterations":
        recorded = recorded.with_iterations(
            positions.samples_per_iteration, positions.iteration_origin
        )
    given: list[dict[str, Any]] = to_plain(parsed.knots)
    resolved: list[dict[str, Any]] = []  # at samples
    for number, knot in enumerate(given):
        path = f"{PATH}.knots[{number}]"
        sample = positions.to_sample(knot["at"], path)
        if knot["weights"] != AS_PLANNED:
            resolved.append({**knot, "at": sample})
            continue
        begin, planned = _planned_knots(recorded, sample, sources)
        if knot["ramp"] not in ("step", planned[-1]["ramp"]):
            raise UserError(
                f"{path}.ramp: {knot['ramp']}, but the recorded schedule has "
                f"{planned[-1]['ramp']} here: remove ramp"
            )
        if resolved:
            before = _schedule_of(resolved, parsed.count, sources, positions, tokens)
            _check_as_planned(recorded, before, begin, min(before.knots[-1].at + 1, sample), path)
        # Knots before `begin` have no effect. They are kept because resuming again with the same
        # file must create the same schedule.
        kept = [entry for entry in resolved if entry["at"] < begin] if begin > 0 else []
        ramps = {entry["at"]: entry["ramp"] for entry in resolved}
        if kept and begin in ramps:
            planned[0]["ramp"] = ramps[begin]
        resolved = [*kept, *planned]
    return _schedule_of(resolved, parsed.count, sources, positions, tokens)


def _schedule_of(
    knots: Sequence[Mapping[str, Any]],
    count: str,
    sources: Sequence[str],
    positions: Positions,
    tokens: TokenCounts | None,
) -> Schedule:
    """Creates a schedule of knots at samples, in the unit of the file if it can express them all.

    After the batch size has changed, knots in iterations may lie before sample 0, which samples do
    not express, and sample 0 before iteration 0, which iterations do not.
    """
    unit, written = positions.unit, [_in_unit(knot, positions) for knot in knots]
    places = list(zip(_places(knots), _places(written), strict=True))
    if any(at < 0 or positions.to_sample(at, PATH) != sample for sample, at in places):
        unit = "samples"
        num_past = sum(knot["at"] <= 0 for knot in knots[1:])
        written = [dict(knot) for knot in knots[num_past:]]
        if num_past or written[0]["at"] < 0:
            written[0] |= {"at": max(written[0]["at"], 0), "ramp": "step", "towards": None}
    return Schedule.from_dict(
        {"unit": unit, "knots": written, **({} if tokens is None else {"count": count})},
        sources,
        positions.samples_per_iteration,
        positions.seq_length,
        positions.iteration_origin if unit == "iterations" else None,
        None if tokens is None else tokens.epochs,
    )


def _places(knots: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the positions of recorded knots and of the ends of their ramps."""
    ends = [end for knot in knots for end in (knot, knot.get("towards")) if end is not None]
    return [int(end["at"]) for end in ends]


def as_planned_knot(schedule: Schedule, sample: int, unit: str | None = None) -> str:
    """Returns the YAML of a knot that keeps a running schedule unchanged up to a sample."""
    return f"{{at: {schedule.position(sample, unit)}, weights: {AS_PLANNED}}}"


def _planned_knots(
    recorded: Schedule, end: int, sources: Sequence[str]
) -> tuple[int, list[dict[str, Any]]]:
    """Returns the recorded knots up to ``end``, and the sample from which they are valid.

    The last knot is at ``end``. Knots at which a removed source has weight cannot be expressed
    without this source and are left out.
    """
    gone = [k for k, name in enumerate(recorded.sources) if name not in set(sources)]
    planned: list[Knot] = [knot for knot in recorded.knots if knot.at <= end]
    if not planned or planned[-1].at < end:
        following = next((knot for knot in recorded.knots if knot.at > end), None)
        levels = tuple(np.cumsum(recorded.weights_at(end, as_written=True)).tolist())
        if following is None or not planned or following.ramp == "step":
            planned.append(Knot(end, levels, "step"))
        else:
            goal = following.towards or following
            planned.append(Knot(end, levels, following.ramp, goal))
    begin = 0
    for k in gone:
        for number, knot in enumerate(planned):
            if any(_weight(part, k) for part in (knot, knot.towards) if part is not None):
                begin = max(begin, number + 1)
        if begin == len(planned):
            raise UserError(
                f"data.sources.{recorded.sources[k]}: removed, but it still has weight at sample "
                f"{end}, where a knot is {AS_PLANNED}: keep it until a knot sets its weight to 0"
            )
    kept = planned[begin:]
    if begin:  # the previous knot is left out, so there is no ramp to this one
        kept[0] = Knot(kept[0].at, kept[0].levels, "step")
    names = list(recorded.sources)
    return (kept[0].at if begin else 0), [_recorded(knot, names, set(gone)) for knot in kept]


def _weight(knot: Knot, k: int) -> int:
    return knot.levels[k] - (knot.levels[k - 1] if k else 0)


def _recorded(knot: Knot, names: Sequence[str], gone: set[int]) -> dict[str, Any]:
    """Converts a knot to the input of `RecordedKnot`, with integer weights that sum to 2**32."""

    def weights(part: Knot) -> dict[str, int]:
        parts = ((name, _weight(part, k)) for k, name in enumerate(names) if k not in gone)
        return {name: weight for name, weight in parts if weight}

    record: dict[str, Any] = {"at": knot.at, "weights": weights(knot), "ramp": knot.ramp}
    if knot.towards is not None:
        record["towards"] = {"at": knot.towards.at, "weights": weights(knot.towards)}
    return record


def _in_unit(knot: Mapping[str, Any], positions: Positions) -> dict[str, Any]:
    """Converts the position of a recorded knot from samples to another unit, rounded up."""
    converted = {**knot, "at": positions.from_sample(knot["at"])}
    if knot.get("towards") is not None:
        converted["towards"] = _in_unit(knot["towards"], positions)
    return converted


def _check_as_planned(recorded: Schedule, given: Schedule, begin: int, end: int, path: str) -> None:
    """Raises `UserError` if knots before an ``as_planned`` knot differ from the record."""
    if begin >= end:
        return
    names = recorded.sources + tuple(n for n in given.sources if n not in set(recorded.sources))
    old, new = recorded.with_sources(names).table(), given.with_sources(names).table()
    sample = first_difference(old, new, begin, end)
    if sample is not None:
        iteration = sample // recorded.samples_per_iteration
        what = _difference(names, old, new, iteration, "in the checkpoint")
        raise UserError(
            f"{path}: {AS_PLANNED}, but the knots before it differ from the plan at sample "
            f"{sample} ({what}): remove those knots, or give this knot numeric weights"
        )


def _difference(
    names: Sequence[str], old: WeightTable, new: WeightTable, iteration: int, verb: str = ""
) -> str:
    """Describes the largest difference of a weight, with enough digits to make it visible."""
    was, now = (Quota(table, table.origin).weights(iteration) for table in (old, new))
    k = int(np.argmax(np.abs(np.subtract(now, was))))
    before, after = differing_numbers(was[k] / GRID, now[k] / GRID)
    return f"{names[k]} {after}, {verb} {before}" if verb else f"{names[k]} {before}, now {after}"


def first_difference(old: WeightTable, new: WeightTable, begin: int, end: int) -> int | None:
    """Returns the first sample of ``[begin, end)`` at which two tables on the same grid differ.

    Differences of up to `ROUNDING` units of 2**-32 are ignored.
    """
    batch = old.samples_per_iteration
    iteration = (begin - old.origin) // batch
    stop = -(-(end - old.origin) // batch)
    while iteration < stop:
        lines = [_line(table, iteration) for table in (old, new)]
        following = min(stop, *(line[1] for line in lines))
        if lines[0][0] != lines[1][0]:
            found = _first_in_interval(old, new, iteration, following)
            if found is not None:
                return max(begin, old.origin + found * batch)
        iteration = following
    return None


def _first_in_interval(old: WeightTable, new: WeightTable, first: int, last: int) -> int | None:
    """Returns the first iteration of ``[first, last)`` at which weights differ, or None."""
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
    """Returns the size and the origin of iterations, which determine where they begin."""
    return schedule.samples_per_iteration, schedule.iteration_origin


def _constant_levels(table: WeightTable, sample: int) -> tuple[int, ...] | None:
    """Returns the levels from ``sample`` on if they are constant, otherwise None."""
    (first, last, *_), end = _line(table, (sample - table.origin) // table.samples_per_iteration)
    return first if end == NEVER and first == last else None


def _differs_from(old: WeightTable, new: WeightTable, sample: int) -> bool:
    """Returns whether two tables on the same grid differ from the iteration of ``sample`` on."""
    iteration = (sample - old.origin) // old.samples_per_iteration
    while True:
        lines = [_line(table, iteration) for table in (old, new)]
        if lines[0][0] != lines[1][0]:
            return True
        iteration = min(line[1] for line in lines)
        if iteration == NEVER:
            return False


def _line(table: WeightTable, iteration: int) -> tuple[tuple[Any, ...], int]:
    """Returns the linear function of the levels at an iteration, and the iteration of its end."""
    number = max(n for n, interval in enumerate(table.intervals) if interval.begin <= iteration)
    interval = table.intervals[number]
    end = table.intervals[number + 1].begin if number + 1 < len(table.intervals) else NEVER
    place = (interval.step, interval.phase - interval.step * interval.begin, interval.span)
    first, last = table.levels[interval.row_begin], table.levels[interval.row_end]
    return (first, last, interval.portion_begin, interval.portion_end, *place), end
