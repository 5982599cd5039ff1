"""Tests plans: phases, epochs, limits on repetition, and their files."""

import csv
import io
import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.plan import (
    check_epochs,
    epoch_findings,
    learning_rate_table,
    mixture_curve,
    plan,
    to_csv,
)
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.config import OptimizerConfig, RunLength, TrainConfig
from megatron_chatflow.config.learning_rate import learning_rates
from megatron_chatflow.errors import UserError

NAMES = ["english", "chinese", "chat"]


def blend() -> Blend:
    knots = [
        {"at": 100, "weights": {"english": 3, "chinese": 1}},
        {"at": 500, "weights": {"chinese": 1, "chat": 1}, "ramp": "linear"},
        {"at": 5000, "weights": {"chat": 1}},
    ]
    return Blend(Schedule.from_dict({"knots": knots}, NAMES, 10))


def test_phases_lie_between_the_knots_within_the_run() -> None:
    rows = plan(blend(), 800, {"english": 100, "chat": 1000})
    assert [(row.phase, row.begin, row.end) for row in rows[::3]] == [
        (1, 0, 100),
        (2, 100, 500),
        (3, 500, 800),
    ]
    assert [row.source for row in rows] == NAMES * 3
    source, _ = blend().take(0, 800)
    for row in rows:
        drawn = source[row.begin : row.end].tolist()
        assert row.realised == drawn.count(NAMES.index(row.source))
        assert row.realised_share == row.realised / (row.end - row.begin)
        assert abs(row.planned - row.realised) < 2
        assert row.planned == pytest.approx(row.planned_share * (row.end - row.begin))
    assert rows[0].planned == pytest.approx(75) and rows[7].planned == pytest.approx(150)
    assert rows[3].epochs == source[:500].tolist().count(0) / 100
    assert rows[4].epochs is None


def test_csv_reads_back() -> None:
    rows = plan(blend(), 800, {"english": 100})
    read = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [float(line["planned"]) for line in read] == [row.planned for row in rows]
    assert [int(line["realised"]) for line in read] == [row.realised for row in rows]
    assert read[0]["epochs"] == str(rows[0].epochs) and read[1]["epochs"] == ""


def test_the_iteration_that_exceeds_max_epochs_is_named() -> None:
    source, index = blend().take(0, 800)
    sizes = {"english": 60, "chinese": 100, "chat": 10}
    sample = int(np.flatnonzero((source == 0) & (index == 90))[0])
    with pytest.raises(UserError) as caught:
        check_epochs(blend(), length(800), sizes, {"english": 1.5, "chinese": 90.0})
    message = str(caught.value)
    assert f"iteration {sample // 20 + 1} (sample {sample})" in message
    assert message.startswith("data.sources.english.max_epochs: 1.5 epochs of 60 samples")
    enough = math.ceil(1000 * source.tolist().count(0) / 60) / 1000
    assert "lower its weight" in message
    assert f"or raise max_epochs to the {enough:g} that the whole run needs" in message
    check_epochs(blend(), length(800), sizes, {"english": enough})
    later = int(np.flatnonzero((source == 2) & (index == 20))[0])
    assert later > sample
    with pytest.raises(UserError, match=rf"english.*\(sample {sample}\)"):
        check_epochs(blend(), length(800), sizes, {"chat": 2, "english": 1.5})


@pytest.mark.parametrize("limit", [1e308, 2.0**63, 1e18])
def test_a_huge_limit_is_none(limit: float) -> None:
    check_epochs(blend(), length(800), {"english": 60}, {"english": limit})
    assert blend().first_draw(0, 2**63) is None


