"""Where the time of a training step goes, and how near each part is to what the machine can do.

In: a step and its shape. Out: a row for each part with its share of the time; for products of
matrices the rate reached beside this device's own for a large product, and for parts that only read
and write, the least bytes that they could move, beside this device's own rate of copying.
"""

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_chatflow.config.model_shape import num_parameters
from megatron_chatflow.evaluation.report_table import Row
from megatron_chatflow.runtime.peak import peak_flops
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.train.benchmark_shape import Shape

# The first part whose words occur in an operation's name has its time.
_PARTS = (
    ("attention", ("attention", "flash", "rotate", "aten::bmm")),
    ("optimizer", ("adam", "linalg_vector_norm", "multi_tensor")),
    (
        "collectives",
        ("allreduce", "all_reduce", "allgather", "reduce_scatter", "c10d", "gloo", "nccl")
        + ("modelparallelregion", "sequenceparallelregion"),
    ),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::matmul", "gemm")),
    ("norm", ("rms_norm", "rmsnorm", "aten::pow", "aten::rsqrt", "aten::mean")),
    ("SwiGLU", ("silu", "swiglu")),
    ("loss", ("crossentropy", "exp", "log", "amax", "gather", "scatter")),
    ("embedding", ("embedding", "index")),
    ("copies and casts", ("copy", "cat", "contiguous", "fill", "zero")),
    ("sums and scaling", ("add", "mul", "div", "sub")),
)
_COPIED_BYTES = 1 << 28


def part_of(operation: str) -> str:
    """The part of a step that an operation belongs to."""
    name = operation.lower()
    return next((part for part, words in _PARTS if any(word in name for word in words)), "other")


def least_bytes(shape: Shape, tensor_parallel_size: int = 1) -> dict[str, int]:
    """Bytes that a part has to read and write in a step in bf16, each tensor once a pass.

    Norm: input and output, and backward input, gradient and gradient; SwiGLU likewise, twice as
    wide on one side. Loss: the logits in and out. Optimizer: fp32 weight, gradient and two moments
    in, all but the gradient out.
    """
    tokens = shape.num_tokens
    wide = tokens * shape.ffn_hidden_size // tensor_parallel_size
    parameters = num_parameters(shape.model_config(), shape.vocab_size)
    return {
        "norm": (2 * shape.num_layers + 1) * 5 * 2 * tokens * shape.hidden_size,
        "SwiGLU": shape.num_layers * (3 + 5) * 2 * wide,
        "loss": 2 * 2 * tokens * shape.vocab_size // tensor_parallel_size,
        "optimizer": 7 * 4 * parameters // tensor_parallel_size,
    }


def copy_rate(device: torch.device) -> float:
    """Bytes a second that this process reads and writes when it copies what no cache holds."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * _COPIED_BYTES / best


def profile_rows(step: Callable[[], float], shape: Shape, ranks: Ranks) -> list[Row]:
    """Profiles one step after one that warms up; every rank calls it.

    Args:
        step: Takes a step.
        shape: What it trains.
        ranks: This process's place; a GPU's kernels are timed there.
    """
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if ranks.is_cuda else [])
    with profile(activities=activities, with_flops=True) as trace:
        step()
    micros: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        micros[part_of(event.key)] += (
            event.self_device_time_total if ranks.is_cuda else event.self_cpu_time_total
        )
        if event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
            flops[part_of(event.key)] += event.flops
    peak, _ = peak_flops(ranks.device, torch.bfloat16)
    moved = least_bytes(shape, ranks.tensor_parallel_size)
    rate = copy_rate(ranks.device)
    rows: list[Row] = []
    for part, own in sorted(micros.items(), key=lambda item: -item[1]):
        seconds = max(own, 1.0) / 1e6
        rows.append(
            {
                "part": part,
                "milliseconds": own / 1000,
                "share": own / sum(micros.values()),
                "nanoseconds_per_token": 1000 * own / shape.num_tokens,
                "part_tflops": flops[part] / seconds / 1e12 if flops[part] else None,
                "share_of_peak": flops[part] / seconds / peak if peak and flops[part] else None,
                "bytes_per_second": moved[part] / seconds if part in moved else None,
                "share_of_copy_rate": moved[part] / seconds / rate if part in moved else None,
            }
        )
    return rows
