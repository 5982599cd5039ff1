"""Decompresses gzip, zstd, xz, bzip2 and lz4 streams with bounded memory.

Streams are recognized by their first bytes; the file name does not matter. As with the programs of
these names, a stream may have several members (gzip), frames (zstd, lz4) or streams (xz, bzip2).
Skippable frames, which the seekable format and parallel compressors write, are skipped. So are zero
bytes after a gzip member or an xz stream, which tapes, block devices and xz itself add as padding.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import zstandard

from megatron_chatflow.errors import UserError

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
XZ_MAGIC = b"\xfd7zXZ\0"
LZ4_MAGIC = b"\x04\x22\x4d\x18"
# Text may begin with "BZh9", so bzip2 is recognized by the number that begins its first block, or
# that ends a stream without blocks.
_BZIP2_MAGICS = tuple(
    b"BZh%d" % level + number
    for level in range(1, 10)
    for number in (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")
)
# zstd and lz4 share the magics of skippable frames.
_SKIPPABLE_MAGICS = tuple(bytes([0x50 + k]) + b"\x2a\x4d\x18" for k in range(16))
_SKIPPABLE_HEADER_BYTES = 8  # magic and size, 4 bytes each
_MAGICS = (GZIP_MAGIC, ZSTD_MAGIC, XZ_MAGIC, LZ4_MAGIC, *_BZIP2_MAGICS, *_SKIPPABLE_MAGICS)
MAGIC_BYTES = max(map(len, _MAGICS))
# zstandard has no limit on its output, and 4 bytes of input can expand to 128 KiB, so 1 KiB of
# input expands to at most 32 MiB. A smaller size is slower. The other libraries have a limit.
ZSTD_BITE_BYTES = 1 << 10
# The rest of a block is copied after every member. Large blocks would make input with many tiny
# members slow.
INPUT_BLOCK_BYTES = 1 << 16
MAX_OUTPUT_BYTES = 1 << 20
MAX_WINDOW_BYTES = 1 << 31  # the window of `zstd --long=31`; `xz -9` needs 64 MiB


def is_compressed(head: bytes) -> bool:
    """Returns whether a stream that begins with ``head`` is in one of the supported formats."""
    return head.startswith(_MAGICS)


def decompress(blocks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Yields the content of a compressed stream in blocks of at most `MAX_OUTPUT_BYTES`.

    Raises:
        UserError: The stream is truncated, or other data follows its end; or a library is missing.
        zlib.error, zstandard.ZstdError, OSError: The stream is damaged.
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
        if pending.startswith(_SKIPPABLE_MAGICS):
            pending = _skip_frame(pending, blocks, name)
        elif pending.startswith(ZSTD_MAGIC):
            pending = yield from _zstd_frame(pending, blocks, name)
        elif pending.startswith(GZIP_MAGIC):
            pending = yield from _gzip_member(pending, blocks, name)
            pending = _skip_zeros(pending, blocks)
        elif pending.startswith(XZ_MAGIC):
            pending = yield from _stream(_xz_decompressor, pending, blocks, name)
            pending = _skip_zeros(pending, blocks)
        elif pending.startswith(_BZIP2_MAGICS):
            pending = yield from _stream(bz2.BZ2Decompressor, pending, blocks, name)
        elif pending.startswith(LZ4_MAGIC):
            pending = yield from _stream(_lz4_decompressor, pending, blocks, name)
        elif is_at_end and any(magic.startswith(pending) for magic in _MAGICS):
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
    frame: Any = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
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


def _stream(
    make_decompressor: Callable[[], Any], pending: bytes, blocks: Iterator[bytes], name: str
) -> Generator[bytes, None, bytes]:
    """Yields the content of one xz or bzip2 stream or lz4 frame and returns the bytes after it."""
    decompressor = make_decompressor()
    block: bytes | None = pending
    while block is not None:
        while True:
            try:
                content = decompressor.decompress(block, MAX_OUTPUT_BYTES)
            except (lzma.LZMAError, ValueError, RuntimeError) as error:  # lz4's is a RuntimeError
                raise OSError(str(error)) from error
            yield content
            if decompressor.eof:
                return decompressor.unused_data or b""
            if decompressor.needs_input:
                break
            block = b""
        block = next(blocks, None)
    raise _truncated(name)


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_WINDOW_BYTES)


def _lz4_decompressor() -> Any:
    try:
        import lz4.frame
    except ImportError as error:
        raise UserError("cannot read: lz4 files need lz4: pip install lz4") from error
    return lz4.frame.LZ4FrameDecompressor()


def _truncated(name: str) -> UserError:
    return UserError(f"cannot read: {name}: the compressed content is truncated")
