"""Analyses ``results.json``: paired differences to the static arm, and verdicts by fixed rules.

The rules were fixed before the runs. ``primary_endpoint`` of ``arms.yaml`` is the one comparison
that tests the claim; all others are exploratory. A difference is clear at one size if its paired
mean exceeds two standard errors over at least three seeds. Nothing here reads anything but the
results.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev
from typing import Any, Literal

from examples.transfer_study.arms import ARMS, DESCRIPTION
from examples.transfer_study.study import PROPOSED, PROPOSED_STATIC, REFERENCE, Run

NUM_STANDARD_ERRORS = 2
MIN_SEEDS = 3
"""Number of seeds below which no difference is clear."""
FALSE_POSITIVE_RATES = {2: 0.295, 3: 0.184, 4: 0.139, 5: 0.116, 6: 0.102}
"""Probability that noise exceeds two standard errors, by number of seeds (t distribution)."""
T_QUANTILES = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Standard errors on either side of the mean in a 95 % interval, by number of seeds."""
GOAL: dict[str, float] = DESCRIPTION["goal"]
EQUAL_GOAL = "goal, equal weights"
"""The measure that shows how much the goal depends on its weights."""

Verdict = Literal["lower", "higher", "not clear", "too few seeds"]
Entry = Mapping[str, Any]
Pair = tuple[int, str]
"""What the runs of a pair have in common: the seed, and the hash of the foundation's weights."""
Setting = tuple[str, str, bool]
"""Model, shape of the learning rate, and whether there is a common tail."""
_PROBES: dict[str, dict[str, Any]] = DESCRIPTION["probes"]
_SHAPES = {"wsd": "constant rate", "cosine": "cosine"}


@dataclass(frozen=True)
class Cell:
    """The runs of an arm in one setting.

    Attributes:
        model: The size.
        learning_rate: The shape of the learning rate.
        has_tail: Whether there is a common tail.
        arm: The arm.
    """

    model: str
    learning_rate: str
    has_tail: bool
    arm: str


