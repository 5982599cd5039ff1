"""Simulates ranks, each in a fork of this process.

``python -m megatron_chatflow.simulate.worker LIBRARY REQUEST.json`` is started by `run.simulate`.
Every rank runs the entry point of training, as torchrun would start it, and believes in the GPU.
"""

import ctypes
import sys

if __name__ == "__main__":
    LIBRARY = ctypes.CDLL(sys.argv[1])  # before torch, see `device.install`

import json
import os
import runpy
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_chatflow.simulate import libraries
from megatron_chatflow.simulate.device import GPUS, install
from megatron_chatflow.simulate.exchange import ObjectExchange
from megatron_chatflow.simulate.mode import SimulatedGpu
from megatron_chatflow.simulate.observer import Observation, Observer
from megatron_chatflow.simulate.process_group import join
from megatron_chatflow.simulate.recorder import Recorder, is_left_out, shown
from megatron_chatflow.training import build
from megatron_chatflow.training.start import find_initial_checkpoint

_MAX_PROCESSES = 2  # at a time; each needs up to 1.5 GB
ENTRY_POINT = "megatron_chatflow.pretrain"


@dataclass(frozen=True)
class Request:
    """What to simulate.

    Attributes:
        config: The YAML file of the run.
        gpu: One of `device.GPUS`.
        world_size: Number of ranks of the job.
        ranks: The ranks to simulate.
        folder: Where a file ``rank_R.json`` is written for each, and ``rank_R.log``.
    """

    config: str
    gpu: str
    world_size: int
    ranks: tuple[int, ...]
    folder: str


@dataclass(frozen=True)
class Failure:
    """How a simulated rank failed.

    Attributes:
        error: The exception, in one line.
        line: Where it was raised, in the innermost frame outside of torch.
        traceback: All of it.
    """

    error: str
    line: str
    traceback: str


def execute(
    library: ctypes.CDLL,
    config: str,
    gpu: str,
    world_size: int,
    rank: int,
    store: str | None = None,
) -> Observation | Failure:
    """Runs the entry point on a simulated GPU, in this process and for good.

    Args:
        library: See `device.install`.
        config: The YAML file of the run.
        gpu: One of `device.GPUS`.
        world_size: Number of ranks of the job.
        rank: The rank that this process simulates.
        store: A file through which the ranks exchange objects, if all of them are simulated at the
            same time. None if this rank is simulated alone.
    """
    recorder = Recorder()
    install(GPUS[gpu], recorder, library)
    libraries.install(GPUS[gpu])
    if store is None:
        join(rank, world_size)
        # Rank 0 would tell the other ranks which checkpoint it has found.
        module: Any = build
        module.resolve_initial_checkpoint = lambda config, ranks: find_initial_checkpoint(config)
    else:
        shared = dist.FileStore(store, world_size)  # type: ignore[attr-defined]
        join(rank, world_size, shared)
        ObjectExchange(dist.PrefixStore("simulated", shared), rank).install()  # type: ignore[attr-defined]
    observer = Observer(recorder)
    observer.install()
    sys.argv = [ENTRY_POINT, "--config", config]
    try:
        with SimulatedGpu(recorder):
            runpy.run_module(ENTRY_POINT, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            return Failure(f"exit status {end.code}", "", "")
    except Exception as error:
        return _failure(error)
    return observer.finish()


def _failure(error: Exception) -> Failure:
    lines = " ".join(str(error).split())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not is_left_out(frame.filename)
    ]
    last = frames[-1]
    return Failure(
        f"{type(error).__name__}: {lines}",
        f"{shown(last.filename)}:{last.lineno} {last.name}",
        "".join(traceback.format_exception(error)),
    )


def start_fork(work: Callable[[], Observation | Failure], result: Path, log: Path) -> int:
    """Starts ``work`` in a forked process, which writes its result and its output to files.

    Returns:
        The process, whose exit status is 0 if ``work`` returned an observation.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("w", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            with redirect_stdout(output), redirect_stderr(output):
                outcome = work()
        content = {type(outcome).__name__.lower(): asdict(outcome)}
        result.write_text(json.dumps(content), encoding="utf-8")
        status = 0 if isinstance(outcome, Observation) else 1
    finally:
        os._exit(status)


def run_request(library: ctypes.CDLL, request: Request) -> None:
    """Simulates the ranks of a request.

    A failure ends the simulation once the ranks that run beside it are done.
    """
    folder = Path(request.folder)
    waiting = list(request.ranks)
    running: set[int] = set()
    num_processes = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES)
    while waiting or running:
        while waiting and len(running) < num_processes:
            rank = waiting.pop(0)
            work = partial(execute, library, request.config, request.gpu, request.world_size, rank)
            result, log = folder / f"rank_{rank}.json", folder / f"rank_{rank}.log"
            running.add(start_fork(work, result, log))
        child, status = os.wait()
        if child not in running:
            continue  # a process of torch's compiler
        running.remove(child)
        if status:
            waiting.clear()


def main() -> None:
    """Simulates the request that the command line names."""
    values: dict[str, Any] = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    run_request(LIBRARY, Request(**{**values, "ranks": tuple(values["ranks"])}))


if __name__ == "__main__":
    main()
