"""Python's garbage collection at fixed iterations, the same ones on every rank.

In: an interval. Out: `GarbageCollection`. Left to itself each process collects by its own counters,
and every collective waits for whichever rank is at it.
"""

import gc


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
