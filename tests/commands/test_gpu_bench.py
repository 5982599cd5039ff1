"""Tests the GPU benchmark script with tiny shapes on the available device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_bench.sh"


def test_every_step_runs_and_reports(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    script = subprocess.run(
        [SCRIPT, "--tiny", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert script.returncode == 0, script.stderr
    # A machine with a GPU may return only a few files.
    reports = ["train.json", "train_micro_batch_1.json", "train_whole.json"]
    names = {"log.txt", "kernels.json", *reports}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "== gpu_tests: " in (tmp_path / "log.txt").read_text()
    kernels = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["operation"] for row in kernels} == {"loss passes", "attention"}
    assert all(row["microseconds"] > 0 for row in kernels)
    for name, micro_batch_size in zip(reports, (None, 1, None), strict=True):
        report = json.loads((tmp_path / name).read_text())
        assert report["ours"]["tokens_per_second"] > 0
        assert ("ours, with --ema-decay" in report) == (name == "train.json")
        assert report["arguments"]["micro_batch_size"] == micro_batch_size
        assert report["arguments"]["recompute"] == (name == "train_whole.json")


def test_a_step_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": "false"}
    script = subprocess.run(
        [SCRIPT, "--tiny", tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert script.returncode == 1
    assert "failed: gpu_tests kernels train train_micro_batch_1 train_whole" in script.stderr
