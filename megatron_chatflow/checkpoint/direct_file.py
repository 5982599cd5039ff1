"""Checkpoint files, which several threads write past the page cache and hash on the way."""

import contextlib
import ctypes
import errno
import io
import mmap
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_chatflow.data.fingerprint import DIGEST_BYTES, LEAF_BYTES, hash_leaves, root_digest
from megatron_chatflow.files import DirectWriter

CHUNK_BYTES = 16 * 2**20
NUM_THREADS = 2
_NICENESS = 10


@dataclass(frozen=True)
class FileHash:
    """A file's length in bytes and its hash, see `data.fingerprint.root_digest`."""

    num_bytes: int
    digest: str


def lower_thread_priority() -> None:
    """Lowers the priority of the calling thread, so that training threads run first."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class DirectFile:
    """A file of known length that is written in chunks in any order."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Creates the file and reserves its space on the disk.

        Args:
            path: The file; an existing one is overwritten.
            num_bytes: Its length.

        Raises:
            OSError: The disk is full, or writing is not permitted.
        """
        self._num_bytes = num_bytes
        self._writer = DirectWriter(path, create=True)
        self._digests: dict[int, bytes] = {}
        self._pool = ThreadPoolExecutor(NUM_THREADS, initializer=lower_thread_priority)
        try:
            _reserve(self._writer.descriptor, num_bytes)
        except BaseException:
            self.close()
            raise

    def submit(self, offset: int, data: memoryview) -> "Future[None]":
        """Writes a chunk in the background.

        Args:
            offset: Its position, a multiple of `CHUNK_BYTES`.
            data: Its bytes, page-aligned; those beyond the end of the chunk or file are ignored.
        """
        return self._pool.submit(self._write, offset, data)

    def finish(self) -> FileHash:
        """Flushes the file once all chunks are written, and returns its hash."""
        self._pool.shutdown()
        os.fsync(self._writer.descriptor)
        leaves = b"".join(self._digests[offset] for offset in sorted(self._digests))
        assert len(leaves) == -(-self._num_bytes // LEAF_BYTES) * DIGEST_BYTES
        return FileHash(self._num_bytes, root_digest(self._num_bytes, leaves))

    def close(self) -> None:
        """Closes the file. Chunks that no thread has begun to write are dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._writer.close()

    def _write(self, offset: int, data: memoryview) -> None:
        chunk = data[: min(CHUNK_BYTES, self._num_bytes - offset)]
        self._digests[offset] = hash_leaves(chunk)
        self._writer.write(chunk, offset)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Reserves the space at once, so that a full disk is noticed before gigabytes are written.

    `os.posix_fallocate` would write the whole file where the file system cannot reserve space.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if num_bytes == 0 or not hasattr(libc, "fallocate"):
        return
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if libc.fallocate(descriptor, 0, 0, num_bytes) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
        raise OSError(code, os.strerror(code))


def hash_file(path: Path) -> FileHash:
    """Reads a file and returns its hash.

    Raises:
        OSError: It cannot be read.
    """
    leaves = []
    num_bytes = 0
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file, memoryview(buffer) as view:
        while read := _read_fully(file, view):
            leaves.append(hash_leaves(view[:read]))
            num_bytes += read
    return FileHash(num_bytes, root_digest(num_bytes, b"".join(leaves)))


def _read_fully(file: io.FileIO, view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        read = file.readinto(view[filled:])
        if not read:
            break
        filled += read
    return filled
