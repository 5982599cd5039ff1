"""The schedule: the weight of every source at every sample, as exact integers.

A schedule is a list of knots. Each knot has relative weights at one point of the run, and the type
of the ramp that ends there. `Schedule.from_dict` parses the ``data.schedule`` block of a
configuration or the output of `Schedule.to_dict`. `Schedule.weights` returns the weights of a
sample. `Schedule.table` returns the `WeightTable` that the blend uses
(`megatron_chatflow.blend.quota`).

**When weights apply.** Samples ``[t * B, (t + 1) * B)`` form iteration t, where B is
``samples_per_iteration``. The schedule is evaluated once per iteration, at its first sample
``x = t * B``. Weights are constant before the first and after the last knot. Between knots at a and
b, for ``a <= x < b``:

- ``step``: the weights of the knot at a. The weights of the knot at b apply from ``x = b`` on.
- ``linear``: the cumulative levels are ``C_a + floor((C_b - C_a) * (x - a) / (b - a))``.
- ``cosine``: linear along 64 chords of the half cosine. Chord j ends at
  ``(x - a) / (b - a) = j / 64`` with the level given by `COSINE_PORTIONS`.

A knot inside an iteration therefore takes effect at the first iteration that begins at or after it.

**Rounding.** Weights are integers that sum to 2**32. The level of source k at a knot is
``floor(2**32 * (p_0 + ... + p_k) / sum(p))`` in exact rationals, where a weight written as 0.1
means exactly one tenth. The weight of source k is the difference of two neighboring levels. Each
rounding changes it by less than 2**-32, so a smaller share may become 0.

**What weights count.** Weights are shares of samples. With another ``count``, the weights of a knot
are shares of tokens. `TokenCounts` converts them to shares of samples, with the exact number of
tokens in an epoch of each source: a share p_k becomes a share proportional to ``p_k / m_k``, where
m_k is the mean number of tokens in a sample. On a ramp, shares of tokens are linear (or follow the
cosine), so both ends of 64 chords are converted, and the shares of samples are linear between them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from megatron_chatflow.blend.quota import GRID, GRID_BITS, Interval, Quota, WeightTable
from megatron_chatflow.config import KnotConfig, ScheduleConfig
from megatron_chatflow.config.fields import CONFIG, Count, ExactKnotWeights, ExactWeights, shorten
from megatron_chatflow.config.problems import describe
from megatron_chatflow.config.validation import check_knots, check_weights
from megatron_chatflow.errors import UserError

PATH = "data.schedule"
AS_PLANNED = "as_planned"
"""Placeholder for the recorded weights at a knot; see `megatron_chatflow.blend.edits`."""
MAX_SOURCES = 32767
"""Source numbers are int16."""
MAX_SAMPLE = 1 << 48
"""Exclusive bound of the samples of knots. It keeps every product of the blend within 128 bits."""

NUM_CHORDS = 64
# No value is within 0.02 of the middle between two integers, so the rounded values do not depend on
# the last bits of a C library's cosine. The chords differ from the true cosine by at most 1.5e-4
# (times the change of weight) and equal it at both ends.
COSINE_PORTIONS = tuple(
    round(GRID * (1 - math.cos(math.pi * chord / NUM_CHORDS)) / 2)
    for chord in range(NUM_CHORDS + 1)
)
"""The ``NUM_CHORDS + 1`` levels of a cosine ramp, integers from 0 to 2**32."""


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class _RecordedGoal:
    at: Count
    weights: ExactWeights


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class RecordedKnot(KnotConfig):
    """A knot of a configuration or a checkpoint. In a checkpoint, it may also have ``towards``."""

    weights: ExactKnotWeights = Field(description="relative weights by source")
    towards: _RecordedGoal | None = None


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class RecordedSchedule(ScheduleConfig):
    """The ``unit`` and ``knots`` of a configuration or a checkpoint."""

    knots: tuple[RecordedKnot, ...] = Field(min_length=1, description="weights by position")


_RECORDED_SCHEDULE = TypeAdapter(RecordedSchedule)


@dataclass(frozen=True)
class Positions:
    """Converts positions in a schedule's unit to samples and back."""

    unit: str  # the unit of a knot's ``at``: samples, tokens or iterations
    samples_per_iteration: int  # number of samples with the same weights
    # First sample of iteration 0, for knots in iterations. It is 0 until a resume changes the size
    # of an iteration. Then it is the first sample that iteration 0 would have if all iterations had
    # the new size, which may be negative.
    iteration_origin: int
    # tokens per sample; None if the unit is not tokens and the length is unknown
    seq_length: int | None

    def to_sample(self, at: int, path: str) -> int:
        """Returns the sample at a position. Tokens are rounded up to whole samples.

        Raises:
            UserError: The sample is too large. The message begins with the path of the knot.
        """
        sample = at
        if self.unit == "iterations":
            sample = self.iteration_origin + at * self.samples_per_iteration
        elif self.unit == "tokens":
            assert self.seq_length is not None
            sample = -(-at // self.seq_length)
        if abs(sample) >= MAX_SAMPLE:
            raise UserError(f"{path}.at: sample {sample} is too large: stay below {MAX_SAMPLE}")
        return sample

    def from_sample(self, sample: int, unit: str | None = None) -> int:
        """Returns the first position at or after a sample, by default in the schedule's unit."""
        unit = unit or self.unit
        if unit == "iterations":
            return -((self.iteration_origin - sample) // self.samples_per_iteration)
        return sample * self.seq_length if unit == "tokens" and self.seq_length else sample


@dataclass(frozen=True)
class TokenCounts:
    """Converts shares of tokens to shares of samples."""

    # tokens and samples in an epoch by source; a source that is missing has as many of both
    epochs: Mapping[str, tuple[int, int]]

    def to_samples(self, levels: Sequence[int], sources: Sequence[str]) -> tuple[int, ...]:
        """Converts the levels of shares of tokens to levels of shares of samples."""
        below, parts = 0, {}
        for name, level in zip(sources, levels, strict=True):
            tokens, samples = self.epochs.get(name, (1, 1))
            if level > below:
                parts[name] = Fraction((level - below) * samples, tokens)
            below = level
        return _levels_of(parts, sources)

    def mean(self, name: str) -> float:
        """Returns the mean number of tokens in a sample of a source."""
        tokens, samples = self.epochs.get(name, (1, 1))
        return tokens / samples if samples else 0.0

    def to_dict(self) -> dict[str, list[int]]:
        """Returns the numbers as JSON."""
        return {name: list(epoch) for name, epoch in self.epochs.items()}


def _token_counts(count: str, epochs: Any) -> TokenCounts | None:
    """Checks what `Schedule.from_dict` gets; returns None if weights count samples."""
    if count == "samples":
        return None
    try:
        read = {str(name): (int(one), int(other)) for name, (one, other) in epochs.items()}
        is_valid = all(one >= 0 and other >= 0 for one, other in read.values())
    except (AttributeError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"{PATH}.count: {count} needs the numbers of tokens and samples of every source"
        )
    return TokenCounts({name: epoch for name, epoch in read.items() if all(epoch)})


def read_block(
    block: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[RecordedSchedule, tuple[str, ...], Positions, TokenCounts | None]:
    """Parses and validates a schedule.

    Args:
        block: ``{unit, knots}``, and optionally recorded values of ``arguments``.
        arguments: ``sources``, ``samples_per_iteration``, ``iteration_origin``, ``seq_length`` and
            ``epochs``; None if unset. An argument must equal the recorded value if both are given.

    Returns:
        The knots as written, the names of the sources, and the conversions of positions and of
        weights; the last is None if weights count samples.

    Raises:
        UserError: The block is not a valid schedule. The message begins with the path of the first
            problem.
    """
    if not isinstance(block, Mapping):
        raise UserError(f"{PATH}: must be a mapping of keys, not {shorten(block)}")
    try:
        recorded = _RECORDED_SCHEDULE.validate_python(
            {key: value for key, value in block.items() if key not in arguments}
        )
    except ValidationError as error:
        raise UserError(f"{PATH}.{describe(error, RecordedSchedule)}") from error
    merged = {name: _merged(name, block, value) for name, value in arguments.items()}
    sources = _check_sources(merged["sources"])
    check_knots(recorded.knots, sources)
    samples_per_iteration = _size(merged["samples_per_iteration"], "samples_per_iteration")
    seq_length = merged["seq_length"]
    if seq_length is not None or recorded.unit == "tokens":
        seq_length = _size(seq_length, "seq_length")
    origin = merged["iteration_origin"] or 0
    if isinstance(origin, bool) or not isinstance(origin, Integral):
        raise UserError(f"{PATH}.iteration_origin: must be a whole number, not {shorten(origin)}")
    origin = int(origin) if recorded.unit == "iterations" else 0
    positions = Positions(recorded.unit, samples_per_iteration, origin, seq_length)
    return recorded, sources, positions, _token_counts(recorded.count, merged.get("epochs"))


def _merged(name: str, block: Mapping[str, Any], argument: Any) -> Any:
    """Returns the argument or the recorded value. Both must be equal if both are given."""
    recorded = block.get(name)
    if argument is None or recorded is None:
        return recorded if argument is None else argument
    same = list(argument) == list(recorded) if name == "sources" else argument == recorded
    if not same:
        raise UserError(
            f"{PATH}.{name}: is {recorded!r} in the schedule, but the caller passed {argument!r}"
        )
    return recorded


def _check_sources(sources: Any) -> tuple[str, ...]:
    if not isinstance(sources, Sequence) or isinstance(sources, str) or not sources:
        raise UserError(f"{PATH}.sources: no sources: list at least one")
    if len(sources) > MAX_SOURCES:
        raise UserError(f"{PATH}.sources: {len(sources)} sources: use at most {MAX_SOURCES}")
    seen = set()
    for name in sources:
        if not isinstance(name, str) or not name:
            raise UserError(f"{PATH}.sources: {name!r} is not a valid name: use a string")
        if name in seen:
            raise UserError(f"{PATH}.sources: {name} is listed twice: use unique names")
        seen.add(name)
    return tuple(sources)


def _size(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 < int(value) < 1 << 31:
        raise UserError(
            f"{PATH}.{name}: must be a whole number from 1 to 2**31 - 1, not {shorten(value)}"
        )
    return int(value)


def _levels(weights: Mapping[str, int | float], sources: Sequence[str]) -> tuple[int, ...]:
    """Returns ``floor(2**32 * (p_0 + ... + p_k) / sum p)`` for every source k."""
    # repr() returns the shortest decimal that is parsed to the same float, as the user wrote it.
    exact = {
        name: Fraction(value if isinstance(value, int) else repr(value))
        for name, value in weights.items()
    }
    return _levels_of(exact, sources)


def _levels_of(exact: Mapping[str, Fraction], sources: Sequence[str]) -> tuple[int, ...]:
    scale = math.lcm(*(value.denominator for value in exact.values()))
    parts = {name: int(value * scale) for name, value in exact.items()}
    total = sum(parts.values())
    levels, below = [], 0
    for name in sources:
        below += parts.get(name, 0)
        levels.append(GRID * below // total)
    return tuple(levels)


@dataclass(frozen=True)
class Knot:
    """The weights of a schedule at a sample."""

    at: int  # the sample
    levels: tuple[int, ...]  # Cumulative weights of the sources. The last one is 2**32.
    ramp: str  # type of the ramp that ends at this knot: step, linear or cosine
    towards: Knot | None = None  # the original end of the ramp, if an edit ended the ramp early


class Schedule:
    """Weights of every source as a function of the sample; immutable.

    Attributes:
        sources: Names of the sources, in the order of `weights`.
        samples_per_iteration: Number of samples with the same weights.
        unit: The unit of the knots in the configuration: samples, tokens or iterations.
        seq_length: Tokens per sample; None if unknown.
        tokens: Converts the weights of the knots to shares of samples; None if they are.
        iteration_origin: First sample of iteration 0, for knots in iterations; see `Positions`.
        knots: The knots, with positions in samples.
    """

    def __init__(
        self,
        recorded: RecordedSchedule,
        sources: tuple[str, ...],
        positions: Positions,
        tokens: TokenCounts | None,
    ) -> None:
        """Initializes the schedule from the results of `read_block`. Use `from_dict` instead."""
        self.sources = sources
        self.samples_per_iteration = positions.samples_per_iteration
        self.unit = positions.unit
        self.seq_length = positions.seq_length
        self.iteration_origin = positions.iteration_origin
        self.count = recorded.count
        self.tokens = tokens
        self._positions = positions
        self._recorded: list[dict[str, Any]] = []  # the knots as written, in the schedule's unit
        knots: list[Knot] = []
        for number, entry in enumerate(recorded.knots):
            path = f"{PATH}.knots[{number}]"
            if isinstance(entry.weights, str):
                raise UserError(
                    f"{path}.weights: {AS_PLANNED} takes the weights from the checkpoint that a "
                    "run continues from, but this run starts without one: give numeric weights"
                )
            sample = positions.to_sample(entry.at, path)
            if knots and sample <= knots[-1].at:
                raise UserError(
                    f"{path}.at: sample {sample} does not come after the previous knot at sample "
                    f"{knots[-1].at}: list the knots in increasing order"
                )
            written = {"at": entry.at, "weights": dict(entry.weights), "ramp": entry.ramp}
            goal = None
            if entry.towards is not None:
                weights = entry.towards.weights
                check_weights(weights, sources, f"{path}.towards.weights")
                goal_sample = positions.to_sample(entry.towards.at, f"{path}.towards")
                if entry.ramp == "step" or not knots or goal_sample <= sample:
                    raise UserError(f"{path}.towards: does not continue a ramp of this knot")
                goal = Knot(goal_sample, _levels(weights, sources), entry.ramp)
                written["towards"] = {"at": entry.towards.at, "weights": dict(weights)}
            knots.append(Knot(sample, _levels(entry.weights, sources), entry.ramp, goal))
            self._recorded.append(written)
        self.knots = tuple(knots)
        self._spans = self._make_spans()
        # First sample at which an iteration begins; 0 unless the size of iterations has changed.
        self._origin = positions.iteration_origin % positions.samples_per_iteration
        self._quota = Quota(self.table(self._origin), self._origin)

    @classmethod
    def from_dict(
        cls,
        block: Mapping[str, Any],
        sources: Sequence[str] | None = None,
        samples_per_iteration: int | None = None,
        seq_length: int | None = None,
        iteration_origin: int | None = None,
        epochs: Mapping[str, Sequence[int]] | None = None,
    ) -> Schedule:
        """Parses the ``data.schedule`` block of a configuration, or the output of `to_dict`.

        Args:
            block: ``{unit, knots}``. The output of `to_dict` also contains the other arguments.
            sources: Names of all sources, in order. A source that is missing in a knot has weight 0
                there.
            samples_per_iteration: Number of samples with the same weights: the global batch size at
                the begin of the run.
            seq_length: Tokens per sample; required for knots in tokens.
            iteration_origin: First sample of iteration 0, for knots in iterations; 0 by default.
            epochs: Tokens that weights count, and samples, in an epoch of each source; required
                unless weights count samples.

        Raises:
            UserError: The block is not a valid schedule. The message begins with the path of the
                first problem.
        """
        arguments = {
            "sources": sources,
            "samples_per_iteration": samples_per_iteration,
            "seq_length": seq_length,
            "iteration_origin": iteration_origin,
            "epochs": epochs,
        }
        return cls(*read_block(block, arguments))

    def weights(self, sample: int) -> npt.NDArray[np.int64]:
        """Returns the weights of a sample, int64[num_sources], which sum to 2**32.

        Raises:
            ValueError: ``sample`` is negative.
        """
        if sample < 0:
            raise ValueError(f"sample {sample}: must not be negative")
        return self._quota.weights(max(sample - self._origin, 0) // self.samples_per_iteration)

    def weights_at(self, sample: int, *, as_written: bool = False) -> npt.NDArray[np.int64]:
        """Returns the weights of an iteration that begins at this sample, int64[num_sources].

        With ``as_written``, they are shares of what the schedule counts instead of samples.
        """
        spans = self._make_spans(as_written=True) if as_written else self._spans
        return Quota(_build_table(spans, sample, 1), sample).weights(0)

    def position(self, sample: int, unit: str | None = None) -> int:
        """Returns the first position at or after a sample, by default in the schedule's unit.

        For the sample of a knot, this is the knot's ``at`` as written.
        """
        if unit in (None, self.unit):
            for knot, written in zip(self.knots, self._recorded, strict=True):
                if knot.at == sample:
                    return int(written["at"])
        return self._positions.from_sample(sample, unit)

    def sample(self, at: int, path: str) -> int:
        """Returns the sample at a position in the schedule's unit; see `Positions.to_sample`."""
        return self._positions.to_sample(at, path)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-compatible block from which `from_dict` creates an equal schedule."""
        block = {
            "unit": self.unit,
            "knots": copy.deepcopy(self._recorded),
            "sources": list(self.sources),
            "samples_per_iteration": self.samples_per_iteration,
            "seq_length": self.seq_length,
        }
        if self.iteration_origin:
            block["iteration_origin"] = self.iteration_origin
        if self.tokens is not None:
            block |= {"count": self.count, "epochs": self.tokens.to_dict()}
        return block

    def with_sources(self, sources: Sequence[str]) -> Schedule:
        """Returns the same schedule with reordered sources, or with additional ones of weight 0."""
        return Schedule.from_dict({**self.to_dict(), "sources": list(sources)})

    def with_iterations(self, samples_per_iteration: int, iteration_origin: int) -> Schedule:
        """Returns the same schedule with another iteration size. Knots in iterations move."""
        grid = {
            "samples_per_iteration": samples_per_iteration,
            "iteration_origin": iteration_origin,
        }
        return Schedule.from_dict({**self.to_dict(), **grid})

    def table(self, origin: int = 0, samples_per_iteration: int | None = None) -> WeightTable:
        """Returns the weights on a grid of iterations, by default on the schedule's own.

        ``origin`` is the first sample of iteration 0. On every interval, the levels are linear.
        """
        return _build_table(
            self._spans, origin, samples_per_iteration or self.samples_per_iteration
        )

    def _make_spans(self, *, as_written: bool = False) -> list[_Span]:
        """Returns the parts of the run on which levels are linear, ascending."""
        tokens = None if as_written else self.tokens

        def drawn(levels: tuple[int, ...]) -> tuple[int, ...]:
            return levels if tokens is None else tokens.to_samples(levels, self.sources)

        ends = [drawn(knot.levels) for knot in self.knots]
        spans = [_Span(None, None, ends[0], ends[0])]
        for number, (first, last) in enumerate(pairwise(self.knots)):
            goal = last.towards or last
            if last.ramp == "step":
                spans.append(_Span(first.at, last.at, ends[number], ends[number]))
                continue
            if last.ramp == "linear" and tokens is None:
                spans.append(_Span(first.at, goal.at, first.levels, goal.levels))
                continue
            # If an edit ended the ramp early, chords that begin after the knot are left out.
            num_chords = -((first.at - last.at) * NUM_CHORDS // (goal.at - first.at))
            begin, end = ends[number], goal.levels
            for chord in range(num_chords):
                portions = COSINE_PORTIONS[chord], COSINE_PORTIONS[chord + 1]
                if tokens is not None:
                    place = portions[1]
                    if last.ramp == "linear":
                        place = GRID * (chord + 1) // NUM_CHORDS
                    pairs = zip(first.levels, goal.levels, strict=True)
                    end = drawn(tuple(a + ((b - a) * place >> GRID_BITS) for a, b in pairs))
                    portions = 0, GRID
                spans.append(_Span(first.at, goal.at, begin, end, chord, NUM_CHORDS, portions))
                if tokens is not None:
                    begin = end
        return [*spans, _Span(self.knots[-1].at, None, ends[-1], ends[-1])]


class _Span(NamedTuple):
    """A part of the run on which levels are linear."""

    begin: int | None  # sample of the knot at which a ramp begins; None before the first knot
    end: int | None  # sample of the knot at which the ramp ends; None after the last knot
    first: tuple[int, ...]  # levels by which ``portions`` are interpolated
    last: tuple[int, ...]
    chord: int = 0  # the part of the ramp, one of ``num_chords`` of equal length
    num_chords: int = 1
    # How far the levels are from ``first`` to ``last`` at both ends, in units of 2**-32.
    portions: tuple[int, int] = (0, GRID)


def _build_table(spans: Sequence[_Span], origin: int, samples_per_iteration: int) -> WeightTable:
    builder = _TableBuilder(origin, samples_per_iteration)
    for span in spans:
        builder.add(span)
    return builder.build()


class _TableBuilder:
    """Collects intervals in ascending order and drops those in which no iteration begins."""

    def __init__(self, origin: int, samples_per_iteration: int):
        self._origin = origin
        self._batch = samples_per_iteration
        self._rows: dict[tuple[int, ...], int] = {}
        self._row_of: dict[int, int] = {}  # by id() of the levels, because hashing levels is slow
        self._intervals: list[Interval] = []

    def add(self, span: _Span) -> None:
        """Adds the interval in which the iterations of a span begin."""
        row, last_row = self._row(span.first), self._row(span.last)
        begin, end, chord, num_chords = span.begin, span.end, span.chord, span.num_chords
        if begin is None:
            start = 0
        elif end is None:
            start = self._iteration(begin)
        else:
            start = self._iteration(begin - (begin - end) * chord // num_chords)
        if row == last_row:
            self._append(Interval(start, row, row, 0, 0, 0, 0, 1))
            return
        assert begin is not None and end is not None
        # Place within the chord at iteration t: ((x_t - begin) * num_chords / length - chord).
        length = end - begin
        step = self._batch * num_chords
        phase = (self._origin + start * self._batch - begin) * num_chords - chord * length
        shared = math.gcd(step, phase, length)
        place = (step // shared, phase // shared, length // shared)
        self._append(Interval(start, row, last_row, *span.portions, *place))

    def build(self) -> WeightTable:
        """Builds the table."""
        return WeightTable(self._origin, self._batch, tuple(self._rows), tuple(self._intervals))

    def _append(self, interval: Interval) -> None:
        if self._intervals and self._intervals[-1].begin >= interval.begin:
            self._intervals.pop()
        if self._intervals and self._intervals[-1][1:] == interval[1:] and interval.is_constant:
            return
        self._intervals.append(interval)

    def _row(self, levels: tuple[int, ...]) -> int:
        if id(levels) not in self._row_of:
            self._row_of[id(levels)] = self._rows.setdefault((0, *levels), len(self._rows))
        return self._row_of[id(levels)]

    def _iteration(self, sample: int) -> int:
        """Returns the first iteration that begins at or after a sample, at least 0."""
        return max(-((self._origin - sample) // self._batch), 0)
