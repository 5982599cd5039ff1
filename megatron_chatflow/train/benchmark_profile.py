"""Where the time of a training step goes.

In: a step. Out: a row for each part with its share, and for matrix products the rate reached beside
the rate that this device's own large product reaches.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_chatflow.evaluation.report_table import Row

# The first part whose words occur in an operation's name has its time.
_PARTS = (
    ("attention", ("attention", "flash", "rotate")),
    ("optimizer", ("adam", "linalg_vector_norm", "multi_tensor")),
    (
        "collectives",
        ("allreduce", "all_reduce", "allgather", "reduce_scatter", "c10d", "gloo", "nccl"),
    ),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::matmul", "aten::bmm", "gemm")),
    ("norm", ("rms_norm", "aten::pow", "aten::rsqrt", "aten::mean")),
    ("SwiGLU", ("silu",)),
    ("loss", ("crossentropy", "exp", "log", "amax", "gather", "scatter")),
    ("embedding", ("embedding", "index")),
    ("copies and casts", ("copy", "cat", "contiguous", "fill", "zero")),
)


def part_of(operation: str) -> str:
    """The part of a step that an operation belongs to."""
    name = operation.lower()
    return next((part for part, words in _PARTS if any(word in name for word in words)), "other")


def profile_rows(step: Callable[[], float], num_tokens: int, device: torch.device) -> list[Row]:
    """Profiles one step after one that warms up.

    Args:
        step: Takes a step.
        num_tokens: Of the step, to give each part per token.
        device: Where it runs; a GPU's kernels are timed there.
    """
    is_cuda = device.type == "cuda"
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    with profile(activities=activities) as trace:
        step()
    micros: dict[str, float] = defaultdict(float)
    for event in trace.key_averages():
        time = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        micros[part_of(event.key)] += time
    total = sum(micros.values())
    return [
        {
            "part": part,
            "milliseconds": time / 1000,
            "share": time / total,
            "nanoseconds_per_token": 1000 * time / num_tokens,
        }
        for part, time in sorted(micros.items(), key=lambda item: -item[1])
    ]
