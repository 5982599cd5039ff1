"""Finds the input files that the user named: paths, globs, folders, or `-` for standard input.

The files come in a fixed order, each with how its records lie in it. What a folder or glob holds
beside them is reported with counts, and data of a kind that cannot be read is an error, so that no
part of a corpus is left out unnoticed.
"""

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

from megatron_chatflow.errors import UserError

logger = logging.getLogger(__name__)

RecordKind = Literal["lines", "jsonl", "tsv", "json", "txt", "parquet"]
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
# Kinds of files that hold text, and that no reader is there for.
UNREADABLE_SUFFIXES = frozenset(
    ".csv .arrow .feather .avro .orc .xls .xlsx .ods .tfrecord .tfrecords .h5 .hdf5 .warc .wet "
    ".wat .lmdb .xml .tmx .xlf .doc .docx .odt .epub "
    ".bz2 .xz .lzma .lz4 .br .snappy .sz .z .zip .7z .rar .tar .tgz .tbz2 .txz".split()
)
STANDARD_INPUT_NAMES = frozenset(["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
# Text about a corpus, and no part of it.
_ABOUT_A_CORPUS = re.compile(
    r"readme([-._].*)?|licen[cs]es?([-._](mit|apache|bsd|l?gpl|cc|odc).*)?|copying|notice|authors|"
    r"change(log|s)|citation|contributing|requirements|(sha\d*|md5)(sums?)?|checksums?",
    re.IGNORECASE,
)
_DATASETS_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NUM_NAMED = 3  # files that a message names


@dataclass(frozen=True)
class InputFile:
    """One input.

    Attributes:
        path: None for standard input.
        name: How messages and the sidecar name it.
        kind: How records lie in it; "lines" where no name says whether they are JSON or
            tab-separated.
        num_bytes: Its size on disk; 0 where that cannot be known.
    """

    path: Path | None
    name: str
    kind: RecordKind
    num_bytes: int


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """Expands the inputs, each in the order given, files of a folder or glob by name.

    Folders are searched to the bottom for known endings. Links are followed, and a file or folder
    that several paths lead to is read once. Hidden files, documentation and files of other kinds
    are left out and logged with their counts.

    Args:
        inputs: Files, globs, folders, `-`.

    Raises:
        UserError: Nothing matches, a file is given twice or cannot be read, or its kind is not
            known.
    """
    try:
        files = [file for name in inputs for file in _expand(name)]
    except OSError as error:
        raise UserError(f"cannot read: {error.filename}: {error.strerror}") from error
    if not files:
        raise UserError("no input: name at least one file, folder or glob")
    given: dict[str, str] = {}
    for file in files:
        real = "-" if file.path is None else os.path.realpath(file.path)
        name = file.name if file.path is None else str(file.path)
        if real in given:
            raise UserError(
                f"input given twice: {given[real]} and {name}: name it once; how often data is "
                "seen is up to its weight in training"
            )
        given[real] = name
    return files


@dataclass
class _Found:
    """The files below a folder, or of a glob, sorted by what becomes of them."""

    files: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def sort_in(self, path: Path) -> bool:
        """Decides on one file by its name; returns whether it is read."""
        kind = _kind_of(path)
        ending = path.suffix.lower()
        if kind is None and ending not in (*UNREADABLE_SUFFIXES, *COMPRESSION_SUFFIXES):
            self.skipped[ending or "without an ending"] += 1
        elif kind is not None and _is_about_a_corpus(path):
            self.skipped[path.name] += 1
        elif not path.exists():
            raise UserError(f"cannot read: {path}: the link leads to no file")
        elif not path.is_file():
            self.skipped["neither files nor folders"] += 1
        elif kind is None:
            self.unreadable.append(path)
        else:
            self.files.append(path)
            return True
        return False

    def report(self, name: str) -> None:
        """Logs what is left out, and refuses to leave out data."""
        if self.unreadable:
            endings = Counter("".join(path.suffixes[-2:]).lower() for path in self.unreadable)
            named = ", ".join(str(path) for path in sorted(self.unreadable)[:_NUM_NAMED])
            others = ", ..." if len(self.unreadable) > _NUM_NAMED else ""
            raise UserError(
                f"cannot read: {len(self.unreadable)} files in {name}: {_counts(endings)} "
                f"({named}{others}): convert them to jsonl or parquet, decompress or compress them "
                "as .gz or .zst, or name what to read with a glob such as "
                f"'{name.rstrip('/')}/**/*.jsonl'"
            )
        if self.skipped:
            logger.warning("left out of %s: %s", name, _counts(self.skipped))


def _expand(name: str) -> list[InputFile]:
    if name in STANDARD_INPUT_NAMES:
        return [InputFile(None, "<stdin>", "lines", 0)]
    if _URL.match(name):
        raise UserError(
            f"not a local path: {name}: download it first, or pipe its lines in and name - as the "
            "input"
        )
    path = Path(name)
    if path.is_dir():
        found = _search(path)
        found.report(name)
        if not found.files:
            endings = " ".join(RECORD_KINDS)
            raise UserError(f"no input in folder: {path}: none of its files ends in {endings}")
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


def _matches(pattern: str) -> _Found:
    """The files of a glob; an ending that is not known is an error when the file is opened."""
    found = _Found()
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
            raise UserError(f"cannot read: {match}: the link leads to no file")
        elif _kind_of(match) is not None and _is_about_a_corpus(match):
            found.skipped[match.name] += 1
        else:
            seen.add(real)
            found.files.append(match)
    found.files.sort()
    return found


def _search(folder: Path) -> _Found:
    """Everything below a folder.

    Folders that are links are entered after all others, so that a folder with several names is read
    under its own; every folder is entered once, which also ends cycles.
    """
    found = _Found()
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
                    if not _is_link(parent, name) and found.sort_in(Path(parent, name)):
                        seen.add(os.path.join(real, name))
        waiting = sorted(links)
    for path in sorted(linked_files):
        real = os.path.realpath(path)
        if real in seen:
            found.skipped["other links to the same files"] += 1
        elif found.sort_in(path):
            seen.add(real)
    found.files.sort()
    return found


def _is_link(parent: str, name: str) -> bool:
    return os.path.islink(os.path.join(parent, name))


def _raise(error: OSError) -> NoReturn:
    raise error


def _is_about_a_corpus(path: Path) -> bool:
    """Whether a file is documentation, or describes datasets that lie beside it."""
    name = path.name
    while Path(name).suffix.lower() in (*RECORD_KINDS, *COMPRESSION_SUFFIXES):
        name = Path(name).stem
    if path.suffix == ".json" and (
        path.name in _DATASETS_METADATA or path.with_suffix(".idx").exists()
    ):
        return True
    return _kind_of(path) == "txt" and _ABOUT_A_CORPUS.fullmatch(name) is not None


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in _by_number(counts.items()))


def _by_number(items: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(items, key=lambda item: (-item[1], item[0]))


def _kind_of(path: Path) -> RecordKind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return RECORD_KINDS.get(suffixes[-1]) if suffixes else None


def _input_file(path: Path, name: str) -> InputFile:
    kind = _kind_of(path)
    if (
        path.is_fifo()
        or path.is_char_device()
        or path.parent.as_posix() in ("/dev/fd", "/proc/self/fd")
    ):
        return InputFile(path, str(path), kind or "lines", 0)
    if kind is None:
        endings = " ".join(RECORD_KINDS)
        raise UserError(
            f"unknown kind of input: {path}: its name should end in one of {endings}, "
            "optionally followed by .gz or .zst"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"cannot read: {path}: permission denied")
    # JSON has no bytes that are not UTF-8: the sidecar gets them as \xff.
    name = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return InputFile(path, name, kind, path.stat().st_size)
