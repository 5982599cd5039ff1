"""Builds a file in one process while all others wait for it, coordinated by a lock file.

No collective communication is used, so processes of different jobs can share the file. If the
building process dies, the others detect that its lock is stale. At worst, two processes build the
same file, and both write it atomically.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from megatron_chatflow.errors import UserError

logger = logging.getLogger(__name__)

Content = TypeVar("Content")

POLL_SECONDS = 0.1
STALE_SECONDS = 60.0
"""A lock whose modification time has not changed for this many seconds is stale. The owner updates
it every sixth of this time."""


def build_once(
    path: Path,
    *,
    load: Callable[[], Content | None],
    build: Callable[[], Content],
    save: Callable[[Content], None],
    stale_seconds: float = STALE_SECONDS,
) -> Content:
    """Loads a file, builds it, or waits until another process has built it.

    If the folder is not writable, every process builds the content in memory and logs a warning.

    Args:
        path: The file. The lock is `<path>.lock`.
        load: Reads the file; returns None if it is missing, damaged or outdated.
        build: Builds the content.
        save: Writes the file atomically; raises OSError or UserError if that fails.
        stale_seconds: Time after which an untouched lock is stale.

    Returns:
        The content, as returned by ``load`` or ``build``.
    """
    watch = _LockWatch(path.with_name(path.name + ".lock"), stale_seconds)
    while True:
        content = load()
        if content is not None:
            return content
        try:
            lock = _Lock.acquire(watch.path, stale_seconds)
        except OSError as error:
            logger.warning("cannot write next to %s (%s): building in memory", path, error.strerror)
            return build()
        if lock is not None:
            break
        watch.wait()
    with lock:
        # Another process may have finished before the lock was acquired.
        content = load()
        if content is not None:
            return content
        content = build()
        try:
            save(content)
        except (OSError, UserError) as error:
            logger.warning("cannot write %s (%s): keeping it in memory", path, error)
        return content


def _owner() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "thread": threading.get_ident()}


class _Lock:
    """A lock file. While this process holds it, a thread updates its modification time."""

    def __init__(self, path: Path, stale_seconds: float) -> None:
        self._path = path
        self._released = threading.Event()
        self._interval = stale_seconds / 6
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, path: Path, stale_seconds: float) -> "_Lock | None":
        """Acquires the lock; returns None if another process holds it.

        Raises:
            OSError: The folder cannot be written to.
        """
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        try:
            with open(descriptor, "w") as file:
                json.dump(_owner(), file)
        except OSError:
            path.unlink(missing_ok=True)  # other processes would wait for a lock without an owner
            raise
        return cls(path, stale_seconds)

    def _touch(self) -> None:
        while not self._released.wait(self._interval):
            try:
                os.utime(self._path)
            except OSError:
                return  # another process removed it as stale; both build the same content

    def __enter__(self) -> "_Lock":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._released.set()
        self._thread.join()
        if _read_owner(self._path) == _owner():
            self._path.unlink(missing_ok=True)


class _LockWatch:
    """Waits for the lock of another process and removes it once its owner is gone."""

    def __init__(self, path: Path, stale_seconds: float) -> None:
        self.path = path
        self._stale_seconds = stale_seconds
        self._seen: tuple[int, int] | None = None
        self._seen_at = time.monotonic()
        self._announced = False

    def wait(self) -> None:
        """Sleeps for a moment, or removes the lock if it is stale."""
        try:
            status = self.path.stat()
        except OSError:
            return  # the lock was released
        owner = _read_owner(self.path)
        if not self._announced:
            self._announced = True
            logger.info("waiting for %s, which %s is building", self.path.stem, _describe(owner))
        # Measure the age with this process's clock only, because clocks of two hosts may differ.
        seen = (status.st_ino, status.st_mtime_ns)
        if seen != self._seen:
            self._seen, self._seen_at = seen, time.monotonic()
        if _is_dead(owner) or time.monotonic() - self._seen_at > self._stale_seconds:
            logger.warning("removed %s: its owner, %s, has ended", self.path, _describe(owner))
            self.path.unlink(missing_ok=True)
            return
        time.sleep(POLL_SECONDS)


def _read_owner(path: Path) -> dict[str, str | int] | None:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _describe(owner: dict[str, str | int] | None) -> str:
    return "someone" if owner is None else f"process {owner.get('pid')} on {owner.get('host')}"


def _is_dead(owner: dict[str, str | int] | None) -> bool:
    """Returns whether the owner is a process of this host that has exited."""
    if owner is None or owner.get("host") != socket.gethostname():
        return False
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
