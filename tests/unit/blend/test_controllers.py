"""Tests controllers against independent references, and the bounds of their decisions."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.adaptive import AdaptiveBlend
from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.controllers import (
    WeightControl,
    bounded_shares,
    fixed_schedule,
    integer_weights,
)
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.checkpoint.decisions import read_decisions
from megatron_chatflow.config import ControllerConfig
from megatron_chatflow.errors import UserError

GRID = 1 << 32
NAMES = ("en", "zh", "chat")
HORIZON = 16


def control_of(
    weights: tuple[float, ...] = (2.0, 1.0, 1.0),
    *,
    allowed: tuple[int | None, ...] = (None, None, None),
    num_samples: int = 10_000,
    state: dict[str, Any] | None = None,
    blend_state: dict[str, Any] | None = None,
    **settings: Any,
) -> WeightControl:
    knot = {"at": 0, "weights": dict(zip(NAMES, weights, strict=True))}
    schedule = Schedule.from_dict({"knots": [knot]}, NAMES, 8)
    blend = AdaptiveBlend(schedule, HORIZON, state=blend_state)
    config = ControllerConfig(**{"name": "odm", "horizon": HORIZON, **settings})
    return WeightControl(config, blend, allowed, num_samples, state or {})


def decide(control: WeightControl) -> list[float]:
    record = control.adopt(*control.propose())
    return [weight / GRID for weight in record["weights"].values()]


def scripted_losses(num_horizons: int) -> list[list[float | None]]:
    """Returns mean losses that fall at different rates; the third source is missing at times."""
    return [
        [3 - 0.02 * h, 5 * math.exp(-0.05 * h), None if h % 4 == 3 else 2 + 0.5 * math.sin(h)]
        for h in range(num_horizons)
    ]


def test_odm_equals_the_published_algorithm() -> None:
    """The reference below is Algorithm 1 of arXiv 2312.02406 in NumPy, one decision per horizon."""
    losses = scripted_losses(40)
    control = control_of(smoothing=0.8)
    found = []
    for row in losses:
        tokens = np.array([0.0 if loss is None else 50.0 for loss in row])
        sums = np.stack([np.array([loss or 0.0 for loss in row]) * tokens, tokens, tokens], axis=1)
        control.observe(sums / 2)  # two iterations
        control.observe(sums / 2)
        found.append(decide(control))

    reward, exploration, expected = np.zeros(3), 1 / 3, []
    for step, row in enumerate(losses, start=1):
        seen = np.array([loss is not None for loss in row])
        values = np.array([loss or 0.0 for loss in row])
        reward = np.where(seen, 0.8 * reward + 0.2 * values, reward)
        previous, exploration = exploration, min(1 / 3, np.sqrt(np.log(3) / (3 * step)))
        softmax = np.exp(previous * reward) / np.exp(previous * reward).sum()
        expected.append((1 - 3 * exploration) * softmax + exploration)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-31)
    np.testing.assert_allclose(found[2], [1 / 3] * 3, atol=2**-31)  # K ln K = 3.3 decisions
    assert np.ptp(found[-1]) > 0.02


def test_shearing_equals_the_published_algorithm() -> None:
    """The reference below is Algorithm 1 of arXiv 2310.06694 in NumPy."""
    references = {"en": 2.0, "zh": 1.5, "chat": 2.1}
    losses = [[2.5 - 0.1 * h, 4.0 * 0.9**h, 2.0 + 0.2 * (h % 2)] for h in range(12)]
    control = control_of(name="shearing", reference_loss=references)
    share, target = np.array([0.5, 0.25, 0.25]), np.array(list(references.values()))
    for number, row in enumerate(losses):
        if number % 3 != 2:  # no validation fell into this horizon
            control.observe_validation(dict(zip(NAMES, row, strict=True)))
            share = share * np.exp(np.maximum(np.array(row) - target, 0))
            share = share / share.sum()
        np.testing.assert_allclose(decide(control), share, rtol=0, atol=2**-30)
    assert share[1] > 0.9


def test_a_run_is_decided_one_horizon_ahead() -> None:
    control = control_of()
    blend = control.blend
    assert blend.decided_samples == 2 * HORIZON
    assert (
        blend.weights(0).tolist()
        == blend.weights(HORIZON).tolist()
        == [GRID // 2, *[GRID // 4] * 2]
    )
    # A batch of 12 samples does not divide the horizon of 16.
    due = []
    for consumed in range(0, 100, 12):
        if control.is_due(consumed):
            decide(control)
            due.append(consumed)
        assert not control.is_due(consumed)
        assert blend.decided_samples >= consumed + HORIZON
    assert due == [24, 36, 48, 72, 84, 96][: len(due)] and len(due) == 6


def test_a_state_continues_in_the_middle_of_a_horizon() -> None:
    settings: dict[str, Any] = {"smoothing": 0.5, "floor": 0.1}
    rng = np.random.default_rng(0)
    sums = np.abs(rng.normal(30, 9, size=(40, 3, 3)))
    whole = control_of(**settings)
    restarted = control_of(**settings)
    for number, row in enumerate(sums):
        for control in (whole, restarted):
            control.observe(row)
            if number % 2:
                decide(control)
        samples = 8 * (number + 1)
        state = json.loads(json.dumps([restarted.state(), restarted.blend.state_at(samples)]))
        restarted = control_of(**settings, state=state[0], blend_state=state[1])
    assert restarted.blend.decisions() == whole.blend.decisions()
    assert restarted.state() == whole.state()
    np.testing.assert_array_equal(restarted.blend.take(0, 300)[0], whole.blend.take(0, 300)[0])


def test_floors_caps_and_sources_without_weight() -> None:
    references = {"en": 0.0, "zh": 9.0}
    bounds = {"floor": {"zh": 0.2}, "cap": {"en": 0.7}}
    control = control_of((1.0, 1.0, 0.0), name="shearing", reference_loss=references, **bounds)
    control.observe_validation({"en": 8.0, "zh": 8.0})
    assert decide(control) == pytest.approx([0.7, 0.3, 0.0])
    references = {"en": 9.0, "zh": 0.0}
    control = control_of((1.0, 1.0, 0.0), name="shearing", reference_loss=references, **bounds)
    control.observe_validation({"en": 8.0, "zh": 1000.0})
    assert decide(control) == pytest.approx([0.0, 1.0, 0.0], abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 2**16))
def test_max_epochs_are_never_exceeded(first: int, second: int, seed: int) -> None:
    """Whatever the losses, a source is drawn at most as often as allowed."""
    rng = np.random.default_rng(seed)
    num_samples = 500
    control = control_of(allowed=(first, second, None), num_samples=num_samples, floor=0.2)
    while control.blend.decided_samples < num_samples + 2 * HORIZON:
        control.observe(np.abs(rng.normal(30, 20, size=(3, 3))) + 1)
        decide(control)
    counts = control.blend.counts(num_samples + HORIZON)
    assert counts[0] <= first and counts[1] <= second
    assert counts.sum() == num_samples + HORIZON


def test_weights_behind_the_end_of_the_run_stay_within_max_epochs() -> None:
    """They are drawn if a resume extends the run, as far as the data of all sources suffices."""
    allowed = (48, 30, 23)
    control = control_of(allowed=allowed, num_samples=80)
    while control.blend.decided_samples < 80 + 2 * HORIZON:
        decide(control)
    assert (control.blend.counts(sum(allowed) - 1) <= allowed).all()


def test_all_data_can_be_used_up() -> None:
    """With one sample to spare, max_epochs of all sources are no obstacle; one less is an error."""
    control = control_of(allowed=(170, 170, 161), num_samples=500)
    while control.blend.decided_samples < 500:
        decide(control)
    assert (control.blend.counts(500) <= [170, 170, 161]).all()
    with pytest.raises(UserError, match="every source reaches its max_epochs after sample 4"):
        control = control_of(allowed=(150, 150, 150), num_samples=500)
        while control.blend.decided_samples < 500:
            decide(control)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**32))
def test_bounded_shares_minimize_the_divergence(number: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(number))
    lows = rng.dirichlet(np.ones(number)) * rng.uniform(0, 0.9)
    highs = np.minimum(lows + rng.uniform(0, 1, number), 1)
    highs[0] = 1
    found = np.array(bounded_shares(shares.tolist(), lows.tolist(), highs.tolist()))
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert (found >= lows - 1e-12).all() and (found <= highs + 1e-12).all()
    # Optimality: free shares have one factor; those at their floor have more, at their cap less.
    factor = found / shares
    free = (found > lows + 1e-9) & (found < highs - 1e-9)
    middle = factor[free].mean() if free.any() else None
    if middle is not None:
        np.testing.assert_allclose(factor[free], middle, rtol=1e-6)
        assert (factor[~free & (found <= lows + 1e-9)] >= middle * (1 - 1e-6)).all()
        assert (factor[~free & (found >= highs - 1e-9)] <= middle * (1 + 1e-6)).all()


def test_integer_weights_have_the_whole_sum() -> None:
    assert integer_weights([1 / 3, 1 / 3, 1 / 3], [GRID] * 3) == [
        GRID // 3 + 1,
        GRID // 3,
        GRID // 3,
    ]
    assert integer_weights([0.5, 0.5, 0.0], [GRID // 4, GRID, 0]) == [GRID // 4, 3 * GRID // 4, 0]


def test_the_fixed_schedule_has_the_decided_weights() -> None:
    control = control_of()
    for number in range(6):
        control.observe(np.array([[3.0 + number, 2, 0], [9, 2, 0], [1, 1, 0]]))
        decide(control)
    blend = control.blend
    block = fixed_schedule(NAMES, HORIZON, blend.decisions())
    assert len(block["knots"]) < blend.num_decided  # equal neighbors are one knot
    schedule = Schedule.from_dict(block, NAMES, 8)
    for sample in range(0, 8 * HORIZON, 8):
        assert schedule.weights(sample).tolist() == blend.weights(sample).tolist()
    # Two sequences with the same quotas: below 1 and below H_3 samples from them.
    counts = Blend(schedule).counts(8 * HORIZON) - blend.counts(8 * HORIZON)
    assert np.abs(counts).max() <= 2


def test_decisions_are_read_from_metrics_and_checkpoints(tmp_path: Path) -> None:
    control = control_of()
    decide(control)
    lines = [{"iteration": 0, "decision": control.record(number)} for number in range(3)]
    text = "".join(f"{json.dumps(line)}\n" for line in [*lines, {"iteration": 1, "lm_loss": 3.0}])
    (tmp_path / "metrics.jsonl").write_text(text + "{torn")
    found = read_decisions(tmp_path)
    assert (found.sources, found.horizon) == (NAMES, HORIZON)
    assert found.weights == control.blend.decisions()
    checkpoint = tmp_path / "iter_0000003"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text(json.dumps({"blend": control.blend.state_at(24)}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3\n")
    again = read_decisions(tmp_path)
    assert again.folder == checkpoint and again.weights == found.weights
    (checkpoint / "state.json").write_text(json.dumps({"blend": {"horizon": "x"}}))
    with pytest.raises(UserError, match="the decisions are damaged"):
        read_decisions(tmp_path)
    (checkpoint / "state.json").write_text(json.dumps({"blend": {}}))
    with pytest.raises(UserError, match="contains no decisions"):
        read_decisions(tmp_path)
    with pytest.raises(UserError, match="mistyped: is not a folder; give the folder of a run"):
        read_decisions(tmp_path / "mistyped")


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        ("shares", ["x", 0.5, 0.5], "controller.shares.0: Input should be a valid number"),
        ("shares", [0.5, 0.5], "controller: has numbers of another number of sources"),
        ("sums", [[0, 0]], "controller: has numbers of another number of sources"),
        ("sums", 3, "controller.sums: Input should be a valid list"),
        ("validation", [1], "controller.validation: Input should be a valid dictionary"),
        ("controller", {"rewards": [0.0]}, "controller: has numbers of another number of sources"),
        ("controller", {"rewards": [None] * 3}, "controller.controller.rewards.0: Input should be"),
        ("controller", None, "controller.controller: Input should be a valid dictionary"),
    ],
)
def test_a_damaged_state_is_refused(place: str, value: Any, problem: str) -> None:
    control = control_of()
    decide(control)
    state = {**control.state(), place: value}
    with pytest.raises(UserError) as caught:
        control_of(state=state, blend_state=control.blend.state_at(24))
    assert str(caught.value).startswith(f"blend state: {problem}")
    for rows in ([["x", 1, 1]], 7, [[1 << 70, 0, 0]]):
        with pytest.raises(UserError, match="blend state: .* the checkpoint's state is damaged"):
            control_of(blend_state={**control.blend.state_at(24), "weights": rows})
