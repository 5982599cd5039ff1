"""Tests edits of a running blend: the future may change, the past may not."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.edits import choose_offsets
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.errors import UserError

GRID = 1 << 32


def schedule_of(knots: list[tuple[Any, ...]], names: str = "abcd", batch: int = 1) -> Schedule:
    """Builds a schedule from knots (at, weights in the order of names[, ramp])."""
    block = [
        {
            "at": at,
            "weights": dict(zip(names, weights, strict=False)),
            "ramp": ramp[0] if ramp else "step",
        }
        for at, weights, *ramp in knots
    ]
    return Schedule.from_dict({"knots": block}, list(names), batch)


def resumed(schedule: Schedule, blend: Blend, position: int) -> Blend:
    return Blend(schedule, json.loads(json.dumps(blend.state_at(position))))


def worst(blend: Blend, end: int) -> Fraction:
    """Returns the largest distance of a count from the quota of the whole run, from the draws."""
    source, index = blend.take(0, end)
    counts = [0] * len(blend.sources)
    num_sources = len(blend.schedule.sources)
    error = 0
    for sample in range(end):
        assert index[sample] == counts[source[sample]]
        counts[source[sample]] += 1
        quotas = blend.quotas(sample + 1)
        due = zip(counts[:num_sources], quotas, strict=True)
        error = max(error, *(abs(count * GRID - quota) for count, quota in due))
    return Fraction(error, GRID)


def test_an_edit_that_cannot_keep_the_error_below_one() -> None:
    """Two of four equal sources were drawn. The other two get all weight from now on."""
    old = Blend(schedule_of([(0, [1, 1, 1, 1])]))
    drawn = old.take(0, 2)[0].tolist()
    rest = [0 if k in drawn else 1 for k in range(4)]
    new = resumed(schedule_of([(0, [1, 1, 1, 1]), (2, rest)]), old, 2)
    assert new.edit is not None and 1 < new.edit.error_bound < 2
    assert str(new.edit).startswith("schedule edited at sample 2; every prefix stays within 1.")
    assert new.take(0, 2)[0].tolist() == drawn
    assert 1 <= worst(new, 200) < new.edit.error_bound


def test_an_edit_where_counts_are_whole_costs_nothing() -> None:
    old = Blend(schedule_of([(0, [1, 1, 1, 1])]))
    new = resumed(schedule_of([(0, [1, 1, 1, 1]), (4, [0, 0, 1, 1])]), old, 4)
    assert new.edit is not None and new.edit.error_bound == 1
    assert worst(new, 100) < 1


def test_edits_are_replayed_on_a_later_resume() -> None:
    first = schedule_of([(0, [5, 3, 1, 0])], batch=8)
    second = schedule_of([(0, [5, 3, 1, 0]), (104, [0, 1, 1, 5])], batch=8)
    third = schedule_of([(0, [5, 3, 1, 0]), (104, [0, 1, 1, 5]), (304, [7, 0, 0, 1])], batch=8)
    one = Blend(first)
    two = resumed(second, one, 104)
    three = resumed(third, two, 304)
    again = resumed(third, three, 500)
    assert two.edit is not None and three.edit is not None and again.edit is None
    np.testing.assert_array_equal(again.take(0, 104)[0], one.take(0, 104)[0])
    np.testing.assert_array_equal(again.take(0, 304)[0], two.take(0, 304)[0])
    np.testing.assert_array_equal(again.take(0, 700)[0], three.take(0, 700)[0])
    np.testing.assert_array_equal(again.take(250, 700)[1], three.take(0, 700)[1][250:])
    assert worst(again, 700) < three.edit.error_bound
    for sample in (50, 200, 600):
        source, index = (int(part[0]) for part in again.take(sample, sample + 1))
        assert again.first_draw(source, index) == sample
    assert resumed(first, again, 0).state_at(0)["segments"] == one.state_at(0)["segments"]
    assert len(again.state_at(200)["segments"]) == 2
    assert again.state_at(104) == one.state_at(104)


def test_a_second_edit_at_the_same_sample_replaces_the_first() -> None:
    old = Blend(schedule_of([(0, [1, 2, 3, 4])]))
    once = resumed(schedule_of([(0, [1, 2, 3, 4]), (7, [4, 0, 0, 1])]), old, 7)
    twice = resumed(schedule_of([(0, [1, 2, 3, 4]), (7, [0, 1, 1, 0])]), once, 7)
    assert [s["begin"] for s in twice.state_at(8)["segments"]] == [0, 7]
    assert set(twice.take(20, 60)[0].tolist()) <= {1, 2}
    assert twice.edit is not None and worst(twice, 60) < twice.edit.error_bound


def test_what_changes_nothing_is_no_edit() -> None:
    old = Blend(schedule_of([(0, [1, 2, 3, 4]), (500, [1, 1, 0, 0], "linear")]))
    same = [
        [(0, [2, 4, 6, 8]), (500, [5, 5, 0, 0], "linear")],
        [(0, [1, 2, 3, 4]), (500, [1, 1, 0, 0], "linear"), (900, [1, 1, 0, 0])],
    ]
    for knots in same:
        new = resumed(schedule_of(knots), old, 300)
        assert new.edit is None
        np.testing.assert_array_equal(new.take(0, 900)[0], old.take(0, 900)[0])


def test_a_knot_on_a_ramp_leaves_the_past_as_it_was() -> None:
    """Splitting a ramp rounds its levels at other samples, which does not count as an edit."""
    old = Blend(schedule_of([(0, [7, 1, 1, 0]), (900, [1, 1, 7, 0], "linear")]))
    knots = [(0, [7, 1, 1, 0]), (300, [5, 1, 3, 0], "linear"), (600, [0, 0, 1, 1], "linear")]
    new = resumed(schedule_of(knots), old, 300)
    assert new.edit is not None
    np.testing.assert_array_equal(new.take(0, 300)[0], old.take(0, 300)[0])
    assert worst(new, 700) < new.edit.error_bound


def test_the_first_sample_of_a_changed_past_is_named() -> None:
    old = Blend(schedule_of([(0, [1, 2, 3, 4]), (100, [4, 3, 2, 1]), (200, [1, 1, 1, 1])]))
    for at, weights, sample in [(101, [4, 3, 2, 1], 100), (100, [4, 3, 2, 2], 100)]:
        knots = [(0, [1, 2, 3, 4]), (at, weights), (200, [1, 1, 1, 1])]
        with pytest.raises(UserError, match=rf"sample {sample} was drawn with other weights") as e:
            resumed(schedule_of(knots), old, 150)
        assert "before sample 150" in str(e.value) and "\n" not in str(e.value)
        assert resumed(schedule_of(knots), old, 100).edit is not None


def test_a_source_is_added() -> None:
    old = Blend(schedule_of([(0, [3, 2])], "ab"))
    names = "xab"  # The new source may be at any index.
    knots = [(0, [0, 3, 2]), (17, [0, 3, 2]), (30, [1, 1, 1], "linear"), (60, [1, 0, 0])]
    new = resumed(schedule_of(knots, names), old, 17)
    assert new.edit is not None and new.edit.added == ("x",)
    assert new.sources == ("x", "a", "b")
    drawn = [new.sources[k] for k in new.take(0, 17)[0]]
    assert drawn == [old.sources[k] for k in old.take(0, 17)[0]]
    assert worst(new, 100) < new.edit.error_bound
    again = resumed(schedule_of(knots, names), new, 80)
    np.testing.assert_array_equal(again.take(0, 120)[0], new.take(0, 120)[0])
    assert again.first_draw(0, 0) == int(np.flatnonzero(new.take(0, 100)[0] == 0)[0])


def test_sources_in_another_order_are_the_same_run() -> None:
    old = Blend(schedule_of([(0, [3, 2, 2])], "abc"))
    new = resumed(schedule_of([(0, [2, 3, 2])], "bac"), old, 40)
    assert new.edit is None and new.sources == ("b", "a", "c")
    drawn = [new.sources[k] for k in new.take(0, 90)[0]]
    assert drawn == [old.sources[k] for k in old.take(0, 90)[0]]
    assert new.counts(40).tolist() == old.counts(40)[[1, 0, 2]].tolist()


def test_a_source_is_removed_when_nothing_is_owed() -> None:
    before = [(0, [1, 1, 2]), (40, [1, 0, 1])]
    old = Blend(schedule_of(before, "abc"))
    assert old.quotas(60)[1] == 10 * GRID
    new = resumed(schedule_of([(0, [1, 1]), (70, [3, 1])], "ac"), old, 60)
    assert new.edit is not None and new.edit.removed == ("b",)
    assert "removed b" in str(new.edit)
    assert new.sources == ("a", "c", "b")
    names = [new.sources[k] for k in new.take(0, 120)[0]]
    assert names[:60] == [old.sources[k] for k in old.take(0, 60)[0]]
    assert "b" not in names[60:]
    assert worst(new, 120) < new.edit.error_bound
    later = resumed(schedule_of([(0, [1, 1]), (70, [3, 1])], "ac"), new, 90)
    assert later.edit is None
    np.testing.assert_array_equal(later.take(0, 120)[0], new.take(0, 120)[0])
    full = [(0, [1, 1, 2]), (40, [1, 0, 1]), (70, [3, 0, 1]), (95, [0, 1, 1])]
    back = resumed(schedule_of(full, "abc"), new, 90)
    assert back.counts(90)[1] == 10 and back.counts(300)[1] > 100


def test_a_source_without_a_change_of_weights_is_removed() -> None:
    old = Blend(schedule_of([(0, [1, 1, 2]), (40, [1, 0, 1])], "abc"))
    new = resumed(schedule_of([(0, [1, 1])], "ac"), old, 60)
    np.testing.assert_array_equal(new.take(0, 60)[1], old.take(0, 60)[1])
    again = resumed(schedule_of([(0, [1, 1])], "ac"), new, 80)
    assert [again.sources[k] for k in again.take(0, 90)[0]] == [
        old.sources[k] for k in old.take(0, 90)[0]
    ]


def test_a_source_in_use_is_not_removed() -> None:
    old = Blend(schedule_of([(0, [3, 3, 4]), (43, [1, 0, 1])], "abc"))
    new = schedule_of([(0, [1, 1])], "ac")
    with pytest.raises(
        UserError, match=r"data.sources.b: removed at sample 20, .* weight is still 0.3"
    ):
        resumed(new, old, 20)
    position = next(i for i in range(44, 99) if old.counts(i)[1] * GRID < old.quotas(i)[1])
    with pytest.raises(UserError, match="its count is still 0.9 samples below its quota"):
        resumed(new, old, position)


def test_another_global_batch_size_is_an_edit() -> None:
    knots = [(0, [1, 2, 3, 4]), (1000, [4, 3, 2, 1], "linear")]
    old = Blend(schedule_of(knots, batch=16))
    new = resumed(schedule_of(knots, batch=100), old, 320)
    assert new.edit is not None
    np.testing.assert_array_equal(new.take(0, 320)[0], old.take(0, 320)[0])
    assert worst(new, 1200) < new.edit.error_bound
    grown = np.diff([new.quotas(i) for i in range(300, 700)], axis=0)
    changes = 300 + 1 + np.flatnonzero(np.abs(np.diff(grown, axis=0)).any(axis=1))
    assert changes.tolist() == [304, 320, 420, 520, 620]
    np.testing.assert_array_equal(grown[200], schedule_of(knots, batch=1).weights(420))


def weight_rows(num_sources: int) -> Any:
    row = st.lists(st.integers(0, 5), min_size=num_sources, max_size=num_sources).filter(any)
    return st.lists(row, min_size=2, max_size=6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8).flatmap(weight_rows), st.data())
def test_any_chain_of_edits_keeps_its_bound(rows: list[list[int]], data: Any) -> None:
    names = "abcdefgh"[: len(rows[0])]
    batch = data.draw(st.sampled_from([1, 4]))
    knots, position = [(0, rows[0])], 0
    blend = Blend(schedule_of(knots, names, batch))
    for number, row in enumerate(rows[1:], 1):
        position += data.draw(st.integers(1, 30))
        knots = [*knots, (position, row)]
        following = resumed(schedule_of(knots, names, batch), blend, position)
        np.testing.assert_array_equal(following.take(0, position)[0], blend.take(0, position)[0])
        assert following.error_bound() < 1 + number
        blend = following
    end = position + 60
    error = worst(blend, end)
    bounds = [1 + max(map(abs, s["offsets"])) / GRID for s in blend.state_at(end)["segments"]]
    assert error < max(bounds)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8).flatmap(weight_rows), st.integers(1, 50))
def test_offsets_are_whole_and_balanced(rows: list[list[int]], position: int) -> None:
    names = "abcdefgh"[: len(rows[0])]
    old = Blend(schedule_of([(0, rows[0])], names))
    table = schedule_of([(0, row) for row in rows[1:2]], names).table()
    quotas, counts = old.quotas(position), old.counts(position).tolist()
    offsets = choose_offsets(table, position, quotas, counts)
    assert sum(offsets) == 0 and max(map(abs, offsets)) < GRID
    if len(names) <= 3:
        assert not any(offsets)
    for quota, offset, count in zip(quotas, offsets, counts, strict=True):
        assert abs(count * GRID - quota - offset) < GRID


def in_iterations(knots: list[tuple[Any, ...]], batch: int, origin: int = 0) -> Schedule:
    """Builds a schedule of two sources from knots (iteration, weights[, ramp])."""
    block = {
        "unit": "iterations",
        "knots": [
            {
                "at": at,
                "weights": dict(zip("ab", weights, strict=True)),
                "ramp": ramp[0] if ramp else "step",
            }
            for at, weights, *ramp in knots
        ],
    }
    return Schedule.from_dict(block, list("ab"), batch, iteration_origin=origin)


@pytest.mark.parametrize("ramp", ["step", "linear", "cosine"])
def test_knots_in_iterations_follow_the_batch_size(ramp: str) -> None:
    """The batch size is 16, 8, 12, then 16 samples. Weights are those of the iteration."""
    knots = [(2, [9, 1]), (20, [1, 9], ramp), (24, [1, 1])]
    batches = [16] * 4 + [8] * 5 + [12] * 7 + [16] * 14
    starts = np.cumsum([0, *batches]).tolist()
    blend = Blend(in_iterations(knots, 16))
    expected = in_iterations(knots, 1)
    for iteration in (4, 9, 16):
        origin = starts[iteration] - iteration * batches[iteration]
        drawn = blend.take(0, starts[iteration])
        resumed_schedule = in_iterations(knots, batches[iteration], origin)
        blend = resumed(resumed_schedule, blend, starts[iteration])
        assert blend.edit is not None
        np.testing.assert_array_equal(blend.take(0, starts[iteration])[0], drawn[0])
        # A second resume with the same batch size changes nothing.
        assert resumed(resumed_schedule, blend, starts[iteration + 2]).edit is None
    for iteration, start in enumerate(starts[:-1]):
        due = np.subtract(blend.quotas(starts[iteration + 1]), blend.quotas(start))
        np.testing.assert_array_equal(due, batches[iteration] * expected.weights(iteration))
        if iteration >= 16:
            np.testing.assert_array_equal(
                blend.schedule.weights(start), expected.weights(iteration)
            )
    assert worst(blend, starts[-1]) < blend.error_bound()
    knot_starts = {starts[at] for at in (2, 20, 24)}
    assert set(blend.knots_before(starts[-1])) == knot_starts


def test_a_constant_schedule_has_no_edit_at_another_batch_size() -> None:
    blend = Blend(in_iterations([(0, [1, 3])], 16))
    again = resumed(in_iterations([(0, [1, 3])], 8, 32), blend, 64)
    assert again.edit is None
    np.testing.assert_array_equal(again.take(0, 200)[0], blend.take(0, 200)[0])


def test_another_batch_size_is_no_way_to_change_the_past() -> None:
    blend = Blend(in_iterations([(0, [1, 3]), (3, [3, 1])], 16))
    with pytest.raises(UserError, match="sample 48 was drawn with other weights"):
        resumed(in_iterations([(0, [1, 3]), (6, [3, 1])], 8, 32), blend, 64)


def test_a_state_of_an_earlier_version_goes_on_in_iterations() -> None:
    """An earlier version counted every iteration as 16 samples.

    Four iterations of 16 and four of 8 samples ended at sample 96.
    """
    knots = [(0, [1, 3]), (3, [3, 1]), (12, [1, 1])]
    blend = Blend(in_iterations(knots, 16))
    state = blend.state_at(96)
    assert "iteration_origin" not in state["segments"][-1]["schedule"]
    again = Blend(in_iterations(knots, 8, 96 - 8 * 8), state)
    # Iteration 12 begins four iterations of 8 samples after the eighth.
    assert again.quotas(128)[0] - again.quotas(96)[0] == 24 * GRID
    assert again.quotas(136)[0] - again.quotas(128)[0] == 4 * GRID
