"""Tests the command plan: table, files and a full disk."""

import csv
import subprocess
import sys
from pathlib import Path

import yaml
from fork_server import run_tool

TOOL = Path(__file__).parents[2] / "tools" / "plan_blend.py"


def run(*arguments: object) -> tuple[int, str, str]:
    done = run_tool("plan_blend.py", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_table_csv_and_png(tiny_run, tmp_path: Path) -> None:
    output = tmp_path / "plans"
    flags = ("--train-iters", 50, "--output", output)
    status, table, errors = run("--config", tiny_run.config, *flags)
    assert status == 0, errors
    batch = yaml.safe_load(tiny_run.config.read_text())["train"]["global_batch_size"]
    assert table.startswith(f"{50 * batch:,} samples of ")
    rows = list(csv.DictReader((output / "plan.csv").open()))
    assert sum(int(row["realised"]) for row in rows) == 50 * batch
    assert all(float(row["epochs"]) >= 0 for row in rows)
    assert (output / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.iterdir()) == ["plan.csv", "plan.png"]


def test_a_full_disk_is_told_in_one_line_and_leaves_no_part(tiny_run, tmp_path: Path) -> None:
    output = tmp_path / "plans"
    command = [sys.executable, str(TOOL), "--config", str(tiny_run.config), "--output", str(output)]
    limited = ["bash", "-c", 'ulimit -f 4 && exec "$@"', "bash", *command]  # KiB per file
    done = subprocess.run(limited, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == f"error: cannot write: {output}/plan.png: File too large"
    assert "Traceback" not in done.stderr
    assert [path.name for path in output.iterdir()] == ["plan.csv"]
