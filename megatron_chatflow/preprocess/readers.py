"""Finds input files and reads them in chunks of bounded size.

`find_inputs` expands paths, globs, folders and `-` (standard input) to files in a fixed order and
determines the kind of each file. Other files in a folder or glob are logged with counts, and data
in an unsupported format is an error, so that no part of a corpus is skipped unnoticed.

`CorpusReader` yields `Chunk`s of whole records with their position in the file and the number of
bytes read so far. Chunks do not depend on the number of workers.
"""

import glob
import logging
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import orjson
import zstandard

from megatron_chatflow import remote
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import is_url
from megatron_chatflow.preprocess.chats import begins_with_messages, is_list_of_messages
from megatron_chatflow.preprocess.compressed import MAGIC_BYTES, decompress, is_compressed
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.preprocess.tab_separated import (
    TabLayout,
    are_json_lines,
    tab_layout,
)
from megatron_chatflow.remote import RemoteFile
from megatron_chatflow.tokenizer.text_encoding import guess_encoding, transcode

logger = logging.getLogger(__name__)

RecordKind = Literal["lines", "jsonl", "tsv", "json", "txt", "parquet"]
ChunkKind = Literal["lines", "text_lines", "text", "objects"]
RECORD_KINDS: dict[str, RecordKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".tsv": "tsv",
    ".json": "json",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
}
COMPRESSION_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
# Files that may contain text but have no reader.
UNREADABLE_SUFFIXES = frozenset(
    ".csv .arrow .feather .avro .orc .xls .xlsx .ods .tfrecord .tfrecords .h5 .hdf5 .warc .wet "
    ".wat .lmdb .xml .tmx .xlf .doc .docx .odt .epub "
    ".bz2 .xz .lzma .lz4 .br .snappy .sz .z .zip .7z .rar .tar .tgz .tbz2 .txz".split()
)
STANDARD_INPUT_NAMES = frozenset(["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
# Names of text files that describe a corpus and are not part of it.
_CORPUS_METADATA = re.compile(
    r"readme([-._].*)?|licen[cs]es?([-._](mit|apache|bsd|l?gpl|cc|odc).*)?|copying|notice|authors|"
    r"change(log|s)|citation|contributing|requirements|(sha\d*|md5)(sums?)?|checksums?",
    re.IGNORECASE,
)
_DATASETS_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_NUM_NAMED = 3  # files that are listed in a message

CHUNK_BYTES = 1 << 20
FREE_EXPANSION_BYTES = 256 << 20  # every file may expand to at least this size
# A parsed JSON value needs up to 100 bytes of memory but may be written with only two bytes. A
# record may have one value for each `RECORD_BYTES_PER_VALUE` bytes of its maximum size, so a parsed
# record needs at most about seven times the maximum size.
RECORD_BYTES_PER_VALUE = 16
NUM_RECORDS_OF_ARRAY = 4  # maximum size of a JSON array, in records of maximum size
NUM_OBJECTS_PER_CHUNK = 1000
NUM_ROWS_PER_BATCH = 256
MAX_BATCH_BYTES = 1 << 28  # maximum size of the rows that are decoded together
MAX_ROW_GROUP_BYTES = 1 << 30  # fewer rows are decoded together from larger columns
_DICTIONARY_PAGE = 2
_SEPARATORS = (b",", b":", b"[", b"{")
_COUNT_BYTES = 1 << 20  # JSON bytes whose values are counted at once


@dataclass(frozen=True)
class InputFile:
    """An input file or standard input."""

    # path of the file, or a file that a URL names; None for standard input
    path: Path | RemoteFile | None
    name: str  # name in messages and in the sidecar
    # Format of the records. "lines" is used for pipes and standard input, where no file name
    # distinguishes JSON from tab-separated lines.
    kind: RecordKind
    num_bytes: int  # size on disk in bytes; 0 if unknown


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """Expands the inputs (files, globs, folders, or `-` for standard input) to files.

    The inputs keep their order; the files of a folder or glob are sorted by path. Folders are
    searched recursively for files with known extensions. Symbolic links are followed, and a file or
    folder with several paths is read once. Hidden files, documentation and files of other kinds are
    skipped and logged with their counts.

    Raises:
        UserError: No file matches, a file is given twice or cannot be read, or its kind is
            unknown.
    """
    try:
        files = [file for name in inputs for file in _expand(name)]
    except OSError as error:
        raise UserError(f"cannot read: {error.filename}: {error.strerror}") from error
    if not files:
        raise UserError("no input: give at least one file, folder or glob")
    given: dict[str, str] = {}
    for file in files:
        real = "-" if file.path is None else str(file.path)
        if isinstance(file.path, Path):
            real = os.path.realpath(file.path)
        name = file.name if file.path is None else str(file.path)
        if real in given:
            raise UserError(
                f"input given twice: {given[real]} and {name}: list it once; its weight in the "
                "schedule decides how often it is trained on"
            )
        given[real] = name
    return files


@dataclass
class _FoundFiles:
    """Files found in a folder or by a glob: to read, unsupported, and counts of skipped ones."""

    files: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def classify(self, path: Path) -> bool:
        """Adds a file to one of the groups by its name. Returns whether the file is to be read."""
        kind = _kind_of(path)
        ending = path.suffix.lower()
        if kind is None and ending not in (*UNREADABLE_SUFFIXES, *COMPRESSION_SUFFIXES):
            self.skipped[ending or "without an extension"] += 1
        elif kind is not None and _is_corpus_metadata(path):
            self.skipped[path.name] += 1
        elif not path.exists():
            raise UserError(f"cannot read: {path}: the link is broken")
        elif not path.is_file():
            self.skipped["special files"] += 1
        elif kind is None:
            self.unreadable.append(path)
        else:
            self.files.append(path)
            return True
        return False

    def report(self, name: str) -> None:
        """Logs the skipped files and raises an error if there are unsupported files with data."""
        if self.unreadable:
            endings = Counter("".join(path.suffixes[-2:]).lower() for path in self.unreadable)
            named = ", ".join(str(path) for path in sorted(self.unreadable)[:_NUM_NAMED])
            others = ", ..." if len(self.unreadable) > _NUM_NAMED else ""
            raise UserError(
                f"cannot read: {len(self.unreadable)} files in {name}: {_counts(endings)} "
                f"({named}{others}): convert them to jsonl or parquet, recompress them as .gz or "
                ".zst, or select the files to read with a glob such as "
                f"'{name.rstrip('/')}/**/*.jsonl'"
            )
        if self.skipped:
            logger.warning("ignored in %s: %s", name, _counts(self.skipped))


def _expand(name: str) -> list[InputFile]:
    if name in STANDARD_INPUT_NAMES:
        return [InputFile(None, "<stdin>", "lines", 0)]
    if is_url(name):
        name = remote.parse_location(name)
        if is_url(name):
            return _expand_url(name, remote.find(name))
    path = Path(name)
    if path.is_dir():
        found = _search(path)
        found.report(name)
        if not found.files:
            endings = " ".join(RECORD_KINDS)
            raise UserError(
                f"no input in folder: {path}: none of its files has an extension among {endings}"
            )
        return [_input_file(file, file.relative_to(path).as_posix()) for file in found.files]
    if path.exists():
        return [_input_file(path, path.name)]
    if not glob.has_magic(name):
        raise UserError(f"no input: {name}: no such file or folder")
    found = _matches(name)
    found.report(name)
    if not found.files:
        raise UserError(f"no input: {name}: the glob matches no file")
    return [_input_file(match, match.name) for match in found.files]


def _expand_url(url: str, found: Sequence[RemoteFile]) -> list[InputFile]:
    """Selects among the files of a URL as `_search` and `_matches` do; there are no links."""
    if len(found) == 1 and found[0].url == url:
        name = PurePosixPath(str(found[0])).name
        return [InputFile(found[0], name, _kind_or_error(Path(name), url), found[0].num_bytes or 0)]
    is_folder = not remote.has_magic(url)
    top = f"{url.rstrip('/')}/" if is_folder else f"{url.partition('://')[0]}://"
    urls = {file.url for file in found}
    hides = is_folder or "/." not in url  # as Python's globs do
    selection = _FoundFiles()
    files = []
    for file in found:
        path = Path(file.url.removeprefix(top))
        kind, ending = _kind_of(path), path.suffix.lower()
        if hides and any(part.startswith(".") for part in path.parts):
            selection.skipped["hidden"] += is_folder
        elif kind is None and ending in (*UNREADABLE_SUFFIXES, *COMPRESSION_SUFFIXES):
            selection.unreadable.append(path)
        elif kind is None and is_folder:
            selection.skipped[ending or "without an extension"] += 1
        elif _is_corpus_metadata(path, lambda path: f"{top}{path}" in urls):
            selection.skipped[path.name] += 1
        else:
            name = path.as_posix() if is_folder else path.name
            kind = _kind_or_error(path, file.url)
            files.append(InputFile(file, name, kind, file.num_bytes or 0))
    selection.report(url)
    if not files:
        raise UserError(
            f"no input: {remote.mask(url)}: no such file, and no folder or glob with files to read"
        )
    return files


def _matches(pattern: str) -> _FoundFiles:
    """Finds the files of a glob. `_input_file` raises an error for unknown extensions."""
    found = _FoundFiles()
    matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    folders = [match for match in matches if match.is_dir()]
    if folders and "**" not in pattern:
        found.skipped["folders"] = len(folders)
    seen: set[str] = set()
    for match in sorted(set(matches) - set(folders), key=lambda path: (path.is_symlink(), path)):
        real = os.path.realpath(match)
        if real in seen:
            found.skipped["other links to the same files"] += 1
        elif not match.exists():
            raise UserError(f"cannot read: {match}: the link is broken")
        elif _kind_of(match) is not None and _is_corpus_metadata(match):
            found.skipped[match.name] += 1
        else:
            seen.add(real)
            found.files.append(match)
    found.files.sort()
    return found


def _search(folder: Path) -> _FoundFiles:
    """Finds the files in a folder and its subfolders.

    Linked folders are entered after all others, so that a folder with several paths is read under
    its own path. Every folder is entered only once, which also prevents cycles.
    """
    found = _FoundFiles()
    top = os.path.realpath(folder)
    entered: set[str] = set()
    seen: set[str] = set()
    linked_files: list[Path] = []
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            real_start = os.path.realpath(start)
            if real_start != top and f"{top}/".startswith(f"{real_start.rstrip('/')}/"):
                found.skipped["links to a folder above"] += 1
                continue
            for parent, folders, names in os.walk(start, onerror=_raise):
                real = os.path.realpath(parent)
                if real in entered:
                    found.skipped["other links to the same folders"] += 1
                    folders.clear()
                    continue
                entered.add(real)
                num_all = len(folders) + len(names)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                kept = sorted(name for name in names if not name.startswith("."))
                if num_hidden := num_all - len(folders) - len(kept):
                    found.skipped["hidden"] += num_hidden
                links += [Path(parent, name) for name in folders if _is_link(parent, name)]
                linked_files += [Path(parent, name) for name in kept if _is_link(parent, name)]
                for name in kept:
                    if not _is_link(parent, name) and found.classify(Path(parent, name)):
                        seen.add(os.path.join(real, name))
        waiting = sorted(links)
    for path in sorted(linked_files):
        real = os.path.realpath(path)
        if real in seen:
            found.skipped["other links to the same files"] += 1
        elif found.classify(path):
            seen.add(real)
    found.files.sort()
    return found


def _is_link(parent: str, name: str) -> bool:
    return os.path.islink(os.path.join(parent, name))


def _raise(error: OSError) -> NoReturn:
    raise error


def _is_corpus_metadata(path: Path, exists: Callable[[Path], bool] = Path.exists) -> bool:
    """Returns whether a file is documentation or metadata of a dataset in the same folder."""
    name = path.name
    while Path(name).suffix.lower() in (*RECORD_KINDS, *COMPRESSION_SUFFIXES):
        name = Path(name).stem
    if path.suffix == ".json" and (
        path.name in _DATASETS_METADATA or exists(path.with_suffix(".idx"))
    ):
        return True
    return _kind_of(path) == "txt" and _CORPUS_METADATA.fullmatch(name) is not None


def _counts(counts: Counter[str]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {name}" for name, number in ordered)


def _kind_of(path: Path) -> RecordKind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return RECORD_KINDS.get(suffixes[-1]) if suffixes else None


def _kind_or_error(path: Path, shown: str) -> RecordKind:
    kind = _kind_of(path)
    if kind is None:
        endings = " ".join(RECORD_KINDS)
        raise UserError(
            f"unknown kind of input: {shown}: the extension must be one of {endings}, optionally "
            "followed by .gz or .zst"
        )
    return kind


def open_input(path: Path | RemoteFile) -> IO[bytes]:
    """Opens a file for reading in binary, unbuffered."""
    return path.open("rb", buffering=0) if isinstance(path, Path) else path.open()


def _input_file(path: Path, name: str) -> InputFile:
    kind = _kind_of(path)
    if (
        path.is_fifo()
        or path.is_char_device()
        or path.parent.as_posix() in ("/dev/fd", "/proc/self/fd")
    ):
        return InputFile(path, str(path), kind or "lines", 0)
    kind = kind or _kind_or_error(path, str(path))
    if not os.access(path, os.R_OK):
        raise UserError(f"cannot read: {path}: permission denied")
    # The sidecar is JSON, so bytes in the name that are not UTF-8 are written as in "\xff".
    name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return InputFile(path, name, kind, path.stat().st_size)


@dataclass(frozen=True)
class OversizedRecord:
    """A placeholder for a record that was skipped because it is too large."""


@dataclass(frozen=True)
class InvalidUtf8Record:
    """A placeholder for a row whose text is not UTF-8. Parquet files are not checked for that."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file."""

    name: str  # name of the file
    first_line: int  # number of the first line or record, counted from 1
    # "lines" (JSON or tab-separated), "text_lines" (one document per line), "text" (one document),
    # or "objects" (parsed JSON, `OversizedRecord` or `InvalidUtf8Record`)
    kind: ChunkKind
    data: Any  # the list of objects if `kind` is "objects", otherwise UTF-8 bytes
    # number of bytes read from disk so far: of the file if the chunk is from `read_chunks`, of all
    # files if it is from `CorpusReader`
    num_bytes_read: int
    layout: TabLayout | None = None  # columns of the pair in tab-separated lines; None for JSON


class _Source:
    """A file on disk or standard input. Counts the bytes that were read."""

    def __init__(self, file: InputFile, settings: CorpusSettings) -> None:
        self.name = file.name
        self.settings = settings
        self.num_bytes_read = 0
        try:
            self._stream: IO[bytes] = (
                sys.stdin.buffer if file.path is None else open_input(file.path)
            )
        except OSError as error:
            raise UserError(f"cannot read: {file.path}: {error.strerror}") from error

    def read(self) -> bytes:
        block = self._stream.read(CHUNK_BYTES)
        self.num_bytes_read += len(block)
        return block

    def chunk(self, first_line: int, kind: ChunkKind, data: Any) -> Chunk:
        return Chunk(self.name, first_line, kind, data, self.num_bytes_read)

    def close(self) -> None:
        if self._stream is not sys.stdin.buffer:
            self._stream.close()


def read_chunks(file: InputFile, settings: CorpusSettings) -> Iterator[Chunk]:
    """Yields a file's records in chunks of about 1 MiB.

    Raises:
        UserError: The file cannot be read, is damaged, or does not have the format of its kind.
    """
    if file.kind == "parquet":
        yield from _read_parquet(file, settings)
        return
    if file.kind == "tsv" and settings.tabs is None:
        raise UserError(f"tab-separated lines are pairs: {file.name}: use --format pairs")
    source = _Source(file, settings)
    try:
        blocks = transcode(_decompressed(source), file.name, settings.encoding)
        is_text = file.kind == "txt" and settings.format == "text"
        if is_text and settings.txt_documents == "file":
            limit = settings.max_record_bytes
            data = _read_all(
                blocks,
                limit,
                f"text file too large: {file.name}: more than {limit} bytes as one document: use "
                "--txt-documents line, convert it to jsonl, or raise --max-record-bytes",
            )
            yield source.chunk(1, "text", data)
        elif is_text:
            yield from _line_chunks(blocks, source, "text_lines")
        elif file.kind == "json":
            yield from _read_json(blocks, source)
        else:
            chunks = _line_chunks(blocks, source, "lines")
            yield from _with_layout(chunks, file, settings)
    except (OSError, zlib.error, zstandard.ZstdError, UnicodeError) as error:
        raise UserError(f"cannot read: {file.name}: {error}") from error
    finally:
        source.close()


class CorpusReader:
    """Reads all inputs of a job.

    Attributes:
        num_bytes: Size of each file on disk in bytes. The size of a pipe is known only after it has
            been read.
    """

    def __init__(self, files: Sequence[InputFile], settings: CorpusSettings) -> None:
        """Initializes the reader. No file is opened until the first chunk is requested."""
        self._files = files
        self._settings = settings
        self.num_bytes = [file.num_bytes for file in files]

    def chunks(self) -> Iterator[Chunk]:
        """Yields the chunks of every file, with `num_bytes_read` counted over all files."""
        num_bytes_before = 0
        for number, file in enumerate(self._files):
            for chunk in read_chunks(file, self._settings):
                self.num_bytes[number] = max(self.num_bytes[number], chunk.num_bytes_read)
                yield replace(chunk, num_bytes_read=num_bytes_before + chunk.num_bytes_read)
            num_bytes_before += self.num_bytes[number]


def _refuse_expansion(
    num_bytes: int, num_bytes_read: int, name: str, settings: CorpusSettings
) -> None:
    """Raises `UserError` if ``num_bytes`` of content are too many for the bytes on disk."""
    limit = max(settings.max_expansion * num_bytes_read, FREE_EXPANSION_BYTES)
    if settings.max_expansion and num_bytes > limit:
        raise UserError(
            f"cannot read: {name}: {num_bytes_read:,} bytes of it expand to more than "
            f"{num_bytes:,} bytes; if this is expected, raise --max-expansion "
            f"({settings.max_expansion:g}; 0 means no limit)"
        )


def _decompressed(source: _Source) -> Iterator[bytes]:
    """Yields the file's content in blocks and limits its size. Decompresses gzip and zstd."""
    blocks = iter(source.read, b"")
    head = b""
    for block in blocks:
        head += block
        if len(head) >= MAGIC_BYTES:  # a pipe may return fewer bytes at first
            break
    whole: Iterator[bytes] = chain([head], blocks)
    num_bytes = 0
    for block in decompress(whole, source.name) if is_compressed(head) else whole:
        num_bytes += len(block)
        _refuse_expansion(num_bytes, source.num_bytes_read, source.name, source.settings)
        yield block


def _line_chunks(blocks: Iterator[bytes], source: _Source, kind: ChunkKind) -> Iterator[Chunk]:
    """Yields chunks of whole lines. A line that is too large becomes an `OversizedRecord`."""
    max_record_bytes = source.settings.max_record_bytes
    first_line = 1
    pending: list[bytes] = []
    num_pending = 0
    is_passing_over = False
    for block in blocks:
        if is_passing_over:
            end = block.find(b"\n") + 1
            if not end:
                continue
            yield source.chunk(first_line, "objects", [OversizedRecord()])
            first_line += 1
            is_passing_over = False
            block = block[end:]
        end = block.rfind(b"\n") + 1
        num_pending += len(block)
        if end == 0 or num_pending < CHUNK_BYTES:
            pending.append(block)
            if num_pending > max(max_record_bytes, CHUNK_BYTES):
                data = b"".join(pending)
                end = data.rfind(b"\n") + 1
                if end:
                    yield source.chunk(first_line, kind, data[:end])
                    first_line += data.count(b"\n")
                pending, num_pending = [data[end:]], len(data) - end
                if num_pending > max_record_bytes:
                    pending, num_pending, is_passing_over = [], 0, True
            continue
        data = b"".join([*pending, block[:end]])
        yield source.chunk(first_line, kind, data)
        first_line += data.count(b"\n")
        pending = [block[end:]]
        num_pending = len(block) - end
    if is_passing_over:
        yield source.chunk(first_line, "objects", [OversizedRecord()])
    if num_pending:
        yield source.chunk(first_line, kind, b"".join(pending))


def _with_layout(
    chunks: Iterator[Chunk], file: InputFile, settings: CorpusSettings
) -> Iterator[Chunk]:
    """Detects from the first lines whether lines are JSON, and adds the layout to the chunks."""
    tabs = settings.tabs
    layout: TabLayout | None = None
    is_known = False
    for chunk in chunks:
        if not is_known and chunk.kind == "lines" and not chunk.data.isspace():
            is_known = True
            is_json = file.kind == "jsonl" or (file.kind != "tsv" and are_json_lines(chunk.data))
            if tabs is not None and not is_json:
                layout = tab_layout(chunk.data, file.name, chunk.first_line, tabs)
            elif tabs is not None and tabs.columns is not None:
                raise UserError(
                    f"--pair-columns: {file.name}: its lines are JSON and have no columns"
                )
            elif chunk.data.lstrip().startswith(b"[") and not (
                settings.format == "chat" and begins_with_messages(chunk.data, settings.chats)
            ):
                raise UserError(
                    f"not JSON lines: {file.name}:{chunk.first_line}: begins with [ like a JSON "
                    "array: rename the file to .json"
                )
        yield chunk if layout is None else replace(chunk, layout=layout)


def num_json_values(data: bytes) -> int:
    """Returns an upper bound on the number of values in JSON text without parsing it."""
    num_separators = sum(map(data.count, _SEPARATORS))
    if num_separators * RECORD_BYTES_PER_VALUE > len(data):  # strings may contain separators
        num_separators = _num_separators_outside_texts(data)
    return 1 + num_separators


def _num_separators_outside_texts(data: bytes) -> int:
    # Without escape sequences, every second quotation mark ends a string. Escaped backslashes are
    # removed first, so that a remaining backslash before a quotation mark escapes it.
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    separators = np.zeros(256, np.bool_)
    separators[list(b"".join(_SEPARATORS))] = True
    num_separators = 0
    is_inside = False
    for begin in range(0, len(data), _COUNT_BYTES):
        block = np.frombuffer(data, np.uint8)[begin : begin + _COUNT_BYTES]
        inside = np.logical_xor.accumulate(block == ord('"')) ^ is_inside
        num_separators += int(np.count_nonzero(separators[block] & ~inside))
        is_inside = bool(inside[-1])
    return num_separators


def _read_all(blocks: Iterator[bytes], limit: int, message: str) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    for block in blocks:
        parts.append(block)
        num_bytes += len(block)
        if num_bytes > limit:
            raise UserError(message)
    return b"".join(parts)


def _read_json(blocks: Iterator[bytes], source: _Source) -> Iterator[Chunk]:
    """Reads a `.json` file, which has one array of records or one record per line."""
    head = b""
    for block in blocks:
        head += block
        if head.strip():
            break
    rest = chain([head], blocks)
    if not head.lstrip().startswith(b"["):
        yield from _line_chunks(rest, source, "lines")
        return
    name, limit = source.name, NUM_RECORDS_OF_ARRAY * source.settings.max_record_bytes
    advice = "convert it to jsonl, or raise --max-record-bytes"
    data = _read_all(
        rest, limit, f"JSON array too large: {name}: more than {limit} bytes: {advice}"
    )
    num_values = limit // RECORD_BYTES_PER_VALUE
    if len(data) > num_values and num_json_values(data) > num_values:
        raise UserError(f"JSON array too large: {name}: more than {num_values} values: {advice}")
    try:
        objects = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        if source.settings.format == "chat" and begins_with_messages(data, source.settings.chats):
            yield source.chunk(1, "lines", data)
            return
        try:
            data.decode()
        except UnicodeDecodeError as undecodable:
            line = data.count(b"\n", 0, undecodable.start) + 1
            advice = guess_encoding(data[undecodable.start :])
            raise UserError(f"not UTF-8: {name}:{line}: {advice}") from error
        raise UserError(f"malformed JSON array: {name}:{error.lineno}: {error.msg}") from error
    if source.settings.format == "chat" and is_list_of_messages(objects, source.settings.chats):
        objects = [objects]
    for begin in range(0, len(objects), NUM_OBJECTS_PER_CHUNK):
        part = objects[begin : begin + NUM_OBJECTS_PER_CHUNK]
        yield source.chunk(begin + 1, "objects", part)


def _read_parquet(file: InputFile, settings: CorpusSettings) -> Iterator[Chunk]:
    """Yields rows as objects. The row number is used as the line number.

    A file of a kilobyte can contain any amount of text, because many rows can refer to the same
    dictionary value. The number of rows that are decoded at once is therefore limited by the sizes
    recorded in the file, and rows are converted to objects in chunks of about `CHUNK_BYTES` of
    content.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(
            f"cannot read: {file.name}: parquet files need pyarrow: pip install pyarrow"
        ) from (error)
    assert file.path is not None  # standard input has the kind "lines"
    columns = settings.columns
    num_bytes = 0
    try:
        # pyarrow maps local files itself.
        path = file.path if isinstance(file.path, Path) else open_input(file.path)
        with parquet.ParquetFile(path) as content:
            names = content.schema_arrow.names
            wanted = None if columns is None else [name for name in columns if name in names]
            if wanted == []:
                raise UserError(
                    f"no such column: {file.name}: has {', '.join(names)}, but none of "
                    f"{', '.join(columns or ())}: set --json-keys or --pair-keys"
                )
            num_rows, shared = _decoding(file.path, content.metadata, wanted)
        path = file.path if isinstance(file.path, Path) else open_input(file.path)
        with parquet.ParquetFile(path, read_dictionary=shared) as content:
            first_row = 1
            for batch in content.iter_batches(batch_size=num_rows, columns=wanted):
                position = file.num_bytes * (first_row - 1) // content.metadata.num_rows
                sizes = _content_sizes(batch, settings.max_record_bytes)
                # Records that are dropped as too large take time to decode as well.
                num_bytes += batch.nbytes if sizes is None else int(sizes.sum())
                _refuse_expansion(num_bytes, file.num_bytes, file.name, settings)
                for rows in _rows(batch, sizes, settings.max_record_bytes):
                    yield Chunk(file.name, first_row, "objects", rows, position)
                    first_row += len(rows)
    except (ArrowException, OSError) as error:
        raise UserError(f"cannot read: {file.name}: {error}") from error


def _decoding(
    path: Path | RemoteFile, metadata: Any, columns: Sequence[str] | None
) -> tuple[int, list[str]]:
    """Returns how many rows to decode at once, and the columns to read in dictionary form.

    A column is read in dictionary form if it has lists, because one row can then refer to a value
    any number of times, and if it could expand beyond `MAX_BATCH_BYTES`. Reading all columns in
    this form would be slower: text with few repetitions has a small dictionary, and most of its
    values are stored outside of it.
    """
    num_rows = NUM_ROWS_PER_BATCH
    shared: set[str] = set()
    with open_input(path) as stream:
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            if group.num_rows == 0:
                continue
            for k in range(group.num_columns):
                column = group.column(k)
                name = column.path_in_schema
                if column.physical_type != "BYTE_ARRAY" or (
                    columns is not None and name.split(".")[0] not in columns
                ):
                    continue
                size = max(column.total_uncompressed_size, 1)
                num_rows = min(
                    num_rows,
                    MAX_BATCH_BYTES * group.num_rows // size,
                    NUM_ROWS_PER_BATCH * MAX_ROW_GROUP_BYTES // size,
                )
                dictionary = _dictionary_bytes(stream, column)
                if metadata.schema.column(k).max_repetition_level == 0:
                    num_rows = min(num_rows, MAX_BATCH_BYTES // max(dictionary, 1))
                elif dictionary * column.num_values > MAX_BATCH_BYTES:
                    shared.add(name)
    return max(num_rows, 1), sorted(shared)


def _dictionary_bytes(stream: IO[bytes], column: Any) -> int:
    """Returns the size of a column's dictionary in bytes; 0 if it has no dictionary.

    The size is read from the header of the first page, which is in Thrift's compact protocol. The
    header begins with the page's type and uncompressed size, both as zigzag-encoded integers.
    """
    has_dictionary = column.has_dictionary_page and column.dictionary_page_offset is not None
    stream.seek(column.dictionary_page_offset if has_dictionary else column.data_page_offset)
    header = stream.read(16)
    values: list[int] = []
    position = 0
    while len(values) < 2 and header[position : position + 1] == b"\x15":
        value = shift = 0
        while True:
            position += 1
            if position >= len(header):
                return 0  # damaged header; pyarrow reports the error
            value |= (header[position] & 0x7F) << shift
            shift += 7
            if header[position] < 0x80:
                break
        values.append(value >> 1)
        position += 1
    return values[1] if len(values) == 2 and values[0] == _DICTIONARY_PAGE else 0


def _content_sizes(batch: Any, max_record_bytes: int) -> npt.NDArray[np.int64] | None:
    """Returns the bytes of content in each row, int64[num_rows].

    The result is None if no row can be too large and all rows fit into one chunk: in small batches
    without dictionaries, the buffers contain every value once, so their size bounds the content.
    """
    from pyarrow import types

    def repeats(kind: Any) -> bool:
        children = [kind.field(k).type for k in range(kind.num_fields)]
        return types.is_dictionary(kind) or any(repeats(child) for child in children)

    if batch.nbytes <= min(CHUNK_BYTES, max_record_bytes) and not any(
        repeats(column.type) for column in batch.columns
    ):
        return None
    zeros = np.zeros(batch.num_rows, np.int64)
    return sum((_sizes(column) for column in batch.columns), zeros)


def _rows(
    batch: Any, sizes: npt.NDArray[np.int64] | None, max_record_bytes: int
) -> Iterator[list[Any]]:
    """Yields the rows of a batch as lists of objects with about `CHUNK_BYTES` of content each."""
    if sizes is None:
        yield _records(batch)
        return
    begin = 0
    while begin < batch.num_rows:
        if sizes[begin] > max_record_bytes:
            yield [OversizedRecord()]
            begin += 1
            continue
        ends = np.cumsum(sizes[begin:])
        end = begin + max(1, int(np.searchsorted(ends, CHUNK_BYTES, "right")))
        yield _records(batch.slice(begin, end - begin))
        begin = end


def _records(batch: Any) -> list[Any]:
    try:
        records: list[Any] = batch.to_pylist()
        return records
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [InvalidUtf8Record()]
    return [record for k in range(batch.num_rows) for record in _records(batch.slice(k, 1))]


def _sizes(array: Any) -> npt.NDArray[np.int64]:
    """Returns the bytes of content in each row of an array, plus 8 bytes per list element."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        of_values = _sizes(array.dictionary)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return np.asarray(of_values[indices] if len(of_values) else np.zeros(len(array), np.int64))
    if types.is_struct(kind):
        fields = [_sizes(array.field(k)) for k in range(kind.num_fields)]
        return np.asarray(np.sum([np.full(len(array), 8, np.int64), *fields], axis=0))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        values = array.keys if types.is_map(kind) else array.values
        of_values = _sizes(values) + 8
        if types.is_map(kind):
            of_values += _sizes(array.items)
        ends = np.concatenate([[0], np.cumsum(of_values)])
        offsets = array.offsets.to_numpy()
        return np.asarray(ends[offsets[1:]] - ends[offsets[:-1]])
    if types.is_fixed_size_list(kind):
        of_values = _sizes(array.flatten()) + 8
        lengths = np.where(array.is_valid().to_numpy(zero_copy_only=False), kind.list_size, 0)
        ends = np.concatenate([[0], np.cumsum(of_values)])
        last = np.cumsum(lengths)
        return np.asarray(ends[last] - ends[last - lengths])
    is_text = types.is_string(kind) or types.is_large_string(kind)
    if is_text or types.is_binary(kind) or types.is_large_binary(kind):
        lengths = compute.binary_length(array).fill_null(0)
        return np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)
    return np.full(len(array), 8, np.int64)
