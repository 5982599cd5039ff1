"""Pairs up and reads parallel text in two files that are aligned by line, as Moses stores it.

The files of a pair have the same name except for the language at its end: `corpus.en` and
`corpus.zh`, possibly compressed (`corpus.en.gz`) or with `.txt` (`corpus.en.txt`). The language may
be a variant (`corpus.zh-CN`). A file `corpus.scores` with a number in each line, as in archives of
mined text from OPUS, has the scores of the pairs.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import PurePath
from typing import NamedTuple

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.languages import is_variant, matching_code
from megatron_chatflow.preprocess.records import OversizedRecord

SCORES_SUFFIX = ".scores"
# Files beside aligned text that say which sentences of which documents it is from.
ALIGNMENT_SUFFIXES = (".xml", ".ids")
NUM_ROWS_PER_CHUNK = 10_000
Line = bytes | OversizedRecord


class AlignedName(NamedTuple):
    """What the name of a file says about its role in a pair of files."""

    stem: str  # path without the language and later suffixes, the same for all files of a pair
    part: int  # 0 or 1 for a side, 2 for the scores
    # Whether the name alone decides. `corpus.en.txt` is a side only if there is another side.
    is_certain: bool


def aligned_name(
    path: PurePath, sides: tuple[str, str], compression: Sequence[str]
) -> AlignedName | None:
    """Returns the role of a file in a pair of the languages ``sides``; None if it has none."""
    while path.suffix.lower() in compression:
        path = path.with_suffix("")
    is_certain = path.suffix.lower() != ".txt"
    if not is_certain:
        path = path.with_suffix("")
    if path.suffix.lower() == SCORES_SUFFIX:
        return AlignedName(str(path.with_suffix("")), 2, is_certain) if is_certain else None
    tag = path.suffix.removeprefix(".")
    code = matching_code(tag, sides)
    is_both = is_variant(tag, "-".join(sides)) or is_variant(tag, "-".join(sides[::-1]))
    if code is None or is_both:  # `corpus.en-zh` has both sides
        return None
    return AlignedName(str(path.with_suffix("")), code, is_certain)


def aligned_rows(
    streams: Sequence[Iterator[Line]], names: Sequence[str], max_bytes: int, chunk_bytes: int
) -> Iterator[list[list[str] | OversizedRecord]]:
    """Yields the rows of files that are aligned by line, in lists of about ``chunk_bytes``.

    A row has one line of each file, without its end. Bytes that are not UTF-8 are lone surrogates.

    Raises:
        UserError: The files have different numbers of lines.
    """
    rows: list[list[str] | OversizedRecord] = []
    num_bytes = 0
    num_lines = [0] * len(streams)
    is_aligned = True
    for lines in zip_longest(*streams):
        for k, line in enumerate(lines):
            num_lines[k] += line is not None
        if None in lines:
            is_aligned = False
        if not is_aligned:
            continue
        fitting = [line for line in lines if isinstance(line, bytes) and len(line) <= max_bytes]
        if len(fitting) < len(lines):
            rows.append(OversizedRecord())
        else:
            rows.append([line.decode("utf-8", "surrogateescape") for line in fitting])
            num_bytes += sum(map(len, fitting))
        if num_bytes >= chunk_bytes or len(rows) >= NUM_ROWS_PER_CHUNK:
            yield rows
            rows, num_bytes = [], 0
    if not is_aligned:
        counts = ", ".join(
            f"{name} has {n:,} lines" for name, n in zip(names, num_lines, strict=True)
        )
        raise UserError(f"not aligned by line: {counts}: give files with one sentence in each line")
    if rows:
        yield rows
