"""Tells the watchdog which phase this rank starts, so that a hung rank can be named."""

from megatron_chatflow.runtime.watchdog import Watchdog
from megatron_chatflow.train.callbacks import Callback


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
