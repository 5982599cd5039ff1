"""SIGTERM, SIGUSR1 or a time limit as a request to stop after the iteration at hand.

In: signals and the clock. Out: `StopRequest.is_made`, the same on every rank.
"""

import math
import signal
import time
from types import FrameType

import torch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that the job was asked to stop."""

    def __init__(self, minutes: float | None = None) -> None:
        """Installs the handlers of this process.

        Args:
            minutes: After which the job asks itself to stop; never if None.
        """
        self._is_made = False
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._is_made = True

    def is_made(self, device: torch.device) -> bool:
        """Whether any rank was asked; every rank calls it once an iteration."""
        is_made = self._is_made or time.monotonic() >= self._deadline
        if not torch.distributed.is_initialized():
            return is_made
        flag = torch.tensor([int(is_made)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def close(self) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
