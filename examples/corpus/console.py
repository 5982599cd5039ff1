"""What the demo's tools tell a person: bars on a terminal, plain lines elsewhere.

In: lines and amounts of work. Out: standard output (lines) and standard error (bars).
"""

import sys
import threading
from types import TracebackType
from typing import NoReturn

from tqdm import tqdm


class Console:
    """Lines, and at most one progress bar at a time; safe to use from several threads."""

    def __init__(self, quiet: bool = False) -> None:
        """Starts without a bar; `quiet` prints nothing at all."""
        self._quiet = quiet
        self._lock = threading.Lock()
        self._bar: tqdm[NoReturn] | None = None

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._quiet:
            return
        with self._lock:
            if self._bar is None:
                print(line, flush=True)
            else:
                self._bar.write(line)

    def start_bar(self, what: str, total: int, unit: str) -> "Console":
        """Shows a bar on a terminal; use as a context manager, which takes it away again."""
        if not self._quiet and sys.stderr.isatty():
            self._bar = tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B", leave=False)
        return self

    def advance(self, amount: int) -> None:
        """Moves the bar on."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(amount)

    def __enter__(self) -> "Console":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes the bar away."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
