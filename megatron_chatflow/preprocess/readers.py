"""Finds input files and reads them in chunks of bounded size.

`find_inputs` expands paths, globs, folders and `-` (standard input) to files in a fixed order and
determines the kind of each file. Other files in a folder or glob are logged with counts, and data
in an unsupported format is an error, so that no part of a corpus is skipped unnoticed.

`CorpusReader` yields `Chunk`s of whole records with their position in the file and the number of
bytes read so far. Chunks do not depend on the number of workers.
"""

import glob
import io
import logging
import lzma
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import IO, Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import orjson
import zstandard

from megatron_chatflow import remote
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import is_url
from megatron_chatflow.preprocess.aligned import (
    ALIGNMENT_SUFFIXES,
    AlignedName,
    aligned_name,
    aligned_rows,
)
from megatron_chatflow.preprocess.archives import OpenArchives, members_of
from megatron_chatflow.preprocess.arrow import (
    arrow_batches,
    check_splits,
    saved_files,
    wanted_columns,
)
from megatron_chatflow.preprocess.chats import begins_with_messages, is_list_of_messages
from megatron_chatflow.preprocess.comma_separated import NUM_SAMPLE_ROWS, csv_rows
from megatron_chatflow.preprocess.compressed import MAGIC_BYTES, decompress, is_compressed
from megatron_chatflow.preprocess.records import InvalidUtf8Record, OversizedRecord
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.preprocess.tab_separated import (
    TabLayout,
    are_json_lines,
    column_layout,
    tab_layout,
)
from megatron_chatflow.preprocess.tmx import TmxParser, read_tmx
from megatron_chatflow.remote import RemoteFile
from megatron_chatflow.tokenizer.text_encoding import guess_encoding, transcode

logger = logging.getLogger(__name__)

RecordKind = Literal[
    "lines", "jsonl", "tsv", "json", "txt", "parquet", "arrow", "csv", "tmx", "aligned"
]
ChunkKind = Literal["lines", "text_lines", "text", "objects", "rows"]
RECORD_KINDS: dict[str, RecordKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".tsv": "tsv",
    ".json": "json",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tmx": "tmx",
}
COMPRESSION_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".xz", ".bz2", ".lz4")
ARCHIVE_SUFFIX = ".zip"
_TABLE_KINDS = ("parquet", "arrow")  # read by pyarrow, which seeks in the file
# Files that may contain text but have no reader.
UNREADABLE_SUFFIXES = frozenset(
    ".avro .orc .xls .xlsx .ods .tfrecord .tfrecords .h5 .hdf5 .warc .wet .wat .lmdb .xml .xlf "
    ".doc .docx .odt .epub .lzma .br .snappy .sz .z .7z .rar .tar .tgz .tbz2 .txz".split()
)
_CONTAINER_SUFFIXES = frozenset([*UNREADABLE_SUFFIXES, *COMPRESSION_SUFFIXES])
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
    member: str | None = None  # name of a file in the zip archive at `path`; else None
    num_content_bytes: int = 0  # size of a file in an archive in bytes; 0 for other files
    # Sizes in bytes of the archive and of all files in it that are read; 0 for other files.
    archive_num_bytes: tuple[int, int] = (0, 0)
    # The files of kind "aligned" that are aligned by line: both sides and, if there is one, the
    # file of their scores. Empty for other kinds.
    parts: tuple["InputFile", ...] = ()

    def absolute(self) -> "InputFile":
        """Returns the file with absolute paths."""
        path = self.path and self.path.absolute()
        return replace(self, path=path, parts=tuple(part.absolute() for part in self.parts))


@contextmanager
def open_input(file: InputFile, archives: OpenArchives | None = None) -> Iterator[IO[bytes]]:
    """Opens a file, a member of an archive or standard input. All inputs are opened here.

    The archive of a member stays open in ``archives`` for other members.

    Raises:
        UserError: The file cannot be opened, or its archive is damaged.
    """
    if file.path is None:
        yield sys.stdin.buffer
    elif file.member is None:
        with _open_file(file.path) as stream:
            yield stream
    else:
        path = file.path
        with ExitStack() as stack:
            archives = archives or stack.enter_context(closing(OpenArchives()))
            yield stack.enter_context(
                archives.open_member(path, lambda: _open_file(path), file.member, file.name)
            )


