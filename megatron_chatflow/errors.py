"""Errors that a user can mend, and the one place where they become an exit code.

In: a ``main`` function. Out: the process's exit status, with one line on standard error for a
mistake of the user's and a traceback for one of ours.
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
from typing import NoReturn

MAX_MESSAGE_CHARACTERS = 1000  # more than any message of ours without a file's content
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk, a quota or a limit on files is exhausted, which may pass."""

_MAX_OPEN_FILES = 1 << 16  # libraries that walk over all descriptors stay fast below it


class UserError(ValueError):
    """A mistake in the input; its message says what is wrong, where, and what to do, in a line.

    Messages quote files, and a file may hold anything: the middle of a message of more than
    `MAX_MESSAGE_CHARACTERS` is left out, so that its cause and its advice remain.
    """

    max_characters = MAX_MESSAGE_CHARACTERS

    def __init__(self, message: str = "", *details: object) -> None:
        """Takes the message."""
        super().__init__(shorten(message, self.max_characters), *details)


def shorten(message: str, limit: int = MAX_MESSAGE_CHARACTERS) -> str:
    """The message, or its beginning and end with the number of characters left out between."""
    if len(message) <= limit:
        return message
    num_last = limit // 4
    num_first = limit - num_last - 40  # for the note, so that the result is not cut once more
    num_cut = len(message) - num_first - num_last
    return f"{message[:num_first]} [... {num_cut} characters ...] {message[-num_last:]}"


class LocalError(UserError):
    """What one process of a job meets and the others do not, such as a disk of its node's."""


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake on the command line in one line, without the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError`."""
        # argparse names the function that converts a value, such as `parse_shard`.
        message = re.sub(r"invalid (?!int\b|float\b)\w+ value: ", "invalid value: ", message)
        raise UserError(f"{message}; see --help")


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs ``main`` and exits: 0 or its own status. Raises the limit on open files before.

    2 stands for a `UserError` or a full disk, 130 for Ctrl-C, and 141, as of a program that SIGPIPE
    ended, for output that nobody reads on (``| head -1``).

    Args:
        main: The program; returns its exit status or None for success.
    """
    _raise_open_file_limit()
    if signal.getsignal(signal.SIGINT) is _exit_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            status = main()
        finally:
            if sys.stdout:
                sys.stdout.flush()  # here, where a failure can still be told
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise  # a socket, or a pipe between processes
        _discard_output()
        sys.exit(141)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = error.filename or "the output, or a temporary file"
        print(f"error: cannot write: {where}: {error.strerror}; make room", file=sys.stderr)
        _discard_output()
        sys.exit(2)
    sys.exit(status or 0)


def _discard_output() -> None:
    """Sends what is still buffered nowhere; Python would complain about it at the very end."""
    with suppress(AttributeError, OSError, ValueError):  # no standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end the process with status 130 until `run_main` takes over.

    A program calls it before imports that take seconds. Nothing has to be cleaned up by then, while
    a KeyboardInterrupt raised inside an import would end in a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, _exit_interrupted)


def _exit_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(130)


def _raise_open_file_limit() -> None:
    """Raises the usual soft limit of 1,024 open files as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a system with a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _has_lost_its_reader() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no standard output, or none with a descriptor
        return False
