"""Fits how final losses depend on when each source's tokens came, and proposes a schedule.

The model is small enough to be identified from a few dozen short runs. For every evaluated source
k, the final loss L_k (bits per byte, or nats) of a run is

    log L_k = a_k - sum_j b_kj * log(1 + M_j / m_k)

where M_j is the effective mass of source j, in tokens at the highest learning rate:

    M_j = sum_t (lr_t / lr_max) * n_jt * (f_k + (1 - f_k) * exp(-(u_T - u_t) / s_k)).

n_jt are the tokens of source j in part t of the run, and u_t is the sum of ``lr / lr_max`` times
tokens of all sources up to it, so that age is counted in tokens at the highest learning rate. The
kernel has a recent part that is forgotten over s_k tokens, and a part f_k that stays. s_k, f_k and
m_k are searched on a grid, and a_k and b_kj are linear least squares given them. A negative b_kj
means that source j displaces what is evaluated.

Runs of several seeds count as one, because the model errs by more than the seeds differ. The error
is that of predicting each group of runs from all others, with the nonlinear parameters chosen anew
each time; it is only approximately nested, because these are compared by errors in which the other
groups took part. Runs of one kind, such as an arm with and without a tail, form a group, because
they would predict each other. An optimizer is drawn to where a model errs, so the proposal
minimizes the upper end of the prediction, among schedules that do not extrapolate: around each
knot, the share of a source is between the lowest and the highest that the runs had there, and the
leverage is at most that of the runs. Leverage alone does not suffice: effective masses are sums,
which do not show that a phase reads a single source. In a run of another length, which the fit
always extrapolates, the bound is the leverage of the runs' mean mixture if that is higher.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.errors import UserError

FloatArray = npt.NDArray[np.float64]

SPANS = tuple(np.geomspace(0.03, 2.0, 13).tolist())
"""Candidates of s_k, relative to the median length of the runs."""
LASTING = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
"""Candidates of f_k; 1 means that the order does not matter."""
SATURATIONS = tuple(np.geomspace(0.003, 1.0, 9).tolist())
"""Candidates of m_k, relative to the median length of the runs."""
NUM_PARTS = 60
"""Number of parts of a run whose tokens and learning rates are kept."""
METRICS_FILE = "metrics.jsonl"
_RIDGE = 1e-4


@dataclass(frozen=True)
class Trajectory:
    """What a run read and at which learning rates.

    Attributes:
        learning_rate: float64[num_parts], mean learning rate of each part of the run.
        tokens: float64[num_parts, num_sources], tokens of each source in each part.
    """

    learning_rate: FloatArray
    tokens: FloatArray

    def masses(self, span: float, lasting: float, peak: float) -> FloatArray:
        """Returns the effective masses, float64[num_sources].

        Args:
            span: s_k, in tokens.
            lasting: f_k.
            peak: The learning rate at which a token counts as one.
        """
        rate = self.learning_rate / peak
        steps = rate * self.tokens.sum(axis=1)
        # Age of the middle of each part.
        age = steps[::-1].cumsum()[::-1] - steps / 2
        kernel = lasting + (1 - lasting) * np.exp(-age / span)
        return np.asarray((rate * kernel) @ self.tokens)


@dataclass(frozen=True)
class Observation:
    """A run with its result.

    Attributes:
        name: The name of the run.
        trajectory: What it read.
        losses: Final loss of each evaluated source.
        group: Runs of the same group are left out together; "" for a group of its own.
    """

    name: str
    trajectory: Trajectory
    losses: Mapping[str, float]
    group: str = ""


@dataclass(frozen=True)
class RunRecord:
    """What is read of a finished run.

    Attributes:
        name: Its folder or name.
        parts: The mean ``learning_rate`` and the ``tokens`` by source of each part of the run.
        losses: Final bits per byte of each evaluated source.
        group: `Observation.group`.
    """

    name: str
    parts: Sequence[Mapping[str, Any]]
    losses: Mapping[str, float]
    group: str = ""

    @property
    def read(self) -> set[str]:
        """The sources of which the run has read tokens."""
        return {name for part in self.parts for name, count in part["tokens"].items() if count}

    @property
    def is_mixture(self) -> bool:
        """Whether the run has read more than one source.

        Losses of a run on sources it has not read measure forgetting. The model has no term for
        that; fitted to a run that has read a single source, it fails on all others.
        """
        return len(self.read) > 1

    def observation(self, sources: Sequence[str]) -> Observation:
        """Returns the run with its sources in this order."""
        rates = np.array([part["learning_rate"] for part in self.parts], np.float64)
        rows = [[part["tokens"].get(name, 0) for name in sources] for part in self.parts]
        trajectory = Trajectory(rates, np.array(rows, np.float64))
        return Observation(self.name, trajectory, self.losses, self.group)


def parts_of_run(entries: Sequence[Mapping[str, Any]], num_parts: int) -> list[dict[str, Any]]:
    """Summarizes the iterations of ``metrics.jsonl`` in at most ``num_parts`` parts."""
    iterations = [entry for entry in entries if "lm_loss" in entry]
    length = max(1, -(-len(iterations) // num_parts))
    parts = []
    before: dict[str, int] = {}
    for start in range(0, len(iterations), length):
        part = iterations[start : start + length]
        drawn = {name: one["tokens"] for name, one in part[-1]["sources"].items()}
        rates = [entry["learning_rate"] for entry in part]
        tokens = {name: count - before.get(name, 0) for name, count in drawn.items() if count}
        parts.append({"learning_rate": sum(rates) / len(rates), "tokens": tokens})
        before = drawn
    return parts


def read_runs(path: Path, model: str | None = None) -> list[RunRecord]:
    """Reads a run's folder, or the results of ``examples/transfer_study``.

    Args:
        path: A folder with ``metrics.jsonl``, or a file.
        model: The model whose results are read; None if there is only one.

    Raises:
        UserError: There are no such files, they are damaged, or the run has no validation.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        if path.is_dir():
            entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
            parts = parts_of_run(entries, NUM_PARTS)
            validations = [entry["validation"] for entry in entries if "validation" in entry]
            if not parts or not validations:
                raise UserError(f"{file}: has no validation after training; set --eval-interval")
            losses = {name: float(one["bits_per_byte"]) for name, one in validations[-1].items()}
            return [RunRecord(str(path), parts, losses)]
        runs: dict[str, Any] = json.loads(text)["runs"]
        models = sorted({run["model"] for run in runs.values()})
        if model not in models and (model is not None or len(models) != 1):
            raise UserError(f"{file}: name one of its models with --model: {', '.join(models)}")
        return [
            RunRecord(name, run["trajectory"], run["final"], run.get("arm", ""))
            for name, run in runs.items()
            if model in (None, run["model"])
        ]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: is not of a finished run ({error!r}); give another") from None


