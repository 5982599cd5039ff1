"""Tests that the C++ engine draws the same samples as the reference."""

import random
import threading

import numpy as np
import pytest
from blend_cases import brute_index, schedules, weights_matrix, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.engine import ReferenceEngine, make_engine, window_ends
from megatron_chatflow.blend.quota import GRID, GRID_BITS, Interval, Quota, WeightTable
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.runtime import load_extension

extension = load_extension("blend")

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(extension is None, reason="csrc/blend is not built"),
]

CONSTANT = Interval(0, 0, 0, 0, 0, 0, 0, 1)


def engines(schedule: Schedule, num_leaf_bits: int | None = None):
    zeros = [0] * len(schedule.sources)
    arguments = (schedule.table(), 0, zeros, zeros, num_leaf_bits)
    return make_engine(*arguments), ReferenceEngine(*arguments)


def assert_same(native, reference, begin: int, end: int) -> None:
    for ours, expected in zip(native.take(begin, end), reference.take(begin, end), strict=True):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


@settings(max_examples=80, deadline=None)
@given(schedules(max_sources=12), st.sampled_from([1, 3, 5, None]))
def test_draw_for_draw(schedule: Schedule, num_leaf_bits: int | None) -> None:
    assert_same(*engines(schedule, num_leaf_bits), 0, 180)


@settings(max_examples=12, deadline=None)
@given(schedules(max_sources=6, max_step=20_000))
def test_draw_for_draw_over_leaves_in_any_order(schedule: Schedule) -> None:
    native, reference = engines(schedule)
    for begin in (50_000, 16_000, 30_000, 0):
        assert_same(native, reference, begin, begin + 1000)
        np.testing.assert_array_equal(native.counts(begin), reference.counts(begin))


@pytest.mark.parametrize("batch", [1, 6, 512, 99_991])
@pytest.mark.parametrize("num_sources", [3, 24])
def test_far_out_and_wide(batch: int, num_sources: int) -> None:
    """Ramps over 2**40 samples with knots off the iteration grid need 128-bit arithmetic."""
    rng = random.Random(batch)
    names = [f"s{k}" for k in range(num_sources)]
    knots, at = [], 17
    for ramp in ("step", "linear", "cosine", "linear"):
        weights = {name: max(0.01, rng.random() - 0.3) for name in names}
        knots.append({"at": at, "weights": weights, "ramp": ramp})
        at += rng.randrange(1 << 36, 1 << 38)
    native, reference = engines(Schedule.from_dict({"knots": knots}, names, batch), 8)
    for _ in range(2):
        begin = rng.randrange(at)
        assert_same(native, reference, begin, begin + 300)


