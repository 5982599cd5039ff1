"""The command line of tools/plan_blend.py."""

import csv
import subprocess
import sys
from pathlib import Path

import yaml

TOOL = Path(__file__).parents[3] / "tools" / "plan_blend.py"


def run(*arguments: object) -> tuple[int, str, str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
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


def test_without_data_the_epochs_are_left_out(tiny_run, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    for source in values["data"]["sources"].values():
        source["paths"] = [str(tmp_path / "not_there")]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    status, table, errors = run("--config", config)
    assert status == 0
    assert "epochs are left out: " in errors and "realised" in table


def test_mistakes_are_one_line(tiny_run, tmp_path: Path) -> None:
    values = yaml.safe_load(tiny_run.config.read_text())
    name = next(iter(values["data"]["sources"]))
    values["data"]["sources"][name]["max_epochs"] = 0.001
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    status, _, errors = run("--config", config)
    assert status == 2
    assert errors.startswith(f"error: data.sources.{name}.max_epochs: 0.001 epochs of ")
    assert "at iteration 1 (sample " in errors and errors.count("\n") == 1
    status, _, errors = run("--config", tmp_path / "missing.yaml")
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1