@dataclass(frozen=True)
class TargetFit:
    """The fitted model of one evaluated source.

    Attributes:
        span: s_k in tokens.
        lasting: f_k.
        saturation: m_k in tokens.
        coefficients: float64[1 + num_sources], a_k and -b_kj.
        covariance: float64[1 + num_sources, 1 + num_sources], ``(X'X)^-1``.
        errors: float64[num_runs], errors of the log loss of each run when its group is left out.
        max_leverage: The highest leverage of a fitted run.
        num_runs: Number of fitted runs.
        spread: Standard deviation of the fitted log losses, for comparison with ``sigma``.
    """

    span: float
    lasting: float
    saturation: float
    coefficients: FloatArray
    covariance: FloatArray
    errors: FloatArray
    max_leverage: float
    num_runs: int
    spread: float

    @property
    def sigma(self) -> float:
        """Standard deviation of a prediction error of a run among the fitted ones, in log loss."""
        return float(np.sqrt(np.mean(self.errors**2)))

    def predict(self, trajectory: Trajectory, peak: float) -> tuple[float, float]:
        """Returns the predicted log loss of a run and the standard deviation of its error."""
        row = _design(trajectory.masses(self.span, self.lasting, peak), self.saturation)
        deviation = self.sigma * (1 + self.leverage(trajectory, peak)) ** 0.5
        return float(row @ self.coefficients), deviation

    def leverage(self, trajectory: Trajectory, peak: float) -> float:
        """Returns the leverage of a run: how far it is from the fitted ones."""
        row = _design(trajectory.masses(self.span, self.lasting, peak), self.saturation)
        return float(row @ self.covariance @ row)


