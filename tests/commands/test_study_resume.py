"""Kills a worker of the study in the middle of an arm, which has to resume."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import TinyRun

from examples.transfer_study.training import Workers, delete_checkpoints, make_job
from megatron_chatflow.errors import UserError


def make_config(tiny_run: TinyRun) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(tiny_run.config.read_text())
    config["train"] |= {"train_iters": 40, "eval_interval": 20}
    return config


def kill_when_saved(workers: list[int], folder: Path) -> None:
    """Kills the worker after its first checkpoint."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (folder / "run/latest_checkpointed_iteration.txt").exists():
            os.kill(workers[0], signal.SIGKILL)
            return
        time.sleep(0.002)


def test_a_killed_arm_resumes(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = make_config(tiny_run)
    pids: list[int] = []

    class Recorder(Workers):
        def _start(self, number: int) -> Any:
            worker = super()._start(number)
            pids.append(worker.process.pid)
            return worker

    workers = Recorder(1, 1)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    new = {"from_scratch": True}
    job = make_job(killed, "digest", config, new, config)
    killer = threading.Thread(target=lambda: kill_when_saved(pids, killed))
    # The thread may begin before there is a process, but not before there is a checkpoint.
    killer.start()
    try:
        with pytest.raises(UserError, match=r"the training failed, see .*log\.txt"):
            workers.train(job)
        resumed = workers.train(make_job(killed, "digest", config, new, config))
        undisturbed = workers.train(make_job(whole, "digest", config, new, config))
    finally:
        killer.join()
        workers.close()
    assert len(pids) == 2  # the new worker trained both runs
    assert "loaded weights and optimizer state" in (killed / "log.txt").read_text()
    for result in (resumed, undisturbed):
        for name in ("core_seconds", "seconds", "training_seconds"):
            assert result.pop(name) > 0
    assert resumed == undisturbed
    assert resumed["curve"][-1]["tokens"] == resumed["tokens"] == 40 * 8 * 64
    delete_checkpoints(whole)
    assert not list((whole / "run").glob("iter_*"))
    # A folder of another digest is emptied, so that nothing continues from its checkpoints.
    make_job(killed, "other", config, {}, config)
    assert not (killed / "run").exists()
