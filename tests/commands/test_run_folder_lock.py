"""Tests that a folder admits one run at a time, and that a killed run leaves no lock."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.training.run_folder import lock_folder

HOLDER = """
import sys, time
from pathlib import Path
from megatron_chatflow.training.run_folder import lock_folder
lock = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"another run .process {holder.pid} on"):
        lock_folder(tmp_path, timeout_seconds=0.0)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    lock_folder(tmp_path, timeout_seconds=0.0).release(remove=False)
    lock_folder(tmp_path, timeout_seconds=0.0).release(remove=False)
