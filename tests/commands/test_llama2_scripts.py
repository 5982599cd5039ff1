"""Tests the launch scripts of the LLaMA-2 example."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from llama2_workplace import FOLDER, make_workplace
from tiny_run import TinyRun


@pytest.fixture(scope="module")
def workplace(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("llama2"), tiny_run)


def test_the_script_makes_the_dry_run(workplace: Path) -> None:
    command = "NNODES=2:4 examples/llama2_7b/train.sh 13b.yaml --log-straggler --dry-run"
    # The script uses the `python` on the path, as in an activated environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=workplace,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "32 processes: 2 per copy of the model, 16 copies" in done.stdout
    for script in ("train.sh", "train.sbatch"):
        subprocess.run(["bash", "-n", str(FOLDER / script)], check=True)
