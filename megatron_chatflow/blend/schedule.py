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
  and whose levels come from a frozen table (`megatron_chatflow.blend.schedule`).

So a knot inside an iteration takes effect from the first iteration that begins at or after it, and
a ramp between such knots is still read at the exact place of each iteration's first sample.

**Rounding.** The level of source k at a knot is ``floor(2**32 * (p_0 + ... + p_k) / sum p)`` in
exact rationals; a number written 0.1 means one tenth. Its weight is the difference of neighbouring
levels, so a weight is off by less than 2**-32 for each rounding, and one below that may become 0.

The cosine ramp as a frozen table of integers, so that it is the same on every machine.

In: nothing. Out: `COSINE_PORTIONS`, how far a cosine ramp has come after each of its equal chords.

The values are ``round(2**32 * (1 - cos(pi * j / 64)) / 2)``, computed once with 60 digits. They are
written down because the cosine of a C library may differ in the last bit from one machine to the
next. The chords are the schedule: between two values a ramp is linear. They stay within
``1.5e-4`` of the true cosine times the change of weight, and agree with it at both ends.

The ``data.schedule`` block as users write it, checked.

In: a mapping from YAML or JSON. Out: a `ScheduleBlock`, or a `UserError` that names the path of the
first thing that is wrong, such as ``data.schedule.knots[1].weights.chinese``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.blend.quota import GRID, Interval, Quota, WeightTable
from megatron_chatflow.errors import UserError

NUM_CHORDS = 64

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
"""``NUM_CHORDS + 1`` integers from 0 to 2**32."""


PATH = "data.schedule"
UNITS = ("samples", "tokens", "iterations")
RAMPS = ("step", "linear", "cosine")
AS_PLANNED = "as_planned"
"""In place of a knot's weights: what the running run's schedule says at that point."""
MAX_SOURCES = 32767
"""Source numbers are int16."""
MAX_SAMPLE = 1 << 48
"""Knots lie before this sample, which keeps every product of the blend within 128 bits."""

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*([KMBT]?)")


@dataclass(frozen=True)
class Knot:
    """Weights that the schedule reaches at a sample.

    Attributes:
        at: The sample.
        levels: Cumulative weights of the sources, rising to 2**32.
        ramp: How the interval that ends here is crossed.
        towards: The knot that the ramp was heading for, where an edit ends it before it gets there.
    """

    at: int
    levels: tuple[int, ...]
    ramp: str
    towards: Knot | None = None


