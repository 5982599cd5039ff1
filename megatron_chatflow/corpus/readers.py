"""Reads input files in chunks of bounded size.

In: `InputFile`s. Out: `Chunk`s, each with whole records, its place in the file, and how far the
file has been read. What a chunk holds does not depend on who will parse it.
"""

import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, Literal

import orjson
import zstandard

from megatron_chatflow.corpus.inputs import InputFile
from megatron_chatflow.errors import UserError

CHUNK_BYTES = 1 << 20
# A line, a text file that is one document, or a JSON array has to fit into memory.
MAX_RECORD_BYTES = 1 << 28
MAX_TXT_FILE_BYTES = 1 << 26
NUM_OBJECTS_PER_CHUNK = 1000
BITE_BYTES = 1 << 14
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

TxtDocuments = Literal["file", "line"]


@dataclass(frozen=True)
class Chunk:
    """Some records of one file.

    Attributes:
        name: The file's.
        first_line: Number of its first record, counted from 1.
        kind: "lines" (JSON or tab-separated), "text_lines" (a document each), "text" (one
            document), "objects" (parsed JSON).
        data: The bytes, or the list of objects.
        num_bytes_read: How far into the file on disk the reader was.
    """

    name: str
    first_line: int
    kind: Literal["lines", "text_lines", "text", "objects"]
    data: Any
    num_bytes_read: int


class _Source:
    """A file on disk or standard input, that knows how much of it has been read."""

    def __init__(self, file: InputFile) -> None:
        self.num_bytes_read = 0
        try:
            self._stream: IO[bytes] = (
                sys.stdin.buffer if file.path is None else file.path.open("rb", buffering=0)
            )
        except OSError as error:
            raise UserError(f"cannot read: {file.path}: {error.strerror}") from error

    def read(self) -> bytes:
        block = self._stream.read(CHUNK_BYTES)
        self.num_bytes_read += len(block)
        return block

    def close(self) -> None:
        if self._stream is not sys.stdin.buffer:
            self._stream.close()


def read_chunks(
    file: InputFile,
    *,
    txt_documents: TxtDocuments | None = "file",
    columns: Sequence[str] | None = None,
) -> Iterator[Chunk]:
    """Yields a file's records in chunks of about a mebibyte.

    Args:
        file: The file.
        txt_documents: Whether a `.txt` file is one document or one a line; None where its lines
            are records of another format.
        columns: The columns of a parquet file that are wanted; None for all.

    Raises:
        UserError: The file cannot be read, or is damaged.
    """
    if file.kind == "parquet":
        yield from _read_parquet(file, columns)
        return
    source = _Source(file)
    try:
        blocks = _without_byte_order_mark(_decompressed(source, file.name))
        if file.kind == "txt" and txt_documents == "file":
            yield _whole_text(blocks, file.name, source)
        elif file.kind == "txt" and txt_documents == "line":
            yield from _line_chunks(blocks, file.name, source, "text_lines")
        elif file.kind == "json":
            yield from _read_json(blocks, file.name, source)
        else:
            yield from _line_chunks(blocks, file.name, source, "lines")
    except (OSError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"cannot read: {file.name}: {error}") from error
    finally:
        source.close()


class CorpusReader:
    """Reads all inputs of a job.

    Attributes:
        num_bytes: For each file, how much of it there is on disk: known in advance, or, for a
            pipe, once it has been read.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        txt_documents: TxtDocuments | None,
        columns: Sequence[str] | None,
    ) -> None:
        """Takes the files, and the options of `read_chunks`."""
        self._files = files
        self._txt_documents: TxtDocuments | None = txt_documents
        self._columns = columns
        self.num_bytes = [file.num_bytes for file in files]

    def chunks(self) -> Iterator[Chunk]:
        """Every file's chunks, with `num_bytes_read` counted over all files.

        Raises:
            UserError: A file cannot be read, or is damaged.
        """
        num_bytes_before = 0
        for number, file in enumerate(self._files):
            chunks = read_chunks(file, txt_documents=self._txt_documents, columns=self._columns)
            for chunk in chunks:
                self.num_bytes[number] = max(self.num_bytes[number], chunk.num_bytes_read)
                yield replace(chunk, num_bytes_read=num_bytes_before + chunk.num_bytes_read)
            num_bytes_before += self.num_bytes[number]


def _decompressed(source: _Source, name: str) -> Iterator[bytes]:
    """Blocks of a file's content; gzip and zstd are known by their first bytes."""
    block = source.read()
    while 0 < len(block) < len(ZSTD_MAGIC) and (more := source.read()):
        block += more  # a pipe may hand out its first bytes one by one
    decompressor = _decompressor(block)
    if decompressor is None:
        while block:
            yield block
            block = source.read()
        return
    while block:
        # Small bites, so that a highly compressed file cannot fill the memory at once.
        for begin in range(0, len(block), BITE_BYTES):
            bite = block[begin : begin + (BITE_BYTES)]
            while bite:
                if decompressor.eof:
                    decompressor = _decompressor(bite)  # the next member of a concatenation
                    if decompressor is None:
                        raise UserError(f"cannot read: {name}: garbage after its compressed end")
                yield decompressor.decompress(bite)
                bite = decompressor.unused_data
        block = source.read()
    if not decompressor.eof:
        raise UserError(f"cannot read: {name}: its compressed content is truncated")


