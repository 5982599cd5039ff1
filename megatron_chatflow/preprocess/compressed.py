"""Decompresses gzip and zstd streams, with a bound on what one call may expand to.

Streams are recognized by their first bytes, whatever the file is called. They may consist of any
number of members or frames, with zstd's skippable frames (which the seekable format and parallel
compressors write) between them and with zero bytes after a gzip member (the padding of tapes and
block devices), as `gzip -d` and `zstd -d` read them.
"""

import zlib
from collections.abc import Generator, Iterator
from typing import Any

import zstandard

from megatron_chatflow.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGICS = tuple(bytes([0x50 + k]) + b"\x2a\x4d\x18" for k in range(16))
_SKIPPABLE_HEADER_BYTES = 8  # magic and size, 4 bytes each
MAGIC_BYTES = 4
# zlib bounds its output itself. zstandard does not, and 4 bytes of input may stand for 128 KiB of
# output, so a bite of 1 KiB yields 32 MiB at most. Smaller bites than this cost time.
ZSTD_BITE_BYTES = 1 << 10
# What follows a member is copied once per member, so that input of tiny members must not be held
# in large blocks.
INPUT_BLOCK_BYTES = 1 << 16
MAX_OUTPUT_BYTES = 1 << 20
MAX_ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes


def is_compressed(head: bytes) -> bool:
    """Whether a stream that begins with ``head`` is gzip or zstd."""
    return head.startswith((GZIP_MAGIC, ZSTD_MAGIC, *_SKIPPABLE_MAGICS))


def decompress(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yields the content of a gzip or zstd stream in blocks of at most `MAX_OUTPUT_BYTES`.

    Args:
        blocks: The compressed bytes, in blocks of any size.
        name: The stream's name, for messages.

    Raises:
        UserError: The stream is truncated, or something else follows its end.
        zlib.error, zstandard.ZstdError: The stream is damaged.
    """
    blocks = _cut(blocks)
    pending = b""
    is_first = True
    while True:
        pending, is_at_end = _fill(pending, blocks, MAGIC_BYTES)
        if not pending and not is_first:
            return
        magic = pending[:MAGIC_BYTES]
        if magic in _SKIPPABLE_MAGICS:
            pending = _skip_frame(pending, blocks, name)
        elif magic == ZSTD_MAGIC:
            pending = yield from _zstd_frame(pending, blocks, name)
        elif magic.startswith(GZIP_MAGIC):
            pending = yield from _gzip_member(pending, blocks, name)
            pending = _skip_zeros(pending, blocks)
        elif is_at_end and any(m.startswith(magic) for m in (ZSTD_MAGIC, GZIP_MAGIC)):
            raise _truncated(name)
        else:
            raise UserError(f"cannot read: {name}: garbage after its compressed end")
        is_first = False


def _cut(blocks: Iterator[bytes]) -> Iterator[bytes]:
    for block in blocks:
        for begin in range(0, len(block), INPUT_BLOCK_BYTES):
            yield block[begin : begin + INPUT_BLOCK_BYTES]


def _fill(pending: bytes, blocks: Iterator[bytes], num_bytes: int) -> tuple[bytes, bool]:
    """At least so many bytes, or all that are left; and whether the input is exhausted."""
    while len(pending) < num_bytes:
        block = next(blocks, None)
        if block is None:
            return pending, True
        pending += block
    return pending, False


def _skip_frame(pending: bytes, blocks: Iterator[bytes], name: str) -> bytes:
    """Passes over a skippable frame; returns what follows it."""
    pending, _ = _fill(pending, blocks, _SKIPPABLE_HEADER_BYTES)
    if len(pending) < _SKIPPABLE_HEADER_BYTES:
        raise _truncated(name)
    num_left = _SKIPPABLE_HEADER_BYTES + int.from_bytes(pending[4:8], "little")
    while num_left > len(pending):
        num_left -= len(pending)
        block = next(blocks, None)
        if block is None:
            raise _truncated(name)
        pending = block
    return pending[num_left:]


def _skip_zeros(pending: bytes, blocks: Iterator[bytes]) -> bytes:
    while not (pending := pending.lstrip(b"\0")):
        block = next(blocks, None)
        if block is None:
            return b""
        pending = block
    return pending


def _zstd_frame(
    pending: bytes, blocks: Iterator[bytes], name: str
) -> Generator[bytes, None, bytes]:
    """Yields the content of one frame and returns what follows it."""
    frame: Any = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES).decompressobj()
    block: bytes | None = pending
    while block is not None:
        for begin in range(0, len(block), ZSTD_BITE_BYTES):
            end = begin + ZSTD_BITE_BYTES
            content = frame.decompress(block[begin:end])
            for offset in range(0, len(content), MAX_OUTPUT_BYTES):
                yield content[offset : offset + MAX_OUTPUT_BYTES]
            if frame.eof:
                unused: bytes = frame.unused_data
                return unused + block[end:]
        block = next(blocks, None)
    raise _truncated(name)


def _gzip_member(
    pending: bytes, blocks: Iterator[bytes], name: str
) -> Generator[bytes, None, bytes]:
    """Yields the content of one member and returns what follows it."""
    member = zlib.decompressobj(wbits=31)
    block: bytes | None = pending
    while block is not None:
        while block:
            yield member.decompress(block, MAX_OUTPUT_BYTES)
            block = member.unconsumed_tail
            if member.eof:
                return member.unused_data
        block = next(blocks, None)
    raise _truncated(name)


def _truncated(name: str) -> UserError:
    return UserError(f"cannot read: {name}: its compressed content is truncated")