def _open_file(path: Path | RemoteFile) -> IO[bytes]:
    try:
        if isinstance(path, Path):
            return path.open("rb", buffering=0)
        return path.open()
    except OSError as error:
        raise UserError(f"cannot read: {path}: {error.strerror}") from error


def find_inputs(
    inputs: Sequence[str], sides: tuple[str, str] | None = None, *, with_scores: bool = False
) -> list[InputFile]:
    """Expands the inputs (files, globs, folders, or `-` for standard input) to files.

    With ``sides``, the language codes of pairs, files whose names end in these languages are joined
    to files of the kind "aligned", at the place of the first of them. Their scores are included
    if ``with_scores`` is set. Zip archives are expanded to the files in them.

    The inputs keep their order; the files of a folder or glob are sorted by path. Folders are
    searched recursively for files with known extensions. Symbolic links are followed, and a file or
    folder with several paths is read once. Hidden files, documentation and files of other kinds are
    skipped and logged with their counts.

    Raises:
        UserError: No file matches, a file is given twice or cannot be read, or its kind is
            unknown.
    """
    try:
        files = [file for name in inputs for file in _expand(name, sides)]
    except OSError as error:
        raise UserError(f"cannot read: {error.filename}: {error.strerror}") from error
    if not files:
        raise UserError("no input: give at least one file, folder or glob")
    given: dict[tuple[str, str | None], str] = {}
    for file in files:
        real = ("-" if file.path is None else str(file.path), file.member)
        if isinstance(file.path, Path):
            real = (os.path.realpath(file.path), file.member)
        name = file.name if file.path is None or file.member is not None else str(file.path)
        if real in given:
            raise UserError(
                f"input given twice: {given[real]} and {name}: list it once; its weight in the "
                "schedule decides how often it is trained on"
            )
        given[real] = name
    return files if sides is None else _align(files, sides, with_scores)


def _align(
    files: Sequence[InputFile], sides: tuple[str, str], with_scores: bool
) -> list[InputFile]:
    """Joins the two sides of aligned text, and their scores, to one file each."""
    groups: dict[str, tuple[list[int], list[int], list[int]]] = {}  # positions of a stem's parts
    roles: list[AlignedName | None] = []
    for position, file in enumerate(files):
        role = None
        if file.path is not None:
            path = PurePath(str(file.path), file.member or "")
            role = aligned_name(path, sides, COMPRESSION_SUFFIXES)
        roles.append(role)
        if role is not None:
            groups.setdefault(role.stem, ([], [], []))[role.part].append(position)
    joined: list[InputFile] = []
    num_unused_scores = 0
    for position, (file, role) in enumerate(zip(files, roles, strict=True)):
        parts = ([], [], []) if role is None else groups[role.stem]
        is_pair = bool(parts[0] and parts[1])
        if role is None or (not role.is_certain and not is_pair):
            joined.append(file)
            continue
        for part in parts:
            if len(part) > 1:
                raise UserError(
                    f"two files for one side: {files[part[0]].name} and {files[part[1]].name}: "
                    "give one, or set --pair-keys to the languages, such as en zh-CN"
                )
        if not is_pair:
            raise UserError(
                f"one side of a pair: {file.name}: there is no {sides[bool(parts[0])]} side of the "
                "same name among the inputs: give both files, or set --pair-keys to their languages"
            )
        num_unused_scores += role.part == 2 and not with_scores
        if position != min(parts[0] + parts[1]):
            continue
        first, second = files[parts[0][0]], files[parts[1][0]]
        if with_scores and not parts[2]:
            raise UserError(
                f"no scores: {first.name} and {second.name}: --pair-min-score needs a file of the "
                "same name that ends in .scores among the inputs"
            )
        used = (first, second, *([files[parts[2][0]]] if with_scores else []))
        name = " + ".join(part.name for part in used)
        num_bytes = sum(part.num_bytes for part in used)
        joined.append(InputFile(file.path, name, "aligned", num_bytes, parts=used))
    if num_unused_scores:
        logger.warning("ignored %d files of scores: see --pair-min-score", num_unused_scores)
    return joined


