"""Tests schedules: weights on the grid, ramps, units, and errors in the configuration."""

import json
import math
from decimal import Decimal, getcontext
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.blend.schedule import COSINE_PORTIONS, NUM_CHORDS, Schedule
from megatron_chatflow.errors import UserError

GRID = 1 << 32
SOURCES = ["english", "chinese", "parallel"]
BLOCK = """
unit: samples
knots:
  - {at: 0,  weights: {english: 0.60, parallel: 0.30, chinese: 0.10}}
  - {at: 5M, weights: {english: 0.10, chinese: 0.90}, ramp: linear}
"""


def make(block: Any, **arguments: Any) -> Schedule:
    defaults = {"sources": SOURCES, "samples_per_iteration": 512, "seq_length": 4096}
    return Schedule.from_dict(block, **{**defaults, **arguments})


def two_knots(ramp: str, at: Any = 1000, batch: int = 10, unit: str = "samples") -> Schedule:
    knots = [
        {"at": 0, "weights": {"english": 1}},
        {"at": at, "weights": {"english": 1, "chinese": 3}, "ramp": ramp},
    ]
    return make({"unit": unit, "knots": knots}, samples_per_iteration=batch)


def test_the_weights_of_the_yaml_example() -> None:
    schedule = make(yaml.safe_load(BLOCK))
    assert schedule.sources == ("english", "chinese", "parallel")
    first = schedule.weights(0)
    assert first.dtype == np.int64
    np.testing.assert_allclose(first / GRID, [0.6, 0.1, 0.3], atol=1e-9)
    np.testing.assert_allclose(schedule.weights(2_500_096) / GRID, [0.35, 0.5, 0.15], atol=2e-5)
    np.testing.assert_allclose(schedule.weights(5_000_192) / GRID, [0.1, 0.9, 0.0], atol=1e-9)
    np.testing.assert_array_equal(schedule.weights(10**12), schedule.weights(5_000_192))


@given(
    st.lists(
        st.lists(st.floats(0, 1e6), min_size=5, max_size=5).filter(any), min_size=1, max_size=5
    ),
    st.lists(st.sampled_from(["step", "linear", "cosine"]), min_size=5, max_size=5),
    st.integers(1, 40),
)
def test_weights_sum_to_the_grid_and_are_never_negative(
    rows: list[list[float]], ramps: list[str], batch: int
) -> None:
    names = list("abcde")
    knots = [
        {"at": 37 * k, "weights": dict(zip(names, row, strict=True)), "ramp": ramp}
        for k, (row, ramp) in enumerate(zip(rows, ramps, strict=False))
    ]
    schedule = Schedule.from_dict({"knots": knots}, names, batch)
    unused = [k for k in range(5) if not any(row[k] for row in rows)]
    for sample in range(0, 37 * len(rows) + 2 * batch, batch):
        weights = schedule.weights(sample)
        assert weights.sum() == GRID and weights.min() >= 0
        assert not weights[unused].any()
        np.testing.assert_array_equal(weights, schedule.weights(sample + batch - 1))


