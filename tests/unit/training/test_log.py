"""Tests the figures that a log reports since the previous log, and their layout."""

import json
import math
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.runtime.table import display_width, format_table, shorten
from megatron_chatflow.training.callbacks.console import (
    INDENT,
    MAX_SOURCES,
    MAX_WIDTH,
    Console,
    choice_lines,
    iteration_lines,
    probe_lines,
    source_lines,
    straggler_lines,
    validation_lines,
)
from megatron_chatflow.training.callbacks.metrics_file import MetricsFile
from megatron_chatflow.training.callbacks.straggler import compare
from megatron_chatflow.training.report import (
    Downtime,
    IterationRecord,
    RemainingTime,
    RunFacts,
    summarize,
)

NOW = datetime(2026, 3, 4, 5, 6, 7)


def make_facts(*names: str, **changes: Any) -> RunFacts:
    values: dict[str, Any] = {
        "num_iterations": 100_000,
        "num_samples": 400_000,
        "seq_length": 10,
        "world_size": 2,
        "flops_per_token": 1e9,
        "causal_share": 0.5,
        "peak_flops": 1e12,
        "sources": names,
        "samples_per_epoch": [50] * len(names),
    }
    return RunFacts(**{**values, **changes})


def make_record(iteration: int, sums: list[list[float]], **changes: Any) -> IterationRecord:
    num_sources = len(sums)
    values: dict[str, Any] = {
        "iteration": iteration,
        "consumed_samples": 8 * iteration,
        "num_samples": 8,
        "source_sums": torch.tensor(sums, dtype=torch.float64),
        "weights": np.full(num_sources, 2**32 // num_sources),
        "num_drawn": np.full(num_sources, 8 // num_sources),
        "counts": np.full(num_sources, 8 * iteration // num_sources),
        "learning_rate": 0.1 * iteration,
        "weight_decay": 0.01,
        "grad_norm": float(iteration),
        "is_updated": True,
        "time": 1000.0 + iteration,
        "seconds": 2.0,
        "data_seconds": 0.0,
        "memory_bytes": 2**30,
        "num_skipped": 0,
        "skipped_no_loss_tokens": 0,
        "num_rollbacks": 0,
    }
    return IterationRecord(**{**values, **changes})


def report_of(*records: IterationRecord, names: tuple[str, ...] = ("en", "zh"), **changes: Any):
    return summarize(records, make_facts(*names, **changes), batch_digest="ab")


def test_means_are_weighted_by_tokens_and_shares_by_samples() -> None:
    first = make_record(
        1,
        [[30.0, 10, 9], [2.0, 2, 9]],
        num_drawn=np.array([6, 2]),
        weights=np.array([3 << 30, 1 << 30]),
        seconds=1.0,
        data_seconds=0.5,
    )
    second = make_record(
        2,
        [[20.0, 10, 9], [8.0, 4, 9]],
        num_samples=4,
        consumed_samples=12,
        num_drawn=np.array([1, 3]),
        counts=np.array([7, 5]),
        weights=np.array([1 << 30, 3 << 30]),
        seconds=3.0,
    )
    report = report_of(first, second)
    assert (report.iteration, report.interval) == (2, 2)
    assert report.lm_loss == 60.0 / 26
    assert report.grad_norm == 1.5 and report.learning_rate == 0.2
    en, zh = report.sources["en"], report.sources["zh"]
    assert (en.loss, en.loss_tokens, zh.loss, zh.loss_tokens) == (50 / 20, 20, 10 / 6, 6)
    assert (en.realised, zh.realised) == (7 / 12, 5 / 12)
    assert en.weight == (8 * 0.75 + 4 * 0.25) / 12
    assert (en.tokens, en.epochs, zh.tokens) == (70, 7 / 50, 50)
    assert (report.seconds, report.data_seconds) == (2.0, 0.25)
    assert report.tokens_per_second == 120 / 4 and report.tokens_per_second_per_gpu == 15
    assert report.mfu == pytest.approx(15e9 / 1e12)
    assert report.mfu_causal == pytest.approx(report.mfu / 2)
    assert report.consumed_tokens == 120


def test_flops_follow_the_stage_of_each_iteration() -> None:
    sums = [[30.0, 10, 9], [2.0, 2, 9]]
    first = make_record(1, sums, stage=0)
    second = make_record(2, sums, stage=1, num_samples=24)
    facts = {"stage_flops": [6e8, 1e9]}
    report = report_of(first, second, **facts)
    per_token = (8 * 6e8 + 24 * 1e9) / 32
    assert report.tflops_per_gpu == pytest.approx(
        per_token * report.tokens_per_second_per_gpu / 1e12
    )
    # Half of the FLOPs of training everything are attention that is not needed, in any stage.
    assert report.mfu_causal == pytest.approx(report.mfu * (per_token - 5e8) / per_token)
    alone = report_of(first, **facts)
    assert alone.mfu == pytest.approx(6e8 * alone.tokens_per_second_per_gpu / 1e12)
    whole = report_of(make_record(1, sums), **facts)
    assert whole.mfu == pytest.approx(1e9 * whole.tokens_per_second_per_gpu / 1e12)


def test_iterations_without_an_update_do_not_spoil_the_means() -> None:
    good = make_record(1, [[30.0, 10, 9], [2.0, 2, 9]])
    bad = make_record(
        2, [[math.nan, 10, 9], [4.0, 2, 9]], is_updated=False, grad_norm=math.nan, num_skipped=1
    )
    both = report_of(good, bad)
    assert both.lm_loss == 32 / 12 and both.grad_norm == 1.0 and both.num_skipped == 1
    assert both.sources["en"].loss == 3.0 and both.sources["en"].loss_tokens == 10
    # Its samples were consumed nevertheless.
    assert both.tokens_per_second == 160 / 4 and both.consumed_samples == 16
    alone = report_of(bad)
    assert math.isnan(alone.lm_loss) and alone.to_dict()["lm_loss"] is None
    assert alone.sources["zh"].loss == 2.0
    assert "skipped 1" in iteration_lines(alone, NOW)[1]


def test_an_interval_with_few_loss_tokens() -> None:
    nothing = make_record(1, [[0.0, 0, 0], [0.0, 0, 0]])
    report = report_of(nothing, make_record(2, [[0.0, 0, 0], [6.0, 2, 3]]))
    assert report.lm_loss == 3.0 and report.sources["en"].loss is None
    empty = report_of(replace(nothing, is_updated=False, skipped_no_loss_tokens=1))
    assert empty.to_dict()["lm_loss"] is None
    line, notes = iteration_lines(empty, NOW)
    assert "no loss tokens" in line and "without loss tokens 1" in notes
    assert "nan" not in line.lower()
    # The columns have the same positions as in other steps.
    other = iteration_lines(report, NOW)[0]
    assert all(line.index(name) == other.index(name) for name in ("lr ", " tok/s", "MFU "))
    assert all("nan" not in line for line in source_lines(empty))


def test_a_row_of_the_metrics_is_an_iteration_or_an_interval(tmp_path: Path) -> None:
    records = [make_record(k, [[30.0 * k, 10, 9], [2.0, 2, 9]]) for k in (1, 2, 3)]
    rows = [report_of(record) for record in records]
    for every_iteration, expected in ((True, [1, 2, 3]), (False, [3])):
        folder = tmp_path / str(every_iteration)
        folder.mkdir()
        file = MetricsFile(folder, every_iteration=every_iteration)
        file.on_iterations(rows[:2])
        file.on_iterations(rows[2:])
        file.on_log(report_of(*records))
        file.close()
        found = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        assert [row["iteration"] for row in found] == expected
        assert sum(row["interval"] for row in found) == 3


def test_the_line_is_aligned_and_about_120_columns() -> None:
    lines = []
    for iteration, loss, seconds in ((1, 11.25, 62.5), (1234, 2.5, 1.23), (99_999, 0.75, 0.5)):
        record = make_record(
            iteration, [[10 * loss, 10, 9], [10 * loss, 10, 9]], seconds=seconds, grad_norm=123.4
        )
        report = summarize(
            [record], make_facts("en", "zh"), batch_digest="ab", seconds_left=3.2e5 / iteration
        )
        lines += iteration_lines(report, NOW, with_memory=False)
    assert len(lines) == 3 and all(len(line) <= MAX_WIDTH for line in lines)
    for name in ("iter ", "loss ", "grad ", "lr ", " tok/s", "MFU "):
        assert len({line.index(name) for line in lines}) == 1
    assert lines[1].startswith("2026-03-04 05:06:07  iter   1234/100000  loss  2.5000  grad ")
    assert "1.230 s" in lines[1] and "62.50 s" in lines[0]
    assert "ETA 3d16h" in lines[0] and "ETA 4m19s" in lines[1]


def test_what_is_unusual_stands_on_a_line_of_its_own() -> None:
    record = make_record(
        5, [[1.0, 1, 1], [1.0, 1, 1]], data_seconds=0.5, num_skipped=2, num_rollbacks=1
    )
    report = report_of(record, downtime=Downtime(4, 900.0, 2, 600.0))
    _, notes = iteration_lines(report, NOW)
    assert notes == INDENT + (
        "peak 1 GiB, waiting for data 25%, skipped 2, rollbacks 1, failures 2 (10 min 0 s lost)"
    )


def test_what_schedules_have_changed_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(num_iterations=10, iteration=0)
    sums = [[1.0, 1, 1], [1.0, 1, 1]]
    for number, changes in enumerate(
        (
            {},
            {"num_samples": 16},
            {"num_samples": 16, "weight_decay": 0.02, "objective_weights": [1.0, 2.0]},
            {"num_samples": 16, "weight_decay": 0.02, "objective_weights": [1.0, 2.5]},
        )
    ):
        record = make_record(number + 1, sums, **{"objective_weights": [1.0, 2.0], **changes})
        console.on_log(report_of(record))
    console.close()
    _, *logs = capsys.readouterr().out.split("  iter ")
    notes = [log.splitlines()[1].strip() for log in logs]
    assert notes[0] == "peak 1 GiB" and notes[1] == "batch 16"
    assert notes[2] == "weight decay 0.02" and notes[3] == "zh counts 2.5 in the objective"
    many = [f"s{k}" for k in range(MAX_SOURCES + 1)]
    first, second = (
        report_of(
            make_record(1, sums[:1] * len(many), objective_weights=[w] * len(many)), names=many
        )
        for w in (1.0, 2.0)
    )
    _, note = iteration_lines(second, NOW, with_memory=False, previous=first)
    assert note.strip() == f"{len(many)} sources count otherwise in the objective"


@pytest.mark.parametrize("has_notes", [False, True])
@pytest.mark.parametrize("peak_flops", [None, 1e15])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4, 1e9])
@pytest.mark.parametrize("name", ["en", "双语平行语料与指令数据混合而成的很长的名字", "x" * 200])
def test_no_line_is_wider_than_the_log(
    name: str, scale: float, peak_flops: float | None, has_notes: bool
) -> None:
    count = 10**9 if has_notes else 0
    record = make_record(
        99_999,
        [[0.0, 0, 0] if has_notes else [1e3 * scale, 1, 1] for _ in range(20)],
        grad_norm=1e3 * scale,
        learning_rate=1e-3 * scale,
        weight_decay=0.1,
        seconds=scale,
        data_seconds=scale if has_notes else 0.0,
        memory_bytes=int(2**30 * scale),
        num_skipped=count,
        skipped_no_loss_tokens=count,
        num_rollbacks=count,
        num_samples=20 * 10**8,
        num_drawn=np.full(20, 10**8),
        counts=np.full(20, 10**15),
    )
    report = summarize(
        [record],
        make_facts(
            *[f"{name}{k}"[::-1] for k in range(20)],
            num_iterations=10**7,
            flops_per_token=1e9 / scale,
            peak_flops=peak_flops,
            downtime=Downtime(count, 1e9, count, 1e9),
        ),
        batch_digest="ab",
        seconds_left=1e7 * scale,
    )
    stragglers = compare([[1e6 * scale, 1.0, 1.0]] * 8, [(name, 0)] * 8, num_listed=8)
    results = {name: {"accuracy": 0.5, "num_questions": 10**7, "chance": 0.25}}
    lines = [
        *iteration_lines(report, NOW),
        *source_lines(report),
        *straggler_lines(stragglers),
        *validation_lines(10**7, {name: SourceLoss(1e3 * scale, scale, 10**15)}, NOW),
        *choice_lines(10**7, results, NOW),
        *probe_lines(10**7, {name: {name: scale, f"{name}_stderr": scale}}, scale, NOW),
    ]
    assert max(map(display_width, lines)) <= MAX_WIDTH


@pytest.mark.parametrize(
    "value", [0.0, 1e-9, 0.5, 99.99999, 999.9, 12_345.6, 99_999.4, 1e30, math.nan]
)
def test_columns_stand_at_the_same_places_whatever_the_numbers(value: float) -> None:
    def line(value: float) -> str:
        record = make_record(1, [[value, 1, 1], [0.0, 0, 0]], grad_norm=value)
        return iteration_lines(report_of(record), NOW)[0]

    assert line(value).index("lr ") == line(1.0).index("lr ")


def test_many_sources_are_folded_and_names_are_aligned() -> None:
    names = tuple(f"语料{k}" if k % 2 else f"corpus_{k}" for k in range(64))
    weights = np.array([2**20 * (64 - k) for k in range(64)])
    weights[0] += 2**32 - weights.sum()
    sums = [[float(k), 2, 2] for k in range(64)]
    report = report_of(make_record(1, sums, weights=weights), names=names)
    head, *rows = source_lines(report)
    assert len(rows) == MAX_SOURCES + 2
    assert [row.split()[0] for row in rows[:3]] == ["corpus_0", "语料1", "corpus_2"]
    assert "(52 more)" in rows[-2] and rows[-1].split()[0] == "all"
    folded = sum(float(k) for k in range(MAX_SOURCES, 64)) / (2 * 52)
    assert f"{folded:.4f}" in rows[-2] and f"{63 / 4:.4f}" in rows[-1]
    for text in ("loss tokens", "planned"):
        end = head.index(text) + len(text)
        cells = [row for row in rows if display_width(row) >= end]
        assert all(_column(row, end) != " " and _column(row, end + 1) == " " for row in cells)
    assert max(map(display_width, rows)) < 120


def _column(text: str, end: int) -> str:
    """Returns the character that ends at a column of the terminal."""
    for k in range(len(text)):
        if display_width(text[: k + 1]) == end:
            return text[k]
    return " "


def test_wide_characters_count_two_columns() -> None:
    assert [display_width(text) for text in ("abc", "中文", "ｅ", "e\u0301")] == [3, 4, 2, 1]
    assert shorten("并行语料并行语料", 7) == "并行语…" and shorten("short", 7) == "short"
    lines = format_table([{"source": "中文", "n": 1}, {"source": "english", "n": 22}]).splitlines()
    assert {display_width(line) for line in lines} == {11}


def test_a_single_source_has_no_sum() -> None:
    report = report_of(make_record(1, [[2.0, 1, 1]]), names=("only",))
    assert len(source_lines(report)) == 2


def test_a_validation_is_a_table() -> None:
    title, head, *rows = validation_lines(
        7, {"en": SourceLoss(2.0, 0.5, 12_000), "zh": SourceLoss(3.0, math.nan, 90)}, NOW
    )
    assert title == "2026-03-04 05:06:07  validation at iteration 7"
    assert head.split() == ["source", "loss", "bits/byte", "loss", "tokens"]
    assert [row.split() for row in rows] == [
        ["en", "2.0000", "0.5000", "12K"],
        ["zh", "3.0000", "-", "90"],
    ]


def test_memory_is_shown_where_it_has_grown(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(num_iterations=10, iteration=0)
    for gib in (1.0, 1.001, 1.5):
        record = make_record(1, [[1.0, 1, 1], [1.0, 1, 1]], memory_bytes=int(gib * 2**30))
        console.on_log(report_of(record))
    console.close()
    _, *logs = capsys.readouterr().out.split("  iter ")
    assert ["peak" in log for log in logs] == [True, False, True]


def test_the_remaining_time_counts_what_lies_between_iterations() -> None:
    remaining = RemainingTime()
    remaining.add(50.0, now=50.0)
    assert remaining.estimate(3, now=50.0) == 150.0
    now = 50.0
    for _ in range(9):
        now += 2.0
        remaining.add(2.0, now)
    # The slow first iteration no longer counts. A validation of 10 s does, over ten iterations.
    assert remaining.estimate(100, now + 10.0) == pytest.approx(100 * (2.0 + 1.0))
