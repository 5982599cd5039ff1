"""Tests weights that are shares of tokens: exact conversion, ramps, and resumes."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.edits import resumed_schedule
from megatron_chatflow.blend.plan import plan, to_table
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.errors import UserError

GRID = 1 << 32
NAMES = ["text", "chat", "pairs"]
# Mean loss tokens per sample: 4096, 211.5 and 1000
EPOCHS = {"text": (4096 * 70, 70), "chat": (423, 2), "pairs": (90_000, 90)}
MEANS = np.array([4096, 211.5, 1000])


def schedule_of(*knots: dict[str, Any], **more: Any) -> Schedule:
    block = {"knots": list(knots), "count": "loss_tokens", **more}
    return Schedule.from_dict(block, NAMES, 8, 4096, epochs=EPOCHS)


def knot(at: int, *weights: float, ramp: str = "step", **more: Any) -> dict[str, Any]:
    return {"at": at, "weights": dict(zip(NAMES, weights, strict=True)), "ramp": ramp, **more}


def token_shares(weights: Any) -> np.ndarray:
    tokens = np.asarray(weights, np.float64) * MEANS
    return tokens / tokens.sum()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any))
def test_weights_are_exact_shares_of_tokens(row: list[int]) -> None:
    weights = schedule_of(knot(0, *row)).weights(0).tolist()
    parts = [
        Fraction(w * samples, tokens)
        for w, (tokens, samples) in zip(row, EPOCHS.values(), strict=True)
    ]
    expected = [part / sum(parts) * GRID for part in parts]
    # The shares of a knot are rounded to 2**-32 and then divided by numbers that differ by 20.
    assert all(abs(one - other) < 32 for one, other in zip(weights, expected, strict=True))
    assert [w == 0 for w in weights] == [w == 0 for w in row]


def test_drawn_tokens_have_the_shares_in_the_long_run() -> None:
    blend = Blend(schedule_of(knot(0, 0.6, 0.3, 0.1)))
    tokens = blend.counts(100_000) * MEANS
    np.testing.assert_allclose(tokens / tokens.sum(), [0.6, 0.3, 0.1], atol=1e-4)
    row = to_table(plan(blend, 100_000), blend)[1]
    assert float(str(row["of loss tokens"]).rstrip("%")) == pytest.approx(30, abs=0.01)
    assert float(str(row["realised"]).rstrip("%")) > 80  # a chat has few loss tokens


@pytest.mark.parametrize("ramp", ["linear", "cosine"])
def test_shares_of_tokens_follow_a_ramp(ramp: str) -> None:
    size = 64 * 800
    schedule = schedule_of(knot(0, 1, 0, 0), knot(size, 0, 0.5, 0.5, ramp=ramp))
    ends, deviations = [], []
    for sample in range(0, size + 1, 8):
        place = sample / size if ramp == "linear" else (1 - np.cos(np.pi * sample / size)) / 2
        expected = np.array([1 - place, place / 2, place / 2])
        found = token_shares(schedule.weights(sample))
        deviations.append(np.abs(found - expected))
        if sample % 800 == 0:
            ends.append(deviations[-1])
    assert np.max(ends) < 1e-7
    # The mean tokens of a sample fall by a factor of 12 along the ramp.
    assert np.mean(deviations, axis=0).max() < 1e-3
    assert np.max(deviations) < 0.02


def resume(block: dict[str, Any], blend: Blend, sample: int, **arguments: Any) -> Blend:
    state, record = json.loads(json.dumps([blend.state_at(sample), blend.schedule.to_dict()]))
    recorded = Schedule.from_dict(record)
    given = {
        "sources": NAMES,
        "samples_per_iteration": 8,
        "seq_length": 4096,
        "epochs": EPOCHS,
        **arguments,
    }
    return Blend(resumed_schedule(block, recorded, given), state)


@pytest.mark.parametrize("ramp", ["linear", "cosine"])
def test_a_resume_and_an_edit_keep_what_was_drawn(ramp: str) -> None:
    knots = [knot(0, 1, 0, 1), knot(6400, 1, 2, 1, ramp=ramp)]
    blend = Blend(schedule_of(*knots))
    source, index = blend.take(0, 8000)
    same = resume({"knots": knots, "count": "loss_tokens"}, blend, 3200)
    assert same.edit is None
    for ours, theirs in zip(same.take(0, 8000), (source, index), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    planned = {"at": 4000, "weights": "as_planned"}
    block = {"knots": [planned, knot(4800, 0, 1, 0)], "count": "loss_tokens"}
    edited = resume(block, blend, 3200)
    assert edited.edit is not None
    for sample in range(0, 4001, 8):
        assert edited.schedule.weights(sample).tolist() == blend.schedule.weights(sample).tolist()
    # After the knot, the shares of tokens are those of the recorded schedule at the knot.
    found = token_shares(edited.schedule.weights(4400))
    np.testing.assert_allclose(found, token_shares(blend.schedule.weights(4000)), atol=5e-3)
    again = resume(block, edited, 4400)
    assert again.edit is None
    with pytest.raises(UserError, match="sample 0 was drawn with other weights"):
        resume({"knots": [knot(0, 1, 1, 1)], "count": "loss_tokens"}, blend, 3200)


def test_numbers_of_tokens_are_needed() -> None:
    for epochs in (None, {"text": "x"}, {"text": [1, -2]}):
        with pytest.raises(UserError, match="count: loss_tokens needs the numbers of tokens"):
            Schedule.from_dict(
                {"knots": [knot(0, 1, 1, 1)], "count": "loss_tokens"}, NAMES, 8, 4096, epochs=epochs
            )
    assert "epochs" not in Schedule.from_dict({"knots": [knot(0, 1, 1, 1)]}, NAMES, 8).to_dict()