def test_a_level_is_exact_in_rationals() -> None:
    """0.1 + 0.2 + 0.7 is 1, and relative weights give the same integers as normalized ones."""
    block = {"knots": [{"at": 0, "weights": {"english": 0.1, "chinese": 0.2, "parallel": 0.7}}]}
    weights = make(block).weights(0)
    assert weights.tolist() == [GRID // 10, 3 * GRID // 10 - GRID // 10, GRID - 3 * GRID // 10]
    block = {"knots": [{"at": 0, "weights": {"english": 1, "chinese": 2, "parallel": 7}}]}
    np.testing.assert_array_equal(make(block).weights(0), weights)


@pytest.mark.parametrize("ramp", ["step", "linear", "cosine"])
@pytest.mark.parametrize(("begin", "end", "batch"), [(0, 1000, 10), (123, 4567, 64), (7, 90, 1)])
def test_a_ramp_is_read_at_the_first_sample_of_each_iteration(
    ramp: str, begin: int, end: int, batch: int
) -> None:
    knots = [
        {"at": begin, "weights": {"english": 1}},
        {"at": end, "weights": {"english": 1, "chinese": 3}, "ramp": ramp},
    ]
    schedule = make({"knots": knots}, samples_per_iteration=batch)
    for sample in range(0, end + 3 * batch):
        first = sample // batch * batch
        place = min(max((first - begin) / (end - begin), 0), 1)
        portion = {
            "step": float(place == 1),
            "linear": place,
            "cosine": (1 - math.cos(math.pi * place)) / 2,
        }[ramp]
        tolerance = 1.6e-4 if ramp == "cosine" else 1e-9
        expected = [1 - 0.75 * portion, 0.75 * portion, 0]
        np.testing.assert_allclose(schedule.weights(sample) / GRID, expected, atol=tolerance)


def test_a_knot_inside_an_iteration_waits_for_the_next() -> None:
    schedule = two_knots("step", at=1001)
    assert schedule.weights(1009)[1] == 0
    assert schedule.weights(1010)[1] == 3 * GRID // 4
    assert two_knots("step", at=1000).weights(1000)[1] == 3 * GRID // 4


def test_ramp_of_the_first_knot_means_nothing() -> None:
    block = {"knots": [{"at": 100, "weights": {"english": 1}, "ramp": "cosine"}]}
    plain = {"knots": [{"at": 100, "weights": {"english": 1}}]}
    assert make(block).weights(50)[0] == GRID
    assert make(block).table() == make(plain).table()


def test_frozen_cosine_table() -> None:
    """Compares the table with Chebyshev's recurrence in 60 decimal digits."""
    getcontext().prec = 60
    assert len(COSINE_PORTIONS) == NUM_CHORDS + 1
    root = Decimal(2).sqrt()
    for _ in range(4):  # 2 cos(pi / 4) = sqrt(2), then the angle is halved four times.
        root = (2 + root).sqrt()
    chord = root / 2
    before, cosine = chord, Decimal(1)
    for portion in COSINE_PORTIONS:
        assert portion == int((GRID * (1 - cosine) / 2).to_integral_value())
        before, cosine = cosine, 2 * chord * cosine - before


@pytest.mark.parametrize(
    ("unit", "at", "sample"),
    [
        ("samples", "20K", 20_000),
        ("samples", "5M", 5_000_000),
        ("samples", "1.5B", 1_500_000_000),
        ("samples", "1T", 10**12),
        ("samples", 1e6, 1_000_000),
        ("samples", "1e6", 1_000_000),
        ("samples", np.int32(7), 7),
        ("tokens", "1B", -(-(10**9) // 4096)),
        ("tokens", 4096, 1),
        ("tokens", 4097, 2),
        ("iterations", "2K", 2000 * 10),
    ],
)
def test_units_and_suffixes(unit: str, at: Any, sample: int) -> None:
    schedule = two_knots("step", at, unit=unit)
    assert schedule.knots[1].at == sample


def test_to_dict_creates_the_same_schedule() -> None:
    for unit in ("samples", "tokens", "iterations"):
        schedule = two_knots("cosine", "3.5K", unit=unit)
        block = json.loads(json.dumps(schedule.to_dict()))
        again = Schedule.from_dict(block)
        assert again.to_dict() == schedule.to_dict() == block
        assert again.table() == schedule.table()
        assert again.samples_per_iteration == 10
        for sample in (0, 500, 2000, 10**5):
            np.testing.assert_array_equal(again.weights(sample), schedule.weights(sample))


def test_to_dict_does_not_give_its_own_parts_away() -> None:
    schedule = two_knots("step")
    schedule.to_dict()["knots"][0]["weights"]["english"] = 5
    assert schedule.to_dict()["knots"][0]["weights"]["english"] == 1


def test_equal_weights_give_equal_tables() -> None:
    plain = two_knots("linear", "1K").table()
    assert two_knots("linear", 1000).table() == plain
    assert two_knots("linear", 1001).table() != plain
    assert two_knots("cosine", 1000).table() != plain
    assert two_knots("linear", 1000, batch=20).table() != plain


def test_with_sources_keeps_the_weights() -> None:
    wide = two_knots("linear").with_sources(["code", "chinese", "english", "parallel"])
    np.testing.assert_allclose(wide.weights(1000) / GRID, [0, 0.75, 0.25, 0])


def test_weights_of_a_negative_sample() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        two_knots("step").weights(-1)


def knot(**changes: Any) -> dict[str, Any]:
    return {"at": 0, "weights": {"english": 1}, **changes}


def weighing(value: Any) -> dict[str, Any]:
    return {"knots": [knot(), knot(at=9, weights={"english": 1, "chinese": value})]}


WEIGHT = r"^data\.schedule\.knots\[1\]\.weights\.chinese: must be "
FINITE = WEIGHT + "a finite number of at least 0, not "
AT = r"knots\[0\]\.at: must be "
BAD = [
    (weighing(-0.1), FINITE + "-0.1"),
    (weighing(math.nan), FINITE + "nan"),
    (weighing(math.inf), FINITE + "inf"),
    (weighing(-math.inf), FINITE + "-inf"),
    (weighing(True), WEIGHT + "a number, not True"),
    (weighing("much"), WEIGHT + "a number, not 'much'"),
    (weighing("1K"), WEIGHT + "a number, not '1K'"),
    (weighing(None), WEIGHT[: -len("must be ")] + "is missing"),
    (weighing([1]), WEIGHT + r"a number, not \[1\]"),
    ({"knots": [knot(weights={"german": 1})]}, r"weights\.german: is not among data\.sources"),
    ({"knots": [knot(weights={"engish": 1})]}, r"engish: .*did you mean english\?"),
    ({"knots": [knot(weights={False: 1})]}, r"knots\[0\]\.weights.*: must be text"),
    ({"knots": [knot(weights={"english": 0})]}, r"knots\[0\]\.weights: all weights are 0"),
    ({"knots": [knot(weights={})]}, r"knots\[0\]\.weights: all weights are 0"),
    ({"knots": [knot(weights=[1, 2])]}, r"knots\[0\]\.weights: must be a mapping"),
    (
        {"knots": [knot(weights="even")]},
        r"knots\[0\]\.weights: must be a mapping from sources to weights",
    ),
    ({"knots": [{"at": 0}]}, r"knots\[0\]\.weights: is missing"),
    ({"knots": [{"weights": {"english": 1}}]}, r"knots\[0\]\.at: is missing"),
    ({"knots": [knot(at=True)]}, AT + "a count .*, not True"),
    ({"knots": [knot(at="soon")]}, AT + "a count .*, not 'soon'"),
    ({"knots": [knot(at="5X")]}, AT + "a count .*, not '5X'"),
    ({"knots": [knot(at="5M5")]}, AT + "a count .*, not '5M5'"),
    ({"knots": [knot(at=None)]}, r"knots\[0\]\.at: is missing"),
    ({"knots": [knot(at=math.nan)]}, AT + "a whole number, not nan"),
    ({"knots": [knot(at=-1)]}, AT + "at least 0, not -1"),
    ({"knots": [knot(at="-1K")]}, AT + "at least 0, not '-1K'"),
    ({"knots": [knot(at=1.5)]}, AT + "a whole number, not 1.5"),
    ({"knots": [knot(at="1.0001K")]}, AT + "a whole number, not '1.0001K'"),
    ({"knots": [knot(at="999T")]}, r"knots\[0\]\.at: sample 999000000000000 is too large"),
    ({"knots": [knot(at=5), knot(at=5)]}, r"knots\[1\]\.at: 5 is not above 5"),
    ({"knots": [knot(at=5), knot(at=4)]}, r"knots\[1\]\.at: 4 is not above 5"),
    (
        {"unit": "tokens", "knots": [knot(at=1), knot(at=2)]},
        r"knots\[1\]\.at: sample 1 does not come after",
    ),
    ({"knots": [knot(ramp="exponential")]}, r"knots\[0\]\.ramp: must be 'step', 'linear' or"),
    ({"knots": [knot(ramp=None)]}, r"knots\[0\]\.ramp: is missing"),
    ({"knots": [knot(weight=1)]}, r"knots\[0\]\.weight: unknown key .did you mean weights"),
    ({"knots": [3]}, r"knots\[0\]: must be a mapping of keys, not 3"),
    ({"knots": []}, r"^data\.schedule\.knots: must not be empty"),
    ({}, r"^data\.schedule\.knots: is missing"),
    ({"knots": "0"}, r"^data\.schedule\.knots: must be a list"),
    ({"knots": [knot()], "units": "samples"}, r"^data\.schedule\.units: unknown key"),
    ({"knots": [knot()], "unit": "epochs"}, r"^data\.schedule\.unit: must be 'samples', 'tokens'"),
    (["knots"], r"^data\.schedule: must be a mapping of keys, not \['knots'\]"),
    (None, r"^data\.schedule: must be a mapping of keys, not None"),
    (
        {"knots": [knot()], "samples_per_iteration": 8},
        r"samples_per_iteration: is 8 in the schedule",
    ),
]


@pytest.mark.parametrize(("block", "message"), BAD)
def test_bad_schedules_are_named(block: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make(block)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.schedule")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": []}, "no sources"),
        ({"sources": None}, "no sources"),
        ({"sources": "english"}, "no sources"),
        ({"sources": ["english", "english"]}, "english is listed twice"),
        ({"sources": ["english", True]}, "True is not a valid name"),
        ({"sources": [f"s{k}" for k in range(32768)]}, "use at most 32767"),
        ({"samples_per_iteration": 0}, "samples_per_iteration: must be a whole number .*, not 0"),
        ({"samples_per_iteration": True}, "samples_per_iteration: must be .*, not True"),
        ({"samples_per_iteration": None}, "samples_per_iteration: must be .*, not None"),
        ({"seq_length": -1}, "seq_length: must be a whole number .*, not -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make({"knots": [knot()]}, **arguments)


def test_tokens_need_the_sequence_length() -> None:
    with pytest.raises(UserError, match="seq_length: must be a whole number .*, not None"):
        make({"unit": "tokens", "knots": [knot()]}, seq_length=None)


def test_yaml_numbers_that_are_strings_or_booleans() -> None:
    """PyYAML reads 1e-3 as a string and `on` as True."""
    block = yaml.safe_load("{knots: [{at: 0, weights: {english: 1e-3, chinese: 3e-3}}]}")
    assert make(block).weights(0).tolist() == [GRID // 4, 3 * GRID // 4, 0]
    with pytest.raises(UserError, match=r"knots\[0\]\.at: must be a count"):
        make(yaml.safe_load("{knots: [{at: on, weights: {english: 1}}]}"))
