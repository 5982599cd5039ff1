"""Defines user errors and turns them into an exit status.

A user error prints one line to standard error and exits with status 2. Any other exception is a
bug and keeps its traceback.
"""

import argparse
import errno
import os
import re
import resource
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

MAX_MESSAGE_CHARACTERS = 1000  # more than any message without quoted file contents
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of an exhausted disk, quota or file size limit, which may be temporary."""

_MAX_OPEN_FILES = 1 << 16  # some libraries iterate over all descriptors


class UserError(ValueError):
    """An error in the input. Its message states what is wrong, where, and how to fix it.

    Messages may quote arbitrary file contents. The middle of a message longer than
    `MAX_MESSAGE_CHARACTERS` is cut out, so that its cause and its advice remain.
    """

    max_characters = MAX_MESSAGE_CHARACTERS

    def __init__(self, message: str = "", *details: object) -> None:
        super().__init__(shorten(message, self.max_characters), *details)


def shorten(message: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Returns the message, without its middle if it is longer than ``limit`` characters."""
    if len(message) <= limit:
        return message
    num_last = limit // 4
    num_first = limit - num_last - 40  # room for the note, so that the result is not cut again
    num_cut = len(message) - num_first - num_last
    return f"{message[:num_first]} [... {num_cut} characters ...] {message[-num_last:]}"


class LocalError(UserError):
    """A user error that occurs on one process only, such as a full disk of its node."""


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser that keeps line breaks of its texts and reports an error in one line."""

    def __init__(
        self, description: str | None = None, epilog: str | None = None, **options: Any
    ) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, epilog=epilog, **options)

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError`."""
        # argparse prints the name of the conversion function, such as `parse_shard`.
        message = re.sub(r"invalid (?!int\b|float\b)\w+ value: ", "invalid value: ", message)
        raise UserError(f"{message}; see --help")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Raises the limit on open files, runs ``main`` and exits with its status.

    The status is 2 after a `UserError` or on a full disk, 130 after Ctrl-C, and 141 if nobody reads
    the output any more (``| head -1``), as after SIGPIPE.
    """
    _raise_open_file_limit()
    if signal.getsignal(signal.SIGINT) is _exit_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            status = main()
        finally:
            if sys.stdout:
                sys.stdout.flush()  # while an error can still be reported
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise  # a socket or a pipe between processes
        _discard_output()
        sys.exit(141)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = error.filename or "the output or a temporary file"
        print(f"error: cannot write: {where}: {error.strerror}; free some space", file=sys.stderr)
        _discard_output()
        sys.exit(2)
    sys.exit(status or 0)


def _discard_output() -> None:
    """Discards buffered output, which would fail again when Python flushes it at exit."""
    with suppress(AttributeError, OSError, ValueError):  # no standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_on_interrupt() -> None:
    """Makes Ctrl-C exit with status 130 until `run_main` is called.

    Programs call it before imports that take seconds, because a KeyboardInterrupt inside an import
    would end in a traceback. There is nothing to clean up at that time.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, _exit_interrupted)


def _exit_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


def _raise_open_file_limit() -> None:
    """Raises the soft limit on open files, often 1,024, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # the system has a lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_stdout_closed() -> bool:
    """Returns whether standard output is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no standard output, or one without a descriptor
        return False
