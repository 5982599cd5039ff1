"""The ``data.schedule`` block as users write it, checked.

In: a mapping from YAML or JSON. Out: a `ScheduleBlock`, or a `UserError` that names the path of the
first thing that is wrong, such as ``data.schedule.knots[1].weights.chinese``.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from megatron_chatflow.errors import UserError
from megatron_chatflow.native.quota_reference import GRID

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
