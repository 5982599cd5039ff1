"""Trains one configuration and records the memory that each rank used.

``memory_worker.py FOLDER ARGUMENTS...`` on each rank. Each rank writes
``FOLDER/rank_R``: the peak resident memory during training minus the resident memory before its
model was built, in bytes. A small run goes first, so that libraries and process groups do not
count. The allocator returns every large block when it is freed, so that the figure is the memory of
tensors. (A real run keeps freed blocks, which is faster.)
"""

import ctypes
import gc
import sys
import warnings
from pathlib import Path

from megatron_chatflow.config import load_config_from_argv
from megatron_chatflow.config.shape import num_model_chunks
from megatron_chatflow.runtime.launch import initialize, running
from megatron_chatflow.runtime.ranks import Ranks

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_STATUS = Path("/proc/self/status")
_SMALL = "--hidden-size 64 --ffn-hidden-size 64 --seq-length 64 --vocab-size none".split()


def _resident(field: str) -> int:
    """Returns ``VmRSS`` (resident memory now) or ``VmHWM`` (its peak so far), in bytes."""
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _measure(arguments: list[str], ranks: Ranks) -> int:
    from megatron_chatflow.pretrain import run_training

    # A run must not save into another run's folder.
    folder = ["--save", str(Path(sys.argv[1]) / "small")] if "--save" in arguments else []
    run_training(load_config_from_argv([*arguments, *_SMALL, *folder])[0], ranks)
    gc.collect()
    # Reset the kernel's peak counter.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _resident("VmRSS")
    run_training(load_config_from_argv(arguments)[0], ranks)
    return _resident("VmHWM") - before


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    # Blocks of 64 KiB and more are mapped by the system, which reclaims them when they are freed.
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16) == 1
    arguments = sys.argv[2:]
    config, _ = load_config_from_argv(arguments)
    parallel = config.parallel
    with running(
        initialize(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            num_model_chunks=num_model_chunks(config.model, parallel),
            context_parallel_size=parallel.context_parallel_size,
            keep_freed_memory=False,
        )
    ) as ranks:
        peak = _measure(arguments, ranks)
        path = Path(sys.argv[1]) / f"rank_{ranks.process.rank}"
        path.write_text(str(peak), encoding="utf-8")


if __name__ == "__main__":
    main()
