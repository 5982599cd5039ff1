"""Appends whole files to a file at the speed of the disk.

In: a file, and one that grows. Out: the bytes behind those that are there, hashed on the way.

Blocks are read ahead while the block before them is hashed and written. They are written past the
page cache where the system and the file's position allow it: copying into the cache costs more
time than the disk itself does, and pushes out what others keep there.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from megatron_chatflow.errors import UserError

BLOCK_BYTES = 1 << 23
ALIGNMENT = 1 << 12


def append_file(
    source: Path,
    target: Path,
    num_before: int,
    append: Callable[[memoryview], object],
    hash_update: Callable[[memoryview], object],
) -> int:
    """Appends a file's bytes.

    Args:
        source: What is read.
        target: What grows; nothing of it waits in a buffer of this process.
        num_before: Bytes that it has.
        append: Writes bytes behind it, to be on it when the call returns.
        hash_update: Takes every byte in order.

    Returns:
        The number of bytes.

    Raises:
        UserError: The source cannot be read, or becomes shorter meanwhile.
        OSError: The target cannot be written.
    """
    with ExitStack() as stack:
        try:
            reading = stack.enter_context(source.open("rb", buffering=0)).fileno()
        except OSError as error:
            raise UserError(f"cannot read: {source}: {error.strerror}") from error
        direct = _open_direct(target)
        if direct is not None:
            stack.callback(os.close, direct)
        pool = stack.enter_context(ThreadPoolExecutor(2))
        buffers = [memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(2)]
        num_bytes = os.fstat(reading).st_size
        blocks = list(_blocks(num_before, num_bytes))

        def read(number: int) -> memoryview:
            begin, end = blocks[number]
            return _read(reading, source, begin, buffers[number % 2][: end - begin])

        ahead = pool.submit(read, 0) if blocks else None
        for number, (begin, _) in enumerate(blocks):
            assert ahead is not None
            block = ahead.result()
            ahead = pool.submit(read, number + 1) if number + 1 < len(blocks) else None
            hashing = pool.submit(hash_update, block)
            try:
                if direct is None or not _write_direct(direct, block, num_before + begin):
                    append(block)
            finally:
                hashing.result()
    return num_bytes


def _blocks(num_before: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Begin and end of blocks that, but for the first and last, are whole and aligned behind."""
    begin = 0
    while begin < num_bytes:
        odd = (num_before + begin) % ALIGNMENT
        length = ALIGNMENT - odd if odd else BLOCK_BYTES
        end = min(begin + length, num_bytes)
        if end - begin > ALIGNMENT and end == num_bytes:
            end -= (num_before + end) % ALIGNMENT  # what is left is a block of its own
        yield begin, end
        begin = end


def _read(descriptor: int, path: Path, begin: int, block: memoryview) -> memoryview:
    at = 0
    while at < len(block):
        try:
            num_read = os.preadv(descriptor, [block[at:]], begin + at)
        except OSError as error:
            raise UserError(f"cannot read: {path}: {error.strerror}") from error
        if num_read == 0:
            raise UserError(f"cannot read: {path}: it became shorter while it was copied")
        at += num_read
    if hasattr(os, "posix_fadvise"):  # it is read once: make room for what is read next
        os.posix_fadvise(descriptor, begin, len(block), os.POSIX_FADV_DONTNEED)
    return block


def _open_direct(path: Path) -> int | None:
    """A descriptor that writes past the page cache; None where there is no such thing."""
    with suppress(OSError, AttributeError):  # AttributeError: a system without the flag
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None


def _write_direct(descriptor: int, block: memoryview, position: int) -> bool:
    """Writes an aligned block; False where it is not, or where the file system will not."""
    if position % ALIGNMENT or len(block) % ALIGNMENT or len(block) == 0:
        return False
    at = 0
    while at < len(block):
        try:
            num_written = os.pwrite(descriptor, block[at:], position + at)
        except OSError:
            if at == 0:
                return False  # the ordinary way finds out whether it is the disk
            raise
        if num_written % ALIGNMENT:
            raise OSError(5, "a write was cut short")
        at += num_written
    return True