@dataclass(frozen=True)
class Difference:
    """The paired difference of a measure between an arm and the static arm.

    Attributes:
        mean: Mean over the seeds of arm minus static.
        standard_error: Of this mean; NaN with one seed.
        num_seeds: Number of pairs, which is that of the seeds that both have.
    """

    mean: float
    standard_error: float
    num_seeds: int

    @property
    def verdict(self) -> Verdict:
        """What the rule says at this size."""
        if self.num_seeds < MIN_SEEDS:
            return "too few seeds"
        if abs(self.mean) <= NUM_STANDARD_ERRORS * self.standard_error:
            return "not clear"
        return "lower" if self.mean < 0 else "higher"

    @property
    def false_positive_rate(self) -> float:
        """The probability that noise alone would exceed two standard errors."""
        return FALSE_POSITIVE_RATES.get(self.num_seeds, 0.1 if self.num_seeds > 1 else math.nan)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval of the mean; None with one seed or more than six."""
        if self.num_seeds not in T_QUANTILES:
            return None
        half = T_QUANTILES[self.num_seeds] * self.standard_error
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Reach:
    """When an arm reaches a value of the static arm of the same seed.

    Attributes:
        shares: For each seed, the position of the first crossing relative to the length of the run;
            infinity if the value is not reached.
    """

    shares: tuple[float, ...]

    def __str__(self) -> str:
        """Returns the median position in percent; a seed that does not reach it counts as late."""
        if not self.shares:
            return "-"
        middle, num_reached = median(self.shares), sum(map(math.isfinite, self.shares))
        if middle == 0:
            text = "at the start"
        else:
            text = f"{100 * middle:.0f} %" if math.isfinite(middle) else "not reached"
        if num_reached < len(self.shares):
            text += f" ({num_reached} of {len(self.shares)} seeds reach it)"
        return text


@dataclass(frozen=True)
class Analysis:
    """All numbers of the page.

    Attributes:
        runs: Entries by cell and pair.
        measures: Names of the measures, in order.
    """

    runs: Mapping[Cell, Mapping[Pair, Entry]]
    measures: tuple[str, ...]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> "Analysis":
        """Groups the entries, in an order that does not depend on theirs."""
        runs: dict[Cell, dict[Pair, Entry]] = {}
        measures: dict[str, None] = {}
        for entry in sorted(entries, key=lambda one: (Run.of(one).key, one["foundation"])):
            cell = Cell(entry["model"], entry["learning_rate"], entry["has_tail"], entry["arm"])
            runs.setdefault(cell, {})[entry["seed"], entry["foundation"]] = entry
            measures.update(dict.fromkeys(values_of(entry)))
        return cls(runs, tuple(measures))

    def settings(self) -> list[Setting]:
        """Returns all settings of arms that have a static arm."""
        found = dict.fromkeys(
            (cell.model, cell.learning_rate, cell.has_tail)
            for cell in self.runs
            if not cell.arm.startswith("random_")
        )
        settings = [one for one in found if self.reference(Cell(*one, REFERENCE)) in self.runs]
        return sorted(settings, key=lambda one: (one[0] != "small", one[1] != "wsd", not one[2]))

    def arms(self, setting: Setting) -> list[str]:
        """Returns the arms of a setting, the static one always."""
        found = [
            cell.arm
            for cell in self.runs
            if (cell.model, cell.learning_rate, cell.has_tail) == setting
        ]
        return in_order({REFERENCE, *found})

    def reference(self, cell: Cell) -> Cell:
        """Returns the static cell of a setting.

        With and without tail, the static arm is the same up to rounding, so that one that was
        trained stands for both.
        """
        static = replace(cell, arm=REFERENCE)
        other = replace(static, has_tail=not cell.has_tail)
        return static if static in self.runs or other not in self.runs else other

    def values(self, cell: Cell, measure: str) -> dict[Pair, float]:
        """Returns a measure of a cell by pair."""
        if cell.arm == REFERENCE:
            cell = self.reference(cell)
        found = {pair: values_of(entry) for pair, entry in self.runs.get(cell, {}).items()}
        return {pair: one[measure] for pair, one in found.items() if measure in one}

    def difference(self, cell: Cell, measure: str, minus: str = REFERENCE) -> Difference | None:
        """Returns the paired difference to another arm; None without a common seed."""
        return self.contrast(cell, measure, (cell.arm, minus), lambda a, b: a - b)

    def contrast(
        self, cell: Cell, measure: str, arms: Sequence[str], combine: Callable[..., float]
    ) -> Difference | None:
        """Returns the mean over seeds of a combination of arms in the setting of a cell.

        Pairs of a seed that start from different foundations are averaged first.
        """
        values = [self.values(replace(cell, arm=arm), measure) for arm in arms]
        common = sorted(set(values[0]).intersection(*values[1:]))
        by_seed: dict[int, list[float]] = {}
        for pair in common:
            by_seed.setdefault(pair[0], []).append(combine(*(one[pair] for one in values)))
        return paired([fmean(found) for found in by_seed.values()])

    def verdict(self, cell: Cell, measure: str) -> str:
        """Returns what the rules say about a difference to the static arm at one size."""
        own = self.difference(cell, measure)
        if own is None:
            return "not measured"
        if own.verdict in ("not clear", "too few seeds"):
            return own.verdict
        others = [
            self.difference(other, measure)
            for other in self.runs
            if other.model != cell.model
            and (other.learning_rate, other.has_tail, other.arm)
            == (cell.learning_rate, cell.has_tail, cell.arm)
        ]
        found = [one for one in others if one is not None]
        if not found:
            return f"{own.verdict}: clear here, one size only"
        same = "same" if all((one.mean < 0) == (own.mean < 0) for one in found) else "other"
        seeds = min(one.num_seeds for one in found)
        return (
            f"{own.verdict}: clear here, {same} sign at the other size "
            f"({seeds} seed{'s' if seeds > 1 else ''})"
        )

    def share_of_run(self, cell: Cell, source: str) -> tuple[float, float, float] | None:
        """Returns what the difference to the static arm is worth, as a part of the run.

        It is the final difference on the text of the curves, divided by what the static arm gains
        per token between its last two evaluations before the decay, relative to the length of the
        run; positive if the arm is ahead. None if it is not clear that the static arm gains
        something there, or if it was evaluated less often.

        Returns:
            The ratio of the means over seeds, and the lowest and highest ratio of a seed.
        """
        ours, static = self.runs.get(cell, {}), self.runs.get(self.reference(cell), {})
        ahead, slopes = [], []
        for pair in sorted(static.keys() & ours.keys()):
            curve = static[pair]["curve"]
            if len(curve) < 4:  # both ends, and two before the decay
                return None
            before, last, final = (point["bits_per_byte"][source] for point in curve[-3:])
            tokens = (curve[-2]["tokens"] - curve[-3]["tokens"]) / static[pair]["tokens"]
            slopes.append((before - last) / tokens)
            ahead.append(final - ours[pair]["curve"][-1]["bits_per_byte"][source])
        gained = paired(slopes)
        if gained is None or gained.verdict != "higher" or min(slopes) <= 0:
            return None
        ratios = [one / slope for one, slope in zip(ahead, slopes, strict=True)]
        return fmean(ahead) / gained.mean, min(ratios), max(ratios)

    def reach(self, cell: Cell, source: str, *, before_decay: bool = False) -> Reach:
        """Returns when an arm reaches bits per byte of the static arm on a source.

        Between evaluations, of which there must be at least four, the loss is interpolated.

        Args:
            cell: The arm.
            source: The evaluated source.
            before_decay: Whether the static arm's value is that of the last evaluation before the
                end, which is at the start of the decay, instead of the final one.
        """
        static = self.runs.get(self.reference(cell), {})
        ours = self.runs.get(cell, {})
        shares = []
        for pair in sorted(static.keys() & ours.keys()):
            if len(ours[pair]["curve"]) < 4:
                return Reach(())  # too far apart for interpolation
            point = static[pair]["curve"][-2 if before_decay else -1]
            goal = point["bits_per_byte"][source]
            crossing = first_crossing(ours[pair]["curve"], source, goal)
            shares.append(math.inf if crossing is None else crossing / ours[pair]["tokens"])
        return Reach(tuple(shares))


def name_of(setting: Setting) -> str:
    """Returns the name of a setting in tables and figures."""
    model, shape, has_tail = setting
    return f"{model}, {_SHAPES[shape]}, {'tail' if has_tail else 'no tail'}"


def in_order(arms: Iterable[str]) -> list[str]:
    """Returns arms in the order of their description; random schedules are left out."""
    found = set(arms)
    return [arm for arm in (*ARMS, PROPOSED, PROPOSED_STATIC) if arm in found]


def values_of(entry: Entry) -> dict[str, float]:
    """Returns the measures of a run: the goal, bits per byte by source, one number per probe."""
    values = dict(entry["final"])
    if GOAL.keys() <= values.keys():
        equal = mean_log(values, dict.fromkeys(GOAL, 1.0))
        values = {"goal": mean_log(values, GOAL), EQUAL_GOAL: equal, **values}
    found = probe_numbers(entry)
    for label, wanted in _PROBES.items():
        if wanted["number"] in found[label]:
            values[f"{label} ({wanted['better']} is better)"] = found[label][wanted["number"]]
    return values


def probe_numbers(entry: Entry) -> dict[str, dict[str, float]]:
    """Returns the finite numbers of each probe of ``arms.yaml``; none of one that was not run.

    ``translation_zh`` and ``translation_en`` are numbers of one probe, ``translation``.
    """
    probes: Mapping[str, Mapping[str, float]] = entry["probes"]
    names = {label: label if label in probes else label.rpartition("_")[0] for label in _PROBES}
    return {
        label: {
            number: value
            for number, value in probes.get(name, {}).items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for label, name in names.items()
    }


def mean_log(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Returns the weighted mean of the logarithms of some values."""
    total = sum(weights.values())
    return sum(weight / total * math.log(values[name]) for name, weight in weights.items())


