"""The peak rate that a run's FLOP/s are set against, and the peak of its memory.

In: the device and dtype. Out: bytes; FLOP/s, from the maker's data sheet for known GPUs and from a
short measurement on CPUs, whose peak depends on cores and instruction set.
"""

import resource
import sys
import time

import torch

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
