"""Files that appear under their final name only when they are complete and on disk.

In: bytes, in order. Out: a file beside its target (`<name>.partial`), then, after an fsync, the
file under its own name. A killed job leaves at most `.partial` files; the next one overwrites them.
"""

import errno
import fcntl
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_chatflow.data.file_copy import append_file
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import refuse_other_than_file, refuse_url

PARTIAL_SUFFIX = ".partial"
LARGE_BYTES = 1 << 22  # from here on a thread of its own hashes while the bytes are being written


@contextmanager
def told_to_the_user(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write a file into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write: {path}: {error.strerror or error}") from error


def remove_file(path: Path) -> None:
    """Removes a file, if it is there.

    Raises:
        UserError: It cannot be removed, as on a read-only disk.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove: {path}: {error.strerror}") from error


class StagedFile:
    """A file being written beside its final name.

    Use `write`, then `seal` (fsync), then `publish`; leaving the ``with`` block before `publish`
    removes what was written.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens `<path>.partial`, and locks it against a second job that writes the same file.

        Args:
            path: The final name; missing folders are made.

        Raises:
            UserError: The file cannot be made there, or another process is writing it.
        """
        refuse_url(path)
        self.path = Path(path)
        refuse_other_than_file(self.path)
        self.partial_path = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self.num_bytes = 0
        self._hash = hashlib.sha256()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial_path, "ab", buffering=1 << 20)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write: {self.partial_path}: {error.strerror}") from error
        self._lock()
        with told_to_the_user(self.partial_path):
            self._file.truncate(0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True  # a file system without locks: two jobs on one prefix are not noticed
        else:
            # Between our open and our lock, the other job may have published this very file.
            mine = self.partial_path.exists() and os.path.samestat(
                os.fstat(self._file.fileno()), self.partial_path.stat()
            )
        if not mine:
            self._file.close()
            raise UserError(
                f"another job is writing: {self.partial_path}: wait for it or choose another prefix"
            )

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes, and takes them into the hash.

        Raises:
            UserError: They cannot be written, as when the disk is full.
        """
        if len(data) < LARGE_BYTES:
            self._hash.update(data)
            with told_to_the_user(self.partial_path):
                self._file.write(data)
        else:
            hashing = threading.Thread(target=self._hash.update, args=(data,))
            hashing.start()
            try:
                with told_to_the_user(self.partial_path):
                    self._file.write(data)
            finally:
                hashing.join()
        self.num_bytes += len(data)

    def append_file(self, source: Path) -> int:
        """Appends a whole file, and takes it into the hash.

        Returns:
            The number of its bytes.

        Raises:
            UserError: It cannot be read, or these bytes cannot be written.
        """
        with told_to_the_user(self.partial_path):
            self._file.flush()
            num_bytes = append_file(
                source, self.partial_path, self.num_bytes, self._append, self._hash.update
            )
        self.num_bytes += num_bytes
        return num_bytes

    def _append(self, data: memoryview) -> None:
        self._file.write(data)
        self._file.flush()

    @property
    def sha256(self) -> str:
        """The hash, in hex, of everything written so far."""
        return self._hash.hexdigest()

    def seal(self) -> None:
        """Brings every byte written so far to the disk."""
        with told_to_the_user(self.partial_path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Gives the file its final name; nothing may be written after it.

        Raises:
            UserError: The name cannot be given, as when a folder has it.
        """
        with told_to_the_user(self.path):
            os.replace(self.partial_path, self.path)
        self._file.close()

    def discard(self) -> None:
        """Removes the file, unless it has been published."""
        if not self._file.closed:
            with suppress(OSError):  # a disk that has become read-only keeps the file
                self.partial_path.unlink(missing_ok=True)
            with suppress(OSError):  # what is still buffered may not fit on the disk
                self._file.close()

    def __enter__(self) -> "StagedFile":
        """Returns the file itself."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Discards what has not been published."""
        self.discard()


class Spool:
    """Bytes that wait on the disk, in a file without a name, until they are read once more."""

    def __init__(self, folder: Path) -> None:
        """Opens the file.

        Args:
            folder: On whose disk it lies.
        """
        self._folder = folder
        with told_to_the_user(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)

    def write(self, data: bytes) -> None:
        """Appends bytes.

        Raises:
            UserError: They cannot be written, as when the disk is full.
        """
        with told_to_the_user(self._folder):
            self._file.write(data)

    def blocks(self) -> Iterator[bytes]:
        """Everything from the beginning, a mebibyte at a time."""
        with told_to_the_user(self._folder):
            self._file.seek(0)
            while block := self._file.read(1 << 20):
                yield block

    def close(self) -> None:
        """Gives the space back."""
        with suppress(OSError):  # what is still buffered may not fit on the disk
            self._file.close()


def publish_all(files: Iterable[StagedFile]) -> None:
    """Seals every file, renames them in the given order, and makes the names durable.

    Args:
        files: In the order in which the names may appear: what others are found by goes last.

    Raises:
        UserError: A file cannot be written or renamed; or all of them have their names, but the
            disk fails to make the names durable.
    """
    files = list(files)
    for file in files:
        file.seal()
    for file in files:
        file.publish()
    for folder in dict.fromkeys(file.path.parent for file in files):
        try:
            _sync_folder(folder)
        except OSError as error:
            first = next(file.path for file in files if file.path.parent == folder)
            raise UserError(
                f"cannot sync the folder of {first}: {folder}: {error.strerror}: the files are "
                "complete under their names, which a crash of the machine may undo: check the "
                "disk, then run this again"
            ) from error


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where its file system can do that for folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