@dataclass
class _FoundFiles:
    """Files found in a folder or by a glob: to read, unsupported, and counts of skipped ones."""

    sides: tuple[str, str] | None = None  # languages of aligned files, as in `find_inputs`
    files: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    _saved: dict[str, frozenset[str] | None] = field(default_factory=dict)

    def classify(self, path: Path) -> bool:
        """Adds a file to one of the groups by its name. Returns whether the file is to be read."""
        kind = _kind_of(path, self.sides)
        ending = path.suffix.lower()
        if kind is None and ending == ARCHIVE_SUFFIX and path.is_file():
            self.files.append(path)
            return True
        if kind is None and ending not in _CONTAINER_SUFFIXES:
            self.skipped[ending or "without an extension"] += 1
        elif _is_alignment(path, self.sides) and path.is_file():
            self.skipped[ending] += 1
        elif self.is_cache(path.parent, path.name):
            self.skipped["cached .arrow"] += 1
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

    def is_cache(self, folder: Path | str, name: str, names: Collection[str] | None = None) -> bool:
        """Returns whether an Arrow file does not belong to the saved data set in its folder.

        The arguments are those of `saved_files`. If there is no saved data set, no file is a cache.
        """
        if not name.lower().endswith(".arrow"):
            return False
        if str(folder) not in self._saved:
            self._saved[str(folder)] = saved_files(folder, names)
        saved = self._saved[str(folder)]
        return saved is not None and name not in saved

    def report(self, name: str) -> None:
        """Logs the skipped files and raises an error if there are unsupported files with data."""
        if self.unreadable:
            endings = Counter("".join(path.suffixes[-2:]).lower() for path in self.unreadable)
            named = ", ".join(str(path) for path in sorted(self.unreadable)[:_NUM_NAMED])
            others = ", ..." if len(self.unreadable) > _NUM_NAMED else ""
            raise UserError(
                f"cannot read: {len(self.unreadable)} files in {name}: {_counts(endings)} "
                f"({named}{others}): convert them to jsonl or parquet, recompress them as .xz or "
                ".zst, or select the files to read with a glob such as "
                f"'{name.rstrip('/')}/**/*.jsonl'"
            )
        if self.skipped:
            logger.warning("ignored in %s: %s", name, _counts(self.skipped))


def _expand(name: str, sides: tuple[str, str] | None) -> list[InputFile]:
    if name in STANDARD_INPUT_NAMES:
        return [InputFile(None, "<stdin>", "lines", 0)]
    if is_url(name):
        name = remote.parse_location(name)
        if is_url(name):
            return _expand_url(name, remote.find(name), sides)
    path = Path(name)
    if path.is_dir():
        found = _search(path, sides)
        found.report(name)
        if not found.files:
            endings = " ".join(RECORD_KINDS)
            raise UserError(
                f"no input in folder: {path}: none of its files has an extension among {endings}"
            )
        return [
            part
            for file in found.files
            for part in _input_files(file, file.relative_to(path).as_posix(), sides)
        ]
    if path.exists():
        return _input_files(path, path.name, sides)
    if not glob.has_magic(name):
        raise UserError(f"no input: {name}: no such file or folder")
    found = _matches(name, sides)
    found.report(name)
    if not found.files:
        raise UserError(f"no input: {name}: the glob matches no file")
    return [part for match in found.files for part in _input_files(match, match.name, sides)]


