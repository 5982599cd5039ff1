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

from megatron_chatflow.corpus.compressed import MAGIC_BYTES, decompress, is_compressed
from megatron_chatflow.corpus.encodings import guess_encoding, transcode
from megatron_chatflow.corpus.inputs import InputFile
from megatron_chatflow.corpus.tab_separated import (
    TabLayout,
    TabOptions,
    are_json_lines,
    tab_layout,
)
from megatron_chatflow.errors import UserError

CHUNK_BYTES = 1 << 20
# A line, a text file that is one document, or a JSON array has to fit into memory.
MAX_RECORD_BYTES = 1 << 28
MAX_TXT_FILE_BYTES = 1 << 26
NUM_OBJECTS_PER_CHUNK = 1000

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
        layout: Of tab-separated lines, where the pair lies in them; None for JSON.
    """

    name: str
    first_line: int
    kind: Literal["lines", "text_lines", "text", "objects"]
    data: Any
    num_bytes_read: int
    layout: TabLayout | None = None


@dataclass(frozen=True)
class ReadOptions:
    """What has to be known to cut files into records.

    Attributes:
        txt_documents: Whether a `.txt` file is one document or one a line; None where its lines
            are records of another format.
        columns: The columns of a parquet file that are wanted; None for all.
        encoding: Of text, as `canonical_encoding` names it; chunks are UTF-8.
        tabs: How tab-separated lines hold pairs; None where records are not pairs.
    """

    txt_documents: TxtDocuments | None = "file"
    columns: Sequence[str] | None = None
    encoding: str = "utf-8"
    tabs: TabOptions | None = None


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


def read_chunks(file: InputFile, options: ReadOptions = ReadOptions()) -> Iterator[Chunk]:
    """Yields a file's records in chunks of about a mebibyte.

    Args:
        file: The file.
        options: What its records are.

    Raises:
        UserError: The file cannot be read, or is damaged.
    """
    if file.kind == "parquet":
        yield from _read_parquet(file, options.columns)
        return
    if file.kind == "tsv" and options.tabs is None:
        raise UserError(f"tab-separated lines hold pairs: {file.name}: read it in the format pairs")
    source = _Source(file)
    try:
        blocks = transcode(_decompressed(source, file.name), file.name, options.encoding)
        if file.kind == "txt" and options.txt_documents == "file":
            yield _whole_text(blocks, file.name, source)
        elif file.kind == "txt" and options.txt_documents == "line":
            yield from _line_chunks(blocks, file.name, source, "text_lines")
        elif file.kind == "json":
            yield from _read_json(blocks, file.name, source)
        else:
            chunks = _line_chunks(blocks, file.name, source, "lines")
            yield from _with_layout(chunks, file, options.tabs)
    except (OSError, zlib.error, zstandard.ZstdError, UnicodeError) as error:
        raise UserError(f"cannot read: {file.name}: {error}") from error
    finally:
        source.close()


class CorpusReader:
    """Reads all inputs of a job.

    Attributes:
        num_bytes: For each file, how much of it there is on disk: known in advance, or, for a
            pipe, once it has been read.
    """

    def __init__(self, files: Sequence[InputFile], options: ReadOptions) -> None:
        """Initializes the reader. No file is opened until the first chunk is requested."""
        self._files = files
        self._options = options
        self.num_bytes = [file.num_bytes for file in files]

    def chunks(self) -> Iterator[Chunk]:
        """Every file's chunks, with `num_bytes_read` counted over all files.

        Raises:
            UserError: A file cannot be read, or is damaged.
        """
        num_bytes_before = 0
        for number, file in enumerate(self._files):
            for chunk in read_chunks(file, self._options):
                self.num_bytes[number] = max(self.num_bytes[number], chunk.num_bytes_read)
                yield replace(chunk, num_bytes_read=num_bytes_before + chunk.num_bytes_read)
            num_bytes_before += self.num_bytes[number]


def _decompressed(source: _Source, name: str) -> Iterator[bytes]:
    """Blocks of a file's content, decompressed if it is gzip or zstd."""
    blocks = iter(source.read, b"")
    head = b""
    for block in blocks:
        head += block
        if len(head) >= MAGIC_BYTES:  # a pipe may hand out its first bytes one by one
            break
    whole = _chain(head, blocks)
    return decompress(whole, name) if is_compressed(head) else whole


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
            _check_line(num_pending, name, first_line)
            continue
        data = b"".join([*pending, block[:end]])
        yield Chunk(name, first_line, kind, data, source.num_bytes_read)
        first_line += data.count(b"\n")
        pending = [block[end:]]
        num_pending = len(block) - end
    if num_pending:
        _check_line(num_pending, name, first_line)
        yield Chunk(name, first_line, kind, b"".join(pending), source.num_bytes_read)


def _with_layout(
    chunks: Iterator[Chunk], file: InputFile, tabs: TabOptions | None
) -> Iterator[Chunk]:
    """Chunks of lines, once their beginning has said whether they are JSON or tab-separated."""
    layout: TabLayout | None = None
    is_known = False
    for chunk in chunks:
        if not is_known and not chunk.data.isspace():
            is_known = True
            is_json = file.kind == "jsonl" or (file.kind != "tsv" and are_json_lines(chunk.data))
            if tabs is not None and not is_json:
                layout = tab_layout(chunk.data, file.name, chunk.first_line, tabs)
            elif tabs is not None and tabs.columns is not None:
                raise UserError(f"--pair-columns: {file.name}: its lines are JSON, without columns")
            elif chunk.data.lstrip().startswith(b"["):
                raise UserError(
                    f"not JSON lines: {file.name}:{chunk.first_line}: begins with [ like a JSON "
                    "array: give the file a name that ends in .json"
                )
        yield chunk if layout is None else replace(chunk, layout=layout)


def _check_line(num_bytes: int, name: str, number: int) -> None:
    if num_bytes > MAX_RECORD_BYTES:
        raise UserError(
            f"line too long: {name}:{number}: more than {MAX_RECORD_BYTES} bytes without a line "
            "end: is this a file of lines?"
        )


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
        raise UserError(_complaint_about_array(name, data, error)) from error
    for begin in range(0, len(objects), NUM_OBJECTS_PER_CHUNK):
        part = objects[begin : begin + NUM_OBJECTS_PER_CHUNK]
        yield Chunk(name, begin + 1, "objects", part, source.num_bytes_read)


def _complaint_about_array(name: str, data: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        data.decode()
    except UnicodeDecodeError as undecodable:
        line = data.count(b"\n", 0, undecodable.start) + 1
        sample = data[undecodable.start :]
        return f"not UTF-8: {name}:{line}: {guess_encoding(sample)}"
    return f"malformed JSON array: {name}:{error.lineno}: {error.msg}"


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
