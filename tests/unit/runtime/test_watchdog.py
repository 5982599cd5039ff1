"""A process that no longer beats is ended with its stacks written; one that does is left alone."""

import subprocess
import sys
import time
from pathlib import Path

from megatron_chatflow.runtime.watchdog import Watchdog

_HANGS = """
import logging, sys, threading, time
from pathlib import Path
from megatron_chatflow.runtime.watchdog import Watchdog

logging.basicConfig(format="%(message)s")
rank = int(sys.argv[2])
watchdog = Watchdog(timeout_seconds=1.0, rank=rank, world_size=3, folder=Path(sys.argv[1]))
watchdog.beat(7, "loading" if rank else "training")

def stuck_here():
    threading.Event().wait()

stuck_here()
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
        assert "no sign of life from rank 2" in output
        report = (tmp_path / "hangs" / f"rank_{rank:05d}.txt").read_text()
        assert report.startswith("iteration 7, " + ("loading" if rank else "training"))
        assert "stuck_here" in report


def test_a_process_that_beats_is_left_alone(tmp_path: Path) -> None:
    watchdog = Watchdog(timeout_seconds=1.0, rank=0, world_size=1, folder=tmp_path)
    for iteration in range(30):
        watchdog.beat(iteration, "training")
        time.sleep(0.05)
    watchdog.close()
    time.sleep(1.5)
    assert not list(tmp_path.iterdir())


def test_no_timeout_watches_nothing() -> None:
    watchdog = Watchdog(timeout_seconds=0, rank=0, world_size=1, folder=None)
    watchdog.beat(1, "training")
    watchdog.close()
