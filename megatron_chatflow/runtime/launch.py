"""Brings a process up: device, process group, parallel groups, seeds, threads; and down again.

In: the parallel sizes of a run's configuration and the launcher's environment. Out: `Ranks`.
CUDA and NCCL where a GPU is there, CPU and gloo elsewhere.
"""

import contextlib
import ctypes
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.connections import keep_queue_order
from megatron_chatflow.runtime.ranks import ProcessRank, Ranks
from megatron_chatflow.runtime.rendezvous import agree_on_prefix

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def _choose_device(process: ProcessRank) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if process.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {process.local_rank}: this node has {torch.cuda.device_count()} GPUs; "
            "start no more processes a node than it has GPUs (--nproc-per-node)"
        )
    return torch.device("cuda", process.local_rank)


def _share_cpu_threads(process: ProcessRank) -> None:
    """Gives each process its share of the cores, unless the user chose a number of threads.

    torchrun sets OMP_NUM_THREADS=1 when several processes run on a node and nothing is set, which
    leaves most of a CPU node idle; so 1 under torchrun counts as unset.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    is_torchrun_default = chosen == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if not chosen or is_torchrun_default:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // process.local_world_size))


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch; the order of the data depends on none of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def die_with_launcher() -> None:
    """Asks Linux to kill this worker when torchrun's agent dies.

    The agent starts its workers in sessions of their own. Killed hard, it would leave them
    training on, beside the job that takes the run up again.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def initialize(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    num_model_chunks: int = 1,
    context_parallel_size: int = 1,
    seed: int = 1234,
    timeout: timedelta = timedelta(minutes=10),
    keep_freed_memory: bool = True,
) -> Ranks:
    """Joins the job and makes its parallel groups.

    ``num_model_chunks`` above 1 asks for megatron-core's interleaved schedule. On CPUs the C
    library is told to keep freed memory, which only a benchmark's peer goes without.

    Raises:
        UserError: The world size is no multiple of the model-parallel size, or a node has fewer
            GPUs than processes.
    """
    die_with_launcher()
    process = ProcessRank.from_environment()
    model_parallel_size = (
        tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size
    )
    if process.world_size % model_parallel_size:
        raise UserError(
            f"parallel: tensor x pipeline x context parallel size {model_parallel_size} does not "
            f"divide the number of processes {process.world_size}; start a multiple of it"
        )
    if tensor_model_parallel_size > 1 or context_parallel_size > 1:
        keep_queue_order()
    device = _choose_device(process)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        from megatron_chatflow.runtime import cpu, freed_memory

        cpu.install()
        if keep_freed_memory:
            freed_memory.keep_freed_memory()
        _share_cpu_threads(process)
    if not torch.distributed.is_initialized():
        _join(process, device, timeout)

    # megatron-core is imported only now: on CPUs it has to find the replaced entry points.
    from megatron_chatflow.runtime import megatron

    ranks = megatron.initialize_groups(
        process=process,
        device=device,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        num_model_chunks=num_model_chunks,
        context_parallel_size=context_parallel_size,
        timeout=timeout,
    )
    seed_everything(seed)
    megatron.seed_model_parallel(seed)
    return ranks


def _join(process: ProcessRank, device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        torch.distributed.init_process_group(
            backend, timeout=timeout, **_store_of_this_attempt(process, timeout)
        )
        return
    if process.world_size > 1:
        raise UserError("WORLD_SIZE is above 1 and MASTER_ADDR is not set; launch with torchrun")
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(
        backend, store=store, rank=0, world_size=1, timeout=timeout
    )


def _store_of_this_attempt(process: ProcessRank, timeout: timedelta) -> dict[str, Any]:
    """Where torchrun's agents keep one store for all attempts, this attempt's part of it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    shared = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
    )
    store = agree_on_prefix(shared, process.rank, process.world_size, timeout)
    return {"store": store, "rank": process.rank, "world_size": process.world_size}


def device_mode(device: torch.device) -> AbstractContextManager[object]:
    """The context in which megatron-core may name CUDA as a device: nothing at all on CUDA."""
    if device.type == "cuda":
        return contextlib.nullcontext()
    from megatron_chatflow.runtime import cpu

    return cpu.device_mode()


def finalize() -> None:
    """Leaves the job; safe to call when `initialize` failed halfway."""
    if torch.distributed.is_initialized():
        from megatron_chatflow.runtime import megatron

        megatron.destroy_groups()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def running(ranks: Ranks) -> Iterator[Ranks]:
    """Leaves the job at the end of the block, whatever ended it."""
    try:
        yield ranks
    finally:
        finalize()
