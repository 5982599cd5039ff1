"""Breaks the time of a training step down by operation and compares it with the machine's limits.

Prints a row for each part of the step with its share of the time. Matrix products also have their
rate relative to the GPU's data sheet and to a large product measured on this device; parts that
only read and write memory have the minimum number of bytes they must move, relative to this
device's copy rate.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import Shape
from megatron_chatflow.config.shape import num_parameters
from megatron_chatflow.runtime.device import call_seconds, peak_flops
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.runtime.table import Row

# An operation's time counts for the first part with a word that occurs in the operation's name.
_PARTS = (
    ("loss", ("crossentropy", "cross_entropy", "softmax_statistics", "softmax_gradient")),
    ("RoPE", ("rope", "rotate", "rotary")),
    ("attention", ("attention", "attn", "flash", "aten::bmm", "softmax")),
    ("optimizer", ("adam", "vector_norm", "foreach_norm", "aten::norm", "multi_tensor")),
    (
        "collectives",
        ("allreduce", "all_reduce", "allgather", "all_gather", "reduce_scatter", "c10d", "gloo")
        + ("nccl", "modelparallelregion", "sequenceparallelregion"),
    ),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::matmul", "gemm")),
    ("norm", ("rms_norm", "rmsnorm", "aten::pow", "aten::rsqrt", "aten::mean")),
    ("SwiGLU", ("silu", "swiglu")),
    ("loss", ("aten::exp_", "log", "amax", "gather", "scatter")),
    ("embedding", ("embedding", "index")),
    ("copies and casts", ("copy", "cat", "contiguous", "fill", "zero")),
    ("sums and scaling", ("add", "mul", "div", "sub")),
)
OUTSIDE = "outside operators"


def part_of(operation: str) -> str:
    """Returns the part of a step that an operation belongs to."""
    name = operation.lower()
    return next((part for part, words in _PARTS if any(word in name for word in words)), "other")


def least_bytes(shape: Shape, tensor_parallel_size: int = 1) -> dict[str, int]:
    """Returns the bytes that each part must read and write in a bf16 step, each tensor once.

    Norm: input and output; in the backward pass input, output gradient and input gradient. SwiGLU:
    the same, with one side twice as wide. Loss: reads and writes the logits. Optimizer: reads the
    fp32 weight, gradient and two moments, and writes all but the gradient.
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


def time_and_flops(
    events: Iterable[FunctionEventAvg], *, is_cuda: bool
) -> dict[str, tuple[float, float]]:
    """Returns microseconds and FLOPs of each part from the averages of a profile.

    On a GPU a profile lists operators, each with the time of the kernels that it launched, and the
    kernels themselves. Only operators have the package's names and FLOPs, so only they are counted.
    Kernel time beyond theirs forms a separate part, `OUTSIDE`.
    """
    micros: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    kernels = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            # A user-defined range covers kernels that are listed themselves.
            kernels += (
                0.0 if getattr(event, "is_user_annotation", False) else event.self_device_time_total
            )
            continue
        part = part_of(event.key or "")
        micros[part] += event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if event.key in ("aten::mm", "aten::addmm", "aten::bmm"):
            flops[part] += event.flops
    if is_cuda:
        micros[OUTSIDE] = max(0.0, kernels - sum(micros.values()))
    return {part: (own, flops[part]) for part, own in micros.items()}


def profile_rows(step: Callable[[], float], shape: Shape, ranks: Ranks) -> list[Row]:
    """Profiles one step after a warm-up step. Collective over all ranks.

    Args:
        step: Function that runs a step.
        shape: Shape of the model and batch.
        ranks: Ranks of this process. On a GPU its kernels are timed.
    """
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if ranks.is_cuda else [])
    with profile(activities=activities, with_flops=True) as trace:
        step()
    parts = time_and_flops(trace.key_averages(), is_cuda=ranks.is_cuda)
    whole = sum(own for own, _ in parts.values())
    peak, _ = peak_flops(ranks.device, torch.bfloat16)
    # The peak of a CPU is measured by such a product already.
    product = product_rate(ranks.device, torch.bfloat16) if ranks.is_cuda else peak
    moved = least_bytes(shape, ranks.tensor_parallel_size)
    rate = copy_rate(ranks.device)
    rows: list[Row] = []
    for part, (own, flops) in sorted(parts.items(), key=lambda item: -item[1][0]):
        seconds = max(own, 1.0) / 1e6
        rows.append(
            {
                "part": part,
                "milliseconds": own / 1000,
                "share": own / whole,
                "nanoseconds_per_token": 1000 * own / shape.num_tokens,
                "part_tflops": flops / seconds / 1e12 if flops else None,
                "share_of_peak": flops / seconds / peak if peak and flops else None,
                "share_of_product": flops / seconds / product if product and flops else None,
                "bytes_per_second": moved[part] / seconds if part in moved else None,
                "share_of_copy_rate": moved[part] / seconds / rate if part in moved else None,
            }
        )
    return rows


_COPIED_BYTES = 1 << 28


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Measures the FLOP/s of the best of thirty products of square matrices.

    The matrices are random, because a GPU's power and clock depend on the values.
    """
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2)
    )
    return 2 * size**3 / min(call_seconds(lambda: torch.matmul(left, right), device, 30))


def copy_rate(device: torch.device) -> float:
    """Measures the bytes per second that a copy beyond the caches reads and writes."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / min(call_seconds(lambda: target.copy_(source), device, 5))
