"""Builds the schedules of the study's arms with exactly equal totals.

`arms.yaml` describes the arms. A schedule consists of a main part and optionally a tail. Each part
is closed: the weights of one of its iterations are set so that the weights of every source sum to a
whole number of samples. The blend keeps ``|count - sum of weights| < 1`` for every prefix, so the
counts at the end of a part then equal these sums. Arms of equal totals therefore draw exactly the
same samples of every source, in the same order within the source (`draws`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from megatron_chatflow.blend import Blend, Schedule

HERE = Path(__file__).parent
GRID = 1 << 32
DESCRIPTION: dict[str, Any] = yaml.safe_load((HERE / "arms.yaml").read_text(encoding="utf-8"))
SOURCES: tuple[str, ...] = tuple(DESCRIPTION["sources"])
ARMS: tuple[str, ...] = tuple(DESCRIPTION["arms"])
EQUAL_ARMS = ("dynamic", "static", "reversed", "two_stage")
"""The arms that draw the same samples of every source."""
TAIL = Fraction(DESCRIPTION["tail"])
_RAMP = Fraction(DESCRIPTION["ramp"])

Weights = dict[str, Fraction]
Block = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """The length of an arm.

    Attributes:
        iterations: Number of iterations.
        samples_per_iteration: Global batch size, a power of two.
    """

    iterations: int
    samples_per_iteration: int

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.iterations * self.samples_per_iteration

    @property
    def tail_iterations(self) -> int:
        """Number of iterations of the tail, and of the decay of the learning rate under WSD."""
        return max(1, round(TAIL * self.iterations))


@dataclass(frozen=True)
class _Knot:
    at: int
    weights: Weights
    ramp: str = "step"


def totals(budget: Budget) -> dict[str, int]:
    """Returns the number of samples of each source in the arms of equal totals."""
    return _whole(_ramp_sums(budget.iterations, budget), budget.num_samples)


def make_schedule(arm: str, budget: Budget, *, has_tail: bool) -> Block:
    """Returns the ``data.schedule`` block of an arm.

    Raises:
        ValueError: The budget is too small to close the schedule.
    """
    wanted = totals(budget)
    mean = _shares(wanted)
    if not has_tail:
        return _block(_main_part(arm, budget.iterations, wanted, budget))
    length = budget.tail_iterations
    main = budget.iterations - length
    size = budget.samples_per_iteration
    tail = _whole({name: mean[name] * length * size for name in SOURCES}, length * size)
    before = {name: wanted[name] - tail[name] for name in SOURCES}
    knots = _main_part(arm, main, before, budget)
    fixed = [_Knot(main, _shares(tail))]
    return _block([*knots, *_close(fixed, range(main, budget.iterations), "first", tail, budget)])


def static_schedule(block: Block, budget: Budget) -> Block:
    """Returns the static schedule that draws the same samples of each source as another one."""
    wanted = {name: len(indices) for name, indices in draws(block, budget).items()}
    knots = [_Knot(0, _shares(wanted))]
    return _block(_close(knots, range(budget.iterations), "last", wanted, budget))


def random_schedule(number: int, budget: Budget) -> Block:
    """Returns a schedule whose knots are drawn from a uniform distribution over mixtures."""
    settings = DESCRIPTION["random"]
    rng = np.random.default_rng(number)
    knots = []
    for k in range(settings["num_knots"]):
        shares = np.round(rng.dirichlet(np.ones(len(SOURCES))), 3)
        shares[np.argmax(shares)] += 1 - shares.sum()
        at = round(Fraction(k, settings["num_knots"] - 1) * (budget.iterations - 1))
        weights = {name: round(float(w), 3) for name, w in zip(SOURCES, shares, strict=True)}
        knots.append({"at": at, "weights": weights, "ramp": "linear" if k else "step"})
    return {"unit": "iterations", "knots": knots}


def draws(block: Block, budget: Budget) -> dict[str, npt.NDArray[np.int64]]:
    """Returns the indices that a schedule draws of each source, in their order."""
    schedule = Schedule.from_dict(block, SOURCES, budget.samples_per_iteration)
    source, index = Blend(schedule).take(0, budget.num_samples)
    return {name: index[source == k] for k, name in enumerate(SOURCES)}


def check_equal_totals(budget: Budget) -> None:
    """Checks that the arms of equal totals draw the same samples in the same order per source.

    All arms must have as many samples, and those of equal totals the same tail.

    Raises:
        AssertionError: They do not, which would be a fault of this module or of the blend.
    """
    wanted = totals(budget)
    boundary = (budget.iterations - budget.tail_iterations) * budget.samples_per_iteration
    tails = []
    for has_tail in (False, True):
        for arm in ARMS:
            found = draws(make_schedule(arm, budget, has_tail=has_tail), budget)
            assert sum(map(len, found.values())) == budget.num_samples, arm
            for name, indices in found.items():
                count = wanted[name] if arm in EQUAL_ARMS else len(indices)
                assert np.array_equal(indices, np.arange(count)), f"{arm}, {name}"
    for arm in EQUAL_ARMS:
        block = make_schedule(arm, budget, has_tail=True)
        schedule = Schedule.from_dict(block, SOURCES, budget.samples_per_iteration)
        tails.append(Blend(schedule).take(boundary, budget.num_samples))
        is_equal = [np.array_equal(tails[-1][part], tails[0][part]) for part in (0, 1)]
        assert all(is_equal), f"{arm}: its tail differs"


def _main_part(arm: str, length: int, wanted: Mapping[str, int], budget: Budget) -> list[_Knot]:
    """Returns the closed knots of the iterations before the tail."""
    description = DESCRIPTION["arms"][arm]
    size = budget.samples_per_iteration
    if "ramp" in description:
        first, last = (_mixture(name) for name in description["ramp"])
        ramp = round(_RAMP * length)
        if description["ramp"] == ["start", "end"]:
            knots = [_Knot(0, first), _Knot(ramp, last, "linear")]
            return _close(knots, range(length), "last", wanted, budget)
        # The mirror image: iteration t has the weights of iteration length - 1 - t.
        knots = [
            _Knot(0, first),
            _Knot(length - 1 - ramp, first),
            _Knot(length - 1, last, "linear"),
        ]
        return _close(knots, range(length), "first", wanted, budget)
    stages: list[list[str]] = description["stages"]
    present = [name for stage in stages for name in stage]
    wanted = {name: wanted[name] if name in present else 0 for name in SOURCES}
    # The tokens of missing sources go to the first one.
    wanted[stages[0][0]] += length * size - sum(wanted.values())
    mixtures = [_shares({name: wanted[name] for name in stage}) for stage in stages]
    if len(stages) == 1:
        return _close([_Knot(0, mixtures[0])], range(length), "last", wanted, budget)
    boundary = (sum(wanted[name] for name in stages[0]) - 1) // size
    knots = [_Knot(0, mixtures[0]), _Knot(boundary, mixtures[1])]
    return _close(knots, range(length), boundary, wanted, budget)


def _close(
    knots: Sequence[_Knot],
    part: range,
    where: str | int,
    wanted: Mapping[str, int],
    budget: Budget,
) -> list[_Knot]:
    """Sets the weights of one or a few iterations so that a part has exactly these totals.

    Args:
        knots: The knots of the part.
        part: Its iterations.
        where: "first" or "last" for iterations at an end of the part, around which the schedule is
            constant, or the iteration of a knot.
        wanted: Samples of each source.
        budget: The budget of the arm.
    """
    for width in (1, 2, 4) if isinstance(where, str) else (1,):
        ends = {"first": part.start, "last": part.stop - width}
        begin = ends[where] if isinstance(where, str) else where
        closing = range(begin, begin + width)
        here = [knot for knot in knots if knot.at <= begin][-1]
        before = [knot for knot in knots if knot.at < begin]
        after = [knot for knot in knots if knot.at >= closing.stop]
        if closing.stop < part.stop and (not after or after[0].at > closing.stop):
            after.insert(0, _Knot(closing.stop, here.weights))
        sums = _sums([*before, _Knot(begin, here.weights), *after], part, closing, budget)
        size = budget.samples_per_iteration
        missing = {name: Fraction(wanted[name] * GRID - sums[name], size) for name in SOURCES}
        assert all(one.denominator == 1 for one in missing.values()), "size is a power of two"
        common = _whole({name: one / width for name, one in missing.items()}, GRID)
        rest = {name: int(one) - (width - 1) * common[name] for name, one in missing.items()}
        if min(*common.values(), *rest.values()) >= 0:
            closed = [_Knot(begin, _exact(common)), _Knot(closing.stop - 1, _exact(rest))]
            return [*before, *closed[-width:], *after]
    raise ValueError(f"iterations {part.start} to {part.stop} cannot have the totals {wanted}")


def _sums(knots: Sequence[_Knot], part: range, without: range, budget: Budget) -> dict[str, int]:
    """Returns the sums of the weights of a part without some iterations, in 2**-32 samples."""
    size = budget.samples_per_iteration
    schedule = Schedule.from_dict(_block(knots), SOURCES, size)
    rows = [schedule.weights(t * size).tolist() for t in part if t not in without]
    sums = [size * sum(column) for column in zip(*rows, strict=True)]
    return dict(zip(SOURCES, sums or [0] * len(SOURCES), strict=True))


def _ramp_sums(length: int, budget: Budget) -> Weights:
    """Returns the sums of the weights of the dynamic arm over a main part, in samples."""
    first, last = (_mixture(name) for name in DESCRIPTION["arms"]["dynamic"]["ramp"])
    ramp = round(_RAMP * length)
    on_ramp = Fraction(ramp - 1, 2)
    return {
        name: budget.samples_per_iteration
        * (first[name] * (ramp - on_ramp) + last[name] * (on_ramp + length - ramp))
        for name in SOURCES
    }


def _whole(exact: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Rounds to whole numbers that sum to ``total``; the largest remainders are rounded up."""
    rounded = {name: int(value) for name, value in exact.items()}
    remainders = sorted(exact, key=lambda name: exact[name] - rounded[name], reverse=True)
    for name in remainders[: total - sum(rounded.values())]:
        rounded[name] += 1
    return rounded


def _mixture(name: str) -> Weights:
    return {
        source: Fraction(repr(weight)) for source, weight in DESCRIPTION["mixtures"][name].items()
    }


def _shares(counts: Mapping[str, int]) -> Weights:
    total = sum(counts.values())
    return {name: Fraction(count, total) for name, count in counts.items()}


def _exact(weights: Mapping[str, int]) -> Weights:
    return {name: Fraction(weight) for name, weight in weights.items()}


def _block(knots: Sequence[_Knot]) -> Block:
    """Returns the knots as a configuration, with weights as whole numbers."""
    written = []
    for knot in knots:
        scale = np.lcm.reduce([weight.denominator for weight in knot.weights.values()])
        weights = {
            name: int(weight * int(scale)) for name, weight in knot.weights.items() if weight
        }
        written.append({"at": knot.at, "weights": weights, "ramp": knot.ramp})
    return {"unit": "iterations", "knots": written}