def _decompressor(block: bytes) -> Any:
    if block.startswith(GZIP_MAGIC):
        return zlib.decompressobj(wbits=31)
    if block.startswith(ZSTD_MAGIC):
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    return None


def _without_byte_order_mark(blocks: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    for block in blocks:
        head += block
        if len(head) >= len(BYTE_ORDER_MARK):
            break
    yield head.removeprefix(BYTE_ORDER_MARK)
    yield from blocks


def _line_chunks(
    blocks: Iterator[bytes],
    name: str,
    source: _Source,
    kind: Literal["lines", "text_lines"],
) -> Iterator[Chunk]:
    """Chunks that end at line ends."""
    first_line = 1
    pending: list[bytes] = []
    num_pending = 0
    for block in blocks:
        end = block.rfind(b"\n") + 1
        num_pending += len(block)
        if end == 0 or num_pending < CHUNK_BYTES:
            pending.append(block)
            if num_pending > MAX_RECORD_BYTES:
                raise UserError(
                    f"line too long: {name}:{first_line}: more than {MAX_RECORD_BYTES} bytes "
                    "without a line end: is this a file of lines?"
                )
            continue
        data = b"".join([*pending, block[:end]])
        yield Chunk(name, first_line, kind, data, source.num_bytes_read)
        first_line += data.count(b"\n")
        pending = [block[end:]]
        num_pending = len(block) - end
    if num_pending:
        yield Chunk(name, first_line, kind, b"".join(pending), source.num_bytes_read)


def _whole(blocks: Iterator[bytes], limit: int, complaint: str) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    for block in blocks:
        parts.append(block)
        num_bytes += len(block)
        if num_bytes > limit:
            raise UserError(complaint)
    return b"".join(parts)


def _whole_text(blocks: Iterator[bytes], name: str, source: _Source) -> Chunk:
    data = _whole(
        blocks,
        MAX_TXT_FILE_BYTES,
        f"text file too large: {name}: more than {MAX_TXT_FILE_BYTES} bytes as one document: "
        "use --txt-documents line, or jsonl",
    )
    return Chunk(name, 1, "text", data, source.num_bytes_read)


def _read_json(blocks: Iterator[bytes], name: str, source: _Source) -> Iterator[Chunk]:
    """A `.json` file: one array of records, or a record on each line."""
    head = b""
    for block in blocks:
        head += block
        if head.strip():
            break
    rest = _chain(head, blocks)
    if not head.lstrip().startswith(b"["):
        yield from _line_chunks(rest, name, source, "lines")
        return
    data = _whole(
        rest,
        MAX_RECORD_BYTES,
        f"JSON array too large: {name}: more than {MAX_RECORD_BYTES} bytes: convert it to jsonl",
    )
    try:
        objects = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise UserError(f"malformed JSON array: {name}:{error.lineno}: {error.msg}") from error
    for begin in range(0, len(objects), NUM_OBJECTS_PER_CHUNK):
        part = objects[begin : begin + NUM_OBJECTS_PER_CHUNK]
        yield Chunk(name, begin + 1, "objects", part, source.num_bytes_read)


def _chain(head: bytes, blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from blocks


def _read_parquet(file: InputFile, columns: Sequence[str] | None) -> Iterator[Chunk]:
    """Rows as objects; a row's number stands for the line number."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(
            f"cannot read: {file.name}: parquet needs pyarrow: pip install pyarrow"
        ) from (error)
    assert file.path is not None  # standard input is lines
    try:
        with parquet.ParquetFile(file.path) as content:
            names = content.schema_arrow.names
            wanted = None if columns is None else [name for name in columns if name in names]
            if wanted == []:
                raise UserError(
                    f"no such column: {file.name}: has {', '.join(names)}, "
                    f"but {', '.join(columns or ())} is wanted"
                )
            first_row = 1
            for batch in content.iter_batches(batch_size=256, columns=wanted):
                rows = batch.to_pylist()
                position = file.num_bytes * (first_row - 1) // content.metadata.num_rows
                yield Chunk(file.name, first_row, "objects", rows, position)
                first_row += len(rows)
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read: {file.name}: {error}") from error
