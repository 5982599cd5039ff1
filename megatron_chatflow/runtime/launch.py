"""Initializes a process: device, process group, parallel groups, seeds and threads.

A run uses CUDA and NCCL if there is a GPU, and the CPU and gloo otherwise. Before CUDA starts,
`limit_cuda_connections` and `use_deterministic_algorithms` set the environment that it reads.

`resolve_attempt_store` gives the workers of one attempt a part of torchrun's store of their own.
Since PyTorch 2.5 the agents pass the same store to every restart and to every change of membership,
where gloo finds the addresses of dead workers and fails with "connection refused". Neither the
restart count nor the world size distinguishes two attempts, because a change of membership may
change neither. So the workers agree on a name: each writes a fresh random number, rank 0 publishes
the list of all numbers as a roster, and every worker signs a roster that contains its own number.
Once all have signed the same roster, its hash is the name. A roster may contain the number of a
dead worker, but then it is never signed by all.
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
    """Returns the compute capability of the first GPU, None without one; does not start CUDA."""
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
    """Sets CUDA_DEVICE_MAX_CONNECTIONS to 1 below sm_100, unless the user has set it.

    With one connection, kernels start in the order in which they were queued. Tensor and context
    parallelism need this: megatron-core queues a collective before the matrix product that it
    overlaps, and the product must not fill the GPU first. From sm_100 on megatron-core does not
    require it.
    """
    capability = first_gpu_capability()
    if capability is not None and capability < _FIRST_WITHOUT:
        environment.setdefault(VARIABLE, "1")


# cuBLAS is deterministic with fixed workspaces, NCCL with one algorithm for all sizes.
_REQUIRED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}


def use_deterministic_algorithms(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes PyTorch, cuBLAS, NCCL and transformer-engine choose deterministic kernels.

    It must be called before the first use of CUDA. flash-attn is configured call by call.

    Raises:
        UserError: CUDA has started, or a variable has a conflicting value.
    """
    has_started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if has_started:
        raise UserError(
            "train.deterministic_mode: CUDA and cuBLAS are already initialized; enable "
            "deterministic mode before the first use of CUDA"
        )
    for name, values in _REQUIRED.items():
        given = environment.setdefault(name, values[0])
        if given not in values:
            raise UserError(
                f"environment variable {name}: {given!r} is not deterministic; use "
                f"{' or '.join(values)}, or unset it"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


_PAUSE_SECONDS = 0.02
_PREFIX = "megatron_chatflow"


def resolve_attempt_store(
    store: Store, rank: int, world_size: int, timeout: timedelta
) -> PrefixStore:
    """Waits for all workers of this attempt and returns their part of the store.

    ``store`` is shared with all workers, including those of earlier attempts. ``timeout`` is the
    limit for the slowest worker.

    Raises:
        UserError: Not all workers arrived in time.
    """
    common = PrefixStore(_PREFIX, store)
    number = uuid.uuid4().hex
    common.set(f"signature/{rank}", "")
    common.set(f"number/{rank}", number)
    deadline = time.monotonic() + timeout.total_seconds()
    coordinator = _Coordinator(common, world_size) if rank == 0 else None
    signed = ""
    while time.monotonic() < deadline:
        if coordinator is not None:
            coordinator.update()
        roster = _read(common, "roster").split(",")
        if len(roster) == world_size and roster[rank] == number:
            name = _name(roster)
            if name != signed:
                common.set(f"signature/{rank}", name)
                signed = name
        if signed and _read(common, "agreed") == signed:
            return PrefixStore(f"{_PREFIX}/{signed}", store)
        time.sleep(_PAUSE_SECONDS)
    raise UserError(
        f"rank {rank}: not all {world_size} processes connected within {timeout}; check the logs "
        "of the other nodes or raise --distributed-timeout-minutes"
    )


class _Coordinator:
    """Rank 0's part: publishes the roster, and the agreement once all have signed it."""

    def __init__(self, store: Store, world_size: int) -> None:
        self._store = store
        self._numbers = [f"number/{rank}" for rank in range(world_size)]
        self._signatures = [f"signature/{rank}" for rank in range(world_size)]
        self._published: list[str] = []

    def update(self) -> None:
        if not self._store.check(self._numbers):
            return
        roster = [value.decode() for value in self._store.multi_get(self._numbers)]
        if roster != self._published:
            self._store.set("roster", ",".join(roster))
            self._published = roster
        name = _name(roster)
        if all(value.decode() == name for value in self._store.multi_get(self._signatures)):
            self._store.set("agreed", name)


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _name(roster: list[str]) -> str:
    return hashlib.sha256(",".join(roster).encode()).hexdigest()[:32]


_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# Parameters of mallopt, of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def make_malloc_keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks instead of returning them to the system.

    Otherwise each step maps its logits and activations anew, and zeroing the fresh pages costs a
    quarter of the step. `training.callbacks.process` bounds what is kept. Does nothing with
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
            "start at most one process per GPU (--nproc-per-node)"
        )
    return torch.device("cuda", process.local_rank)


def _share_cpu_threads(process: ProcessRank) -> None:
    """Assigns each process an equal share of the cores unless the user set OMP_NUM_THREADS.

    torchrun sets OMP_NUM_THREADS=1 by default if several processes run on a node, which leaves most
    cores of a CPU node idle. Therefore 1 under torchrun counts as unset.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    is_torchrun_default = chosen == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if not chosen or is_torchrun_default:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // process.local_world_size))


def exit_with_launcher() -> None:
    """Asks Linux to kill this worker when torchrun's agent dies.

    The agent starts its workers in their own sessions. If it were killed, they would continue to
    train next to the job that resumes the run.
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
    """Joins the job, creates its parallel groups and seeds all random number generators.

    ``num_model_chunks`` is the number per rank; more than 1 selects the interleaved schedule.
    ``timeout`` is that of collectives. ``keep_freed_memory`` is about malloc on CPUs.

    Raises:
        UserError: A node has fewer GPUs than processes.
    """
    exit_with_launcher()
    process = ProcessRank.from_environment()
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
        _init_process_group(process, device, timeout)

    # megatron-core must be imported after `cpu.install` has replaced the CUDA functions.
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
    # The order of the data depends on none of these generators.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    megatron.seed_model_parallel(seed)
    return ranks


def _init_process_group(process: ProcessRank, device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        arguments: dict[str, Any] = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            shared = torch.distributed.TCPStore(  # type: ignore[attr-defined]
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timeout,
            )
            own = resolve_attempt_store(shared, process.rank, process.world_size, timeout)
            arguments = {"store": own, "rank": process.rank, "world_size": process.world_size}
        torch.distributed.init_process_group(backend, timeout=timeout, **arguments)
        return
    if process.world_size > 1:
        raise UserError(
            "environment variable MASTER_ADDR: is not set although WORLD_SIZE is above 1; "
            "launch with torchrun"
        )
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(
        backend, store=store, rank=0, world_size=1, timeout=timeout
    )


def device_mode(device: torch.device) -> AbstractContextManager[object]:
    """Returns the context for megatron-core code that names CUDA as a device; empty on CUDA."""
    if device.type == "cuda":
        return contextlib.nullcontext()
    from megatron_chatflow.runtime import cpu

    return cpu.device_mode()


def finalize() -> None:
    """Leaves the job; safe to call after a failed `initialize`."""
    if torch.distributed.is_initialized():
        from megatron_chatflow.runtime import ranks as megatron

        megatron.destroy_groups()
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def running(ranks: Ranks) -> Iterator[Ranks]:
    """Leaves the job at the end of the ``with`` block."""
    try:
        yield ranks
    finally:
        finalize()
