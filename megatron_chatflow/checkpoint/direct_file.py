"""Checkpoint files, which several threads write past the page cache and hash on the way.

A file's hash is a tree of two levels, so that threads can hash its chunks in any order: a digest of
128 bits of each leaf, and of the file's length and these digests.
"""

import contextlib
import ctypes
import errno
import io
import mmap
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

import blake3

from megatron_chatflow.files import DirectWriter

CHUNK_BYTES = 16 * 2**20
NUM_THREADS = 2
_NICENESS = 10

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True)
class TreeHash:
    """A hash function over leaves of fixed length."""

    # Length of a leaf. It divides `CHUNK_BYTES`.
    leaf_bytes: int
    digest: Callable[[Buffer], bytes]  # returns the 16 bytes of a buffer's digest

    def leaves(self, data: Buffer) -> bytes:
        """Returns the digests of the leaves of ``data`` in order. The last may be shorter."""
        view = memoryview(data)
        size = self.leaf_bytes
        return b"".join(self.digest(view[at : at + size]) for at in range(0, len(view), size))

    def root(self, num_bytes: int, leaves: bytes) -> str:
        """Returns the digest of a file's length and leaf digests, in hexadecimal."""
        return self.digest(num_bytes.to_bytes(8, "little") + leaves).hex()


ALGORITHM = "blake3-128 of the length and of each 16 MiB leaf's blake3-128"
# By their names in checkpoints.
ALGORITHMS = {
    ALGORITHM: TreeHash(CHUNK_BYTES, lambda data: blake3.blake3(data).digest(16)),
    # Checkpoints of version 0.1.
    "blake2b-128 of the length and of each 64 KiB leaf's blake2b-128": TreeHash(
        1 << 16, lambda data: blake2b(data, digest_size=16).digest()
    ),
}
_HASH = ALGORITHMS[ALGORITHM]


@dataclass(frozen=True)
class FileHash:
    """A file's length in bytes and its hash, in hexadecimal."""

    num_bytes: int
    digest: str


def lower_thread_priority() -> None:
    """Lowers the priority of the calling thread, so that training threads run first."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class DirectFile:
    """A file of known length that is written in chunks in any order."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Creates the file, or overwrites it, and reserves its space on the disk.

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
        return FileHash(self._num_bytes, _HASH.root(self._num_bytes, leaves))

    def close(self) -> None:
        """Closes the file. Chunks that no thread has begun to write are dropped."""
        self._pool.shutdown(cancel_futures=True)
        self._writer.close()

    def _write(self, offset: int, data: memoryview) -> None:
        chunk = data[: min(CHUNK_BYTES, self._num_bytes - offset)]
        self._digests[offset] = _HASH.leaves(chunk)
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


def hash_file(path: Path, algorithm: str = ALGORITHM) -> FileHash:
    """Reads a file and returns its hash by one of `ALGORITHMS`."""
    tree = ALGORITHMS[algorithm]
    leaves = []
    num_bytes = 0
    buffer = mmap.mmap(-1, CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file, memoryview(buffer) as view:
        while read := _read_fully(file, view):
            leaves.append(tree.leaves(view[:read]))
            num_bytes += read
    return FileHash(num_bytes, tree.root(num_bytes, b"".join(leaves)))


def _read_fully(file: io.FileIO, view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        read = file.readinto(view[filled:])
        if not read:
            break
        filled += read
    return filled