def _expand_url(
    url: str, found: Sequence[RemoteFile], sides: tuple[str, str] | None
) -> list[InputFile]:
    """Selects among the files of a URL as `_search` and `_matches` do; there are no links."""
    if len(found) == 1 and found[0].url == url:
        return _remote_files(found[0], found[0].name, sides)
    is_folder = not remote.has_magic(url)
    top = f"{url.rstrip('/')}/" if is_folder else f"{url.partition('://')[0]}://"
    urls = {file.url for file in found}
    names: dict[str, set[str]] = {}  # of the files in each folder
    for file in found:
        folder, _, name = file.url.rpartition("/")
        names.setdefault(folder, set()).add(name)
    if is_folder:
        for folder in sorted(names):
            check_splits(folder, names[folder])
    hides = is_folder or "/." not in url  # as Python's globs do
    selection = _FoundFiles(sides)
    files: list[InputFile] = []
    for file in found:
        path = Path(file.url.removeprefix(top))
        kind, ending = _kind_of(path, sides), path.suffix.lower()
        is_archive = kind is None and ending == ARCHIVE_SUFFIX
        if hides and any(part.startswith(".") for part in path.parts):
            selection.skipped["hidden"] += is_folder
        elif kind is None and ending in _CONTAINER_SUFFIXES:
            selection.unreadable.append(path)
        elif kind is None and is_folder and not is_archive:
            selection.skipped[ending or "without an extension"] += 1
        elif sides is not None and ending in ALIGNMENT_SUFFIXES:
            selection.skipped[ending] += 1
        elif _is_corpus_metadata(path, lambda path: f"{top}{path}" in urls):
            selection.skipped[path.name] += 1
        elif selection.is_cache(
            folder := file.url.rpartition("/")[0], path.name, names[folder] if is_folder else None
        ):
            selection.skipped["cached .arrow"] += 1
        else:
            name = path.as_posix() if is_folder else path.name
            files += _remote_files(file, name, sides)
    selection.report(remote.mask(url))
    if not files:
        raise UserError(
            f"no input: {remote.mask(url)}: no such file, and no folder or glob with files to read"
        )
    return files


def _remote_files(file: RemoteFile, name: str, sides: tuple[str, str] | None) -> list[InputFile]:
    if name.lower().endswith(ARCHIVE_SUFFIX):
        return _archive_files(InputFile(file, name, "lines", file.num_bytes or 0), sides)
    return [InputFile(file, name, _kind_or_error(Path(name), file.url, sides), file.num_bytes or 0)]


def _matches(pattern: str, sides: tuple[str, str] | None) -> _FoundFiles:
    """Finds the files of a glob. `_input_file` raises an error for unknown extensions."""
    found = _FoundFiles(sides)
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
        elif _kind_of(match, sides) is not None and _is_corpus_metadata(match):
            found.skipped[match.name] += 1
        elif _is_alignment(match, sides):
            found.skipped[match.suffix.lower()] += 1
        elif found.is_cache(match.parent, match.name):
            found.skipped["cached .arrow"] += 1
        else:
            seen.add(real)
            found.files.append(match)
    found.files.sort()
    return found


def _search(folder: Path, sides: tuple[str, str] | None) -> _FoundFiles:
    """Finds the files in a folder and its subfolders.

    Linked folders are entered after all others, so that a folder with several paths is read under
    its own path. Every folder is entered only once, which also prevents cycles.
    """
    found = _FoundFiles(sides)
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
                check_splits(Path(parent), names)
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


def _kind_of(path: PurePath, sides: tuple[str, str] | None = None) -> RecordKind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    kind = RECORD_KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None and sides is not None and aligned_name(path, sides, COMPRESSION_SUFFIXES):
        return "aligned"
    return kind


def _kind_or_error(path: PurePath, shown: str, sides: tuple[str, str] | None = None) -> RecordKind:
    kind = _kind_of(path, sides)
    if kind is None:
        endings = " ".join(RECORD_KINDS)
        raise UserError(
            f"unknown kind of input: {shown}: the extension must be one of {endings}, optionally "
            f"followed by one of {' '.join(COMPRESSION_SUFFIXES)}, or .zip; the files of pairs may "
            "end in the languages (--pair-keys)"
        )
    return kind


