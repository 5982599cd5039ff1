"""Copies to the device that do not block the host.

CUDA copies a large tensor from ordinary memory while the host waits; a copy from page-locked memory
is queued. torch keeps page-locked blocks for reuse until the copies out of them are done.
"""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Queues a copy of ``tensor`` to ``device``; returns the tensor itself if it is there already.

    The tensor may have any strides. ``pin_memory`` keeps them, so it cannot write an expanded or
    overlapping tensor, several elements of which are one place in memory.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)
