"""SIGTERM and SIGUSR1 as a request to stop after the iteration at hand.

In: signals. Out: `StopRequest.is_made`, the same on every rank.
"""

import signal
from types import FrameType

import torch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers that the job was asked to stop."""

    def __init__(self) -> None:
        """Installs the handlers of this process."""
        self._is_made = False
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._is_made = True

    def is_made(self, device: torch.device) -> bool:
        """Whether any rank was asked; every rank calls it once an iteration."""
        if not torch.distributed.is_initialized():
            return self._is_made
        flag = torch.tensor([int(self._is_made)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def close(self) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
