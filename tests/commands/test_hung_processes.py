"""Tests that a process without heartbeats is ended and its stacks are written."""

import subprocess
import sys
from pathlib import Path

_HANGS = """
import logging, sys, threading, time
from pathlib import Path
from megatron_chatflow.runtime.watchdog import Watchdog

logging.basicConfig(format="%(message)s")
rank = int(sys.argv[2])
# Both begin together, however long each took to start.
Path(sys.argv[1], f"ready_{rank}").touch()
while len(list(Path(sys.argv[1]).glob("ready_*"))) < 2:
    time.sleep(0.01)
watchdog = Watchdog(timeout_seconds=1.0, rank=rank, world_size=3, folder=Path(sys.argv[1]))
watchdog.enter_phase(7, "loading" if rank else "training")

def stuck_here():
    threading.Event().wait()

stuck_here()
"""

_LEAVES_OFF = """
import time
from pathlib import Path
from megatron_chatflow.runtime.watchdog import Watchdog

watchdog = Watchdog(timeout_seconds=0.5, rank=0, world_size=1, folder=Path("{folder}"))
watchdog.enter_phase(1, "training")
watchdog.close()
time.sleep(1.5)
"""


def test_a_hung_process_ends_and_says_where_it_stood(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _HANGS, str(tmp_path), str(rank)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [70, 70]
    for rank, output in enumerate(outputs):
        assert "stuck_here" in output
        assert "no report from rank 2" in output
        report = (tmp_path / "hangs" / f"rank_{rank:05d}.txt").read_text()
        assert report.startswith("iteration 7, " + ("loading" if rank else "training"))
        assert "stuck_here" in report


def test_a_watch_that_is_over_ends_nothing(tmp_path: Path) -> None:
    code = _LEAVES_OFF.replace("{folder}", str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert not list(tmp_path.iterdir())
