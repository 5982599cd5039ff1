"""Decompresses gzip and zstd streams with bounded memory.

Streams are recognized by their first bytes; the file name does not matter. As with `gzip -d` and
`zstd -d`, a stream may have several gzip members or zstd frames. Skippable zstd frames, which the
seekable format and parallel compressors write, are skipped. So are zero bytes after a gzip member,
which tapes and block devices add as padding.
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
# zlib has a limit on its output. zstandard has none, and 4 bytes of input can expand to 128 KiB, so
# 1 KiB of input expands to at most 32 MiB. A smaller size is slower.
ZSTD_BITE_BYTES = 1 << 10
# The rest of a block is copied after every member. Large blocks would make input with many tiny
# members slow.
INPUT_BLOCK_BYTES = 1 << 16
MAX_OUTPUT_BYTES = 1 << 20
MAX_ZSTD_WINDOW_BYTES = 1 << 31  # the window of `zstd --long=31`


def is_compressed(head: bytes) -> bool:
    """Returns whether a stream that begins with ``head`` is gzip or zstd."""
    return head.startswith((GZIP_MAGIC, ZSTD_MAGIC, *_SKIPPABLE_MAGICS))


def decompress(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yields the content of a gzip or zstd stream in blocks of at most `MAX_OUTPUT_BYTES`.

    Raises:
        UserError: The stream is truncated, or other data follows its end.
        zlib.error, zstandard.ZstdError: The stream is damaged.
    """
    blocks = (
        block[begin : begin + INPUT_BLOCK_BYTES]
        for block in blocks
        for begin in range(0, len(block), INPUT_BLOCK_BYTES)
    )
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
            raise UserError(
                f"cannot read: {name}: invalid data after the end of the compressed content"
            )
        is_first = False


def _fill(pending: bytes, blocks: Iterator[bytes], num_bytes: int) -> tuple[bytes, bool]:
    """Extends ``pending`` to at least ``num_bytes``; also returns whether the input ended first."""
    while len(pending) < num_bytes:
        block = next(blocks, None)
        if block is None:
            return pending, True
        pending += block
    return pending, False


def _skip_frame(pending: bytes, blocks: Iterator[bytes], name: str) -> bytes:
    """Skips a skippable frame and returns the bytes after it."""
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
    """Yields the content of one frame and returns the bytes after it."""
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
    """Yields the content of one member and returns the bytes after it."""
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
    return UserError(f"cannot read: {name}: the compressed content is truncated")
