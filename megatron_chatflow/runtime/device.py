"""Device utilities: asynchronous copies, peak FLOP/s, peak memory and timing of calls."""

import resource
import sys
import time
from collections.abc import Callable
from functools import cache

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Queues a copy of ``tensor`` to ``device``; returns the tensor itself if it is already there.

    CUDA queues copies from page-locked memory only; for other memory the host waits. The tensor may
    have any strides: ``pin_memory`` fails for expanded and overlapping tensors, so it is made
    contiguous first.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


# Dense bf16 FLOP/s from the data sheets.
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
    """Returns the peak FLOP/s of matrix products on this process's device, and the rate's origin.

    Known GPUs are looked up; the rate is None for others. A CPU is measured, because its peak
    depends on its cores and instruction set.
    """
    if device.type != "cuda":
        rate = _measure(device, dtype)
        return rate, f"{rate / 1e9:.0f} GFLOP/s, measured on the CPU threads of this process"
    name = torch.cuda.get_device_name(device)
    if dtype != torch.bfloat16:
        return None, f"peak FLOP/s unknown for {dtype}"
    for key, rate in _BF16_PEAKS.items():
        if key in name:
            return rate, f"{name}: {rate / 1e12:.0f} TFLOP/s according to its data sheet"
    return None, f"{name}: peak FLOP/s unknown"


def has_fast_bf16(device: torch.device) -> bool:
    """Returns whether matrix products in bf16 are no slower than in fp32 on this device.

    PyTorch multiplies bf16 matrices on a CPU by oneDNN where the CPU has AVX-512. Elsewhere it runs
    loops that are up to fifty times slower than products in fp32.
    """
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _measure(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Measures products of square matrices and returns the rate of the fastest, in FLOP/s.

    Where a small product shows that ``size`` would take long, the small one has to do.
    """
    small = size // 4
    seconds = _fastest_product(device, dtype, small)
    if seconds * (size / small) ** 3 > 0.25:
        return 2 * small**3 / seconds
    return 2 * size**3 / _fastest_product(device, dtype, size)


def _fastest_product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Returns the seconds of the fastest of up to thirty products of square matrices."""
    left = torch.ones(size, size, dtype=dtype, device=device)
    right = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    end = time.perf_counter() + 0.5
    for _ in range(30):
        begin = time.perf_counter()
        torch.matmul(left, right)
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() > end:
            break
    return best


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory of this process in bytes, on the GPU or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_MAX_FLUSHES = 100


def call_seconds(
    function: Callable[[], object], device: torch.device, num_calls: int
) -> list[float]:
    """Measures the seconds of each of ``num_calls`` calls after three warm-up calls.

    On a GPU, CUDA events time calls that were queued ahead, and the L2 cache is flushed before
    each, so that neither launch latency nor cached data affect the result.
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
    num_flushes = _num_flushes_to_hide_launch(function, flushed)
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


def _num_flushes_to_hide_launch(function: Callable[[], object], flushed: torch.Tensor) -> int:
    """Returns how many flushes give the host enough time to queue a call."""
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
    return min(_MAX_FLUSHES, 1 + int(2 * launch_seconds / flush_seconds))
