"""The schedule: the weight of every source at every sample, as exact integers.

A schedule is a list of knots. Each knot gives relative weights at one point of the run and says how
the interval that ends there is crossed. `Schedule` reads the ``data.schedule`` block of a
configuration (or what `Schedule.to_dict` wrote), answers `Schedule.weights` for a sample, and hands
the blend a `WeightTable` (`megatron_chatflow.blend.quota`).

**When a weight holds.** Samples ``[t * B, (t + 1) * B)`` form iteration t, where B is
``samples_per_iteration``. The schedule is evaluated once per iteration, at its first sample
``x = t * B``. Weights are constant before the first and after the last knot. Between knots at a and
b, for ``a <= x < b``:

- ``step``: the weights of the knot at a. Those of the knot at b hold from ``x = b`` on.
- ``linear``: the cumulative levels are ``C_a + floor((C_b - C_a) * (x - a) / (b - a))``.
- ``cosine``: linear along 64 chords of the half cosine. Chord j ends at
  ``(x - a) / (b - a) = j / 64`` with the level given by `COSINE_PORTIONS`.

A knot inside an iteration therefore takes effect at the first iteration that begins at or after it.

**Rounding.** Weights are integers that sum to 2**32. The level of source k at a knot is
``floor(2**32 * (p_0 + ... + p_k) / sum(p))`` in exact rationals, where a weight written as 0.1
means one tenth. The weight of source k is the difference of two neighboring levels. It is off by
less than 2**-32 per rounding, and a share below that may become 0.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from megatron_chatflow.blend.quota import GRID, Interval, Quota, WeightTable
from megatron_chatflow.config import KnotConfig, ScheduleConfig
from megatron_chatflow.config.fields import CONFIG, Count, ExactKnotWeights, ExactWeights, shorten
from megatron_chatflow.config.problems import describe
from megatron_chatflow.config.validation import check_knots, check_weights
from megatron_chatflow.errors import UserError

PATH = "data.schedule"
AS_PLANNED = "as_planned"
"""Stands for the weights that the checkpoint's schedule has at a knot; see `blend.edits`."""
MAX_SOURCES = 32767
"""Source numbers are int16."""
MAX_SAMPLE = 1 << 48
"""Knots lie before this sample, which keeps every product of the blend within 128 bits."""

NUM_CHORDS = 64
# round(2**32 * (1 - cos(pi * j / 64)) / 2) for j = 0 to 32, computed once with 60 digits. They are
# constants because the last bit of a C library's cosine differs between machines. The chords stay
# within 1.5e-4 (times the change of weight) of the true cosine and meet it at both ends.
_FIRST_HALF = (
    0,
    2586738,
    10340721,
    23243268,
    41263296,
    64357394,
    92469925,
    125533164,
    163467459,
    206181423,
    253572154,
    305525484,
    361916252,
    422608608,
    487456340,
    556303222,
    628983398,
    705321774,
    785134444,
    868229132,
    954405657,
    1043456411,
    1135166864,
    1229316076,
    1325677235,
    1424018197,
    1524102050,
    1625687685,
    1728530372,
    1832382353,
    1936993442,
    2042111620,
    2147483648,
)

COSINE_PORTIONS = _FIRST_HALF + tuple((1 << 32) - portion for portion in _FIRST_HALF[-2::-1])
"""The ``NUM_CHORDS + 1`` levels of a cosine ramp, integers from 0 to 2**32."""


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class _RecordedGoal:
    at: Count
    weights: ExactWeights


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class RecordedKnot(KnotConfig):
    """A knot of a configuration, or of a checkpoint, where it may also have a goal."""

    weights: ExactKnotWeights = Field(description="relative weights by source")
    towards: _RecordedGoal | None = None


@pydantic_dataclass(frozen=True, kw_only=True, config=CONFIG)
class RecordedSchedule(ScheduleConfig):
    """The ``unit`` and ``knots`` of a configuration or a checkpoint."""

    knots: tuple[RecordedKnot, ...] = Field(min_length=1, description="weights by position")


_RECORDED_SCHEDULE = TypeAdapter(RecordedSchedule)


