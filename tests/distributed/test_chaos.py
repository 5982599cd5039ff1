"""Runs the chaos test with a few kills. `make chaos` runs thirty."""

import os
import subprocess
import sys
from pathlib import Path

import jobs
import pytest

pytestmark = pytest.mark.slow


@pytest.mark.distributed
def test_a_run_through_kills_ends_where_an_undisturbed_one_ends(tmp_path: Path) -> None:
    script = Path(__file__).with_name("chaos.py")
    here = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join([str(script.parent), str(script.parent.parent), here])
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "--kills", "5", "--seed", "1"],
        env={**jobs.environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "kills: 5 " in result.stdout
