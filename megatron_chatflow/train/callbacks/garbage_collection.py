"""Runs Python's garbage collector at fixed iterations, the same ones on every rank.

By default each process collects when its own counters say so, and every collective then waits for
whichever rank is collecting.
"""

import gc

from megatron_chatflow.train.callbacks import Callback


class GarbageCollection(Callback):
    """Disables automatic collection and collects at multiples of an interval instead.

    Args:
        interval: Iterations between collections; None leaves automatic collection enabled.
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