@dataclass(frozen=True)
class RecencyFit:
    """Fitted models of all evaluated sources.

    Attributes:
        sources: Names of the training sources, in the order of the trajectories.
        peak: The highest learning rate of all runs.
        trajectories: The runs.
        targets: The fits by evaluated source.
    """

    sources: tuple[str, ...]
    peak: float
    trajectories: tuple[Trajectory, ...]
    targets: Mapping[str, TargetFit]

    def predict(self, trajectory: Trajectory) -> dict[str, tuple[float, float, float]]:
        """Returns predicted loss and the ends of its interval of two standard deviations."""
        found = {}
        for name, target in self.targets.items():
            mean, deviation = target.predict(trajectory, self.peak)
            ends = np.exp([mean, mean - 2 * deviation, mean + 2 * deviation])
            found[name] = (float(ends[0]), float(ends[1]), float(ends[2]))
        return found

    def extrapolated(self, trajectory: Trajectory) -> list[str]:
        """Returns the evaluated sources for which a run is farther off than all fitted ones."""
        return [
            name
            for name, target in self.targets.items()
            if target.leverage(trajectory, self.peak) > target.max_leverage * 1.001
        ]

    def predict_goal(
        self, trajectory: Trajectory, goal: Mapping[str, float]
    ) -> tuple[float, float]:
        """Returns the predicted weighted mean of log losses and the deviation of its error.

        The errors of different sources are correlated as they are when groups are left out.
        """
        targets = [self.targets[name] for name in goal]
        weights = np.array(list(goal.values())) / sum(goal.values())
        found = np.array([one.predict(trajectory, self.peak) for one in targets])
        # Not centered: what the errors have in common does not average out.
        errors = np.stack([one.errors / max(one.sigma, 1e-12) for one in targets])
        deviations = weights * found[:, 1]
        variance = np.mean((deviations @ errors) ** 2)
        return float(weights @ found[:, 0]), float(np.sqrt(variance))


def merge_replicates(observations: Sequence[Observation]) -> list[Observation]:
    """Averages the losses of runs that read the same, such as those of different seeds.

    Left in, the others would predict a run that is left out from its own replicates.
    """
    groups: dict[bytes, list[Observation]] = {}
    for one in observations:
        parts = (one.trajectory.learning_rate, one.trajectory.tokens)
        key = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        groups.setdefault(key, []).append(one)
    merged = []
    for group in groups.values():
        names = [name for name in group[0].losses if all(name in one.losses for one in group)]
        losses = {name: float(np.mean([one.losses[name] for one in group])) for name in names}
        merged.append(replace(group[0], losses=losses))
    return merged


def fit_recency(observations: Sequence[Observation], sources: Sequence[str]) -> RecencyFit:
    """Fits the model to runs.

    Args:
        observations: The runs, which should be mixtures; trajectories have the sources in the given
            order.
        sources: Names of the training sources.

    Raises:
        UserError: There are too few runs for the parameters, or losses are missing.
    """
    least = 2 * (len(sources) + 4)  # twice the parameters of a source
    if len(observations) < least:
        raise UserError(
            f"{len(observations)} runs cannot determine a fit with {len(sources)} sources; give at "
            f"least {least}"
        )
    names = list(observations[0].losses)
    for one in observations:
        if missing := set(names) - set(one.losses):
            raise UserError(
                f"{one.name}: has no final loss of {min(missing)}; evaluate the same sources in "
                "all runs"
            )
    peak = max(float(one.trajectory.learning_rate.max()) for one in observations)
    length = float(np.median([one.trajectory.tokens.sum() for one in observations]))
    grid, designs = [], []
    for span, lasting in product(SPANS, LASTING):
        rows = [one.trajectory.masses(span * length, lasting, peak) for one in observations]
        for saturation in SATURATIONS:
            grid.append((span * length, lasting, saturation * length))
            designs.append(_design(np.stack(rows), saturation * length))
    groups = [one.group or f"#{number}" for number, one in enumerate(observations)]
    smoothers = np.stack([_leave_groups_out(design, groups) for design in designs])
    targets = {}
    for name in names:
        y = np.log([one.losses[name] for one in observations])
        targets[name] = _fit_target(grid, designs, smoothers @ y, y, groups)
    return RecencyFit(tuple(sources), peak, tuple(one.trajectory for one in observations), targets)


def _fit_target(
    grid: Sequence[tuple[float, float, float]],
    designs: Sequence[FloatArray],
    residuals: FloatArray,
    y: FloatArray,
    groups: Sequence[str],
) -> TargetFit:
    """Chooses the nonlinear parameters by leave-group-out error, and estimates the error of that.

    ``residuals`` is float64[grid, runs], the errors of predicting each run from other groups.
    """
    squares = residuals**2
    best = int(np.argmin(squares.sum(axis=1)))
    # A group is predicted with the parameters that are best for the others.
    is_same = np.array([[one == other for other in groups] for one in groups])
    chosen = np.argmin(squares @ ~is_same, axis=0)
    errors = residuals[chosen, np.arange(len(y))]
    design = designs[best]
    covariance = np.asarray(np.linalg.inv(_normal(design)), np.float64)
    span, lasting, saturation = grid[best]
    return TargetFit(
        span=span,
        lasting=lasting,
        saturation=saturation,
        coefficients=covariance @ design.T @ y,
        covariance=covariance,
        errors=errors,
        max_leverage=float(np.einsum("ij,jk,ik->i", design, covariance, design).max()),
        num_runs=len(y),
        spread=float(np.std(y)),
    )