def test_tables_at_the_edge_of_64_bits() -> None:
    """Spans around 2**31, the limit of the narrow arithmetic, and iterations beyond 2**31."""
    rng = random.Random(5)
    levels = ((0, 0, 5, GRID), (0, GRID - 3, GRID - 1, GRID), (0, 1, GRID, GRID))
    for span in ((1 << 31) - 1, 1 << 31, (1 << 45) + 9):
        for batch in (1, 3):
            half = span // 2
            intervals = (
                Interval(0, 0, 1, 0, GRID, 1, 0, span),
                Interval(half, 1, 2, GRID // 3, GRID - 7, 2, span % 2, span),
                Interval(2 * half, 2, 2, 0, 0, 0, 0, 1),
            )
            table = WeightTable(5, batch, levels, intervals)
            begin, base = 7, [-5, GRID + 3, 2 - GRID]
            quota = Quota(table, begin, base)
            ends = window_ends(table, begin, base)
            for k, end in enumerate(ends):
                target = ((base[k] >> GRID_BITS) + 1) << GRID_BITS
                assert end == quota.first_at_least(k, target)
            zeros = [0, 0, 0]
            native = make_engine(table, begin, zeros, zeros, 6)
            reference = ReferenceEngine(table, begin, zeros, zeros, 6)
            for place in (7, half * batch - 40, 2 * half * batch - 90, rng.randrange(1 << 39)):
                at = min(max(place, 7), (1 << 40) - 200)
                assert_same(native, reference, at, at + 150)


@settings(max_examples=30, deadline=None)
@given(schedules())
def test_find_equals_search(schedule: Schedule) -> None:
    native, _ = engines(schedule, 4)
    source, index = native.take(0, 200)
    for sample in range(0, 200, 11):
        assert native.find(int(source[sample]), int(index[sample])) == sample
    np.testing.assert_array_equal(index, brute_index(source, len(schedule.sources)))


def test_find_says_never() -> None:
    block = {"knots": [{"at": 0, "weights": {"a": 1}}, {"at": 8, "weights": {"b": 1}}]}
    native, _ = engines(Schedule.from_dict(block, ["a", "b"], 4))
    assert native.find(0, 7) == 7
    assert native.find(0, 8) == -1
    with pytest.raises(ValueError, match="does not lie in this segment"):
        native.find(2, 0)


@pytest.mark.parametrize(("num_sources", "batch"), [(64, 1), (129, 7), (512, 512), (3000, 8)])
def test_many_sources_stay_within_one(num_sources: int, batch: int) -> None:
    names = [f"s{k}" for k in range(num_sources)]
    rng = random.Random(num_sources)
    knots = [
        {
            "at": 5000 * number,
            "weights": {name: max(0.0, rng.random() ** 4 - 0.01) for name in names},
            "ramp": ("step", "linear", "cosine")[number],
        }
        for number in range(3)
    ]
    schedule = Schedule.from_dict({"knots": knots}, names, batch)
    end = 12_000 if num_sources < 1000 else 1000
    source, _ = engines(schedule)[0].take(0, end)
    assert worst_error(weights_matrix(schedule, 0, end), source) < GRID


def test_as_many_sources_as_an_int16_holds() -> None:
    count = 32767
    table = WeightTable(0, 512, (tuple(GRID * k // count for k in range(count + 1)),), (CONSTANT,))
    zeros = [0] * count
    source, index = make_engine(table, 0, zeros, zeros).take(0, 2 * count)
    assert sorted(source[:count].tolist()) == list(range(count))
    counts = np.bincount(source, minlength=count)
    assert counts.min() >= 1 and counts.max() <= 3 and index.max() <= 2


def test_one_source_too_many() -> None:
    count = 32768
    levels = (tuple(GRID * k // count for k in range(count + 1)),)
    with pytest.raises(ValueError, match="32767|32768"):
        make_engine(WeightTable(0, 1, levels, (CONSTANT,)), 0, [0] * count, [0] * count)


def test_calls_from_several_threads() -> None:
    block = {"knots": [{"at": 0, "weights": {"a": 5, "b": 3, "c": 1}}]}
    schedule = Schedule.from_dict(block, list("abc"), 4)
    native, reference = engines(schedule)
    whole = reference.take(0, 60_000)[0]
    failures = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            begin = rng.randrange(59_000)
            if (native.take(begin, begin + 500)[0] != whole[begin : begin + 500]).any():
                failures.append(begin)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


ROWS = ((0, 1 << 31, GRID),)
BAD_TABLES = [
    (WeightTable(-1, 1, ROWS, (CONSTANT,)), "origin"),
    (WeightTable(0, 0, ROWS, (CONSTANT,)), "samples_per_iteration"),
    (WeightTable(0, 1, ((0, 5, GRID - 1),), (CONSTANT,)), "0 to 2\\^32"),
    (WeightTable(0, 1, ((0, GRID + 1, GRID),), (CONSTANT,)), "decrease"),
    (WeightTable(0, 1, ROWS, (CONSTANT._replace(begin=1),)), "iteration 0"),
    (
        WeightTable(0, 1, ROWS, (CONSTANT._replace(row_begin=1, row_end=1),)),
        "a row that does not exist",
    ),
    (WeightTable(0, 1, ROWS, (CONSTANT._replace(row_end=-1),)), "must be constant"),
    (WeightTable(0, 1, ROWS, (CONSTANT._replace(portion_end=GRID + 1),)), "portion"),
    (WeightTable(0, 1, ROWS, (CONSTANT._replace(span=0),)), "span"),
    (WeightTable(0, 1, ROWS, (CONSTANT, CONSTANT)), "ascending order"),
    (
        WeightTable(0, 1, ROWS, (CONSTANT._replace(step=1), CONSTANT._replace(begin=9))),
        "longer than its span",
    ),
]


@pytest.mark.parametrize(("table", "message"), BAD_TABLES)
def test_tables_that_cannot_be_are_refused(table: WeightTable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(table, 0, [0, 0], [0, 0])


@pytest.mark.parametrize(
    ("base", "counts", "message"),
    [
        ([0, 0], [1, 0], "rounded down or up"),
        ([0, GRID], [0, 0], "rounded down or up"),
        ([5, 0], [1, 0], "sums"),
        ([0, 0, 0], [0, 0, 0], "one base per source"),
        ([0, 0], [0], "one count per source"),
    ],
)
def test_states_that_cannot_be_are_refused(
    base: list[int], counts: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(WeightTable(0, 1, ROWS, (CONSTANT,)), 0, base, counts)


def test_samples_outside_the_tree_are_refused() -> None:
    native = make_engine(WeightTable(0, 1, ROWS, (CONSTANT,)), 5, [0, 0], [0, 0])
    for begin, end in [(4, 6), (7, 6), (1 << 40, (1 << 40) + 6)]:
        with pytest.raises(ValueError, match="samples"):
            native.take(begin, end)
    with pytest.raises(ValueError, match="samples"):
        native.counts(4)