def _is_alignment(path: Path, sides: tuple[str, str] | None) -> bool:
    """Returns whether a file says where the aligned text beside it is from."""
    if sides is None or path.suffix.lower() not in ALIGNMENT_SUFFIXES:
        return False
    return any(_is_side(beside.name, path.stem, sides) for beside in path.parent.iterdir())


def _is_side(name: str, stem: str, sides: tuple[str, str]) -> bool:
    role = aligned_name(PurePath(name), sides, COMPRESSION_SUFFIXES)
    return role is not None and role.stem == stem


def _input_files(path: Path, name: str, sides: tuple[str, str] | None) -> list[InputFile]:
    """Returns a file, or the files in a zip archive. Files that cannot be read are errors."""
    if path.suffix.lower() != ARCHIVE_SUFFIX or not path.is_file():
        return [_input_file(path, name, sides)]
    return _archive_files(_input_file(path, name, sides), sides)


def _archive_files(archive: InputFile, sides: tuple[str, str] | None) -> list[InputFile]:
    """Returns the files in a zip archive. Files that cannot be read are errors."""
    name = archive.name
    with open_input(archive) as stream:
        members, num_hidden = members_of(stream, name)
    names = {info.filename for info in members}
    files: list[InputFile] = []
    skipped: Counter[str] = Counter({"hidden": num_hidden} if num_hidden else {})
    for info in members:
        member = PurePath(info.filename)
        ending = member.suffix.lower()
        kind = _kind_of(member, sides)
        if (
            (
                kind is not None
                and _is_corpus_metadata(Path(member), lambda path: path.as_posix() in names)
            )
            or (kind is None and ending not in (*_CONTAINER_SUFFIXES, ARCHIVE_SUFFIX))
            or (sides is not None and ending in ALIGNMENT_SUFFIXES)
        ):
            skipped[ending or member.name] += 1
            continue
        if kind is None or kind in _TABLE_KINDS:
            raise UserError(
                f"cannot read: {name}: {info.filename} in it: unpack the archive, and convert the "
                "file if it is none of the supported kinds"
            )
        files.append(
            InputFile(
                archive.path,
                f"{archive.name}/{_printable(info.filename)}",
                kind,
                info.compress_size,
                info.filename,
                info.file_size,
            )
        )
    if not files:
        raise UserError(f"no input in archive: {archive.path}: none of its files can be read")
    if skipped:
        logger.warning("ignored in %s: %s", archive.path, _counts(skipped))
    # Several files may share their compressed bytes, so each alone says nothing about expansion.
    num_bytes = archive.num_bytes or sum(file.num_bytes for file in files)
    sizes = (num_bytes, sum(file.num_content_bytes for file in files))
    return [replace(file, archive_num_bytes=sizes) for file in files]


def _input_file(path: Path, name: str, sides: tuple[str, str] | None) -> InputFile:
    kind = _kind_of(path, sides)
    if (
        path.is_fifo()
        or path.is_char_device()
        or path.parent.as_posix() in ("/dev/fd", "/proc/self/fd")
    ):
        return InputFile(path, str(path), kind or "lines", 0)
    if path.suffix.lower() != ARCHIVE_SUFFIX:
        kind = _kind_or_error(path, str(path), sides)
    if not os.access(path, os.R_OK):
        raise UserError(f"cannot read: {path}: permission denied")
    return InputFile(path, _printable(name), kind or "lines", path.stat().st_size)