def _design(masses: FloatArray, saturation: float) -> FloatArray:
    """Returns the features of runs, float64[..., 1 + num_sources]."""
    logs = np.log1p(masses / saturation)
    return np.concatenate([np.ones_like(logs[..., :1]), logs], axis=-1)


def _normal(design: FloatArray) -> FloatArray:
    """Returns ``X'X`` with a slight ridge on the slopes, for sources that no run varies."""
    ridge = _RIDGE * len(design) * np.eye(design.shape[1])
    ridge[0, 0] = 0
    return np.asarray(design.T @ design + ridge)


def _leave_groups_out(design: FloatArray, groups: Sequence[str]) -> FloatArray:
    """Returns the matrix that maps values to their errors when their group is left out.

    For least squares with hat matrix H, the errors of a group g are
    ``(I - H_gg)^-1 (y - H y)_g``.
    """
    hat = design @ np.linalg.solve(_normal(design), design.T)
    errors = np.eye(len(hat)) - hat
    for group in dict.fromkeys(groups):
        rows = np.array([k for k, one in enumerate(groups) if one == group])
        own = errors[np.ix_(rows, rows)]
        # Without its group, a source that no other run varies is left to the ridge.
        errors[rows] = np.linalg.solve(own + 1e-6 * np.eye(len(rows)), errors[rows])
    return np.asarray(errors)


@dataclass(frozen=True)
class Proposal:
    """A proposed schedule.

    Attributes:
        positions: float64[num_knots], positions of the knots from 0 to 1.
        shares: float64[num_knots, num_sources], shares of tokens at the knots, linear between them.
        trajectory: What it reads.
        score: The predicted weighted mean of log losses plus ``caution`` standard deviations.
        outside: Sources of which a knot has more or less than the runs had there, because of
            ``max_tokens``.
    """

    positions: FloatArray
    shares: FloatArray
    trajectory: Trajectory
    score: float
    outside: tuple[str, ...]


