"""Compares the estimate of a process's memory with the peak of real runs.

Only the memory of tensors is compared: glibc returns large blocks to the system, and a small run
has loaded the libraries before, see `memory_worker`. The estimate is that of the process that needs
the most memory.
"""

from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

from megatron_chatflow.config import load_config_from_argv
from megatron_chatflow.config.memory import estimate_memory

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("memory_worker.py")
TOLERANCE = 0.15
SHAPE = (
    "--num-layers 4 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 8 "
    "--num-query-groups 8 --max-position-embeddings 2048 --seq-length 512 --vocab-size 32000 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --eval-interval none "
    "--num-prefetch 1"
).split()
RUNS = {
    "plain": (1, []),
    "tensor": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pipeline": (2, ["--pipeline-model-parallel-size", "2"]),
    "context": (2, ["--context-parallel-size", "2"]),
    "recompute": (
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split(),
    ),
    # The staging copy for checkpoints is in memory from the first step on.
    "saving": (1, ["--save", "run", "--train-iters", "4"]),
    "sharded_saving": (2, ["--use-distributed-optimizer", "--save", "run", "--train-iters", "4"]),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_near_the_measured_peak(
    tiny_run: TinyRun, tmp_path: Path, name: str
) -> None:
    num_processes, flags = RUNS[name]
    flags = [str(tmp_path / flag) if flag == "run" else flag for flag in flags]
    arguments = ["--config", str(tiny_run.config), *SHAPE, *flags]
    jobs.run_ranks(num_processes, WORKER, tmp_path, *arguments, timeout=900)
    peaks = [int(path.read_text()) for path in tmp_path.glob("rank_*")]
    assert len(peaks) == num_processes
    config, _ = load_config_from_argv(arguments)
    estimate = estimate_memory(config, 32000, num_processes, on_cpu=True).total
    print(f"{name}: estimated {estimate / 2**20:.0f} MiB, measured {max(peaks) / 2**20:.0f} MiB")
    assert estimate == pytest.approx(max(peaks), rel=TOLERANCE)
