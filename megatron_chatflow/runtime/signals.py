"""Stops a run after the current iteration on SIGTERM, SIGUSR1, Ctrl-C or a time limit."""

import contextlib
import math
import os
import signal
import time
from types import FrameType

import torch

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

# A terminal sends SIGINT to the launcher and to its processes, and the launcher forwards it. All
# signals within this time belong to the same Ctrl-C.
_SAME_KEY_SECONDS = 1.0


class StopRequest:
    """Records requests to stop. A second Ctrl-C ends the process at once."""

    def __init__(self, minutes: float | None = None, *, notice: str | None = None) -> None:
        """Installs the signal handlers and, with ``minutes``, a time limit.

        The notice is written to standard error at the first Ctrl-C.
        """
        self._is_set = False
        self._interrupted_at: float | None = None
        self._notice = notice
        self._deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in _SIGNALS
            # A shell makes background jobs ignore Ctrl-C.
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
        }

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._is_set = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._notice is not None:
                # Unlike `print`, this is safe while the interrupted code is writing.
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{self._notice}\n".encode())
        elif now - self._interrupted_at > _SAME_KEY_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def is_set(self, device: torch.device) -> bool:
        """Returns whether any rank was asked to stop; every rank calls it once per iteration."""
        is_set = self._is_set or time.monotonic() >= self._deadline
        if not torch.distributed.is_initialized():
            return is_set
        flag = torch.tensor([int(is_set)], device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def close(self) -> None:
        """Restores the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