@dataclass(frozen=True)
class ScheduleBlock:
    """A checked schedule.

    Attributes:
        unit: What ``at`` counts in the written knots.
        sources: Names in order.
        samples_per_iteration: Samples that share one evaluation of the weights.
        iteration_origin: The sample from which knots in iterations count. It is 0 until a resume
            changes the size of an iteration: then it is where iteration 0 would lie if every
            iteration had been of the new size, which may be below 0.
        seq_length: Tokens per sample; None where no knot counts tokens.
        knots: The knots at samples, with integer levels.
        written: The knots as numbers in ``unit``, for `to_dict`.
    """

    unit: str
    sources: tuple[str, ...]
    samples_per_iteration: int
    iteration_origin: int
    seq_length: int | None
    knots: tuple[Knot, ...]
    written: tuple[dict[str, Any], ...]

    @classmethod
    def parse(cls, block: Mapping[str, Any], arguments: Mapping[str, Any]) -> ScheduleBlock:
        """Checks a block.

        Args:
            block: ``{unit, knots}`` and whatever of ``arguments`` it carries itself.
            arguments: ``sources``, ``samples_per_iteration``, ``iteration_origin`` and
                ``seq_length``, None where unset.

        Raises:
            UserError: Something is wrong with the block.
        """
        _check_keys(block, {"unit", "knots", *arguments}, PATH)
        unit = block.get("unit", "samples")
        if unit not in UNITS:
            raise UserError(f"{PATH}.unit: unknown unit {unit!r}: use one of {', '.join(UNITS)}")
        merged = {name: _merged(name, block, value) for name, value in arguments.items()}
        sources = _sources(merged["sources"])
        batch = _count(merged["samples_per_iteration"], "samples_per_iteration")
        origin = merged["iteration_origin"] or 0
        if isinstance(origin, bool) or not isinstance(origin, Integral):
            raise UserError(f"{PATH}.iteration_origin: {origin!r} is not a whole number")
        origin = int(origin) if unit == "iterations" else 0
        seq_length = merged["seq_length"]
        if seq_length is not None or unit == "tokens":
            seq_length = _count(seq_length, "seq_length")
        knots = block.get("knots")
        if not isinstance(knots, Sequence) or isinstance(knots, str) or not knots:
            raise UserError(f"{PATH}.knots: no knots: list at least one {{at, weights}}")

        parsed: list[Knot] = []
        written: list[dict[str, Any]] = []
        for number, entry in enumerate(knots):
            path = f"{PATH}.knots[{number}]"
            _check_keys(entry, {"at", "weights", "ramp", "towards"}, path)
            at = position_of(entry, path)
            sample = sample_of(at, unit, batch, origin, seq_length, path)
            if parsed and sample <= parsed[-1].at:
                raise UserError(
                    f"{path}.at: sample {sample} does not come after the knot before it, at sample "
                    f"{parsed[-1].at}: knots stand in increasing order"
                )
            ramp = entry.get("ramp", "step")
            if ramp not in RAMPS:
                raise UserError(
                    f"{path}.ramp: unknown ramp {ramp!r}: use one of {', '.join(RAMPS)}"
                )
            weights = _weights(entry.get("weights"), sources, f"{path}.weights")
            record = {"at": at, "weights": weights, "ramp": ramp}
            towards = None
            if (goal := entry.get("towards")) is not None:
                path = f"{path}.towards"
                _check_keys(goal, {"at", "weights"}, path)
                goal_at = position_of(goal, path)
                goal_sample = sample_of(goal_at, unit, batch, origin, seq_length, path)
                goal_weights = _weights(goal.get("weights"), sources, f"{path}.weights")
                if ramp == "step" or not parsed or goal_sample <= sample:
                    raise UserError(f"{path}: does not go on with a ramp from the knot before it")
                towards = Knot(goal_sample, _levels(goal_weights, sources), ramp)
                record["towards"] = {"at": goal_at, "weights": goal_weights}
            parsed.append(Knot(sample, _levels(weights, sources), ramp, towards))
            written.append(record)
        return cls(unit, sources, batch, origin, seq_length, tuple(parsed), tuple(written))

    def to_dict(self) -> dict[str, Any]:
        """A block that `parse` reads back without arguments."""
        block = {
            "unit": self.unit,
            "knots": copy.deepcopy(list(self.written)),
            "sources": list(self.sources),
            "samples_per_iteration": self.samples_per_iteration,
            "seq_length": self.seq_length,
        }
        return (
            {**block, "iteration_origin": self.iteration_origin} if self.iteration_origin else block
        )


def _check_keys(mapping: Any, known: set[str], path: str) -> None:
    if not isinstance(mapping, Mapping):
        raise UserError(f"{path}: {mapping!r} is not a mapping: write keys and values")
    for key in mapping:
        if key not in known:
            raise UserError(f"{path}.{key}: unknown key: use {', '.join(sorted(known))}")


def _merged(name: str, block: Mapping[str, Any], argument: Any) -> Any:
    """The argument, or what the block itself carries; they must not disagree."""
    recorded = block.get(name)
    if argument is None or recorded is None:
        return recorded if argument is None else argument
    same = list(argument) == list(recorded) if name == "sources" else argument == recorded
    if not same:
        raise UserError(f"{PATH}.{name}: the block says {recorded!r}, the caller {argument!r}")
    return recorded


