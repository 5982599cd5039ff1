"""Tests the benchmark harness: arguments, table and JSON report, no partial files."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import harness as benchmark
from benchmarks.harness import commit, run_benchmark
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.table import Row, format_cell, format_table


class Counting:
    """Counts to a number."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--to", type=int, default=3)

    def run(self, arguments: argparse.Namespace) -> Sequence[Row]:
        if arguments.to < 0:
            raise UserError("--to: must be at least 0")
        ours: Row = {"what": "ours", "steps": arguments.to}
        return [ours, {"what": "peer", "steps": None}] if arguments.to else []


def test_a_report_says_what_it_was_measured_on(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "commit", lambda: "0123abc+")  # without a process of git
    path = tmp_path / "new" / "r.json"
    report = run_benchmark(
        "count", Counting(), ["--to", "12345", "--output", str(path)], prog="benchmark.py"
    )
    assert json.loads(path.read_text()) == report
    assert report["commit"] == "0123abc+"
    assert report["benchmark"] == "count"
    # The report omits its own path, so that a committed report has no machine's paths.
    assert report["arguments"] == {"to": 12345, "peers": False}
    assert str(tmp_path) not in path.read_text()
    assert report["rows"] == [{"what": "ours", "steps": 12345}, {"what": "peer", "steps": None}]
    assert report["machine"]["num_cores"] >= 1
    assert {"python", "torch", "megatron-core"} <= report["versions"].keys()
    assert "ours  12,345" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["-1", "0"])
def test_a_benchmark_that_fails_leaves_no_report(tmp_path, to: str) -> None:
    with pytest.raises(UserError):
        run_benchmark("count", Counting(), ["--to", to, "--output", str(tmp_path / "r")], prog="b")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_found_before_measuring(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "r.json")
    with pytest.raises(UserError, match="cannot write"):
        run_benchmark("count", Counting(), ["--to", "-1", "--output", output], prog="b")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (1234567.8, "1,234,568"),
        (12.3456, "12.35"),
        (0.0, "0"),
        (1.23456e-9, "1.235e-09"),
        ("x", "x"),
    ],
)
def test_cells(value, text: str) -> None:
    assert format_cell(value) == text


def test_tables_align_and_keep_the_order_of_columns() -> None:
    rows: list[Row] = [{"what": "ours", "time_ns": 9.5}, {"what": "peer", "note": "slow"}]
    assert format_table(rows).splitlines() == [
        "what  time_ns  note",
        "----  -------  ----",
        "ours      9.5  -",
        "peer        -  slow",
    ]
    assert format_table([]) == ""


def test_outside_a_working_tree_the_commit_is_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "package" / "layer" / "module.py"))
    monkeypatch.delenv("MEGATRON_CHATFLOW_COMMIT", raising=False)
    assert commit() is None
    monkeypatch.setenv("MEGATRON_CHATFLOW_COMMIT", "0123abcd")
    assert commit() == "0123abcd"
