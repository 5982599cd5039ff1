"""Tests weights that are decided during the run: error bounds for any weights, and replay."""

import json
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.adaptive import AdaptiveBlend, draw_horizon
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.errors import UserError

GRID = 1 << 32


def blend_of(num_sources: int, horizon: int, **arguments: object) -> AdaptiveBlend:
    names = [f"s{k}" for k in range(num_sources)]
    schedule = Schedule.from_dict({"knots": [{"at": 0, "weights": {"s0": 1}}]}, names, 1)
    return AdaptiveBlend(schedule, horizon, **arguments)


def to_weights(row: list[int]) -> np.ndarray:
    levels = [GRID * sum(row[:k]) // sum(row) for k in range(len(row) + 1)]
    return np.diff(np.array(levels, np.int64))


def decided(rows: list[list[int]], horizon: int, num_samples: int) -> AdaptiveBlend:
    """Returns a blend with the weights of the rows, the last of them for all later horizons."""
    blend = blend_of(len(rows[0]), horizon)
    while blend.decided_samples < num_samples:
        blend.append(to_weights(rows[min(blend.num_decided, len(rows) - 1)]))
    return blend


def harmonic(number: int) -> Fraction:
    return sum((Fraction(1, k) for k in range(1, number + 1)), Fraction(0))


def lags_of(blend: AdaptiveBlend, num_samples: int) -> np.ndarray:
    """Returns quota minus count for every prefix, from the recorded weights and the draws."""
    source, index = blend.take(0, num_samples)
    answers = np.array(blend.decisions(), np.int64)
    weights = np.repeat(answers, blend.horizon, axis=0)[:num_samples]
    drawn = np.cumsum(source[:, None] == np.arange(len(blend.sources)), axis=0)
    np.testing.assert_array_equal(drawn[np.arange(num_samples), source] - 1, index)
    sums = np.cumsum(weights, axis=0)
    assert sums[-1].tolist() == blend.quotas(num_samples)
    return sums - drawn * GRID


def rows_of(num_sources: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 20), min_size=num_sources, max_size=num_sources).filter(any)
    return st.lists(row, min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7).flatmap(rows_of), st.integers(1, 9))
def test_bounds_for_any_answers(rows: list[list[int]], horizon: int) -> None:
    lags = lags_of(decided(rows, horizon, 90), 90)
    assert lags.min() > -GRID
    assert Fraction(int(lags.max()), GRID) < harmonic(len(rows[0]))


def adversarial_weights(blend: AdaptiveBlend) -> Iterator[np.ndarray]:
    """Yields the hardest weights: at every sample, only the sources drawn least have weight."""
    alive, before = list(range(len(blend.sources))), blend.counts(0)
    while True:
        share, rest = divmod(GRID, len(alive))
        answer = np.zeros(len(blend.sources), np.int64)
        answer[alive] = share
        answer[alive[0]] += rest
        yield answer
        counts = blend.counts(blend.num_decided)
        last = int(np.argmax(counts - before))
        alive = [k for k in alive if k != last] or list(range(len(counts)))
        before = counts


def test_an_adversary_that_starves_what_was_not_drawn() -> None:
    for num_sources in (3, 8, 32):
        blend = blend_of(num_sources, 1)
        weights = adversarial_weights(blend)
        for _ in range(5 * num_sources):
            blend.append(next(weights))
        lags = lags_of(blend, 5 * num_sources)
        assert -GRID < lags.min()
        assert GRID // 2 < lags.max()
        assert Fraction(int(lags.max()), GRID) < harmonic(num_sources)


def test_constant_weights_stay_within_one() -> None:
    assert np.abs(lags_of(decided([[60, 30, 9, 1]], 64, 3000), 3000)).max() < GRID


def test_what_was_drawn_is_drawn_again() -> None:
    rows = [[5, 1, 1], [0, 3, 1], [1, 0, 0], [2, 2, 2]]
    blend = decided(rows, 7, 42)
    source, index = blend.take(0, 40)
    for begin, end in [(20, 33), (0, 3), (39, 40), (5, 5)]:
        part, place = blend.take(begin, end)
        np.testing.assert_array_equal(part, source[begin:end])
        np.testing.assert_array_equal(place, index[begin:end])
        np.testing.assert_array_equal(blend.counts(begin), np.bincount(source[:begin], minlength=3))
    state = json.loads(json.dumps(blend.state_at(17)))
    again = blend_of(3, 7, state=state)
    np.testing.assert_array_equal(again.take(17, 40)[0], source[17:])
    np.testing.assert_array_equal(again.take(17, 40)[1], index[17:])
    np.testing.assert_array_equal(again.take(0, 40)[0], source)
    assert again.weights(16).tolist() == blend.weights(16).tolist()


def test_a_complete_blend_keeps_its_last_weights() -> None:
    rows = [[5, 1], [1, 2]]
    blend, complete = decided(rows, 8, 64), decided(rows, 8, 16)
    with pytest.raises(UserError, match="sample 16: its weights are not decided yet"):
        complete.take(0, 17)
    complete.complete()
    np.testing.assert_array_equal(complete.take(0, 60)[0], blend.take(0, 60)[0])
    assert complete.quotas(60) == blend.quotas(60)


def test_the_first_open_draw_that_is_complete_comes_first() -> None:
    """Among equal lags the heavier source is due earlier. Ties go to the lower source index."""
    weights = np.array([GRID // 4, GRID // 2, GRID // 4])
    source, lags = draw_horizon(weights, np.zeros(3, np.int64), 4)
    assert source.tolist() == [1, 0, 1, 2]
    assert not lags.any()


def test_bad_weights_and_states_are_refused() -> None:
    for row in ([GRID, 0, 0], [GRID + 1, -1], [GRID - 1, 0]):
        with pytest.raises(UserError, match="weights at sample 0"):
            blend_of(2, 4).append(row)
    blend = decided([[1, 1]], 4, 8)
    with pytest.raises(UserError, match="must be non-negative"):
        blend.take(3, 2)
    state = blend.state_at(6)
    for num_sources, horizon in [(3, 4), (2, 5)]:
        with pytest.raises(UserError, match="its sources or its horizon differ"):
            blend_of(num_sources, horizon, state=state)
    with pytest.raises(UserError, match="format 1: a run with a controller has format 2"):
        blend_of(2, 4, state={"format_version": 1})
    with pytest.raises(UserError, match="do not add up"):
        blend_of(2, 4, state={**state, "counts": [3, 4]})
    with pytest.raises(UserError, match="damaged"):
        blend_of(2, 4, state={**state, "weights": None})
