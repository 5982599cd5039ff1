"""Host memory that holds a rank's part of a checkpoint while it is written.

In: a number of bytes. Out: a buffer of them, kept from save to save. Memory that a process touches
for the first time is slow (a page fault each 4 KiB), several times slower than the copy itself, so
the buffer is touched ahead, in the background, and is pinned where copies come from a GPU.
"""

import ctypes
import logging
import mmap
import threading
from typing import Any

import psutil
import torch

from megatron_chatflow.checkpoint.direct_file import BLOCK_BYTES, yield_to_training

logger = logging.getLogger(__name__)

_TOUCH_BYTES = 64 * 2**20
_HUGE_PAGE = 2 * 2**20
# What is left to everything else on the machine.
_MEMORY_MARGIN = 0.1


def page_aligned(num_bytes: int) -> tuple[mmap.mmap, torch.Tensor]:
    """Memory for direct writes, and the same as a uint8 tensor, a block longer than asked for."""
    size = -(-(num_bytes + BLOCK_BYTES) // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, torch.frombuffer(memory, dtype=torch.uint8)


class StagingBuffer:
    """A buffer that grows to the largest checkpoint seen."""

    def __init__(self, device: torch.device) -> None:
        """Makes an empty one.

        Args:
            device: Where the copies will come from.
        """
        self._device = device
        self._memory: mmap.mmap | None = None
        self._tensor: torch.Tensor | None = None
        self._toucher: threading.Thread | None = None
        self._is_pinned = False

    def reserve(self, num_bytes: int) -> bool:
        """Makes room, and begins to touch it in the background.

        Returns:
            Whether this machine's memory has that much to spare; if not, nothing is taken.
        """
        if self._tensor is not None and len(self._tensor) >= num_bytes + BLOCK_BYTES:
            return True
        self.release()
        memory = psutil.virtual_memory()
        if num_bytes > memory.available - _MEMORY_MARGIN * memory.total:
            logger.warning(
                "a copy of this rank's checkpoint (%.1f GB) does not fit into the memory that is "
                "free (%.1f GB): training waits while checkpoints are written",
                num_bytes / 1e9,
                memory.available / 1e9,
            )
            return False
        self._memory, self._tensor = page_aligned(num_bytes)
        self._toucher = threading.Thread(
            target=_touch, args=(self._tensor,), name="checkpoint-staging", daemon=True
        )
        self._toucher.start()
        return True

    def tensor(self) -> torch.Tensor:
        """The buffer, uint8, once it is touched and pinned."""
        assert self._tensor is not None
        if self._toucher is not None:
            self._toucher.join()
            self._toucher = None
            if self._device.type == "cuda":
                self._pin(self._tensor)
        return self._tensor

    def bytes(self) -> memoryview:
        """The same memory, for writing it out."""
        assert self._memory is not None
        return memoryview(self._memory)

    def release(self) -> None:
        """Gives the memory back."""
        if self._toucher is not None:
            self._toucher.join()
            self._toucher = None
        if self._is_pinned and self._tensor is not None:
            _cuda().cudaHostUnregister(self._tensor.data_ptr())
            self._is_pinned = False
        self._tensor = self._memory = None

    def _pin(self, tensor: torch.Tensor) -> None:
        # Not `pin_memory`: its allocator rounds up to a power of two.
        code = _cuda().cudaHostRegister(tensor.data_ptr(), len(tensor), 0)
        self._is_pinned = int(code) == 0
        if not self._is_pinned:
            logger.warning("the checkpoint's staging buffer could not be pinned (CUDA %d)", code)


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _touch(tensor: torch.Tensor) -> None:
    yield_to_training()
    for begin in range(0, len(tensor), _TOUCH_BYTES):
        part = tensor[begin : begin + _TOUCH_BYTES]
        # ctypes lets other threads run meanwhile.
        ctypes.memset(part.data_ptr(), 0, len(part))
