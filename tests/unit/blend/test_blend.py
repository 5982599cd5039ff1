"""Tests the blend through the interface that the loader and the checkpoint use."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_chatflow.blend.blend import MAX_SAMPLES, Blend
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.errors import UserError

GRID = 1 << 32
NAMES = ["english", "parallel", "chinese", "instruction"]


def flow(batch: int = 64, **last: Any) -> Schedule:
    knots = [
        {"at": 0, "weights": {"english": 0.6, "parallel": 0.3, "chinese": 0.1}},
        {
            "at": "20K",
            "weights": {"english": 0.1, "parallel": 0.1, "chinese": 0.5, "instruction": 0.3},
            "ramp": "linear",
        },
        {"at": "30K", "weights": {"instruction": 1}, "ramp": "cosine", **last},
    ]
    return Schedule.from_dict({"knots": knots}, NAMES, batch, 4096)


@pytest.fixture(scope="module")
def whole() -> tuple[np.ndarray, np.ndarray]:
    return Blend(flow()).take(0, 40_000)


def test_every_prefix_is_within_one(whole: tuple[np.ndarray, np.ndarray]) -> None:
    source, index = whole
    assert source.dtype == np.int16 and index.dtype == np.int64
    schedule = flow()
    quotas = np.cumsum([schedule.weights(i // 64 * 64) for i in range(40_000)], axis=0)
    counts = np.cumsum(source[:, None] == np.arange(4), axis=0)
    assert np.abs(counts * GRID - quotas).max() < GRID
    np.testing.assert_array_equal(counts[np.arange(40_000), source] - 1, index)


def test_random_access_equals_sequential(whole: tuple[np.ndarray, np.ndarray]) -> None:
    source, index = whole
    blend = Blend(flow())
    rng = np.random.default_rng(0)
    for begin in [39_000, 16_383, 16_384, 0, *rng.integers(0, 39_000, 12).tolist()]:
        end = begin + int(rng.integers(0, 1000))
        part, place = blend.take(begin, end)
        np.testing.assert_array_equal(part, source[begin:end])
        np.testing.assert_array_equal(place, index[begin:end])
        np.testing.assert_array_equal(blend.counts(begin), np.bincount(source[:begin], minlength=4))
        assert blend.quotas(begin) == Blend(flow()).quotas(begin)


def test_taking_in_any_batch_size_gives_the_same(whole: tuple[np.ndarray, np.ndarray]) -> None:
    for size in (1000, 77):
        blend = Blend(flow())
        parts = [blend.take(i, min(i + size, 20_000))[0] for i in range(0, 20_000, size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole[0][:20_000])


def test_first_draw_is_where_the_index_is_drawn(whole: tuple[np.ndarray, np.ndarray]) -> None:
    source, index = whole
    blend = Blend(flow())
    for sample in (0, 1, 777, 16_400, 39_999):
        assert blend.first_draw(int(source[sample]), int(index[sample])) == sample
    assert blend.first_draw(0, 10**9) is None


def test_resuming_from_a_state_goes_on(whole: tuple[np.ndarray, np.ndarray]) -> None:
    source, index = whole
    for position in (0, 1, 20_000, 33_333):
        state = Blend(flow()).state_at(position)
        assert state["counts"] == np.bincount(source[:position], minlength=4).tolist()
        blend = Blend(Schedule.from_dict(flow().to_dict()), json.loads(json.dumps(state)))
        assert blend.edit is None and blend.error_bound() == 1
        part, place = blend.take(position, position + 500)
        np.testing.assert_array_equal(part, source[position : position + 500])
        np.testing.assert_array_equal(place, index[position : position + 500])
        assert blend.state_at(position) == state


def test_the_state_does_not_grow_with_the_run() -> None:
    blend = Blend(flow())
    early, late = (len(json.dumps(blend.state_at(i))) for i in (100, 10**9))
    assert late < early + 100


def test_a_past_with_other_weights_is_refused_by_its_first_sample() -> None:
    state = Blend(flow()).state_at(25_000)
    for last, sample in [({"at": "29K"}, 20_032), ({"ramp": "linear"}, 20_032)]:
        with pytest.raises(UserError, match=rf"sample {sample} was drawn with other weights"):
            Blend(flow(**last), state)
    other = flow().to_dict()
    other["knots"][0]["weights"]["english"] = 0.61
    with pytest.raises(UserError, match="sample 0 was drawn with other weights"):
        Blend(Schedule.from_dict(other), state)


def test_bad_ranges() -> None:
    blend = Blend(flow())
    assert len(blend.take(5, 5)[0]) == 0
    for begin, end in [(-1, 5), (6, 5), (0, MAX_SAMPLES + 1)]:
        with pytest.raises(UserError, match="sample"):
            blend.take(begin, end)
    with pytest.raises(UserError, match="no such source"):
        blend.first_draw(4, 0)


def test_the_last_sample_of_a_run() -> None:
    blend = Blend(flow())
    source, _ = blend.take(MAX_SAMPLES - 100, MAX_SAMPLES)
    assert set(source.tolist()) <= {2, 3}
    assert blend.counts(MAX_SAMPLES).sum() == MAX_SAMPLES


@pytest.mark.parametrize(
    "damage",
    [
        {"format_version": 9},
        {"counts": [1, 2]},
        {"counts": [0, 0, 0, 0]},
        {"segments": []},
        {"segments": [{}]},
        {"position": None},
    ],
)
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    state = {**Blend(flow()).state_at(1000), **damage}
    with pytest.raises(UserError, match="blend state"):
        Blend(flow(), state)
