"""How many queues a GPU takes work from: one, where overlapped collectives need their order kept.

In: the environment before CUDA starts. Out: ``CUDA_DEVICE_MAX_CONNECTIONS`` in it, where nobody has
set it. CUDA reads it when it starts, so the driver's own library is asked for the architecture.
"""

import ctypes
import os
from collections.abc import MutableMapping

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


def keep_queue_order(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes kernels start in the order in which they were queued.

    For tensor and context parallelism: megatron-core queues a collective ahead of the product that
    it is to overlap with, and asks for one connection, so that the product does not fill the GPU
    first. From sm_100 on it does not ask.
    """
    capability = first_gpu_capability()
    if capability is not None and capability < _FIRST_WITHOUT:
        environment.setdefault(VARIABLE, "1")
