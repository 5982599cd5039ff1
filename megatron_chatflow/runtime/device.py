"""How long calls take on a device, and what that device can do at best.

In: a function and its device. Out: seconds of each call. On a GPU they are read off its own clock,
with the calls queued ahead and the second-level cache emptied before each, so that neither the
time of a launch nor what the call before left there is measured; on a CPU off the host's clock.

Copies to the device that do not block the host.

CUDA copies a large tensor from ordinary memory while the host waits; a copy from page-locked memory
is queued. torch keeps page-locked blocks for reuse until the copies out of them are done.

The peak rate that a run's FLOP/s are set against, and the peak of its memory.

In: the device and dtype. Out: bytes; FLOP/s, from the maker's data sheet for known GPUs and from a
short measurement on CPUs, whose peak depends on cores and instruction set.
"""

import resource
import sys
import time
from collections.abc import Callable

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Queues a copy of ``tensor`` to ``device``; returns the tensor itself if it is there already.

    The tensor may have any strides. ``pin_memory`` keeps them, so it cannot write an expanded or
    overlapping tensor, several elements of which are one place in memory.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


# Dense bf16 FLOP/s of the makers' data sheets.
_BF16_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """Peak FLOP/s of this process's device for matrix products.

    Returns:
        The rate, None where it is not known, and where it comes from.
    """
    if device.type != "cuda":
        rate = _measure(device, dtype)
        return rate, f"measured on this process's CPU threads: {rate / 1e9:.0f} GFLOP/s"
    name = torch.cuda.get_device_name(device)
    if dtype != torch.bfloat16:
        return None, f"no peak is tabled for {dtype}"
    for key, rate in _BF16_PEAKS.items():
        if key in name:
            return rate, f"{name}: {rate / 1e12:.0f} TFLOP/s by its data sheet"
    return None, f"{name}: no peak is tabled"


def _measure(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Best of thirty matrix products of ``size`` cubed: other work on the machine slows some."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        torch.matmul(left, right)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of the GPU's memory, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_COPIED_BYTES = 1 << 28
_MOST_FLUSHES = 100


def call_seconds(
    function: Callable[[], object], device: torch.device, num_calls: int
) -> list[float]:
    """Seconds of each of ``num_calls`` calls, after three that are not counted.

    Args:
        function: What is called; its result is dropped.
        device: Where it works.
        num_calls: Calls to measure.
    """
    if device.type == "cuda":
        return _queued_seconds(function, device, num_calls)
    seconds = []
    for _ in range(3 + num_calls):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return seconds[3:]


def _queued_seconds(
    function: Callable[[], object], device: torch.device, num_calls: int
) -> list[float]:
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(max(4 * cache_bytes, 1 << 26), dtype=torch.uint8, device=device)
    for _ in range(3):
        function()
    num_flushes = _flushes_that_hide_a_launch(function, flushed)
    marks = [(_mark(), _mark()) for _ in range(num_calls)]
    torch.cuda.synchronize(device)
    for begin, end in marks:
        for _ in range(num_flushes):
            flushed.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000 for begin, end in marks]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _flushes_that_hide_a_launch(function: Callable[[], object], flushed: torch.Tensor) -> int:
    """How often the buffer is written, so that the host has queued a call before it begins."""
    torch.cuda.synchronize(flushed.device)
    begin = time.perf_counter()
    function()
    launch_seconds = time.perf_counter() - begin
    torch.cuda.synchronize(flushed.device)
    begin = time.perf_counter()
    for _ in range(10):
        flushed.zero_()
    torch.cuda.synchronize(flushed.device)
    flush_seconds = (time.perf_counter() - begin) / 10
    return min(_MOST_FLUSHES, 1 + int(2 * launch_seconds / flush_seconds))


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of the best of thirty products of matrices of ``size`` squared.

    They hold random numbers: a GPU's power, and so its clock, depend on what is multiplied.
    """
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2)
    )
    return 2 * size**3 / min(call_seconds(lambda: torch.matmul(left, right), device, 30))


def copy_rate(device: torch.device) -> float:
    """Bytes a second that this process reads and writes when it copies what no cache holds."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / min(call_seconds(lambda: target.copy_(source), device, 5))
