"""Tests that a run continues when its disk is full, and saves again once space is available.

The disk is a small tmpfs mounted in a mount namespace of the run, so real system calls fail with
real errors. Systems that permit neither skip the test. `test_saver` still tests failing saves
there, with a limit on the file size.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jobs
import psutil
import pytest
from tiny_run import TinyRun

from megatron_chatflow.checkpoint.files import find_damage, iteration_folder, latest_iteration

pytestmark = pytest.mark.slow

# Room for three checkpoints of a tiny run.
DISK = "size=16m"
LIMIT_SECONDS = 240


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a small file system, or skips the test if mounting is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", DISK, "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _wait(what: str, condition: Callable[[], bool], process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        text = log.read_text(encoding="utf-8")
        assert process.poll() is None, f"the run ended before {what}:\n{text[-4000:]}"
        assert time.monotonic() < deadline, f"no sign of {what}:\n{text[-4000:]}"
        time.sleep(0.01)


@pytest.mark.distributed
def test_a_full_disk_costs_saves_and_nothing_else(
    tiny_run: TinyRun, tmp_path: Path, disk: Path
) -> None:
    run, log, filler = disk / "run", tmp_path / "log", disk / "filler"
    flags = ["--config", tiny_run.config, "--save", run, "--load", run, "--train-iters", 1_000_000]
    flags += ["--save-interval", 10, "--save-retain", 1, "--no-tensorboard", "--bf16"]
    flags += ["--use-distributed-optimizer", "--eval-interval", "none"]
    command = [*jobs.torchrun(2), "-m", "megatron_chatflow.pretrain", *flags]
    with open(log, "w", encoding="utf-8") as output:
        process = psutil.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=jobs.environment(),
        )

    def num_failures() -> int:
        text = log.read_text(encoding="utf-8")
        return len(re.findall(r"saving .* failed: .*No space left on device", text))

    try:
        latest = run / "latest_checkpointed_iteration.txt"
        _wait("a checkpoint", latest.exists, process, log)
        with open(filler, "wb", buffering=0) as file:
            while num_failures() < 2:
                try:
                    # Also fill the space that a failed save frees meanwhile.
                    file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize or 1))
                except OSError:
                    time.sleep(0.01)
                _wait("the run", lambda: True, process, log)
        previous = latest_iteration(run)
        assert previous is not None
        assert find_damage(iteration_folder(run, previous)) == [], (
            "the previous checkpoint is whole"
        )
        filler.unlink()
        _wait(
            "a checkpoint after there was room",
            lambda: (latest_iteration(run) or 0) > previous,
            process,
            log,
        )
        for worker in process.children(recursive=True):
            worker.send_signal(signal.SIGTERM)
        process.wait(LIMIT_SECONDS)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*process.children(recursive=True), process]:
                one.kill()
        process.wait()
    text = log.read_text(encoding="utf-8")
    assert "Traceback" not in text
    last = latest_iteration(run)
    assert last is not None and find_damage(iteration_folder(run, last)) == []
    assert sorted(path.name for path in run.iterdir() if "iter_" in path.name) == [
        iteration_folder(run, last).name
    ], "nothing is left of the saves that failed"
    assert num_failures() >= 2


@pytest.mark.distributed
def test_a_full_disk_ends_no_restart(tiny_run: TinyRun, disk: Path) -> None:
    run, filler = disk / "run", disk / "filler"
    flags = ["--config", tiny_run.config, "--save", run, "--load", run, "--save-interval", 2]
    command = jobs.pretrain(*flags, "--no-tensorboard", "--eval-interval", "none")
    jobs.run([*command, "--exit-interval", "4"])
    (run / "latest_checkpointed_iteration.txt").write_text("2\n")
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 12))
    output = jobs.run([*command, "--train-iters", "6"], expect=2)
    assert "the last checkpoint could not be written" in output.splitlines()[-1]
    assert "iter 6/6" in output and "Traceback" not in output
    filler.unlink()
    jobs.run([*command, "--train-iters", "6"])
    entries, _ = jobs.read_metrics(run)
    assert [entry["iteration"] for entry in entries] == list(range(1, 7))