def _sources(sources: Any) -> tuple[str, ...]:
    if not isinstance(sources, Sequence) or isinstance(sources, str) or not sources:
        raise UserError(f"{PATH}.sources: no sources: name at least one")
    if len(sources) > MAX_SOURCES:
        raise UserError(
            f"{PATH}.sources: {len(sources)} sources: at most {MAX_SOURCES} fit the int16 source id"
        )
    seen = set()
    for name in sources:
        if not isinstance(name, str) or not name:
            raise UserError(f"{PATH}.sources: {name!r} is not a name: use a string")
        if name in seen:
            raise UserError(f"{PATH}.sources: {name} stands there twice: give each its own name")
        seen.add(name)
    return tuple(sources)


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 < int(value) < 1 << 31:
        raise UserError(f"{PATH}.{name}: {value!r} is not a whole number from 1 to 2**31 - 1")
    return int(value)


def _rational(value: Any) -> Fraction | None:
    """A finite number in decimal, exactly as written; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return Fraction(int(value))
    if isinstance(value, Real):
        return Fraction(repr(float(value))) if math.isfinite(value) else None
    return None


def position_of(entry: Mapping[str, Any], path: str) -> int:
    """``at`` of a knot, in the schedule's unit."""
    if "at" not in entry:
        raise UserError(f"{path}.at: missing: say where the knot stands, such as 5M")
    value = entry["at"]
    number = _rational(value)
    if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())):
        number = Fraction(match[1]) * _SUFFIXES[match[2]]
    if number is None:
        raise UserError(
            f"{path}.at: {value!r} is not a number: write one such as 20000, 1.5B or 5M"
        )
    if number < 0:
        raise UserError(f"{path}.at: {value} is negative: knots count from 0")
    if number.denominator != 1:
        raise UserError(f"{path}.at: {value} is not whole: round it")
    return int(number)


def sample_of(
    at: int, unit: str, batch: int, origin: int, seq_length: int | None, path: str
) -> int:
    """The sample at a position in a unit; tokens are rounded up to whole samples."""
    sample = origin + at * batch if unit == "iterations" else at
    if unit == "tokens":
        assert seq_length is not None
        sample = -(-at // seq_length)
    if abs(sample) >= MAX_SAMPLE:
        raise UserError(f"{path}.at: sample {sample} is too far: stay below {MAX_SAMPLE}")
    return sample


def _weights(weights: Any, sources: Sequence[str], path: str) -> dict[str, int | float]:
    """The weights of one knot, checked, as they were written."""
    if weights == AS_PLANNED:
        raise UserError(
            f"{path}: {AS_PLANNED} takes the weights from the checkpoint of the run that goes on, "
            "and this one starts fresh: give numbers"
        )
    if not isinstance(weights, Mapping):
        raise UserError(f"{path}: {weights!r} is not a mapping: write source: weight")
    known = set(sources)
    result: dict[str, int | float] = {}
    for name, value in weights.items():
        if name not in known:
            shown = ", ".join(sources[:8]) + (", ..." if len(sources) > 8 else "")
            raise UserError(f"{path}.{name}: unknown source: data.sources has {shown}")
        if isinstance(value, str) and (match := _NUMBER.fullmatch(value.strip())) and not match[2]:
            value = float(value)  # YAML 1.1 reads 1e-3 as a string
        number = _rational(value)
        if number is None:
            raise UserError(
                f"{path}.{name}: {value!r} is not a finite number: write one such as 0.3"
            )
        if number < 0:
            raise UserError(f"{path}.{name}: {value} is negative: weights are 0 or more")
        result[name] = int(value) if isinstance(value, Integral) else float(value)
    if not any(result.values()):
        raise UserError(f"{path}: every weight is 0: give at least one source a weight above 0")
    return result


def _levels(weights: Mapping[str, int | float], sources: Sequence[str]) -> tuple[int, ...]:
    """``floor(2**32 * (p_0 + ... + p_k) / sum p)`` for every source k."""
    exact = {name: _rational(value) or Fraction(0) for name, value in weights.items()}
    scale = math.lcm(*(value.denominator for value in exact.values()))
    parts = {name: int(value * scale) for name, value in exact.items()}
    total = sum(parts.values())
    levels, below = [], 0
    for name in sources:
        below += parts.get(name, 0)
        levels.append(GRID * below // total)
    return tuple(levels)


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
