"""Detects input that is not UTF-8 text, and converts text in other encodings to UTF-8.

A corpus in another encoding may decode without an error into wrong characters. A file is therefore
rejected if its first bytes are a UTF-16 or UTF-32 byte-order mark or the signature of a binary
format, and text is rejected if more than a small share of it is not UTF-8. To read another
encoding, the user names it, and `transcode` converts the bytes to UTF-8 before any other
processing, so that line ends, JSON and byte limits have the same meaning everywhere.
"""

import codecs
from collections.abc import Iterator
from itertools import chain

from megatron_chatflow.errors import UserError

UTF8_MARK = b"\xef\xbb\xbf"
# The order matters: the mark of little-endian UTF-32 begins with that of UTF-16.
_MARKS = {
    UTF8_MARK: ("utf-8", "utf-8-sig"),
    b"\xff\xfe\0\0": ("utf-32", "utf-32-le"),
    b"\0\0\xfe\xff": ("utf-32", "utf-32-be"),
    b"\xff\xfe": ("utf-16", "utf-16-le"),
    b"\xfe\xff": ("utf-16", "utf-16-be"),
}
_BINARY_MAGICS = {
    b"\x1f\x8b": "gzip",  # nested compression: the outer layer is already removed
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"\xff\x06\0\0sNaPpY": "snappy",
    b"\x1f\x9d": "compress (.Z)",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"Obj\x01": "avro",
    b"ORC": "orc",
    b"%PDF-": "PDF",
    b"\x89PNG": "PNG",
    b"\x93NUMPY": "NumPy",
    b"\x89HDF\r\n": "HDF5",
    b"SQLite format 3\0": "SQLite",
    b"\x7fELF": "ELF",
}
# Text may begin with these too. They mark a binary file only if a control character follows.
_MAGICS_THAT_TEXT_MAY_HAVE = (b"BZh", b"ORC", b"PAR1")
_TAR_MAGIC, _TAR_MAGIC_OFFSET = b"ustar", 257
HEAD_BYTES = 1 << 16
MAX_INVALID_SHARE = 1e-3  # of the characters
NUM_INVALID_LET_PASS = 2  # a share is not meaningful in a short text
_GUESSES = ("gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "cp1252")
_MIN_TELLING_BYTES = 64  # this many non-ASCII bytes are not valid UTF-8 by chance
_INVALID = "chatflow_invalid"


def canonical_encoding(name: str) -> str:
    """Returns Python's canonical name of a text encoding.

    Raises:
        UserError: If the encoding is unknown, or is not a text encoding.
    """
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError) as error:
        raise UserError(
            f"--encoding: {name}: unknown encoding: use one such as utf-8, utf-16, gb18030, big5 "
            "or shift_jis"
        ) from error
    if not info._is_text_encoding or info.incrementaldecoder is None:
        raise UserError(f"--encoding: {name}: is not a text encoding")
    return info.name


def transcode(blocks: Iterator[bytes], name: str, encoding: str) -> Iterator[bytes]:
    """Checks the beginning of a text stream and yields it as UTF-8 without a byte-order mark.

    UTF-8 input is passed through. In other encodings, bytes that cannot be decoded become the byte
    0xFF, which is not valid UTF-8 either. Later stages treat both kinds of invalid bytes alike:
    they drop or replace them and count them. ``encoding`` is a result of `canonical_encoding`.

    Raises:
        UserError: If the stream is not text, or is not in the given encoding.
    """
    beginning: list[bytes] = []
    num_bytes = 0
    for block in blocks:
        beginning.append(block)
        num_bytes += len(block)
        if num_bytes >= HEAD_BYTES:
            break
    head = b"".join(beginning)
    check_head(head, name, encoding)
    if encoding in _MARKS[UTF8_MARK]:
        yield from [head.removeprefix(UTF8_MARK)] if head.startswith(UTF8_MARK) else beginning
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)(_INVALID)
    is_first = True
    for block in chain(beginning, blocks):
        text = decoder.decode(block)
        if is_first and text:
            text, is_first = text.removeprefix("\ufeff"), False
        yield text.encode("utf-8", "surrogateescape")
    yield decoder.decode(b"", final=True).encode("utf-8", "surrogateescape")