@dataclass(frozen=True)
class Positions:
    """Converts positions in a schedule's unit to samples and back.

    Attributes:
        unit: What ``at`` of a knot counts: samples, tokens or iterations.
        samples_per_iteration: Samples that share one evaluation of the weights.
        iteration_origin: The sample from which knots in iterations count. It is 0 until a resume
            changes the size of an iteration. Then it is where iteration 0 would lie if all
            iterations had the new size, which may be below 0.
        seq_length: Tokens per sample; None if no knot counts tokens.
    """

    unit: str
    samples_per_iteration: int
    iteration_origin: int
    seq_length: int | None

    def to_sample(self, at: int, path: str) -> int:
        """The sample at a position; tokens are rounded up to whole samples.

        Raises:
            UserError: The sample is too large. ``path`` names the knot in the message.
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
        """The first position in ``unit`` (by default the schedule's own) not before a sample."""
        unit = unit or self.unit
        if unit == "iterations":
            return -((self.iteration_origin - sample) // self.samples_per_iteration)
        return sample * self.seq_length if unit == "tokens" and self.seq_length else sample


def read_block(
    block: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[RecordedSchedule, tuple[str, ...], Positions]:
    """Parses and checks a block of a schedule.

    Args:
        block: ``{unit, knots}``, and those of ``arguments`` that it records itself.
        arguments: ``sources``, ``samples_per_iteration``, ``iteration_origin`` and ``seq_length``;
            None if unset.

    Returns:
        The knots as written, the names of the sources, and how to convert positions.

    Raises:
        UserError: The block is not a schedule; the message names the path of the first problem.
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
    return recorded, sources, Positions(recorded.unit, samples_per_iteration, origin, seq_length)


def _merged(name: str, block: Mapping[str, Any], argument: Any) -> Any:
    """The argument, or what the block records, which must be equal if both are given."""
    recorded = block.get(name)
    if argument is None or recorded is None:
        return recorded if argument is None else argument
    same = list(argument) == list(recorded) if name == "sources" else argument == recorded
    if not same:
        raise UserError(f"{PATH}.{name}: the block has {recorded!r}, the caller {argument!r}")
    return recorded


def _check_sources(sources: Any) -> tuple[str, ...]:
    if not isinstance(sources, Sequence) or isinstance(sources, str) or not sources:
        raise UserError(f"{PATH}.sources: no sources: name at least one")
    if len(sources) > MAX_SOURCES:
        raise UserError(f"{PATH}.sources: {len(sources)} sources: use at most {MAX_SOURCES}")
    seen = set()
    for name in sources:
        if not isinstance(name, str) or not name:
            raise UserError(f"{PATH}.sources: {name!r} is not a name: use a string")
        if name in seen:
            raise UserError(f"{PATH}.sources: {name} is listed twice: give each its own name")
        seen.add(name)
    return tuple(sources)


def _size(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 < int(value) < 1 << 31:
        raise UserError(
            f"{PATH}.{name}: must be a whole number from 1 to 2**31 - 1, not {shorten(value)}"
        )
    return int(value)


def _levels(weights: Mapping[str, int | float], sources: Sequence[str]) -> tuple[int, ...]:
    """``floor(2**32 * (p_0 + ... + p_k) / sum p)`` for every source k."""
    # repr() is the shortest decimal that reads back as the float: what the user wrote.
    exact = {
        name: Fraction(value if isinstance(value, int) else repr(value))
        for name, value in weights.items()
    }
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
    """Weights that the schedule reaches at a sample.

    Attributes:
        at: The sample.
        levels: Cumulative weights of the sources, rising to 2**32.
        ramp: How the interval that ends here is crossed.
        towards: The knot that the ramp was heading for, if an edit ended it early.
    """

    at: int
    levels: tuple[int, ...]
    ramp: str
    towards: Knot | None = None


class Schedule:
    """Weights of every source as a function of the sample; immutable.

    Attributes:
        sources: Names in the order of `weights`.
        samples_per_iteration: Samples that share one evaluation of the weights.
        unit: What the knots in the configuration count: samples, tokens or iterations.
        seq_length: Tokens per sample; None if unknown.
        iteration_origin: The sample from which knots in iterations count; see `Positions`.
        knots: The knots, at samples, with their cumulative integer levels.
    """

    def __init__(
        self, recorded: RecordedSchedule, sources: tuple[str, ...], positions: Positions
    ) -> None:
        """Use `from_dict` instead; the arguments are what `read_block` returns."""
        self.sources = sources
        self.samples_per_iteration = positions.samples_per_iteration
        self.unit = positions.unit
        self.seq_length = positions.seq_length
        self.iteration_origin = positions.iteration_origin
        self._positions = positions
        self._recorded: list[dict[str, Any]] = []  # the knots as written, in the schedule's unit
        knots: list[Knot] = []
        for number, entry in enumerate(recorded.knots):
            path = f"{PATH}.knots[{number}]"
            if isinstance(entry.weights, str):
                raise UserError(
                    f"{path}.weights: {AS_PLANNED} takes the weights from the checkpoint that a "
                    "run continues from, and this run has none: give numbers"
                )
            sample = positions.to_sample(entry.at, path)
            if knots and sample <= knots[-1].at:
                raise UserError(
                    f"{path}.at: sample {sample} does not come after the previous knot at sample "
                    f"{knots[-1].at}: list knots in increasing order"
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
        # Where iterations begin: at 0 as long as all have been of one size.
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
    ) -> Schedule:
        """Reads the ``data.schedule`` block of a configuration, or what `to_dict` returned.

        Args:
            block: ``{unit, knots}``. `to_dict` records the other arguments in it as well.
            sources: Names of all sources, in order. A source that a knot does not name has weight
                0 there.
            samples_per_iteration: Samples that share one evaluation of the weights: the global
                batch size that the run began with.
            seq_length: Tokens per sample; required for knots in tokens.
            iteration_origin: The sample from which knots in iterations count; 0 by default.

        Raises:
            UserError: The block is not a schedule; the message names the path within it.
        """
        arguments = {
            "sources": sources,
            "samples_per_iteration": samples_per_iteration,
            "seq_length": seq_length,
            "iteration_origin": iteration_origin,
        }
        return cls(*read_block(block, arguments))

    def weights(self, sample: int) -> npt.NDArray[np.int64]:
        """The weights of a sample, int64[num_sources]: none is negative, their sum is 2**32."""
        if sample < 0:
            raise ValueError(f"sample {sample}: samples count from 0")
        return self._quota.weights(max(sample - self._origin, 0) // self.samples_per_iteration)

    def weights_at(self, sample: int) -> npt.NDArray[np.int64]:
        """The weights if an iteration began at exactly this sample, int64[num_sources]."""
        return Quota(self.table(sample, 1), sample).weights(0)

    def position(self, sample: int, unit: str | None = None) -> int:
        """The first position not before a sample, in ``unit`` or the schedule's own.

        For the sample of a knot, this is the knot's ``at`` as written.
        """
        if unit in (None, self.unit):
            for knot, written in zip(self.knots, self._recorded, strict=True):
                if knot.at == sample:
                    return int(written["at"])
        return self._positions.from_sample(sample, unit)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-compatible block from which `from_dict` creates an equal schedule."""
        block = {
            "unit": self.unit,
            "knots": copy.deepcopy(self._recorded),
            "sources": list(self.sources),
            "samples_per_iteration": self.samples_per_iteration,
            "seq_length": self.seq_length,
        }
        origin = {"iteration_origin": self.iteration_origin} if self.iteration_origin else {}
        return {**block, **origin}

    def with_sources(self, sources: Sequence[str]) -> Schedule:
        """The same schedule with its sources in another order, or with more of weight 0."""
        return Schedule.from_dict({**self.to_dict(), "sources": list(sources)})

    def with_iterations(self, samples_per_iteration: int, iteration_origin: int) -> Schedule:
        """The same schedule with iterations of another size; knots in iterations move."""
        grid = {
            "samples_per_iteration": samples_per_iteration,
            "iteration_origin": iteration_origin,
        }
        return Schedule.from_dict({**self.to_dict(), **grid})

    def table(self, origin: int = 0, samples_per_iteration: int | None = None) -> WeightTable:
        """The weights on a grid of iterations, in the form that the blend reads.

        Args:
            origin: The first sample of the grid's iteration 0.
            samples_per_iteration: The grid's step; the schedule's own by default.

        Returns:
            Intervals on which every level is linear in the iteration.
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
    """Collects intervals in order of their samples and drops those in which no iteration begins."""

    def __init__(self, origin: int, samples_per_iteration: int):
        self._origin = origin
        self._batch = samples_per_iteration
        self._rows: dict[tuple[int, ...], int] = {}
        self._row_of: dict[int, int] = {}  # by the knot's identity: levels are long to hash
        self._intervals: list[Interval] = []

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
            self._append(Interval(start, row, row, 0, 0, 0, 0, 1))
            return
        assert begin is not None and end is not None
        # Place within the chord at iteration t: ((x_t - begin) * num_chords / span - chord).
        span = end - begin
        step = self._batch * num_chords
        phase = (self._origin + start * self._batch - begin) * num_chords - chord * span
        shared = gcd(step, phase, span)
        place = (step // shared, phase // shared, span // shared)
        self._append(Interval(start, row, last_row, *portions, *place))

    def build(self) -> WeightTable:
        """The table."""
        return WeightTable(self._origin, self._batch, tuple(self._rows), tuple(self._intervals))

    def _append(self, interval: Interval) -> None:
        if self._intervals and self._intervals[-1].begin >= interval.begin:
            self._intervals.pop()
        if self._intervals and self._intervals[-1][1:] == interval[1:] and interval.is_constant:
            return
        self._intervals.append(interval)

    def _row(self, knot: Knot) -> int:
        if id(knot) not in self._row_of:
            self._row_of[id(knot)] = self._rows.setdefault((0, *knot.levels), len(self._rows))
        return self._row_of[id(knot)]

    def _iteration(self, sample: int) -> int:
        """The first iteration that begins at or after a sample."""
        return max(-((self._origin - sample) // self._batch), 0)
