"""Tests knots with ``weights: as_planned``, up to which a running schedule stays unchanged."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.edits import as_planned_knot, resumed_schedule
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.config.fields import differing_numbers
from megatron_chatflow.errors import UserError

A, B, C = ({"en": 9, "zh": 1}, {"en": 1, "zh": 4}, {"en": 1, "zh": 1})
NAMES = ["en", "zh"]
SEQ_LENGTH = 100


def begin(block: dict[str, Any], names: Any = NAMES, batch: int = 4) -> Blend:
    return Blend(Schedule.from_dict(block, names, batch, SEQ_LENGTH))


def resume(block: dict[str, Any], blend: Blend, position: int, names: Any = NAMES) -> Blend:
    """Resumes a blend as a run does: only from the saved state, through JSON."""
    state, record = json.loads(json.dumps([blend.state_at(position), blend.schedule.to_dict()]))
    recorded = Schedule.from_dict(record)
    arguments = {
        "sources": list(names),
        "samples_per_iteration": recorded.samples_per_iteration,
        "seq_length": SEQ_LENGTH,
    }
    return Blend(resumed_schedule(block, recorded, arguments), state)


def planned(at: Any, **more: Any) -> dict[str, Any]:
    return {"at": at, "weights": "as_planned", **more}


@pytest.mark.parametrize("ramp", ["step", "linear", "cosine"])
@pytest.mark.parametrize(
    ("unit", "end", "at", "last"),
    [
        ("samples", 1000, 402, 1201),
        ("tokens", "100K", "40.2K", 120_100),
        ("iterations", 250, 100, 300),
    ],
)
def test_an_edit_on_the_way_to_a_knot(ramp: str, unit: str, end: Any, at: Any, last: Any) -> None:
    goal = {"at": end, "weights": B, "ramp": ramp}
    old = begin({"unit": unit, "knots": [{"at": 0, "weights": A}, goal]})
    tail = {"at": last, "weights": C, "ramp": "linear"}
    sample = 400 if unit == "iterations" else 402
    for knots in ([planned(at)], [{"at": 0, "weights": A}, planned(at, ramp=ramp)]):
        block = {"unit": unit, "knots": [*knots, tail]}
        new = resume(block, old, 320)
        assert new.edit is not None and new.edit.begin == 320
        for i in range(0, sample + 1):
            np.testing.assert_array_equal(new.schedule.weights_at(i), old.schedule.weights_at(i))
        assert new.schedule.unit == unit
        # Resuming later with the same file changes nothing, at any position of the run.
        for position in (324, sample, sample + 2, 900, 5000):
            again = resume(block, new, position)
            assert again.edit is None
            assert again.schedule.table() == new.schedule.table()
            np.testing.assert_array_equal(again.take(0, 1500)[0], new.take(0, 1500)[0])
            new = again
        np.testing.assert_array_equal(new.take(0, 320)[0], old.take(0, 320)[0])


def test_the_record_holds_numbers_and_reads_back() -> None:
    goal = {"at": 1000, "weights": B, "ramp": "cosine"}
    old = begin({"knots": [{"at": 0, "weights": A}, goal]})
    new = resume({"knots": [planned(300), {"at": 400, "weights": C}]}, old, 280)
    record = json.loads(json.dumps(new.state_at(300)))["segments"][-1]["schedule"]
    knot = record["knots"][1]
    assert knot["at"] == 300 and sum(knot["weights"].values()) == 2**32
    assert list(knot["weights"].values()) == old.schedule.weights_at(300).tolist()
    assert knot["towards"]["at"] == 1000
    assert "as_planned" not in json.dumps(record)
    read = Schedule.from_dict(record)
    assert read.table() == new.schedule.table()


def test_nothing_changes_without_a_change() -> None:
    goal = {"at": 1000, "weights": B, "ramp": "cosine"}
    block = {"knots": [{"at": 0, "weights": A}, goal]}
    old = begin(block)
    assert resume({"knots": [planned(1000)]}, old, 280).edit is None
    assert resume({"knots": [planned(3000)]}, old, 280).edit is None
    assert resume({"knots": [planned(1000), {"at": 1500, "weights": B}]}, old, 280).edit is None


def test_several_edits_in_one_ramp() -> None:
    """Each edit is cut from the line of the previous edit, without accumulated rounding."""
    names = [f"s{k}" for k in range(7)]
    first = {"at": 0, "weights": {name: 1 + k for k, name in enumerate(names)}}
    last = {"at": 100_003, "weights": {names[6]: 1, names[0]: 2}, "ramp": "linear"}
    blend = begin({"knots": [first, last]}, names)
    line = blend.schedule
    for number, at in enumerate((90_000, 70_001, 50_002, 30_003, 10_004)):
        block = {"knots": [planned(at), {"at": 200_000, "weights": {names[number]: 1}}]}
        blend = resume(block, blend, 8 * (number + 1), names)
        assert blend.edit is not None
        for i in (0, 5000, at - 1, at):
            np.testing.assert_array_equal(blend.schedule.weights_at(i), line.weights_at(i))


def test_two_edits_stand_in_one_file() -> None:
    old = begin({"knots": [{"at": 0, "weights": A}, {"at": 800, "weights": B, "ramp": "cosine"}]})
    first = [{"at": 0, "weights": A}, planned(200), {"at": 600, "weights": C, "ramp": "cosine"}]
    one = resume({"knots": first}, old, 200)
    both = [*first[:2], planned(400), {"at": 500, "weights": A, "ramp": "linear"}]
    two = resume({"knots": both}, one, 400)
    shown = resume({"knots": [planned(400), both[-1]]}, one, 400)
    assert two.schedule.table() == shown.schedule.table()
    np.testing.assert_array_equal(two.take(0, 400)[0], one.take(0, 400)[0])
    again = resume({"knots": both}, two, 600)
    assert again.edit is None


def test_a_source_comes_with_the_edit() -> None:
    old = begin({"knots": [{"at": 0, "weights": A}, {"at": 800, "weights": B, "ramp": "cosine"}]})
    more = ["code", "en", "zh"]
    tail = {"at": 400, "weights": {"code": 1, "zh": 1}, "ramp": "linear"}
    new = resume({"knots": [planned(200), tail]}, old, 200, more)
    assert new.edit is not None and new.edit.added == ("code",)
    for i in range(201):
        shares = new.schedule.weights_at(i)
        assert shares[0] == 0
        np.testing.assert_array_equal(shares[1:], old.schedule.weights_at(i))
    assert resume({"knots": [planned(200), tail]}, new, 300, more).edit is None
    with pytest.raises(UserError, match=r"data.sources.en: removed, but .* at sample 390"):
        resume({"knots": [planned(390), tail]}, new, 380, ["code", "zh"])


def test_a_source_goes_before_the_edit() -> None:
    knots = [
        {"at": 0, "weights": {"a": 1, "b": 1, "c": 2}},
        {"at": 40, "weights": {"a": 1, "c": 1}},
        {"at": 400, "weights": {"c": 1}, "ramp": "cosine"},
    ]
    old = begin({"knots": knots}, ["a", "b", "c"])
    block = {"knots": [planned(200), {"at": 300, "weights": {"a": 1, "c": 3}, "ramp": "linear"}]}
    new = resume(block, old, 60, ["a", "c"])
    assert new.edit is not None and new.edit.removed == ("b",)
    for i in range(40, 201):
        expected = old.schedule.weights_at(i)
        np.testing.assert_array_equal(new.schedule.weights_at(i), expected[[0, 2]])
    drawn = [[one.sources[k] for k in one.take(0, 60)[0]] for one in (old, new)]
    assert drawn[0] == drawn[1]
    again = resume(block, new, 250, ["a", "c"])
    assert again.edit is None
    np.testing.assert_array_equal(again.take(0, 400)[0], new.take(0, 400)[0])


def test_another_batch_size_or_unit_keeps_the_line() -> None:
    old = begin({"knots": [{"at": 0, "weights": A}, {"at": 801, "weights": B, "ramp": "cosine"}]})
    tail = {"at": 60_000, "weights": C, "ramp": "linear"}
    new = resume({"unit": "tokens", "knots": [planned(20_100), tail]}, old, 22)
    assert new.schedule.unit == "tokens" and new.schedule.knots[1].at == 201
    # In iterations of 4 samples the old knot at 201 cannot be expressed, so samples are kept.
    tail = {"at": 300, "weights": A}
    third = resume({"unit": "iterations", "knots": [planned(80), tail]}, new, 240)
    assert third.schedule.unit == "samples"
    for i in range(0, 321):
        np.testing.assert_array_equal(third.schedule.weights_at(i), new.schedule.weights_at(i))


@pytest.mark.parametrize("ramp", ["step", "linear", "cosine"])
def test_a_larger_batch_puts_early_iterations_before_sample_0(ramp: str) -> None:
    """After 30 iterations of 8 samples, iteration 0 would begin at -120 in iterations of 12."""
    knots = [
        {"at": 0, "weights": A},
        {"at": 5, "weights": C},
        {"at": 100, "weights": B, "ramp": ramp},
    ]
    old = begin({"unit": "iterations", "knots": knots}, batch=8)
    expected = begin({"unit": "iterations", "knots": knots}, batch=1).schedule
    state, recorded = old.state_at(240), Schedule.from_dict(old.schedule.to_dict())
    arguments = {
        "sources": NAMES,
        "samples_per_iteration": 12,
        "seq_length": SEQ_LENGTH,
        "iteration_origin": -120,
    }
    tail = {"at": 120, "weights": A}
    for first in ([], knots[:2]):
        block = {"unit": "iterations", "knots": [*first, planned(60), tail]}
        new = Blend(resumed_schedule(block, recorded, arguments), state)
        assert new.edit is not None and new.edit.begin == 240
        assert new.schedule.unit == "iterations"
        np.testing.assert_array_equal(new.take(0, 240)[0], old.take(0, 240)[0])
        for iteration in range(30, 61):
            sample = 240 + 12 * (iteration - 30)
            np.testing.assert_array_equal(new.schedule.weights(sample), expected.weights(iteration))
        again = resumed_schedule(block, Schedule.from_dict(new.schedule.to_dict()), arguments)
        assert Blend(again, new.state_at(360)).edit is None
    # A schedule recorded in samples begins at sample 0.
    in_samples = begin({"knots": [{"at": 0, "weights": A}, {"at": 301, "weights": B}]}, batch=8)
    block = {"unit": "iterations", "knots": [knots[0], planned(60), tail]}
    one = Blend(resumed_schedule(block, in_samples.schedule, arguments), in_samples.state_at(240))
    assert [knot.at for knot in one.schedule.knots] == [0, 301, 600, 1320]


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_a_smaller_batch_puts_sample_0_before_iteration_0(unit: str) -> None:
    """After 6 iterations of 8 samples, iteration 0 would begin at 24 in iterations of 4."""
    per = {"samples": 1, "tokens": SEQ_LENGTH}[unit]
    knots = [{"at": 0, "weights": A}, {"at": 72 * per - (per > 1), "weights": B, "ramp": "linear"}]
    old = begin({"unit": unit, "knots": knots}, batch=8)
    arguments = {
        "sources": NAMES,
        "samples_per_iteration": 4,
        "seq_length": SEQ_LENGTH,
        "iteration_origin": 24,
    }
    block = {"unit": "iterations", "knots": [planned(6), {"at": 100, "weights": A}]}
    recorded = Schedule.from_dict(old.schedule.to_dict())
    new = Blend(resumed_schedule(block, recorded, arguments), old.state_at(48))
    assert new.schedule.unit == "samples" and new.edit is not None
    assert [knot.at for knot in new.schedule.knots] == [0, 48, 424]
    np.testing.assert_array_equal(new.take(0, 48)[0], old.take(0, 48)[0])
    for sample in (0, 20, 48):
        expected = old.schedule.weights_at(sample)
        np.testing.assert_array_equal(new.schedule.weights_at(sample), expected)
    again = resumed_schedule(block, Schedule.from_dict(new.schedule.to_dict()), arguments)
    assert Blend(again, new.state_at(60)).edit is None


def test_two_recorded_knots_in_one_iteration_are_kept_in_samples() -> None:
    knots = [{"at": 0, "weights": A}, {"at": 301, "weights": B}, {"at": 303, "weights": C}]
    old = begin({"knots": knots}, batch=8)
    arguments = {
        "sources": NAMES,
        "samples_per_iteration": 12,
        "seq_length": SEQ_LENGTH,
        "iteration_origin": -120,
    }
    block = {"unit": "iterations", "knots": [planned(60), {"at": 70, "weights": A}]}
    new = Blend(resumed_schedule(block, old.schedule, arguments), old.state_at(240))
    assert [knot.at for knot in new.schedule.knots] == [0, 301, 303, 600, 720]
    np.testing.assert_array_equal(new.take(0, 240)[0], old.take(0, 240)[0])


def test_samples_do_not_express_a_ramp_over_iterations_of_two_sizes() -> None:
    """The refusal names the unit that does, and not the knot that is already there."""
    knots = [{"at": 0, "weights": A}, {"at": 100, "weights": B, "ramp": "linear"}]
    old = begin({"unit": "iterations", "knots": knots}, batch=8)
    arguments = {
        "sources": NAMES,
        "samples_per_iteration": 12,
        "seq_length": SEQ_LENGTH,
        "iteration_origin": -120,
    }

    def resumed(unit: str, at: int, end: int, blend: Blend, position: int) -> Blend:
        block = {"unit": unit, "knots": [planned(at), {"at": end, "weights": A}]}
        recorded = Schedule.from_dict(blend.schedule.to_dict())
        return Blend(resumed_schedule(block, recorded, arguments), blend.state_at(position))

    larger = resumed("iterations", 60, 120, old, 240)
    with pytest.raises(UserError, match="was drawn with other weights") as caught:
        resumed("samples", 480, 3000, larger, 480)
    advice = (
        "keep unit: iterations and replace all knots up to there by {at: 50, weights: as_planned}"
    )
    assert advice in str(caught.value)
    edited = resumed("iterations", 50, 90, larger, 480)
    assert edited.edit is not None and edited.edit.begin == 480


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        (
            [{"at": 0, "weights": {"en": 8, "zh": 2}}, planned(300)],
            r"knots\[1\]: as_planned, but the knots before it differ from the plan at sample 0 "
            r"\(en 0.8, in the checkpoint 0.9\): remove those knots",
        ),
        (
            [planned(300, ramp="cosine")],
            r"knots\[0\].ramp: cosine, but the recorded schedule has linear",
        ),
        ([planned(-3)], r"knots\[0\].at: must be at least 0, not -3"),
        ([{"at": 0, "weights": "planned"}], r"knots\[0\].weights: must be a mapping from sources"),
        ([planned(300), {"at": 200, "weights": A}], r"knots\[\d\].at: 200 is not above 300"),
    ],
)
def test_mistakes(knots: list[dict[str, Any]], message: str) -> None:
    old = begin({"knots": [{"at": 0, "weights": A}, {"at": 800, "weights": B, "ramp": "linear"}]})
    with pytest.raises(UserError, match=message):
        resume({"knots": knots}, old, 200)


def test_a_run_that_begins_has_no_plan() -> None:
    with pytest.raises(UserError, match=r"knots\[0\].weights: as_planned takes the weights from"):
        begin({"knots": [planned(0)]})


@pytest.mark.parametrize("unit", ["samples", "tokens", "iterations"])
def test_the_refusal_prints_the_knot_that_repairs(unit: str) -> None:
    per = {"samples": 1, "tokens": SEQ_LENGTH, "iterations": 1}[unit]
    knots = [
        {"at": 0, "weights": A},
        {"at": 800 * per, "weights": B, "ramp": "linear"},
    ]
    old = begin({"unit": unit, "knots": knots})
    share = old.schedule.weights_at(old.schedule.knots[1].at // 2) / 2**32
    rounded = {name: float(f"{part:.6g}") for name, part in zip(NAMES, share, strict=True)}
    rounded["zh"] += 1e-7
    tail = {"at": 900 * per, "weights": A}
    guess = [knots[0], {"at": 400 * per, "weights": rounded, "ramp": "linear"}, tail]
    position = old.schedule.knots[1].at // 2
    with pytest.raises(UserError, match="was drawn with other weights") as caught:
        resume({"unit": unit, "knots": guess}, old, position)
    text = str(caught.value)
    was, now = text.split("weights (")[1].split(")")[0].replace("zh ", "").split(", now ")
    assert was.removeprefix("en ") != now
    knot = as_planned_knot(old.schedule, position)
    assert f"replace all knots up to there by {knot}" in text and f"(unit: {unit})" in text
    assert knot == f"{{at: {400 * per}, weights: as_planned}}"
    new = resume({"unit": unit, "knots": [planned(400 * per), tail]}, old, position)
    assert new.edit is not None


def test_the_refusal_says_what_flags_can_do() -> None:
    """--data-path makes a schedule of one knot, which no flag can edit."""
    old = begin({"knots": [{"at": 0, "weights": A}]})
    with pytest.raises(UserError, match="was drawn with other weights") as caught:
        resume({"knots": [{"at": 0, "weights": B}]}, old, 500)
    text = str(caught.value)
    assert "with --data-path, use the weights that the run started with" in text
    assert "to a copy of the run's config.yaml and pass that as --config" in text


def test_differing_numbers_show_that_they_differ() -> None:
    assert differing_numbers(0.25, 0.5) == ("0.25", "0.5")
    assert differing_numbers(0.108184, 0.1081840001) == ("0.108184", "0.1081840001")
    assert differing_numbers(1.0, 1.0 + 2**-52) == ("1", "1.0000000000000002")
    assert differing_numbers(0.1, 0.1) == ("0.1", "0.1")


WEIGHTS = st.lists(st.integers(0, 9), min_size=5, max_size=5).filter(any)


@settings(max_examples=40, deadline=None)
@given(st.lists(WEIGHTS, min_size=3, max_size=6), st.data())
def test_any_chain_of_edits_keeps_what_was_planned(rows: list[list[int]], data: Any) -> None:
    names = list("abcde")
    ramps = st.sampled_from(["step", "linear", "cosine"])

    def knot(at: int, row: list[int]) -> dict[str, Any]:
        weights = dict(zip(names, row, strict=True))
        return {"at": at, "weights": weights, "ramp": data.draw(ramps)}

    blend = begin({"knots": [knot(3, rows[0]), knot(150, rows[1])]}, names, 3)
    position = 0
    for row in rows[2:]:
        position += data.draw(st.integers(1, 60))
        at = position + data.draw(st.integers(0, 60))
        block = {"knots": [planned(at), knot(at + data.draw(st.integers(1, 90)), row)]}
        new = resume(block, blend, position, names)
        for i in range(at + 1):
            np.testing.assert_array_equal(new.schedule.weights_at(i), blend.schedule.weights_at(i))
        np.testing.assert_array_equal(new.take(0, position)[0], blend.take(0, position)[0])
        assert resume(block, new, position + 7, names).edit is None
        blend = new
    end = position + 200
    source, _ = blend.take(0, end)
    counts = [0] * len(names)
    offsets = [max(map(abs, part["offsets"])) for part in blend.state_at(end)["segments"]]
    for sample in range(end):
        counts[source[sample]] += 1
        due = zip(counts, blend.quotas(sample + 1), strict=True)
        assert max(abs((count << 32) - quota) for count, quota in due) < 2**32 + max(offsets)