def propose_schedule(
    fit: RecencyFit,
    goal: Mapping[str, float],
    learning_rate: FloatArray,
    num_tokens: float,
    *,
    max_tokens: Mapping[str, float] | None = None,
    num_knots: int = 5,
    caution: float = 1.0,
    num_starts: int = 8,
    seed: int = 1,
) -> Proposal:
    """Searches the schedule with the best score, linear between equally spaced knots.

    It extrapolates no farther than the length of the run and ``max_tokens`` demand: around each
    knot, the share of a source is one that the runs had there, and the leverage for the sources of
    the goal is at most that of the runs or of their mean mixture.

    Args:
        fit: The fitted model.
        goal: Weights of the evaluated sources' log losses.
        learning_rate: float64[num_parts], the learning rate over the run.
        num_tokens: Tokens of the run.
        max_tokens: Upper bounds of the tokens of sources.
        num_knots: Number of knots; 1 for the best static mixture.
        caution: Standard deviations of the prediction that are added to it.
        num_starts: Number of starts besides the runs' mean mixture: first the best runs, then as
            many random ones.
        seed: Seed of the random starts and directions.

    Raises:
        UserError: The goal names a source without a fit, the bounds leave too few tokens or cannot
            be kept, or a run has fewer parts than knots.
    """
    for name in goal:
        if name not in fit.targets:
            raise UserError(f"goal: {name} was not evaluated; known: {', '.join(fit.targets)}")
    if not any(goal.values()) or min(goal.values()) < 0:
        raise UserError("goal: give weights of at least 0, and one above 0")
    goal = {name: weight for name, weight in goal.items() if weight}
    bounds = np.array([(max_tokens or {}).get(name, np.inf) for name in fit.sources])
    if bounds.sum() < num_tokens:
        raise UserError(
            f"the sources have {bounds.sum():.0f} tokens together, fewer than the {num_tokens:.0f} "
            "of the run; train shorter, or allow more epochs"
        )
    least = min(len(learning_rate), *(len(one.tokens) for one in fit.trajectories))
    if num_knots > least:
        raise UserError(f"{num_knots} knots: a run has {least} parts; use at most as many")
    num_parts, num_sources = len(learning_rate), len(fit.sources)
    positions = np.linspace(0, 1, num_knots)
    middles = (np.arange(num_parts) + 0.5) / num_parts
    mix = np.stack([np.interp(middles, positions, row) for row in np.eye(num_knots)], axis=1)

    def trajectory(logits: FloatArray) -> tuple[FloatArray, Trajectory]:
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return shares, Trajectory(learning_rate, mix @ shares * (num_tokens / num_parts))

    seen = np.stack([_knot_shares(one, positions) for one in fit.trajectories])
    lowest, highest = seen.min(axis=0), seen.max(axis=0)
    runs = list(np.log(np.maximum(seen, 1e-3)))
    mean_mixture = np.tile(np.log(np.maximum(seen.mean(axis=(0, 1)), 1e-3)), (num_knots, 1))
    middle = trajectory(mean_mixture)[1]
    limits = {
        name: max(fit.targets[name].max_leverage, fit.targets[name].leverage(middle, fit.peak))
        for name in goal
    }

    def outside(shares: FloatArray) -> FloatArray:
        return np.asarray(np.maximum(0, np.maximum(shares - highest, lowest - shares)))

    def cost(logits: FloatArray) -> float:
        shares, found = trajectory(logits)
        excess = float(outside(shares).sum())
        # Tokens that a source does not have weigh more than anything that no run had.
        tokens = found.tokens.sum(axis=0)
        excess += 1e4 * float(np.maximum(tokens - bounds, 0).sum()) / num_tokens
        for name, limit in limits.items():
            excess += max(0.0, fit.targets[name].leverage(found, fit.peak) / limit - 1)
        mean, deviation = fit.predict_goal(found, goal)
        return mean + caution * deviation + 10 * excess

    rng = np.random.default_rng(seed)
    starts = [mean_mixture, *sorted(runs, key=cost)[: num_starts // 2]]
    while len(starts) < num_starts + 1:
        starts.append(rng.normal(0, 1.5, (num_knots, num_sources)))
    best, best_cost = min((_search(cost, one, rng) for one in starts), key=lambda found: found[1])
    shares, result = trajectory(best)
    for name, excess in zip(fit.sources, result.tokens.sum(axis=0) - bounds, strict=True):
        if excess > 0.01 * num_tokens:
            raise UserError(f"no schedule was found that keeps the bound of the tokens of {name}")
    too_far = [
        name
        for name, one in zip(fit.sources, outside(shares).max(axis=0), strict=True)
        if one > 0.02
    ]
    return Proposal(positions, shares, result, best_cost, tuple(too_far))


def schedule_block(
    proposal: Proposal, sources: Sequence[str], num_iterations: int
) -> dict[str, Any]:
    """Returns a proposal as a ``data.schedule`` block in iterations, with rounded weights."""
    knots: list[dict[str, Any]] = []
    for position, row in zip(proposal.positions, proposal.shares, strict=True):
        weights = {name: round(float(w), 3) for name, w in zip(sources, row, strict=True)}
        at = round(float(position) * (num_iterations - 1))
        knots.append({"at": at, "weights": weights, "ramp": "linear" if knots else "step"})
    return {"unit": "iterations", "knots": knots}


def _knot_shares(trajectory: Trajectory, positions: FloatArray) -> FloatArray:
    """Returns a run's mean shares around knots, float64[num_knots, num_sources].

    Each part of the run belongs to the nearest knot.
    """
    num_parts = len(trajectory.tokens)
    nearest = np.abs((np.arange(num_parts)[:, None] + 0.5) / num_parts - positions).argmin(axis=1)
    counts = np.stack([trajectory.tokens[nearest == k].sum(0) for k in range(len(positions))])
    return np.asarray(counts / counts.sum(axis=1, keepdims=True), np.float64)


def _search(
    cost: Callable[[FloatArray], float], logits: FloatArray, rng: np.random.Generator
) -> tuple[FloatArray, float]:
    """Minimizes by steps along coordinates and random directions, halved when none helps.

    Coordinates alone would end at the edges of the constraints.
    """
    value, step = cost(logits), 2.0
    while step > 0.02:
        has_improved = False
        directions = rng.normal(size=(logits.size, logits.size))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        for direction in np.concatenate([np.eye(logits.size), directions]):
            for change in (step, -step):
                moved = np.clip(logits + change * direction.reshape(logits.shape), -6, 6)
                if (tried := cost(moved)) < value - 1e-9:
                    logits, value, has_improved = moved, tried, True
                    break
        if not has_improved:
            step /= 2
    return logits, value
