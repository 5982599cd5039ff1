"""Python's garbage collection at fixed iterations, the same ones on every rank.

In: an interval. Out: `GarbageCollection`. Left to itself each process collects by its own counters,
and every collective waits for whichever rank is at it.

What a process on CPUs keeps of the memory that it freed: much, but not ever more.

In: the end of each step. Out: freed blocks that stay in the process for the next step, and go back
to the system once they have piled up. Torch caches no CPU memory; glibc does, where it is told to.
But a block that something small and long-lived was put into is lost to large tensors: with
documents of ever other lengths, for each of which oneDNN keeps a kernel, a run of SmolLM2-135M grew
from 6.8 to 14.9 GB in 170 iterations. Freed pages inside such blocks can be returned, and are.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

# Numbers of mallopt's parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
# By how much a process may grow beyond what a step needs: fresh pages cost about 0.3 s a GB.
_GROWTH = 1.2
_SPARE_BYTES = 256 << 20
_PAGE_BYTES = 4096
_STATM = Path("/proc/self/statm")


def keep_freed_memory() -> None:
    """Has glibc keep large freed blocks instead of returning them to the system.

    Without this, each step maps its logits and activations anew, and zeroing the fresh pages costs
    a quarter of the step. Where the C library is another one, nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def resident_bytes() -> int | None:
    """Memory of this process that is in use or kept; None where Linux does not tell."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


def return_freed_memory() -> None:
    """Gives every freed page back to the system, also those between blocks in use."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory:
    """Returns what was freed, once a process has grown by a fifth over what a step needs."""

    def __init__(
        self,
        *,
        measure: Callable[[], int | None] = resident_bytes,
        give_back: Callable[[], None] = return_freed_memory,
    ) -> None:
        """Begins to watch.

        Args:
            measure: Gives this process's memory in bytes.
            give_back: Returns what is freed.
        """
        self._measure = measure
        self._give_back = give_back
        self._needed: int | None = None

    def after_step(self) -> None:
        """Looks at the memory, which takes microseconds, and returns freed pages if need be."""
        held = self._measure()
        if held is None:
            return
        if self._needed is None:
            self._needed = held
        elif held > self._needed * _GROWTH + _SPARE_BYTES:
            self._give_back()
            # The next step fetches what it needs, and shows how much that is.
            self._needed = None


class GarbageCollection:
    """Collects at multiples of an interval and never between them; `close` undoes that."""

    def __init__(self, interval: int | None) -> None:
        """Turns the automatic collection off.

        Args:
            interval: Iterations between collections; Python's own rhythm if None.
        """
        self._interval = interval
        self._was_enabled = gc.isenabled()
        if interval is not None:
            gc.collect()
            gc.disable()

    def after(self, iteration: int) -> None:
        """Collects if it is time."""
        if self._interval is not None and iteration % self._interval == 0:
            gc.collect()

    def close(self) -> None:
        """Leaves the collection as it was."""
        if self._was_enabled:
            gc.enable()
