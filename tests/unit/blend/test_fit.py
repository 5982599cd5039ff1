"""Tests the fit of losses to what runs read, on synthetic data whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_chatflow.blend.fit import (
    Observation,
    Trajectory,
    _leave_groups_out,
    fit_recency,
    merge_replicates,
    propose_schedule,
    schedule_block,
)
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.errors import UserError

SOURCES = ("english", "chinese", "instruction")
LENGTH, PARTS = 1e6, 40
LEVELS = np.array([0.9, 1.4, 1.1])
# Rows: what is evaluated; columns: what is read. Chinese displaces English.
GAINS = np.array([[0.10, -0.03, 0.0], [0.0, 0.15, 0.02], [0.01, 0.04, 0.25]])
NOISE = 0.002


def rates(is_cosine: bool) -> np.ndarray:
    place = (np.arange(PARTS) + 0.5) / PARTS
    if is_cosine:
        return 1e-3 * (1 + np.cos(np.pi * place)) / 2
    return 1e-3 * np.minimum(1, (1 - place) / 0.15)


def random_runs(
    num_runs: int, span: float, lasting: float, seed: int = 0
) -> tuple[list[Observation], np.random.Generator]:
    """Returns runs of a truth that is of the model's form but not on its grid."""
    rng = np.random.default_rng(seed)
    runs = []
    for number in range(num_runs):
        knots = rng.dirichlet(np.ones(len(SOURCES)), 4)
        place = np.linspace(0, 3, PARTS)
        shares = np.stack([np.interp(place, range(4), column) for column in knots.T], axis=1)
        trajectory = Trajectory(rates(number % 3 == 0), shares * LENGTH / PARTS)
        losses = true_losses(trajectory, span, lasting, NOISE * rng.normal(size=len(SOURCES)))
        runs.append(Observation(f"run {number}", trajectory, losses))
    return runs, rng


def true_losses(
    trajectory: Trajectory, span: float, lasting: float, noise: float | np.ndarray = 0.0
) -> dict[str, float]:
    masses = trajectory.masses(span * LENGTH, lasting, 1e-3)
    logs = LEVELS - GAINS @ np.log1p(masses / (0.04 * LENGTH)) + noise
    return dict(zip(SOURCES, np.exp(logs).tolist(), strict=True))


@pytest.mark.parametrize(("span", "lasting"), [(0.18, 0.2), (0.08, 0.4), (0.3, 1.0)])
def test_the_truth_is_recovered_and_predictions_hold(span: float, lasting: float) -> None:
    runs, _ = random_runs(30, span, lasting)
    fit = fit_recency(runs, SOURCES)
    for name, target in fit.targets.items():
        # The error is that of the noise, and far below what there is to explain.
        assert NOISE / 2 < target.sigma < 2.5 * NOISE, name
        assert target.sigma < target.spread / 4
    new, _ = random_runs(40, span, lasting, seed=5)
    inside = []
    for run in new:
        truth = true_losses(run.trajectory, span, lasting)
        for name, (_, low, high) in fit.predict(run.trajectory).items():
            inside.append(low <= truth[name] <= high)
    assert np.mean(inside) > 0.9
    if lasting == 1:
        found = fit.targets["instruction"]
        assert found.lasting + (1 - found.lasting) * np.exp(-0.5 * LENGTH / found.span) > 0.7
    else:
        assert fit.targets["instruction"].lasting < 1
        assert 0.4 < fit.targets["instruction"].span / (span * LENGTH) < 2.5


def test_a_signal_that_is_not_there_is_not_found() -> None:
    """Losses that depend on nothing have a leave-one-out error as large as their spread."""
    runs, rng = random_runs(20, 0.2, 0.2)
    runs = [
        Observation(one.name, one.trajectory, {"x": float(np.exp(rng.normal()))}) for one in runs
    ]
    target = fit_recency(runs, SOURCES).targets["x"]
    assert target.sigma > 0.9 * target.spread


