"""Starts processes, by torchrun, alone or as forks, and parses the metrics that they wrote."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fork_server
from fork_server import run_forked

# What a launcher starts in place of Python so that the program becomes a fork.
FORKED = [sys.executable, "-S", fork_server.__file__]
WORKER = Path(__file__).with_name("worker.py")
STANDIN = Path(__file__).parents[1] / "te_standin"


def environment() -> dict[str, str]:
    """Returns the environment of all processes that tests start."""
    # One thread per process, so that reductions are split the same way on every machine.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(num_processes: int, *options: str) -> list[str]:
    """Returns the torchrun command for ``num_processes`` on this machine, with its own port."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
        *options,
    ]


def forking_torchrun(num_processes: int, *options: str) -> list[str]:
    """Returns a torchrun command for `run` whose workers are forks, see `fork_server`."""
    return [*torchrun(num_processes, "--no-python", *options), *FORKED]


def run_layouts(num_processes: int, jobs: Sequence[Sequence[str]], folder: Path) -> None:
    """Trains all jobs of a list in the same processes. Fails with their output."""
    path = folder / f"jobs_{num_processes}.json"
    path.write_text(json.dumps([list(map(str, job)) for job in jobs]), encoding="utf-8")
    run_ranks(num_processes, WORKER, path, timeout=900)


def run_with_stand_in(
    num_processes: int,
    jobs: Sequence[Sequence[object]],
    folder: Path,
    extra_environment: Mapping[str, str] | None = None,
) -> str:
    """Trains all jobs in the same processes, with the layers of the stand-in of `tests/te_standin`.

    Returns their output.
    """
    path = folder / f"stand_in_{num_processes}.json"
    impl = ["--transformer-impl", "transformer_engine"]
    path.write_text(json.dumps([[*map(str, job), *impl] for job in jobs]), encoding="utf-8")
    return run_ranks(
        num_processes,
        WORKER,
        path,
        libraries=STANDIN,
        environment=extra_environment,
        timeout=900,
    )


def run_ranks(
    num_ranks: int,
    script: Path,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    libraries: Path | None = None,
    timeout: int = 300,
) -> str:
    """Runs a script in a forked process per rank and returns the output of all ranks.

    Use `torchrun` where the launcher matters, for example after a failure. For the other arguments
    see `run_forked`.
    """
    done = run_forked(
        [script, *arguments],
        num_ranks=num_ranks,
        environment=environment,
        libraries=libraries,
        timeout=timeout,
        merge_output=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def run(
    command: Sequence[object],
    *,
    expect: int = 0,
    timeout: int = 300,
    extra_environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    fresh: bool = False,
) -> str:
    """Runs a command, checks its exit status and returns its output.

    A Python program runs in a fork of a process that has imported torch, see `fork_server`.

    Args:
        command: The command line.
        expect: The exit status that it has to have.
        timeout: In seconds.
        extra_environment: Environment variables in addition to those of `environment`.
        folder: The working folder.
        fresh: Whether a Python program has to run in an interpreter of its own.
    """
    interpreter, *rest = map(str, command)
    launcher = rest[:2] == ["-m", "torch.distributed.run"] and FORKED[-1] not in rest
    if interpreter == sys.executable and rest[0] != "-c" and not launcher and not fresh:
        result = run_forked(
            rest,
            environment=extra_environment,
            folder=folder,
            timeout=timeout,
            merge_output=True,
        )
    else:
        result = subprocess.run(
            [interpreter, *rest],
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