def _printable(name: str) -> str:
    # The sidecar is JSON, so bytes in the name that are not UTF-8 are written as in "\xff".
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file."""

    name: str  # name of the file
    first_line: int  # number of the first line or record, counted from 1
    # "lines" (JSON or tab-separated), "text_lines" (one document per line), "text" (one document),
    # "objects" (parsed JSON or placeholders), or "rows" (lists of cells or placeholders)
    kind: ChunkKind
    data: Any  # the list of objects or rows, otherwise UTF-8 bytes
    # number of bytes read from disk so far: of the file if the chunk is from `read_chunks`, of all
    # files if it is from `CorpusReader`
    num_bytes_read: int
    layout: TabLayout | None = None  # columns of rows and of tab-separated lines; None for JSON


class _Source:
    """A file on disk or standard input. Counts the bytes that were read."""

    def __init__(
        self, file: InputFile, settings: CorpusSettings, archives: OpenArchives | None = None
    ) -> None:
        self.name = file.name
        self.settings = settings
        self.num_bytes_read = 0
        self._file = file
        self._num_content_bytes = 0
        self._stack = ExitStack()
        num_archive_bytes, num_bytes = file.archive_num_bytes
        _refuse_expansion(num_bytes, num_archive_bytes, str(file.path), settings)
        self._stream = self._stack.enter_context(open_input(file, archives))

    def read(self) -> bytes:
        block = self._stream.read(CHUNK_BYTES)
        self._num_content_bytes += len(block)
        if self._file.num_content_bytes:  # of an archive: the content is proportional to its size
            share = self._num_content_bytes / self._file.num_content_bytes
            self.num_bytes_read = round(share * self._file.num_bytes)
        else:
            self.num_bytes_read = self._num_content_bytes
        return block

    def chunk(self, first_line: int, kind: ChunkKind, data: Any) -> Chunk:
        return Chunk(self.name, first_line, kind, data, self.num_bytes_read)

    def close(self) -> None:
        self._stack.close()


_READ_ERRORS = (
    OSError,
    zlib.error,
    zstandard.ZstdError,
    UnicodeError,
    *(zipfile.BadZipFile, EOFError, lzma.LZMAError),  # of a file in a zip archive
)


def read_chunks(
    file: InputFile, settings: CorpusSettings, archives: OpenArchives | None = None
) -> Iterator[Chunk]:
    """Yields a file's records in chunks of about 1 MiB; see `open_input` for ``archives``.

    Raises:
        UserError: The file cannot be read, is damaged, or does not have the format of its kind.
    """
    if file.kind in _TABLE_KINDS:
        yield from _read_table(file, settings)
        return
    if file.kind == "aligned":
        yield from _read_aligned(file, settings, archives)
        return
    check_kind(file, settings)
    source = _Source(file, settings, archives)
    try:
        if file.kind == "tmx":
            yield from _read_tmx(source)
            return
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
        elif file.kind == "csv":
            yield from _read_csv(blocks, source)
        else:
            chunks = _line_chunks(blocks, source, "lines")
            yield from _with_layout(chunks, file, settings)
    except _READ_ERRORS as error:
        raise UserError(f"cannot read: {file.name}: {error}") from error
    finally:
        source.close()


def check_kind(file: InputFile, settings: CorpusSettings) -> None:
    """Raises `UserError` if a file always has pairs but the records are not pairs."""
    if file.kind in ("tsv", "tmx") and settings.tabs is None:
        lines = "tab-separated lines are" if file.kind == "tsv" else "a translation memory has"
        raise UserError(f"{lines} pairs: {file.name}: use --format pairs")


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
        with closing(OpenArchives()) as archives:
            for number, file in enumerate(self._files):
                for chunk in read_chunks(file, self._settings, archives):
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
    """Yields the file's content in blocks, decompressed, and limits its size."""
    blocks = iter(source.read, b"")
    head = b""
    for block in blocks:
        head += block
        if len(head) >= MAGIC_BYTES:  # a pipe may return fewer bytes at first
            break
    whole: Iterator[bytes] = chain([head], blocks)
    if not is_compressed(head):
        yield from whole
        return
    num_bytes = 0
    for block in decompress(whole, source.name):
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


