"""Looks after the process: heartbeats, Python's garbage collection, and freed memory on CPUs."""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

from megatron_chatflow.runtime.watchdog import Watchdog
from megatron_chatflow.training.callbacks import Callback

# How far a process may grow beyond what a step needs. Fresh pages cost about 0.3 s per GB.
_GROWTH = 1.2
_SPARE_BYTES = 256 << 20
_PAGE_BYTES = 4096
_STATM = Path("/proc/self/statm")


class Heartbeat(Callback):
    """Sends a heartbeat at the start of every phase of the loop.

    Within a phase, micro-batches and checkpoint writes call `Watchdog.heartbeat` themselves.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def before_iteration(self, iteration: int) -> None:
        """Enters the phase ``loading``."""
        self._watchdog.enter_phase(iteration, "loading")

    def before_step(self, iteration: int) -> None:
        """Enters the phase ``training``."""
        self._watchdog.enter_phase(iteration, "training")

    def before_validation(self, iteration: int, name: str) -> None:
        """Enters the phase named after the evaluation."""
        self._watchdog.enter_phase(iteration, name)

    def on_save(self, iteration: int) -> None:
        """Enters the phase ``saving``."""
        self._watchdog.enter_phase(iteration, "saving")


class GarbageCollection(Callback):
    """Collects at multiples of an interval, at the same iterations on every rank.

    By default each process collects when its own counters say so, and every collective then waits
    for whichever rank is collecting. Without an interval, this remains so.
    """

    def __init__(self, interval: int | None) -> None:
        self._interval = interval
        self._was_enabled = gc.isenabled()
        if interval is not None:
            gc.collect()
            gc.disable()

    def after_iteration(self, iteration: int) -> None:
        """Collects if it is due."""
        if self._interval is not None and iteration % self._interval == 0:
            gc.collect()

    def close(self) -> None:
        """Enables automatic collection again if it was enabled."""
        if self._was_enabled:
            gc.enable()


def resident_bytes() -> int | None:
    """Returns the resident memory of this process; None where Linux's /proc is not available."""
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


def return_freed_memory() -> None:
    """Returns all free pages to the system, including those between blocks in use."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class FreedMemory(Callback):
    """Returns freed memory to the system when the process has grown by a fifth over a step's need.

    PyTorch does not cache CPU memory, but `runtime.launch` makes glibc keep freed blocks, because
    mapping fresh pages in every step costs a quarter of its time. A kept block into which a small
    long-lived object was placed cannot be reused for large tensors. With documents of varying
    lengths, for each of which oneDNN caches a kernel, a run of SmolLM2-135M grew from 6.8 to 14.9
    GB in 170 iterations. ``malloc_trim`` returns the free pages inside such blocks.
    """

    def __init__(
        self,
        *,
        measure: Callable[[], int | None] = resident_bytes,
        give_back: Callable[[], None] = return_freed_memory,
    ) -> None:
        self._measure = measure
        self._give_back = give_back
        self._needed: int | None = None

    def after_iteration(self, iteration: int) -> None:
        """Measures the memory, which takes microseconds, and returns free pages if necessary."""
        held = self._measure()
        if held is None:
            return
        if self._needed is None:
            self._needed = held
        elif held > self._needed * _GROWTH + _SPARE_BYTES:
            self._give_back()
            # The next step allocates what it needs, which sets the new reference.
            self._needed = None