def check_head(head: bytes, name: str, encoding: str) -> None:
    """Checks from the first bytes of a file that it is text in the given encoding.

    Raises:
        UserError: If the file is not text, or is not in the given encoding.
    """
    head = head[:HEAD_BYTES]
    marked = next((names for mark, names in _MARKS.items() if head.startswith(mark)), None)
    if marked is not None and encoding not in marked:
        raise UserError(
            f"not {encoding}: {name}: begins with the byte-order mark of {marked[0]}: set "
            f"--encoding {marked[0]}"
        )
    for magic, kind in _BINARY_MAGICS.items():
        if head.startswith(magic) and (
            magic not in _MAGICS_THAT_TEXT_MAY_HAVE or _has_control_character(head)
        ):
            raise UserError(f"not text: {name}: it is {kind}: decompress or convert it first")
    if head[_TAR_MAGIC_OFFSET:].startswith(_TAR_MAGIC) and b"\0" in head[:_TAR_MAGIC_OFFSET]:
        raise UserError(f"not text: {name}: it is a tar archive: unpack it first")
    num_zeros = head.count(b"\0")
    if encoding.startswith(("utf-16", "utf-32")):
        if marked is None and encoding in ("utf-16", "utf-32") and head:
            raise UserError(
                f"not {encoding}: {name}: has no byte-order mark: set --encoding {encoding}-le "
                f"or {encoding}-be"
            )
        is_utf8 = len(head) >= _MIN_TELLING_BYTES and not num_zeros and _is_utf8(head)
    else:
        if num_zeros * 16 > len(head):
            raise UserError(
                f"not text: {name}: {num_zeros} of its first {len(head)} bytes are NUL, so it is "
                "binary or UTF-16 without a byte-order mark (set --encoding utf-16-le or "
                "utf-16-be)"
            )
        if encoding in _MARKS[UTF8_MARK]:
            return
        is_utf8 = sum(byte >= 0x80 for byte in head) >= _MIN_TELLING_BYTES and _is_utf8(head)
    if is_utf8:
        raise UserError(f"not {encoding}: {name}: is UTF-8: remove --encoding")


def check_share_of_invalid(num_invalid: int, data: bytes, where: str) -> None:
    """Raises `UserError` if so many characters of ``data`` are invalid that it is not UTF-8.

    ``where`` is the file and line of the first invalid character, for the message.
    """
    limit = min(NUM_INVALID_LET_PASS + MAX_INVALID_SHARE * len(data), len(data) / 2)
    if num_invalid > limit:
        raise UserError(
            f"not UTF-8: {where}: {num_invalid} invalid characters in {len(data)} bytes: "
            f"{guess_encoding(data)}"
        )


def num_invalid_characters(data: bytes, text: str) -> int:
    """Counts the U+FFFD in a decoded text that replace invalid bytes of `data`."""
    return text.count("\ufffd") - data.count(b"\xef\xbf\xbd")


def guess_encoding(data: bytes) -> str:
    """Returns advice for an error message on which encodings can decode the bytes."""
    sample = data[:HEAD_BYTES]
    fitting = []
    for encoding in _GUESSES:
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            decoder.decode(sample)
        except UnicodeDecodeError:
            continue
        fitting.append(encoding)
    if not fitting:
        return "set its encoding with --encoding, if it is text"
    return f"set its encoding with --encoding (it may be {' or '.join(fitting[:3])})"


def _replace_invalid(error: UnicodeError) -> tuple[str, int]:
    """Replaces invalid bytes by U+DCFF, which "surrogateescape" encodes as the byte 0xFF."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error(_INVALID, _replace_invalid)


def _has_control_character(head: bytes) -> bool:
    return any(byte < 32 and byte not in b"\t\n\r\f" for byte in head[:1024])


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
