"""Tells text in UTF-8 from everything else that may lie in a file of text.

A corpus in another encoding decodes without an error into characters that nobody wrote. Therefore
a file is refused at its first bytes if they are the mark of UTF-16 or of a kind of file that is not
text, and text is refused if more than a small share of it is not UTF-8. Other encodings are read
when they are named: `transcode` turns them into UTF-8 before anything else looks at the bytes, so
that line ends, JSON and byte limits mean the same everywhere.
"""

import codecs
from collections.abc import Iterator
from itertools import chain

from megatron_chatflow.errors import UserError

UTF8_MARK = b"\xef\xbb\xbf"
# In this order: the mark of UTF-32 (little-endian) begins with that of UTF-16.
_MARKS = {
    UTF8_MARK: ("utf-8", "utf-8-sig"),
    b"\xff\xfe\0\0": ("utf-32", "utf-32-le"),
    b"\0\0\xfe\xff": ("utf-32", "utf-32-be"),
    b"\xff\xfe": ("utf-16", "utf-16-le"),
    b"\xfe\xff": ("utf-16", "utf-16-be"),
}
_BINARY_MAGICS = {
    b"\x1f\x8b": "gzip",  # inside of another compression: the outer one is gone already
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
_MAGICS_THAT_TEXT_MAY_HAVE = (b"BZh", b"ORC", b"PAR1")  # and only a control character tells
_TAR_MAGIC, _TAR_MAGIC_OFFSET = b"ustar", 257
HEAD_BYTES = 1 << 16
MAX_INVALID_SHARE = 1e-3  # of the characters
NUM_INVALID_LET_PASS = 2  # in a short text, a share says little
_GUESSES = ("gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "cp1252")
_MIN_TELLING_BYTES = 64  # so many bytes outside ASCII are UTF-8 by chance in no other encoding
_INVALID = "chatflow_invalid"


def canonical_encoding(name: str) -> str:
    """Python's name of a text encoding.

    Raises:
        UserError: There is no such encoding, or it is one from bytes to bytes.
    """
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError) as error:
        raise UserError(
            f"--encoding: {name}: no such encoding: such as utf-8, utf-16, gb18030, big5, shift_jis"
        ) from error
    if not info._is_text_encoding or info.incrementaldecoder is None:
        raise UserError(f"--encoding: {name}: is not an encoding of text")
    return info.name


def transcode(blocks: Iterator[bytes], name: str, encoding: str) -> Iterator[bytes]:
    """Checks the beginning of a stream of text and yields it as UTF-8, without a byte-order mark.

    What cannot be decoded becomes a byte that is not UTF-8 either: it is dropped, replaced and
    counted where all text is.

    Args:
        blocks: The text's bytes.
        name: The file's name, for messages.
        encoding: A result of `canonical_encoding`.

    Raises:
        UserError: The stream is not text, or is in another encoding than the one named.
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
    """Refuses text by its first bytes, as `transcode` does.

    Args:
        head: The first bytes; `HEAD_BYTES` of them are enough.
        name: The file's name, for messages.
        encoding: A result of `canonical_encoding`.

    Raises:
        UserError: It is not text, or in another encoding than the one named.
    """
    head = head[:HEAD_BYTES]
    marked = next((names for mark, names in _MARKS.items() if head.startswith(mark)), None)
    if marked is not None and encoding not in marked:
        raise UserError(
            f"not {encoding}: {name}: begins with the mark of {marked[0]}: "
            f"name it with --encoding {marked[0]}"
        )
    for magic, kind in _BINARY_MAGICS.items():
        if head.startswith(magic) and (
            magic not in _MAGICS_THAT_TEXT_MAY_HAVE or _has_control_character(head)
        ):
            raise UserError(
                f"not text: {name}: its content is {kind}: decompress or convert it first"
            )
    if head[_TAR_MAGIC_OFFSET:].startswith(_TAR_MAGIC) and b"\0" in head[:_TAR_MAGIC_OFFSET]:
        raise UserError(f"not text: {name}: its content is a tar archive: unpack it first")
    num_zeros = head.count(b"\0")
    if encoding.startswith(("utf-16", "utf-32")):
        if marked is None and encoding in ("utf-16", "utf-32") and head:
            raise UserError(
                f"not {encoding}: {name}: has no byte-order mark: name it with "
                f"--encoding {encoding}-le or {encoding}-be, if it is"
            )
        is_utf8 = len(head) >= _MIN_TELLING_BYTES and not num_zeros and _is_utf8(head)
    else:
        if num_zeros * 16 > len(head):
            raise UserError(
                f"not text: {name}: {num_zeros} of its first {len(head)} bytes are NUL, as in "
                "UTF-16 without a mark (--encoding utf-16-le or utf-16-be) or in a binary file"
            )
        if encoding in _MARKS[UTF8_MARK]:
            return
        is_utf8 = sum(byte >= 0x80 for byte in head) >= _MIN_TELLING_BYTES and _is_utf8(head)
    if is_utf8:
        raise UserError(f"not {encoding}: {name}: is UTF-8: leave --encoding out")


def check_share_of_invalid(num_invalid: int, data: bytes, where: str) -> None:
    """Refuses text of which more than a few characters are not UTF-8.

    Args:
        num_invalid: How many characters of it cannot be decoded.
        data: The text's bytes.
        where: The file and the line of the first such character, for messages.

    Raises:
        UserError: They are too many, which is how text in another encoding looks.
    """
    limit = min(NUM_INVALID_LET_PASS + MAX_INVALID_SHARE * len(data), len(data) / 2)
    if num_invalid > limit:
        raise UserError(
            f"not UTF-8: {where}: {num_invalid} characters in {len(data)} bytes: "
            f"{guess_encoding(data)}"
        )


def num_invalid_characters(data: bytes, text: str) -> int:
    """How often U+FFFD stands in a decoded text for bytes that could not be decoded."""
    return text.count("\ufffd") - data.count(b"\xef\xbf\xbd")


def guess_encoding(data: bytes) -> str:
    """Advice on which encoding some bytes may have, for a message."""
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
        return "name its encoding with --encoding, if it is text"
    return f"name its encoding with --encoding ({' or '.join(fitting[:3])} would fit)"


def _replace_invalid(error: UnicodeError) -> tuple[str, int]:
    """Marks bytes that cannot be decoded, for "surrogateescape" to turn into a byte 0xFF."""
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
