"""Tests that the reference engine keeps every prefix within one sample of its quota."""

import hashlib

import numpy as np
import pytest
from blend_cases import brute_index, schedules, weights_matrix, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.engine import ReferenceEngine, leaf_bits
from megatron_chatflow.blend.quota import GRID
from megatron_chatflow.blend.schedule import Schedule

pytestmark = pytest.mark.native


def engine_of(schedule: Schedule, num_leaf_bits: int | None = None) -> ReferenceEngine:
    zeros = [0] * len(schedule.sources)
    return ReferenceEngine(schedule.table(), 0, zeros, zeros, num_leaf_bits)


@settings(max_examples=80, deadline=None)
@given(schedules(), st.sampled_from([0, 1, 3, 5, None]))
def test_every_prefix_is_within_one(schedule: Schedule, num_leaf_bits: int | None) -> None:
    """With leaves of one sample, `select` decides every draw."""
    num_samples = 160
    source, index = engine_of(schedule, num_leaf_bits).take(0, num_samples)
    assert worst_error(weights_matrix(schedule, 0, num_samples), source) < GRID
    np.testing.assert_array_equal(index, brute_index(source, len(schedule.sources)))


def test_every_prefix_is_within_one_over_many_leaves() -> None:
    names = [f"s{k}" for k in range(12)]
    block = {
        "knots": [
            {"at": 0, "weights": {"s0": 1, "s1": 0.3, "s2": 0.001, "s3": 0.01}},
            {"at": 30_001, "weights": {name: 1 for name in names[4:]}, "ramp": "linear"},
            {"at": 50_000, "weights": {"s0": 1, "s11": 1e-4}, "ramp": "cosine"},
            {"at": 60_000, "weights": {"s5": 1, "s6": 1}},
        ]
    }
    schedule = Schedule.from_dict(block, names, 48)
    source, index = engine_of(schedule).take(0, 70_000)
    assert worst_error(weights_matrix(schedule, 0, 70_000), source) < GRID
    np.testing.assert_array_equal(index, brute_index(source, 12))


def test_the_first_sample_looks_ahead() -> None:
    """Sources 0 and 1 have weight only in the second sample. The first must not draw them."""
    block = {
        "knots": [
            {"at": 0, "weights": {"c": 1, "d": 1}},
            {"at": 1, "weights": {"a": 1, "b": 1}},
        ]
    }
    schedule = Schedule.from_dict(block, list("abcd"), 1)
    for num_leaf_bits in (0, 1, 2, None):
        source, _ = engine_of(schedule, num_leaf_bits).take(0, 2)
        assert source[0] in (2, 3) and source[1] in (0, 1)


@settings(max_examples=20, deadline=None)
@given(
    schedules(max_sources=6),
    st.lists(st.tuples(st.integers(0, 299), st.integers(0, 40)), max_size=4),
)
def test_random_access_equals_sequential(schedule: Schedule, places: list[tuple[int, int]]) -> None:
    whole, index = engine_of(schedule, 3).take(0, 340)
    engine = engine_of(schedule, 3)
    for begin, length in places:
        source, part = engine.take(begin, begin + length)
        np.testing.assert_array_equal(source, whole[begin : begin + length])
        np.testing.assert_array_equal(part, index[begin : begin + length])
        counts = np.bincount(whole[:begin], minlength=len(schedule.sources))
        np.testing.assert_array_equal(engine.counts(begin), counts)


@settings(max_examples=12, deadline=None)
@given(schedules(max_sources=6))
def test_find_equals_search(schedule: Schedule) -> None:
    engine = engine_of(schedule, 4)
    source, index = engine.take(0, 200)
    for sample in range(0, 200, 23):
        assert engine.find(int(source[sample]), int(index[sample])) == sample


def test_find_says_never() -> None:
    block = {"knots": [{"at": 0, "weights": {"a": 1}}, {"at": 8, "weights": {"b": 1}}]}
    engine = engine_of(Schedule.from_dict(block, ["a", "b"], 4))
    assert engine.find(0, 7) == 7
    assert engine.find(0, 8) == -1


def test_leaf_sizes_are_those_of_the_definition() -> None:
    sizes = {1: 14, 128: 14, 129: 16, 2048: 16, 2049: 20, 32767: 20}
    assert {n: leaf_bits(n) for n in sizes} == sizes


def knots_of(*knots: tuple[int, str, str]) -> list[dict[str, object]]:
    """Builds knots (at, weights, ramp), where "aab" means two thirds a and one third b."""
    return [
        {"at": at, "weights": {k: parts.count(k) for k in parts}, "ramp": ramp}
        for at, parts, ramp in knots
    ]


GOLDEN = [
    (knots_of((0, "ab", "step")), "abababababababababababababababab"),
    (knots_of((0, "aaaaabbbc", "step")), "aababacabaababacabaababacabaabab"),
    (
        knots_of((0, "a", "step"), (8, "bc", "linear"), (20, "addd", "cosine")),
        "aaaaabacbcbcbcdbdcdadddadddaddda",
    ),
    (
        knots_of((0, "cd", "step"), (4, "ab", "step"), (8, "d", "step")),
        "cdcdababdddddddddddddddddddddddd",
    ),
]


@pytest.mark.parametrize(("knots", "expected"), GOLDEN)
def test_golden_sequences(knots: list[dict[str, object]], expected: str) -> None:
    schedule = Schedule.from_dict({"knots": knots}, list("abcd"), 4)
    source, _ = engine_of(schedule).take(0, len(expected))
    assert "".join("abcd"[k] for k in source) == expected


def test_golden_hash_of_a_long_sequence() -> None:
    names = ["english", "parallel", "chinese", "instruction", "code"]
    block = {
        "knots": [
            {"at": 0, "weights": {"english": 0.6, "parallel": 0.3, "chinese": 0.1}},
            {
                "at": "20K",
                "weights": {"english": 0.1, "chinese": 0.5, "instruction": 0.3, "code": 0.1},
                "ramp": "linear",
            },
            {"at": 45_000, "weights": {"instruction": 0.9, "code": 0.1}, "ramp": "cosine"},
        ]
    }
    source, index = engine_of(Schedule.from_dict(block, names, 64)).take(0, 60_000)
    digest = hashlib.sha256(source.astype("<i2").tobytes() + index.astype("<i8").tobytes())
    assert digest.hexdigest() == "bf66ff6f0d32c36ed5ea807eb1cfa38a4b901035f25651f35afc3377d22cc6ad"
