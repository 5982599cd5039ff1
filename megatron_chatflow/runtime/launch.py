"""Brings a process up: device, process group, parallel groups, seeds, threads; and down again.

In: the parallel sizes of a run's configuration and the launcher's environment. Out: `Ranks`.
CUDA and NCCL where a GPU is there, CPU and gloo elsewhere.

How many queues a GPU takes work from: one, where overlapped collectives need their order kept.

In: the environment before CUDA starts. Out: ``CUDA_DEVICE_MAX_CONNECTIONS`` in it, where nobody has
set it. CUDA reads it when it starts, so the driver's own library is asked for the architecture.

Runs whose every bit is the same each time, as far as kernels go.

In: the environment before CUDA starts. Out: torch, cuBLAS, NCCL and transformer-engine set so that
they choose deterministic kernels; flash-attn is told call by call. What is set is tested; that the
bits are the same has not been seen on a GPU yet.

A part of torchrun's store that only the workers of one attempt know.

In: the store that the agents keep for all attempts of a job. Out: the same store behind a prefix
that these very workers have agreed upon.

Since torch 2.5 the agents hand the same store to every restart and to every change of membership.
gloo finds the addresses of workers that are dead there, and the restarted job ends with "connection
refused". Neither the number of restarts nor the world's size tells two attempts apart (a change of
membership moves neither), so the workers make a name up: each writes a fresh random number, rank 0
reads all of them out as a roll, and only when every worker has signed one and the same roll, which
holds its own number, is that roll's hash the name. What a dead worker left behind can be read into
a roll, but a roll with a dead worker's number is never signed by all.
"""

import contextlib
import ctypes
import hashlib
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.ranks import ProcessRank, Ranks

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
_FIRST_WITHOUT = (10, 0)


def first_gpu_capability() -> tuple[int, int] | None:
    """Compute capability of this node's first GPU; None without a driver. Does not start CUDA."""
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if driver.nvmlInit_v2():
        return None
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    has_failed = driver.nvmlDeviceGetHandleByIndex_v2(
        ctypes.c_uint(0), ctypes.byref(device)
    ) or driver.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    driver.nvmlShutdown()
    return None if has_failed else (major.value, minor.value)


def limit_cuda_connections(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes kernels start in the order in which they were queued.

    For tensor and context parallelism: megatron-core queues a collective ahead of the product that
    it is to overlap with, and asks for one connection, so that the product does not fill the GPU
    first. From sm_100 on it does not ask.
    """
    capability = first_gpu_capability()
    if capability is not None and capability < _FIRST_WITHOUT:
        environment.setdefault(VARIABLE, "1")


# cuBLAS is deterministic with workspaces of fixed size; NCCL with one algorithm for all sizes.
_REQUIRED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}


def use_deterministic_algorithms(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets everything; has to come before the process's first use of CUDA.

    Raises:
        UserError: CUDA has started, or a variable is set to something else.
    """
    has_started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if has_started:
        raise UserError(
            "train.deterministic_mode: CUDA has started already, and cuBLAS with it; ask for it "
            "before anything else"
        )
    for name, values in _REQUIRED.items():
        given = environment.setdefault(name, values[0])
        if given not in values:
            raise UserError(
                f"environment variable {name}: {given!r} is not deterministic; use "
                f"{' or '.join(values)}, or leave it out"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


_PAUSE_SECONDS = 0.02
_PREFIX = "megatron_chatflow"


def resolve_attempt_store(
    store: Store, rank: int, world_size: int, timeout: timedelta
) -> PrefixStore:
    """Waits for all workers of this attempt and gives them a part of the store of their own.

    Args:
        store: Shared with all workers, and with those of earlier attempts.
        rank: Of this worker.
        world_size: Workers of this attempt.
        timeout: For the slowest to arrive.

    Raises:
        UserError: Not all workers came in time.
    """
    common = PrefixStore(_PREFIX, store)
    number = uuid.uuid4().hex
    common.set(f"signature/{rank}", "")
    common.set(f"number/{rank}", number)
    deadline = time.monotonic() + timeout.total_seconds()
    caller = _Coordinator(common, world_size) if rank == 0 else None
    signed = ""
    while time.monotonic() < deadline:
        if caller is not None:
            caller.call()
        roll = _read(common, "roll").split(",")
        if len(roll) == world_size and roll[rank] == number:
            name = _name(roll)
            if name != signed:
                common.set(f"signature/{rank}", name)
                signed = name
        if signed and _read(common, "agreed") == signed:
            return PrefixStore(f"{_PREFIX}/{signed}", store)
        time.sleep(_PAUSE_SECONDS)
    raise UserError(
        f"rank {rank}: not all {world_size} processes came within {timeout}; see the logs of the "
        "other nodes (--distributed-timeout-minutes)"
    )


class _Coordinator:
    """Rank 0's part: reads the numbers out, and says when all have signed."""

    def __init__(self, store: Store, world_size: int) -> None:
        self._store = store
        self._numbers = [f"number/{rank}" for rank in range(world_size)]
        self._signatures = [f"signature/{rank}" for rank in range(world_size)]
        self._called: list[str] = []

    def call(self) -> None:
        if not self._store.check(self._numbers):
            return
        roll = [value.decode() for value in self._store.multi_get(self._numbers)]
        if roll != self._called:
            self._store.set("roll", ",".join(roll))
            self._called = roll
        name = _name(roll)
        if all(value.decode() == name for value in self._store.multi_get(self._signatures)):
            self._store.set("agreed", name)


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _name(roll: list[str]) -> str:
    return hashlib.sha256(",".join(roll).encode()).hexdigest()[:32]


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# Parameters of mallopt, of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def make_malloc_keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks instead of returning them to the system.

    Otherwise each step maps its logits and activations anew, and zeroing the fresh pages costs a
    quarter of the step. `train.callbacks.freed_memory` bounds what is kept. Does nothing with
    another C library.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


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


def exit_with_launcher() -> None:
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
    exit_with_launcher()
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
        limit_cuda_connections()
    device = _choose_device(process)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        from megatron_chatflow.runtime import cpu

        cpu.install()
        if keep_freed_memory:
            make_malloc_keep_freed_memory()
        _share_cpu_threads(process)
    if not torch.distributed.is_initialized():
        _join(process, device, timeout)

    # megatron-core is imported only now: on CPUs it has to find the replaced entry points.
    from megatron_chatflow.runtime import ranks as megatron

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
    store = resolve_attempt_store(shared, process.rank, process.world_size, timeout)
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
        from megatron_chatflow.runtime import ranks as megatron

        megatron.destroy_groups()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def running(ranks: Ranks) -> Iterator[Ranks]:
    """Leaves the job at the end of the block, whatever ended it."""
    try:
        yield ranks
    finally:
        finalize()
