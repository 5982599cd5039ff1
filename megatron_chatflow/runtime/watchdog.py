"""Detects a hung rank, reports where its threads are, and ends the process.

The training loop sends a heartbeat at the start of every phase; micro-batches and checkpoint writes
send more within a phase. If none arrives for too long, the watchdog writes the stacks of all
threads to standard error and to the run's folder, logs one line that names the hung ranks, and ends
the process, so that torchrun ends or restarts the job.

When one rank hangs, the others wait for it in a collective and hang as well. Every rank therefore
writes a report, and the log line names the ranks that wrote none or are in a different phase from
most.
"""

import faulthandler
import logging
import os
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import main_thread

logger = logging.getLogger(__name__)

_EXIT_STATUS = 70  # EX_SOFTWARE of sysexits.h
_SECONDS_FOR_OTHERS = 3.0


def _innermost_call() -> str:
    """Returns the name of the function that the main thread is executing."""
    frame = sys._current_frames().get(main_thread().ident or 0)
    if frame is None:
        return "nowhere"
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}"


class Deadline:
    """Measures the seconds ``waited`` since the last heartbeat."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._seen = 0
        self.waited = 0.0

    def has_passed(self, seconds: float, num_heartbeats: int) -> bool:
        """Adds the seconds since the last call and returns whether the timeout has passed."""
        self.waited = self.waited + seconds if num_heartbeats == self._seen else 0.0
        self._seen = num_heartbeats
        return self.waited >= self._timeout


class Watchdog:
    """Ends this process when no heartbeat arrives for too long.

    Time is the sum of the thread's own short sleeps, so the time during which a job was suspended
    as a whole is not counted.
    """

    def __init__(
        self, *, timeout_seconds: float, rank: int, world_size: int, folder: Path | None
    ) -> None:
        """Starts the watchdog thread, unless the timeout is 0.

        Reports are written below the run's folder, or nowhere if it is None.
        """
        self._timeout = timeout_seconds
        self._rank = rank
        self._world_size = world_size
        self._folder = None if folder is None else folder / "hangs"
        self._place = "iteration 0, starting"
        self._num_heartbeats = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_seconds:
            self._remove_report()
            self._thread.start()

    def enter_phase(self, iteration: int, phase: str) -> None:
        """Starts a phase of an iteration, such as ``loading``, which counts as a heartbeat."""
        self._place = f"iteration {iteration}, {phase}"
        self._num_heartbeats += 1

    def heartbeat(self) -> None:
        """Reports progress within the current phase."""
        self._num_heartbeats += 1

    def close(self) -> None:
        """Stops the watchdog thread."""
        self._closed.set()
        if self._timeout:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause = min(self._timeout / 10, 5.0)
        deadline = Deadline(self._timeout)
        while not self._closed.wait(pause):
            # Covers a thread that holds the interpreter lock forever, which stops this loop too.
            faulthandler.dump_traceback_later(max(2 * self._timeout, 10 * pause), exit=True)
            if deadline.has_passed(pause, self._num_heartbeats):
                self._end(deadline.waited)

    def _end(self, waited: float) -> None:
        # Writing the report may take seconds on a slow disk; limit that time as well.
        faulthandler.dump_traceback_later(60 + _SECONDS_FOR_OTHERS, exit=True)
        place = self._place
        print(
            f"rank {self._rank}: no progress for {waited:.0f} s at {place}; stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self._write_report(place)
        self._closed.wait(_SECONDS_FOR_OTHERS)
        logger.error("%s", self._verdict(place, waited))
        sys.stderr.flush()
        os._exit(_EXIT_STATUS)

    def _report_path(self, rank: int) -> Path | None:
        return None if self._folder is None else self._folder / f"rank_{rank:05d}.txt"

    def _remove_report(self) -> None:
        path = self._report_path(self._rank)
        # The checkpoint reports a folder that cannot be written.
        with suppress(OSError):
            if path is not None:
                path.unlink(missing_ok=True)

    def _write_report(self, place: str) -> None:
        path = self._report_path(self._rank)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(f"{place}, in {_innermost_call()}\n")
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            logger.warning("%s: %s", path, error.strerror)

    def _verdict(self, place: str, waited: float) -> str:
        text = f"hung: no progress for {waited:.0f} s (--hang-timeout-minutes) at {place}"
        if self._folder is None or self._world_size == 1:
            return f"{text}; exiting rank {self._rank}"
        lines = {rank: self._first_line(rank) for rank in range(self._world_size)}
        usual = Counter(line for line in lines.values() if line).most_common(1)
        silent = [rank for rank, line in lines.items() if line is None]
        elsewhere = [rank for rank, line in lines.items() if line and line != usual[0][0]]
        if silent:
            text += f"; no report from rank {', '.join(map(str, silent))}"
        if elsewhere:
            text += "; at a different point: " + ", ".join(
                f"rank {r} ({lines[r]})" for r in elsewhere
            )
        return f"{text}; stack traces are in {self._folder}"

    def _first_line(self, rank: int) -> str | None:
        path = self._report_path(rank)
        assert path is not None, "needs a folder"
        try:
            return path.read_text(encoding="utf-8").splitlines()[0]
        except (OSError, IndexError):
            return None
