"""Copies to the device during which the host goes on.

In: tensors on the CPU. Out: the same on the device. From ordinary memory CUDA copies larger tensors
while the host waits; from page-locked memory the copy is queued. torch keeps page-locked blocks
for reuse until the copies out of them are done.
"""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Queues a copy of ``tensor``; the same tensor where it lies on ``device`` already."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
