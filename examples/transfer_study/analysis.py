"""Analyses ``results.json``: paired differences to the static arm, and verdicts by fixed rules.

The rules were fixed before the runs. A difference counts at one size if its paired mean exceeds two
standard errors over the seeds; it counts in the study if it also has the same sign at every other
size that was measured. Nothing here reads anything but the results.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

REFERENCE = "static"
NUM_STANDARD_ERRORS = 2

Verdict = Literal["lower", "higher", "no difference", "one seed"]
Entry = Mapping[str, Any]


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
        num_seeds: Number of seeds that both have.
    """

    mean: float
    standard_error: float
    num_seeds: int

    @property
    def verdict(self) -> Verdict:
        """What the rule says at this size."""
        if self.num_seeds < 2:
            return "one seed"
        if abs(self.mean) <= NUM_STANDARD_ERRORS * self.standard_error:
            return "no difference"
        return "lower" if self.mean < 0 else "higher"


@dataclass(frozen=True)
class Reach:
    """When an arm reaches the final value of the static arm of the same seed.

    Attributes:
        shares: Position of the first crossing relative to the length of the run, for each seed in
            which it is reached.
        num_seeds: Number of seeds that both have.
    """

    shares: tuple[float, ...]
    num_seeds: int

    def __str__(self) -> str:
        """Returns the mean position in percent."""
        if not self.shares:
            return "not reached"
        text = f"{100 * fmean(self.shares):.0f} %"
        if len(self.shares) < self.num_seeds:
            text += f" ({len(self.shares)} of {self.num_seeds} seeds)"
        return text


@dataclass(frozen=True)
class Analysis:
    """All numbers of the page.

    Attributes:
        runs: Entries by cell and seed.
        measures: Names of the measures, in order.
    """

    runs: Mapping[Cell, Mapping[int, Entry]]
    measures: tuple[str, ...]

    @classmethod
    def of(cls, entries: Mapping[str, Entry], foundations: Mapping[str, Entry]) -> "Analysis":
        """Groups the entries. Those that started from another foundation are left out."""
        runs: dict[Cell, dict[int, Entry]] = {}
        measures: dict[str, None] = {}
        for entry in entries.values():
            facts = foundations.get(entry["model"])
            if facts is not None and facts["digest"] != entry["foundation"]:
                continue
            cell = Cell(entry["model"], entry["learning_rate"], entry["has_tail"], entry["arm"])
            runs.setdefault(cell, {})[entry["seed"]] = entry
            measures.update(dict.fromkeys(values_of(entry)))
        return cls(runs, tuple(measures))

    def settings(self) -> list[tuple[str, str, bool]]:
        """Returns model, learning rate and tail of all settings that have a static arm."""
        return [
            (cell.model, cell.learning_rate, cell.has_tail)
            for cell in self.runs
            if cell.arm == REFERENCE
        ]

    def arms(self, setting: tuple[str, str, bool]) -> list[str]:
        """Returns the arms of a setting."""
        return [
            cell.arm
            for cell in self.runs
            if (cell.model, cell.learning_rate, cell.has_tail) == setting
            and not cell.arm.startswith("random_")
        ]

    def values(self, cell: Cell, measure: str) -> dict[int, float]:
        """Returns a measure of a cell by seed."""
        found = {seed: values_of(entry) for seed, entry in self.runs.get(cell, {}).items()}
        return {seed: one[measure] for seed, one in found.items() if measure in one}

    def difference(self, cell: Cell, measure: str) -> Difference | None:
        """Returns the paired difference to the static arm; None without a common seed."""
        ours = self.values(cell, measure)
        static = Cell(cell.model, cell.learning_rate, cell.has_tail, REFERENCE)
        theirs = self.values(static, measure)
        return paired([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])

    def verdict(self, cell: Cell, measure: str) -> str:
        """Returns the verdict of the study on a difference at one size.

        A difference that exceeds two standard errors counts if its mean has the same sign at every
        other size with the same setting.
        """
        own = self.difference(cell, measure)
        if own is None:
            return "not measured"
        if own.verdict in ("no difference", "one seed"):
            return own.verdict
        others = [
            self.difference(other, measure)
            for other in self.runs
            if other.model != cell.model
            and (other.learning_rate, other.has_tail, other.arm)
            == (cell.learning_rate, cell.has_tail, cell.arm)
        ]
        signs = [one.mean < 0 for one in others if one is not None]
        if not signs:
            return f"{own.verdict}, one size only"
        if all(sign == (own.mean < 0) for sign in signs):
            return f"{own.verdict}, at both sizes"
        return f"{own.verdict}, other sign at the other size"

    def reach(self, cell: Cell, source: str) -> Reach:
        """Returns when an arm reaches the final bits per byte of the static arm on a source."""
        static = self.runs.get(Cell(cell.model, cell.learning_rate, cell.has_tail, REFERENCE), {})
        ours = self.runs.get(cell, {})
        seeds = sorted(static.keys() & ours.keys())
        shares = []
        for seed in seeds:
            goal = static[seed]["final"][source]
            crossing = first_crossing(ours[seed]["curve"], source, goal)
            if crossing is not None:
                shares.append(crossing / ours[seed]["tokens"])
        return Reach(tuple(shares), len(seeds))

    def cost(self) -> dict[str, float]:
        """Returns the compute of all runs: core-hours, FLOPs and tokens."""
        entries = [entry for seeds in self.runs.values() for entry in seeds.values()]
        return {
            "runs": len(entries),
            "core_hours": sum(entry["core_seconds"] for entry in entries) / 3600,
            "flops": sum(entry["flops"] for entry in entries),
            "tokens": sum(entry["tokens"] for entry in entries),
        }


def values_of(entry: Entry) -> dict[str, float]:
    """Returns the measures of a run: final bits per byte by source, and numbers of probes."""
    values = dict(entry["final"])
    for probe, found in entry.get("probes", {}).items():
        for name, value in found.items():
            if name.endswith("_stderr") or name.startswith("num_"):
                continue
            if isinstance(value, int | float) and math.isfinite(value):
                values[f"{probe}: {name}"] = value
    return values


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
        tokens, value = point["tokens"], point["bits_per_byte"][source]
        if value <= goal:
            if before is None or before[1] == value:
                return float(tokens)
            share = (before[1] - goal) / (before[1] - value)
            return before[0] + share * (tokens - before[0])
        before = (float(tokens), value)
    return None