def rate_of_source(entry: Entry, source: str) -> float | None:
    """Returns the mean learning rate at which a run read a source, relative to its highest rate.

    None if the run has not read it.
    """
    peak = max(part["learning_rate"] for part in entry["trajectory"])
    tokens = [part["tokens"].get(source, 0) for part in entry["trajectory"]]
    if not sum(tokens):
        return None
    rates = [part["learning_rate"] for part in entry["trajectory"]]
    return float(sum(map(operator.mul, rates, tokens)) / peak / sum(tokens))


def paired(differences: Sequence[float]) -> Difference | None:
    """Returns mean and standard error of differences over seeds; None without any."""
    if not differences:
        return None
    error = math.nan
    if len(differences) > 1:
        error = stdev(differences) / math.sqrt(len(differences))
    return Difference(fmean(differences), error, len(differences))


def first_crossing(curve: Sequence[Entry], source: str, goal: float) -> float | None:
    """Returns the tokens at which a curve first is at most ``goal``, interpolated; None if never.

    A curve that begins below it has no crossing before the start: the result is then its start.
    """
    before: tuple[float, float] | None = None
    for point in curve:
        tokens, value = float(point["tokens"]), float(point["bits_per_byte"][source])
        if value <= goal:
            if before is None or before[1] == value:
                return tokens
            share = (before[1] - goal) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (tokens, value)
    return None
