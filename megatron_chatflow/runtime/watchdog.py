"""Notices a rank that no longer gets on, says where every thread of it stands, and ends it.

In: a beat at every phase of the training loop, and one within a phase at every micro-batch and
every written part of a checkpoint. Out: nothing while beats come; when none came for
too long, the stacks of all threads on standard error and in the run's folder, one line that names
the ranks which hang, and the end of the process, upon which torchrun ends or restarts the job.

Where one rank hangs, the others wait for it in a collective and hang as well. So each writes a
report, and the line names those that wrote none or stand in another phase than most.
"""

import faulthandler
import logging
import os
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from threading import main_thread

logger = logging.getLogger(__name__)

_EXIT_STATUS = 70  # EX_SOFTWARE of sysexits.h
_SECONDS_FOR_OTHERS = 3.0


@dataclass(frozen=True)
class _Place:
    """Where a rank stands."""

    iteration: int
    phase: str

    def __str__(self) -> str:
        return f"iteration {self.iteration}, {self.phase}"


def _innermost_call() -> str:
    """The function that the main thread is in."""
    frame = sys._current_frames().get(main_thread().ident or 0)
    if frame is None:
        return "nowhere"
    return f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}"


class Patience:
    """Counts for how long no beat has come.

    Attributes:
        waited: Seconds since the last beat.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Begins to wait; none has come yet."""
        self._timeout = timeout_seconds
        self._seen = 0
        self.waited = 0.0

    def is_over(self, seconds: float, num_beats: int) -> bool:
        """Whether it is over.

        Args:
            seconds: Waited since the last call.
            num_beats: That have come so far.
        """
        self.waited = self.waited + seconds if num_beats == self._seen else 0.0
        self._seen = num_beats
        return self.waited >= self._timeout


class Watchdog:
    """Ends this process when no beat comes for too long.

    Time counts by the thread's own short sleeps: a job that was suspended as a whole, and its
    clock not, does not take itself for hung.
    """

    def __init__(
        self, *, timeout_seconds: float, rank: int, world_size: int, folder: Path | None
    ) -> None:
        """Starts watching.

        Args:
            timeout_seconds: Without a beat, after which the process ends; 0 watches nothing.
            rank: Of this process.
            world_size: Processes of the job.
            folder: Where reports go; none are written if None.
        """
        self._timeout = timeout_seconds
        self._rank = rank
        self._world_size = world_size
        self._folder = None if folder is None else folder / "hangs"
        self._place = _Place(0, "starting")
        self._num_beats = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if timeout_seconds:
            self._remove_report()
            self._thread.start()

    def beat(self, iteration: int, phase: str) -> None:
        """Says that this rank gets on.

        Args:
            iteration: At hand.
            phase: What it does next, such as ``loading``.
        """
        self._place = _Place(iteration, phase)
        self._num_beats += 1

    def beat_on(self) -> None:
        """Says that this rank gets on within its phase."""
        self._num_beats += 1

    def close(self) -> None:
        """Watches no longer."""
        self._closed.set()
        if self._timeout:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause = min(self._timeout / 10, 5.0)
        patience = Patience(self._timeout)
        while not self._closed.wait(pause):
            # For a thread that holds the interpreter's lock and never lets go of it, so that this
            # loop stands still as well.
            faulthandler.dump_traceback_later(max(2 * self._timeout, 10 * pause), exit=True)
            if patience.is_over(pause, self._num_beats):
                self._end(patience.waited)

    def _end(self, waited: float) -> None:
        # What follows takes seconds on a slow disk, and has a time limit of its own.
        faulthandler.dump_traceback_later(60 + _SECONDS_FOR_OTHERS, exit=True)
        place = self._place
        print(
            f"rank {self._rank}: no progress for {waited:.0f} s at {place}; its threads' stacks:",
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
        try:
            if path is not None:
                path.unlink(missing_ok=True)
        except OSError:
            pass  # a folder that cannot be written is the checkpoint's to complain of

    def _write_report(self, place: _Place) -> None:
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

    def _verdict(self, place: _Place, waited: float) -> str:
        text = f"hung: no progress for {waited:.0f} s (--hang-timeout-minutes) at {place}"
        if self._folder is None or self._world_size == 1:
            return f"{text}; ending rank {self._rank}"
        lines = {rank: self._first_line(rank) for rank in range(self._world_size)}
        usual = Counter(line for line in lines.values() if line).most_common(1)
        silent = [rank for rank, line in lines.items() if line is None]
        elsewhere = [rank for rank, line in lines.items() if line and line != usual[0][0]]
        if silent:
            text += f"; no sign of life from rank {', '.join(map(str, silent))}"
        if elsewhere:
            text += "; elsewhere: " + ", ".join(f"rank {r} ({lines[r]})" for r in elsewhere)
        return f"{text}; stacks are in {self._folder}"

    def _first_line(self, rank: int) -> str | None:
        path = self._report_path(rank)
        assert path is not None, "asked for only where there is a folder"
        try:
            return path.read_text(encoding="utf-8").splitlines()[0]
        except (OSError, IndexError):
            return None