def test_recency_counts_in_steps_of_the_learning_rate() -> None:
    early = np.zeros((PARTS, 1))
    early[: PARTS // 2] = 1
    late = early[::-1]
    constant, cosine = np.ones(PARTS), rates(is_cosine=True) * 1e3
    span = 10.0

    def masses(rate: np.ndarray, tokens: np.ndarray) -> float:
        both = np.concatenate([tokens, 1 - tokens], axis=1)
        return float(Trajectory(rate, both).masses(span, 0.0, 1.0)[0])

    assert masses(constant, late) > 5 * masses(constant, early)
    # Under a cosine the second half is learned at low rates, and the first is less forgotten.
    assert masses(cosine, late) < masses(constant, late)
    assert masses(cosine, early) > masses(constant, early)
    everything = Trajectory(constant, early).masses(span, 1.0, 1.0)
    assert everything == pytest.approx([PARTS / 2])


def test_a_proposal_is_better_than_every_run_and_keeps_its_bounds() -> None:
    runs, _ = random_runs(30, 0.18, 0.2)
    fit = fit_recency(runs, SOURCES)
    goal = {"english": 1.0, "chinese": 2.0, "instruction": 1.0}
    proposal = propose_schedule(
        fit, goal, rates(is_cosine=False), LENGTH, max_tokens={"instruction": 0.2 * LENGTH}
    )

    def true_score(trajectory: Trajectory) -> float:
        losses = true_losses(trajectory, 0.18, 0.2)
        return sum(goal[name] * np.log(losses[name]) for name in goal)

    allowed = [
        true_score(run.trajectory)
        for run in runs
        if run.trajectory.tokens[:, 2].sum() <= 0.2 * LENGTH
    ]
    assert true_score(proposal.trajectory) < min(allowed)
    tokens = proposal.trajectory.tokens
    assert tokens[:, 2].sum() <= 0.2 * LENGTH * 1.001
    assert tokens.sum() == pytest.approx(LENGTH)
    block = schedule_block(proposal, SOURCES, 240)
    schedule = Schedule.from_dict(block, SOURCES, 8)
    assert block["knots"][-1]["at"] == 239
    drawn = np.stack([schedule.weights(8 * t) for t in range(240)]).mean(axis=0) / 2**32
    assert drawn == pytest.approx(tokens.sum(axis=0) / LENGTH, abs=0.01)
    free = propose_schedule(fit, {"instruction": 1.0}, rates(False), LENGTH, num_starts=2)
    assert free.trajectory.tokens[:, 2].sum() > 0.5 * LENGTH


def test_runs_that_read_the_same_count_once() -> None:
    runs, _ = random_runs(3, 0.2, 0.2)
    again = [Observation("again", runs[0].trajectory, {name: 9.0 for name in SOURCES}), *runs[1:]]
    merged = merge_replicates([*runs, *again])
    assert [one.name for one in merged] == ["run 0", "run 1", "run 2"]
    assert merged[0].losses["chinese"] == pytest.approx((runs[0].losses["chinese"] + 9) / 2)


def test_groups_are_left_out_together() -> None:
    """Against a fit of the other runs."""
    rng = np.random.default_rng(2)
    design = np.concatenate([np.ones((12, 1)), rng.normal(size=(12, 3))], axis=1)
    y, groups = rng.normal(size=12), [f"{k // 2}" for k in range(12)]
    errors = _leave_groups_out(design, groups) @ y
    for group in set(groups):
        rows = [k for k in range(12) if groups[k] != group]
        found = np.linalg.lstsq(design[rows], y[rows], rcond=None)[0]
        for k in (k for k in range(12) if groups[k] == group):
            assert errors[k] == pytest.approx(y[k] - design[k] @ found, abs=0.02)


def test_the_error_of_a_goal_has_the_correlation_of_its_sources() -> None:
    runs, rng = random_runs(30, 0.18, 0.2)
    common = [dict.fromkeys(SOURCES, float(np.exp(0.03 * rng.normal()))) for _ in runs]
    runs = [
        Observation(
            run.name, run.trajectory, {name: run.losses[name] * one[name] for name in SOURCES}
        )
        for run, one in zip(runs, common, strict=True)
    ]
    fit = fit_recency(runs, SOURCES)
    goal = {"english": 1.0, "chinese": 3.0}
    mean, deviation = fit.predict_goal(runs[0].trajectory, goal)
    found = {name: fit.targets[name].predict(runs[0].trajectory, fit.peak) for name in goal}
    assert mean == pytest.approx((found["english"][0] + 3 * found["chinese"][0]) / 4)
    # What all sources have in common does not average out.
    alone = (found["english"][1] + 3 * found["chinese"][1]) / 4
    assert 0.9 * alone < deviation <= alone


def test_schedules_outside_the_runs_extrapolate() -> None:
    runs, _ = random_runs(20, 0.2, 0.2)
    fit = fit_recency(runs, SOURCES)
    assert fit.extrapolated(runs[0].trajectory) == []
    alone = np.zeros((PARTS, len(SOURCES)))
    alone[:, 2] = LENGTH / PARTS
    assert fit.extrapolated(Trajectory(rates(False), alone)) == list(SOURCES)
    # The best schedule for instructions alone would be this one.
    proposal = propose_schedule(fit, {"instruction": 1.0}, rates(False), LENGTH, num_starts=2)
    assert "instruction" not in fit.extrapolated(proposal.trajectory)
    # A longer run is always farther off, but not more than it must.
    longer = propose_schedule(fit, {"instruction": 1.0}, rates(False), 10 * LENGTH, num_starts=2)
    mixture = np.mean([run.trajectory.tokens for run in runs], axis=(0, 1)) * PARTS / LENGTH
    middle = Trajectory(rates(False), np.tile(mixture, (PARTS, 1)) * 10 * LENGTH / PARTS)
    target = fit.targets["instruction"]
    limit = target.leverage(middle, fit.peak)
    assert target.max_leverage < target.leverage(longer.trajectory, fit.peak) < 1.05 * limit


def test_no_share_is_outside_of_what_the_runs_had() -> None:
    """Effective masses are sums: a phase of one source may have those of an ordinary run."""
    runs, _ = random_runs(30, 0.2, 0.2)
    is_early = np.arange(PARTS) < PARTS / 2
    for run in runs:  # English is rare early, and instructions late
        for when, which in ((is_early, 0), (~is_early, 2)):
            run.trajectory.tokens[when, which] *= 0.3
            run.trajectory.tokens[when, 1] = LENGTH / PARTS - run.trajectory.tokens[when][
                :, [0, 2]
            ].sum(axis=1)
    runs = [replace(run, losses=true_losses(run.trajectory, 0.2, 0.2)) for run in runs]
    fit = fit_recency(runs, SOURCES)
    shares = np.stack([run.trajectory.tokens / (LENGTH / PARTS) for run in runs])
    for goal in SOURCES:
        proposal = propose_schedule(fit, {goal: 1.0}, rates(False), LENGTH, num_starts=2)
        found = proposal.shares
        assert proposal.outside == ()
        for knot, part in ((0, slice(0, 5)), (-1, slice(-5, None))):
            seen = shares[:, part].mean(axis=1)
            assert np.all(found[knot] <= seen.max(axis=0) + 0.02)
            assert np.all(found[knot] >= seen.min(axis=0) - 0.02)
    # A source that does not have enough tokens comes before that.
    for most in (0.1, 0.0):
        bounds = {"chinese": most * LENGTH}
        found = propose_schedule(fit, {"chinese": 1.0}, rates(False), LENGTH, max_tokens=bounds)
        assert found.trajectory.tokens[:, 1].sum() < (most + 0.001) * LENGTH
        assert "chinese" in found.outside


def test_the_best_static_mixture_is_no_better_than_a_schedule() -> None:
    runs, _ = random_runs(30, 0.18, 0.2)
    fit = fit_recency(runs, SOURCES)
    goal = {"english": 1.0, "chinese": 2.0, "instruction": 1.0}
    found = [propose_schedule(fit, goal, rates(False), LENGTH, num_knots=n) for n in (1, 5)]
    assert np.ptp(found[0].trajectory.tokens, axis=0) == pytest.approx(0)
    assert found[1].score < found[0].score


def test_what_cannot_be_fitted_is_refused() -> None:
    runs, _ = random_runs(14, 0.2, 0.2)
    with pytest.raises(UserError, match="13 runs cannot determine a fit with 3 sources"):
        fit_recency(runs[:13], SOURCES)
    fit = fit_recency(runs, SOURCES)
    with pytest.raises(UserError, match="goal: french was not evaluated"):
        propose_schedule(fit, {"french": 1.0}, rates(False), LENGTH)
    with pytest.raises(UserError, match="have 300000 tokens together, fewer than the 1000000"):
        bounds = dict.fromkeys(SOURCES, 1e5)
        propose_schedule(fit, {"chinese": 1.0}, rates(False), LENGTH, max_tokens=bounds)
    del runs[3].losses["chinese"]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="run 3: has no final loss of chinese"):
        fit_recency(runs, SOURCES)
