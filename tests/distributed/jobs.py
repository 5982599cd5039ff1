"""Starts real processes, through torchrun or alone, and parses the metrics that they wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")


def environment() -> dict[str, str]:
    """Returns the environment of all processes that tests start."""
    # One thread per process, so that reductions are split the same way on every machine.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(num_processes: int) -> list[str]:
    """Returns the torchrun command for ``num_processes`` on this machine, with its own port."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
    ]


def run_layouts(num_processes: int, jobs: Sequence[Sequence[str]], folder: Path) -> None:
    """Trains all jobs of a list in the same processes. Fails with their output."""
    path = folder / f"jobs_{num_processes}.json"
    path.write_text(json.dumps([list(map(str, job)) for job in jobs]), encoding="utf-8")
    run([*torchrun(num_processes), str(WORKER), str(path)], timeout=900)


def run(
    command: Sequence[object],
    *,
    expect: int = 0,
    timeout: int = 300,
    extra_environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Runs a command, in ``folder`` if given, checks its exit status and returns its output."""
    result = subprocess.run(
        list(map(str, command)),
        env={**environment(), **(extra_environment or {})},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == expect, result.stdout[-6000:]
    return result.stdout


def pretrain(*arguments: object) -> list[str]:
    """Returns the command line of the entry point for a run in one process."""
    return [sys.executable, "-m", "megatron_chatflow.pretrain", *map(str, arguments)]


def read_metrics(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the iterations and the validations of a run."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return (
        [entry for entry in entries if "lm_loss" in entry],
        [entry for entry in entries if "validation" in entry],
    )
