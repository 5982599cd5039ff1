"""Errors that a user can mend, and the one place where they become an exit code.

In: a ``main`` function. Out: the process's exit status, with one line on standard error for a
mistake of the user's and a traceback for one of ours.
"""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A mistake in the input; its message says what is wrong, where, and what to do, in a line."""


class LocalError(UserError):
    """What one process of a job meets and the others do not, such as a disk of its node's."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Runs ``main`` and exits: 0 or its own status, 2 for a `UserError`, 130 for Ctrl-C.

    Args:
        main: The program; returns its exit status or None for success.
    """
    try:
        status = main()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(status or 0)
