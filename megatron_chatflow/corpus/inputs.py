"""Finds the input files that the user named.

In: paths, globs, folders, or `-` for standard input. Out: the files in a fixed order, each with
how its records lie in it.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_chatflow.errors import UserError

RecordKind = Literal["lines", "json", "txt", "parquet"]
RECORD_KINDS: dict[str, RecordKind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".tsv": "lines",
    ".json": "json",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
}
COMPRESSION_SUFFIXES = (".gz", ".zst")


@dataclass(frozen=True)
class InputFile:
    """One input.

    Attributes:
        path: None for standard input.
        name: How messages and the sidecar name it.
        kind: How records lie in it.
        num_bytes: Its size on disk; 0 where that cannot be known.
    """

    path: Path | None
    name: str
    kind: RecordKind
    num_bytes: int


def find_inputs(inputs: Sequence[str]) -> list[InputFile]:
    """Expands the inputs, each in the order given, files of a folder or glob by name.

    Args:
        inputs: Files, globs, folders (searched to the bottom for known endings), `-`.

    Raises:
        UserError: Nothing matches, or the ending of a file is not known.
    """
    files = [file for name in inputs for file in _expand(name)]
    if not files:
        raise UserError("no input: name at least one file, folder or glob")
    return files


def _expand(name: str) -> Iterator[InputFile]:
    if name == "-":
        yield InputFile(None, "<stdin>", "lines", 0)
        return
    path = Path(name)
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and _kind_of(file) and not _is_hidden(file.relative_to(path))
        )
        if not found:
            endings = " ".join(RECORD_KINDS)
            raise UserError(f"no input in folder: {path}: none of its files ends in {endings}")
        for file in found:
            yield _input_file(file, file.relative_to(path).as_posix())
    elif path.exists():
        yield _input_file(path, path.name)
    elif glob.has_magic(name):
        matches = sorted(
            match for match in glob.glob(name, recursive=True) if os.path.isfile(match)
        )
        if not matches:
            raise UserError(f"no input: {name}: the glob matches no file")
        for match in matches:
            yield _input_file(Path(match), Path(match).name)
    else:
        raise UserError(f"no input: {name}: no such file or folder")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind_of(path: Path) -> RecordKind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        suffixes.pop()
    return RECORD_KINDS.get(suffixes[-1]) if suffixes else None


def _input_file(path: Path, name: str) -> InputFile:
    kind = _kind_of(path)
    if path.is_fifo() or path.is_char_device():
        return InputFile(path, str(path), kind or "lines", 0)
    if kind is None:
        endings = " ".join(RECORD_KINDS)
        raise UserError(
            f"unknown kind of input: {path}: its name should end in one of {endings}, "
            "optionally followed by .gz or .zst"
        )
    return InputFile(path, name, kind, path.stat().st_size)
