"""Tests weights that are decided during the run: error bounds for any weights, and replay."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.adaptive import AdaptiveBlend, draw_horizon
from megatron_chatflow.errors import UserError

GRID = 1 << 32


class Answers:
    """Returns weights from a list, the last of them forever, and records the calls."""

    def __init__(self, rows: list[list[int]], horizon: int) -> None:
        self.horizon = horizon
        self.rows = rows
        self.asked: list[int] = []

    def weights(self, begin: int, counts: np.ndarray) -> np.ndarray:
        assert counts.sum() == begin
        self.asked.append(begin)
        row = self.rows[min(begin // self.horizon, len(self.rows) - 1)]
        levels = [GRID * sum(row[:k]) // sum(row) for k in range(len(row) + 1)]
        return np.diff(np.array(levels, np.int64))


def harmonic(number: int) -> Fraction:
    return sum((Fraction(1, k) for k in range(1, number + 1)), Fraction(0))


def lags_of(blend: AdaptiveBlend, num_samples: int) -> np.ndarray:
    """Returns quota minus count for every prefix, from the recorded weights and the draws."""
    source, index = blend.take(0, num_samples)
    answers = np.array(blend.state_at(num_samples)["weights"], np.int64)
    weights = np.repeat(answers, blend.horizon, axis=0)[:num_samples]
    drawn = np.cumsum(source[:, None] == np.arange(len(blend.sources)), axis=0)
    np.testing.assert_array_equal(drawn[np.arange(num_samples), source] - 1, index)
    return np.cumsum(weights, axis=0) - drawn * GRID


def rows_of(num_sources: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 20), min_size=num_sources, max_size=num_sources).filter(any)
    return st.lists(row, min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 7).flatmap(rows_of), st.integers(1, 9))
def test_bounds_for_any_answers(rows: list[list[int]], horizon: int) -> None:
    num_sources = len(rows[0])
    blend = AdaptiveBlend([f"s{k}" for k in range(num_sources)], Answers(rows, horizon))
    lags = lags_of(blend, 90)
    assert lags.min() > -GRID
    assert Fraction(int(lags.max()), GRID) < harmonic(num_sources)


def test_an_adversary_that_starves_what_was_not_drawn() -> None:
    """The hardest case: at every sample the weight moves to the sources drawn least."""

    class Adversary(Answers):
        def weights(self, begin: int, counts: np.ndarray) -> np.ndarray:
            if begin:
                last = int(np.argmax(counts - self.before))
                self.alive = [k for k in self.alive if k != last] or list(range(len(counts)))
            self.before = counts
            share, rest = divmod(GRID, len(self.alive))
            answer = np.zeros(len(counts), np.int64)
            answer[self.alive] = share
            answer[self.alive[0]] += rest
            return answer

    for num_sources in (3, 8, 32):
        adversary = Adversary([], 1)
        adversary.alive = list(range(num_sources))
        blend = AdaptiveBlend([f"s{k}" for k in range(num_sources)], adversary)
        lags = lags_of(blend, 5 * num_sources)
        assert -GRID < lags.min()
        assert GRID // 2 < lags.max()
        assert Fraction(int(lags.max()), GRID) < harmonic(num_sources)


def test_constant_weights_stay_within_one() -> None:
    blend = AdaptiveBlend(list("abcd"), Answers([[60, 30, 9, 1]], 64))
    assert np.abs(lags_of(blend, 3000)).max() < GRID


def test_what_was_drawn_is_drawn_again() -> None:
    rows = [[5, 1, 1], [0, 3, 1], [1, 0, 0], [2, 2, 2]]
    provider = Answers(rows, 7)
    blend = AdaptiveBlend(list("abc"), provider)
    source, index = blend.take(0, 40)
    assert provider.asked == [0, 7, 14, 21, 28, 35]
    for begin, end in [(20, 33), (0, 3), (39, 40), (5, 5)]:
        part, place = blend.take(begin, end)
        np.testing.assert_array_equal(part, source[begin:end])
        np.testing.assert_array_equal(place, index[begin:end])
        np.testing.assert_array_equal(blend.counts(begin), np.bincount(source[:begin], minlength=3))
    later = Answers(rows, 7)
    again = AdaptiveBlend(list("abc"), later, json.loads(json.dumps(blend.state_at(17))))
    np.testing.assert_array_equal(again.take(0, 40)[0], source)
    assert later.asked == [21, 28, 35]


def test_the_first_open_draw_that_is_complete_comes_first() -> None:
    """Among equal lags the heavier source is due earlier. Ties go to the lower source index."""
    weights = np.array([GRID // 4, GRID // 2, GRID // 4])
    source, lags = draw_horizon(weights, np.zeros(3, np.int64), 4)
    assert source.tolist() == [1, 0, 1, 2]
    assert not lags.any()


def test_bad_answers_and_states_are_refused() -> None:
    class Wrong(Answers):
        def weights(self, begin: int, counts: np.ndarray) -> np.ndarray:
            return np.array(self.rows[0], np.int64)

    for row in ([GRID, 0, 0], [GRID + 1, -1], [GRID - 1, 0]):
        with pytest.raises(UserError, match="weights at sample 0"):
            AdaptiveBlend(list("ab"), Wrong([row], 4)).take(0, 1)
    blend = AdaptiveBlend(list("ab"), Answers([[1, 1]], 4))
    with pytest.raises(UserError, match="must be non-negative"):
        blend.take(3, 2)
    state = blend.state_at(0)
    for names, horizon in [("abc", 4), ("ab", 5)]:
        with pytest.raises(UserError, match="its sources or its horizon differ"):
            AdaptiveBlend(list(names), Answers([[1] * len(names)], horizon), state)
    with pytest.raises(UserError, match="unknown format"):
        AdaptiveBlend(list("ab"), Answers([[1, 1]], 4), {"format_version": 7})