def test_more_than_four_epochs_are_reported_unless_a_limit_was_chosen() -> None:
    counts = dict(zip(NAMES, blend().counts(800).tolist(), strict=True))
    sizes = {"english": counts["english"] // 4, "chinese": 1, "chat": 0}
    assert counts["english"] % 4 == 0 and counts["chinese"] > 4
    [finding] = epoch_findings(blend(), 800, sizes, {})
    assert finding.startswith(
        f"data.sources.chinese: {counts['chinese']:,}.0 epochs in this run "
        f"({counts['chinese']:,} samples from 1)"
    )
    assert epoch_findings(blend(), 800, sizes, {"chinese": 1000.0}) == []
    assert epoch_findings(blend(), 800, {}, {}) == []


def test_what_is_just_enough_is_allowed() -> None:
    needed = int(blend().counts(800)[0])
    check_epochs(blend(), length(800), {"english": needed}, {"english": 1})
    with pytest.raises(UserError):
        check_epochs(blend(), length(800), {"english": needed - 1}, {"english": 1})
    check_epochs(blend(), length(800), {"english": 1, "chinese": 1}, {})


def test_the_curve_adds_up() -> None:
    curve = mixture_curve(blend(), 3000, 30)
    assert curve.edges.tolist() == list(range(0, 3001, 100))
    np.testing.assert_allclose(curve.planned.sum(axis=1), 1)
    np.testing.assert_allclose(curve.realised.sum(axis=1), 1)
    np.testing.assert_allclose(curve.planned, curve.realised, atol=2 / 100)
    drawn = (curve.realised * np.diff(curve.edges)[:, None]).sum(axis=0)
    np.testing.assert_allclose(drawn, blend().counts(3000))
    assert curve.points[-1] == 3000 and curve.drawn[-1].tolist() == blend().counts(3000).tolist()
    # Even with few bins, the draws of a short run are known at every point.
    short = mixture_curve(blend(), 250)
    assert len(short.edges) == 3
    middle = len(short.points) // 2
    assert short.drawn[middle].tolist() == blend().counts(int(short.points[middle])).tolist()
    assert len(mixture_curve(blend(), 1).edges) == 2


def test_the_iteration_of_a_resumed_run_counts_from_its_present_batch_size() -> None:
    """Ten iterations of 20 samples are followed by iterations of 50."""
    sizes = {"english": 200, "chinese": 2, "chat": 100}
    with pytest.raises(UserError) as fresh:
        check_epochs(blend(), length(800), sizes, {"english": 1.0})
    sample = int(re.search(r"sample (\d+)", str(fresh.value))[1])
    assert sample > 200
    with pytest.raises(UserError, match=f"exceeded at iteration {10 + (sample - 200) // 50 + 1} "):
        check_epochs(blend(), length(800, 50, 10, 200), sizes, {"english": 1.0})
    with pytest.raises(UserError, match="exceeded before iteration 40 "):
        check_epochs(blend(), length(800, 50, 40, 790), sizes, {"english": 1.0})


def optimizer_and_length(batch: int, num_iterations: int, **settings: Any) -> tuple[Any, Any]:
    optimizer = OptimizerConfig(lr=1.0, **settings)
    train = TrainConfig(global_batch_size=batch, train_iters=num_iterations, micro_batch_size=1)
    run: Any = SimpleNamespace(train=train, optimizer=optimizer)
    return optimizer, RunLength.of(run)


def length(num_samples: int, batch: int = 20, iteration: int = 0, consumed: int = 0) -> RunLength:
    """Returns the length of a run that may have begun with another batch size."""
    train = TrainConfig(global_batch_size=batch, train_samples=num_samples, micro_batch_size=1)
    run: Any = SimpleNamespace(train=train, optimizer=OptimizerConfig(lr=1.0))
    return RunLength.of(run, iteration, consumed, initial_batch_size=20)


def test_tenths_of_the_learning_rate_hold_the_same_amount_of_learning() -> None:
    optimizer, length = optimizer_and_length(10, 1000, lr_decay_style="linear")
    rows = learning_rate_table(blend(), optimizer, length)
    edges = [0, *(int(row["iterations"].split(" to ")[1].replace(",", "")) for row in rows)]
    assert len(rows) == 10 and edges[-1] == 1000
    rates = learning_rates(optimizer, length, np.arange(1000))
    sums = [rates[a:b].sum() for a, b in itertools.pairwise(edges)]
    assert sums == pytest.approx([rates.sum() / 10] * 10, abs=2.0)
    # The rate falls to 0, so that the last tenth of learning takes a third of the iterations.
    assert edges[1] == 52 and edges[9] == 685
    source, _ = blend().take(0, 10_000)
    for row, (a, b) in zip(rows, itertools.pairwise(edges), strict=True):
        for k, name in enumerate(NAMES):
            count = source[10 * a : 10 * b].tolist().count(k)
            assert row[f"{name} tokens"] == f"{count:,} ({count / (10 * (b - a)):.1%})"


def test_tenths_of_a_long_run_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, length = optimizer_and_length(10, 1000, lr_decay_style="linear", lr_warmup_iters=100)
    exact = learning_rate_table(blend(), optimizer, length)
    monkeypatch.setattr("megatron_chatflow.blend.plan._MAX_RATES", 400)
    rows = learning_rate_table(blend(), optimizer, length)
    ends = [
        [int(row["iterations"].split(" to ")[1].replace(",", "")) for row in each]
        for each in (rows, exact)
    ]
    assert ends[0] == pytest.approx(ends[1], abs=3) and ends[0][-1] == 1000
    means = [[float(row["mean"]) for row in each] for each in (rows, exact)]
    assert means[0] == pytest.approx(means[1], rel=0.03)


def test_tenths_follow_a_ramp_of_the_batch_size() -> None:
    train = TrainConfig(
        global_batch_size=20,
        rampup_batch_size=(5, 5, 600),
        train_samples=5000,
        micro_batch_size=1,
    )
    optimizer = OptimizerConfig(lr=1.0, lr_decay_style="linear")
    run: Any = SimpleNamespace(train=train, optimizer=optimizer)
    rows = learning_rate_table(blend(), optimizer, RunLength.of(run))
    consumed = [0]
    while consumed[-1] + 20 <= 5000:
        done = consumed[-1]
        consumed.append(done + min(5 + done // 200 * 5, 20))
    edges = [0, *(int(row["iterations"].split(" to ")[1].replace(",", "")) for row in rows)]
    assert edges[-1] == len(consumed) - 1
    rates = learning_rates(optimizer, RunLength.of(run), np.array(consumed[:-1]))
    sums = [rates[a:b].sum() for a, b in itertools.pairwise(edges)]
    assert sums == pytest.approx([rates.sum() / 10] * 10, abs=1.5)
    for row, (a, b) in zip(rows, itertools.pairwise(edges), strict=True):
        drawn = blend().counts(consumed[b]) - blend().counts(consumed[a])
        assert [int(row[f"{name} tokens"].split()[0].replace(",", "")) for name in NAMES] == [
            *drawn.tolist()
        ]


def test_no_learning_has_no_tenths() -> None:
    optimizer, length = optimizer_and_length(10, 100, lr_decay_iters=20)
    assert learning_rate_table(blend(), optimizer, length)
    assert learning_rate_table(blend(), optimizer, replace(length, iteration=21)) == []


def test_a_short_run_has_no_tenths() -> None:
    assert learning_rate_table(blend(), *optimizer_and_length(10, 9)) == []