def _read_aligned(
    file: InputFile, settings: CorpusSettings, archives: OpenArchives | None
) -> Iterator[Chunk]:
    """Yields the lines of aligned files as rows of one cell of each file."""
    with ExitStack() as stack:
        sources = []
        for part in file.parts:
            source = _Source(part, settings, archives)
            stack.callback(source.close)
            sources.append(source)
        layout = TabLayout((0, 1), len(sources), score=2 if len(sources) > 2 else None)
        streams = [_lines(source) for source in sources]
        names = [part.name for part in file.parts]
        first_line = 1
        for rows in aligned_rows(streams, names, settings.max_record_bytes, CHUNK_BYTES):
            num_bytes_read = sum(source.num_bytes_read for source in sources)
            yield Chunk(file.name, first_line, "rows", rows, num_bytes_read, layout)
            first_line += len(rows)


def _lines(source: _Source) -> Iterator[bytes | OversizedRecord]:
    """Yields the lines of a file without their ends."""
    try:
        blocks = transcode(_decompressed(source), source.name, source.settings.encoding)
        for chunk in _line_chunks(blocks, source, "lines"):
            if chunk.kind == "objects":
                yield from chunk.data
            else:
                yield from chunk.data.removesuffix(b"\n").split(b"\n")
    except _READ_ERRORS as error:
        raise UserError(f"cannot read: {source.name}: {error}") from error


def _read_tmx(source: _Source) -> Iterator[Chunk]:
    settings = source.settings
    blocks = _decompressed(source)
    is_declared = settings.encoding in ("utf-8", "utf-8-sig")  # the file declares its encoding
    if not is_declared:
        blocks = transcode(blocks, source.name, settings.encoding)
    parser = TmxParser(
        source.name,
        settings.pairs.codes,
        score=settings.pairs.score_name,
        max_record_bytes=settings.max_record_bytes,
        encoding=None if is_declared else "utf-8",
    )
    score = None if settings.pairs.score_name is None else 2
    layout = TabLayout((0, 1), 2 if score is None else 3, score=score)
    first_unit = 1
    for rows in read_tmx(blocks, parser, CHUNK_BYTES):
        yield replace(source.chunk(first_unit, "rows", rows), layout=layout)
        first_unit += len(rows)


def _read_csv(blocks: Iterator[bytes], source: _Source) -> Iterator[Chunk]:
    """Yields the rows of a CSV file. The number of a row counts the header and blank lines."""
    settings = source.settings
    layout: TabLayout | None = None
    first_row = 1
    chunks = csv_rows(
        _text_lines(blocks, source), source.name, settings.max_record_bytes, CHUNK_BYTES
    )
    for rows in chunks:
        numbered = [(n, row) for n, row in enumerate(rows, first_row) if isinstance(row, list)]
        sample = [(n, row) for n, row in numbered if row][:NUM_SAMPLE_ROWS]
        if layout is None and sample:
            if settings.tabs is not None:
                layout = column_layout(sample, source.name, settings.tabs)
            else:
                number, names = sample[0]
                _check_columns(names, source.name, settings)
                layout = TabLayout((0, 0), len(names), number, names=tuple(names))
        # Before the layout is known, there are only blank lines and placeholders.
        yield replace(source.chunk(first_row, "rows", rows), layout=layout)
        first_row += len(rows)


def _check_columns(names: Sequence[str], name: str, settings: CorpusSettings) -> None:
    """Raises `UserError` if none of the wanted columns exist or a name is used twice."""
    wanted = settings.columns
    shown = ", ".join(names)
    if wanted is not None and not set(wanted) & set(names):
        raise UserError(
            f"no such column: {name}: its first row names {shown:.300}, but none of "
            f"{', '.join(wanted)}: set --json-keys or --pair-keys"
        )
    if len(set(names)) < len(names):
        raise UserError(f"two columns of one name: {name}: {shown:.300}: rename one")


