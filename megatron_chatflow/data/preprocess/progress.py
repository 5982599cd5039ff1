"""Progress of a job: a bar on a terminal, a plain line now and then elsewhere.

In: bytes read and documents written so far. Out: lines on standard error.
"""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows how far a job is."""

    def __init__(self, num_total_bytes: int) -> None:
        """Begins at nothing of so many bytes; 0 if their number is not known."""
        self._num_total_bytes = num_total_bytes
        self._num_bytes = 0
        self._begin = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            total = num_total_bytes or None
            self._bar = tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True)

    def update(self, num_bytes: int, num_documents: int) -> None:
        """Shows the state.

        Args:
            num_bytes: Read so far, on disk.
            num_documents: Written so far.
        """
        if self._bar is not None:
            self._bar.set_postfix(documents=num_documents, refresh=False)
            self._bar.update(num_bytes - self._num_bytes)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            seconds = self._last_line - self._begin
            share = f" of {self._num_total_bytes / 1e6:.1f}" if self._num_total_bytes else ""
            print(
                f"{num_bytes / 1e6:.1f}{share} MB, {num_documents} documents, "
                f"{num_bytes / 1e6 / seconds:.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )
        self._num_bytes = num_bytes

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()
