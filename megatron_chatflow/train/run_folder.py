"""One run at a time in a run's folder.

In: the folder. Out: a lock that lasts as long as this process, however it ends. Two runs that write
the same checkpoints and the same metrics would each undo the other's.
"""

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path

from megatron_chatflow.errors import UserError

logger = logging.getLogger(__name__)

# A job that was just killed may take a moment to be gone.
LOCK_TIMEOUT_SECONDS = 20.0


class RunFolder:
    """A run's folder, locked for this process."""

    def __init__(self, folder: Path, *, timeout_seconds: float = LOCK_TIMEOUT_SECONDS) -> None:
        """Makes the folder and takes its lock.

        Args:
            folder: The run's folder.
            timeout_seconds: Seconds to wait for another process to let go.

        Raises:
            UserError: It cannot be made or written, or another process trains into it.
        """
        path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"checkpoint.save: {folder}: {error.strerror}") from None
        deadline = time.monotonic() + timeout_seconds
        while not self._try():
            if time.monotonic() >= deadline:
                owner = os.pread(self._descriptor, 64, 0).decode(errors="replace").strip()
                os.close(self._descriptor)
                raise UserError(
                    f"checkpoint.save: {folder}: another run ({owner or 'unknown'}) is writing "
                    "there; stop it, or give this one a folder of its own"
                )
            time.sleep(0.1)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            os.ftruncate(self._descriptor, 0)
            name = f"process {os.getpid()} on {os.uname().nodename}"
            os.pwrite(self._descriptor, name.encode(), 0)

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # a file system without locks
            logger.warning(
                "checkpoint.save: no locks there (%s); a second run in the same folder will not be "
                "noticed",
                error.strerror,
            )
        return True

    def close(self) -> None:
        """Lets go of the folder."""
        os.close(self._descriptor)
