"""Tests that the cost of restarts is recorded, even if the metrics were truncated."""

import json
import logging
from pathlib import Path

import pytest

from megatron_chatflow.training.callbacks.metrics_file import truncate_metrics
from megatron_chatflow.training.callbacks.restarts import (
    RESTARTS_FILE,
    record_restart,
    write_status,
)


def log(folder: Path, iterations: range, *, begin: float, **more: float) -> None:
    """Logs one line every ten seconds."""
    with (folder / "metrics.jsonl").open("a") as file:
        for k, iteration in enumerate(iterations):
            entry = {"iteration": iteration, "lm_loss": 1.0, "time": begin + 10.0 * k, **more}
            file.write(json.dumps({**entry, "seconds": 10.0}) + "\n")


def restart(folder: Path, iteration: int, now: float):
    return record_restart(
        folder, truncate_metrics(folder / "metrics.jsonl", iteration), iteration, now
    )


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / RESTARTS_FILE).read_text().splitlines()]


def test_time_runs_from_the_last_iteration_that_counts(tmp_path: Path) -> None:
    log(tmp_path, range(1, 8), begin=1000.0)  # iteration 5 at 1040, 7 at 1060
    first = restart(tmp_path, 5, 1100.0)
    assert (first.num_restarts, first.seconds) == (1, 60.0)
    log(tmp_path, range(6, 7), begin=1110.0, num_restarts=1, seconds_lost=60.0)
    second = restart(tmp_path, 5, 1150.0)  # before a checkpoint was written, so all of it is lost
    assert (second.num_restarts, second.seconds) == (2, 110.0)
    log(tmp_path, range(6, 10), begin=1160.0, num_restarts=2, seconds_lost=110.0)
    third = restart(tmp_path, 8, 1200.0)  # iteration 8 at 1180
    assert (third.num_restarts, third.seconds) == (3, 130.0)
    found = records(tmp_path)
    assert [entry["attempt"] for entry in found] == [2, 3, 4]
    assert [(entry["iteration"], entry["reached"]) for entry in found] == [(5, 7), (5, 6), (8, 9)]
    assert [entry["seconds_lost"] for entry in found] == [60.0, 50.0, 20.0]


def test_restarts_before_the_first_checkpoint(tmp_path: Path) -> None:
    log(tmp_path, range(1, 4), begin=1010.0)  # started at 1000
    assert restart(tmp_path, 0, 1045.0).seconds == 45.0
    assert restart(tmp_path, 0, 1060.0).seconds == 60.0
    assert [entry["reached"] for entry in records(tmp_path)] == [3, 0]


def test_damaged_records_lose_nothing_else(tmp_path: Path) -> None:
    log(tmp_path, range(1, 4), begin=1000.0, num_restarts=4)
    (tmp_path / RESTARTS_FILE).write_bytes(b'\xff\n[1]\n{"attempt": "x", "time": null}\n{"att')
    cost = restart(tmp_path, 3, 1030.0)
    assert (cost.num_restarts, cost.seconds) == (5, 10.0)
    assert records(tmp_path)[-1]["attempt"] == 6


def test_a_folder_that_takes_no_record_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log(tmp_path, range(1, 4), begin=1000.0)
    (tmp_path / RESTARTS_FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        cost = restart(tmp_path, 2, 1030.0)
    assert (cost.num_restarts, cost.seconds) == (1, 20.0)
    assert "the restart is not recorded" in caplog.text


def test_only_failures_count_as_failures(tmp_path: Path) -> None:
    log(tmp_path, range(1, 6), begin=1000.0)
    causes = []
    for number, status in enumerate((None, "exit_interval", "running", "finished", "failed")):
        if status is not None:
            write_status(tmp_path, status)
        cost = restart(tmp_path, 5, 1050.0 + 10.0 * number)
        causes.append(records(tmp_path)[-1]["cause"])
    assert causes == ["unknown", "exit_interval", "failed", "finished", "failed"]
    assert (cost.num_restarts, cost.seconds) == (5, 50.0)
    assert (cost.num_failures, cost.failure_seconds) == (2, 20.0)


def test_a_run_continued_from_another_folder_has_not_failed(tmp_path: Path) -> None:
    assert restart(tmp_path, 5, 1000.0).num_failures == 0
    assert records(tmp_path)[0]["cause"] == "another_folder"


def test_changes_of_a_resume_are_recorded(tmp_path: Path) -> None:
    log(tmp_path, range(1, 6), begin=1000.0)
    cut = truncate_metrics(tmp_path / "metrics.jsonl", 5)
    record_restart(tmp_path, cut, 5, 1050.0, ["schedule edited", "source math added"])
    assert records(tmp_path)[0]["changes"] == ["schedule edited", "source math added"]
