"""Files written past the page cache, by several threads, and hashed on the way.

In: a length and chunks of a file. Out: the file on the disk, and its hash. Writing through the
page cache copies every byte once more and leaves the disk idle meanwhile; where the file system
has no direct writes, they go through the cache after all.
"""

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

CHUNK_BYTES = 16 * 2**20
BLOCK_BYTES = 4096
NUM_THREADS = 2
_NICENESS = 10


@dataclass(frozen=True)
class FileHash:
    """What is recorded of a file.

    Attributes:
        num_bytes: Its length.
        digest: See `tree_hash.root_digest`.
    """

    num_bytes: int
    digest: str


def lower_thread_priority() -> None:
    """Gives this thread what the training threads leave of the processor."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class DirectFile:
    """A file of known length that is written in chunks, in any order."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Makes the file and reserves its room on the disk.

        Args:
            path: Where; a file that is there is written over.
            num_bytes: Its length.

        Raises:
            OSError: There is no room, or no permission.
        """
        self._num_bytes = num_bytes
        self._path = path
        self._is_direct, self._descriptor = _open(path)
        self._digests: dict[int, bytes] = {}
        self._pool = ThreadPoolExecutor(NUM_THREADS, initializer=lower_thread_priority)
        try:
            _reserve(self._descriptor, num_bytes)
        except BaseException:
            self.close()
            raise

    def submit(self, offset: int, data: memoryview) -> "Future[None]":
        """Writes a chunk in the background.

        Args:
            offset: Where it goes, a multiple of `CHUNK_BYTES`.
            data: Its bytes, page-aligned, readable up to the next multiple of 4096.
        """
        return self._pool.submit(self._write, offset, data)

    def finish(self) -> FileHash:
        """Flushes the file, whose chunks are all written, and says its hash."""
        self._pool.shutdown()
        os.ftruncate(self._descriptor, self._num_bytes)
        os.fsync(self._descriptor)
        leaves = b"".join(self._digests[offset] for offset in sorted(self._digests))
        assert len(leaves) == -(-self._num_bytes // LEAF_BYTES) * DIGEST_BYTES
        return FileHash(self._num_bytes, root_digest(self._num_bytes, leaves))

    def close(self) -> None:
        """Lets go of the file; chunks that wait are not written."""
        self._pool.shutdown(cancel_futures=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, offset: int, data: memoryview) -> None:
        length = min(CHUNK_BYTES, self._num_bytes - offset)
        self._digests[offset] = hash_leaves(data[:length])
        end = offset + length
        position = offset
        while position < end:
            stop = -(-end // BLOCK_BYTES) * BLOCK_BYTES if self._is_direct else end
            try:
                chunk = data[position - offset : stop - offset]
                written = os.pwrite(self._descriptor, chunk, position)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._leave_direct()
                continue
            # A direct write that was cut short goes on at a block's begin.
            position += written if position + written >= end else written & -BLOCK_BYTES
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _leave_direct(self) -> None:
        """Goes on through the page cache: this file system opens for direct writes and has none."""
        descriptor = os.open(self._path, os.O_WRONLY)
        os.dup2(descriptor, self._descriptor)
        os.close(descriptor)
        self._is_direct = False


def _open(path: Path) -> tuple[bool, int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if hasattr(os, "O_DIRECT"):
        try:
            return True, os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return False, os.open(path, flags, 0o644)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Asks for the room at once, so that a full disk shows before gigabytes are written.

    Not through `os.posix_fallocate`, which writes the whole file where the system cannot reserve.
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
    """Reads a file and says its hash.

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