def _text_lines(blocks: Iterator[bytes], source: _Source) -> Iterator[str]:
    """Yields lines with their ends. Bytes that are not UTF-8 become lone surrogates."""
    for chunk in _line_chunks(blocks, source, "lines"):
        if chunk.kind == "objects":
            raise UserError(
                f"line too large: {source.name}:{chunk.first_line}: raise --max-record-bytes"
            )
        text = chunk.data.decode("utf-8", "surrogateescape")
        yield from io.StringIO(text, newline="\n")


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


def _read_table(file: InputFile, settings: CorpusSettings) -> Iterator[Chunk]:
    """Yields the rows of a parquet or Arrow file as objects, with row numbers as line numbers.

    A file of a kilobyte can contain any amount of text, because many rows can refer to the same
    dictionary value. The number of rows of a parquet file that are decoded at once is therefore
    limited by the sizes recorded in the file, and rows are converted to objects in chunks of about
    `CHUNK_BYTES` of content.
    """
    try:
        from pyarrow import ArrowException
    except ImportError as error:
        raise UserError(
            f"cannot read: {file.name}: {file.kind} files need pyarrow: pip install pyarrow"
        ) from error
    num_bytes = 0
    first_row = 1
    with open_input(file) as stream:
        try:
            if file.kind == "parquet":
                batches = _parquet_batches(stream, file.name, settings.columns)
            else:
                assert file.path is not None
                batches = arrow_batches(stream, file.path, file.name, settings.columns)
            for batch, share in batches:
                if file.kind == "arrow" and batch.nbytes > MAX_ROW_GROUP_BYTES:
                    raise UserError(
                        f"batch too large: {file.name}: the batch from row {first_row} on has "
                        f"{batch.nbytes:,} bytes: write the file in batches of at most "
                        f"{MAX_ROW_GROUP_BYTES:,} bytes, or as parquet"
                    )
                sizes = _content_sizes(batch, settings.max_record_bytes)
                # Records that are dropped as too large take time to decode as well.
                num_bytes += batch.nbytes if sizes is None else int(sizes.sum())
                _refuse_expansion(num_bytes, file.num_bytes, file.name, settings)
                position = int(share * file.num_bytes)
                for rows in _rows(batch, sizes, settings.max_record_bytes):
                    yield Chunk(file.name, first_row, "objects", rows, position)
                    first_row += len(rows)
        except (ArrowException, OSError) as error:
            raise UserError(f"cannot read: {file.name}: {error}") from error


def _parquet_batches(
    stream: IO[bytes], name: str, columns: Sequence[str] | None
) -> Iterator[tuple[Any, float]]:
    """Yields batches of rows, and the share of the file that was read before each."""
    from pyarrow import PythonFile, parquet

    with parquet.ParquetFile(PythonFile(stream, "r")) as content:
        wanted = wanted_columns(columns, content.schema_arrow.names, name)
        num_rows, shared = _decoding(stream, content.metadata, wanted)
    with parquet.ParquetFile(PythonFile(stream, "r"), read_dictionary=shared) as content:
        num_read = 0
        for batch in content.iter_batches(batch_size=num_rows, columns=wanted):
            yield batch, num_read / content.metadata.num_rows
            num_read += batch.num_rows


def _decoding(
    stream: IO[bytes], metadata: Any, columns: Sequence[str] | None
) -> tuple[int, list[str]]:
    """Returns how many rows to decode at once, and the columns to read in dictionary form.

    A column is read in dictionary form if it has lists, because one row can then refer to a value
    any number of times, and if it could expand beyond `MAX_BATCH_BYTES`. Reading all columns in
    this form would be slower: text with few repetitions has a small dictionary, and most of its
    values are stored outside of it.
    """
    num_rows = NUM_ROWS_PER_BATCH
    shared: set[str] = set()
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        if group.num_rows == 0:
            continue
        for k in range(group.num_columns):
            column = group.column(k)
            name = column.path_in_schema
            if column.physical_type != "BYTE_ARRAY" or (
                columns is not None and not any(f"{name}.".startswith(f"{c}.") for c in columns)
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
