"""Finds the columns of the pair in lines with separators, and detects lines that are JSON.

The separator is a tab or, as in the input of word aligners, ` ||| `. CSV files have the same
columns, but their cells are found by a CSV parser. The layout is detected once from the beginning
of each file, before its chunks are passed to workers, because a single line is ambiguous:
tab-separated text may begin with a brace. If a file has more than two columns, such as a URL or a
score, the user has to name the columns of the pair, unless the header names them. They are never
guessed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson

from megatron_chatflow.errors import UserError

SAMPLE_BYTES = 1 << 16
# Common column names in lower case. A first line of only such words is a header, not a pair.
_HEADER_WORDS = frozenset(
    "id idx index no url url1 url2 source target src tgt trg score scores similarity text text1 "
    "text2 sentence sentence1 sentence2 sentence_1 sentence_2 lang lang1 lang2 language domain "
    "src_text tgt_text source_text target_text src_lang tgt_lang translation original "
    "en zh zh-cn zh-tw zh_cn zh_tw ja ko de fr es it pt ru ar hi vi th ms tr nl pl cs uk fa he "
    "eng zho cmn jpn kor deu fra spa ita por rus ara hin vie tha ind tur eng_latn zho_hans "
    "zho_hant english chinese japanese korean german french spanish italian portuguese russian "
    "arabic hindi vietnamese thai indonesian turkish".split()
)


SEPARATORS = ("\t", " ||| ")


@dataclass(frozen=True)
class TabOptions:
    """Options for finding the pair in files with columns."""

    # the two columns of the pair, as numbers counted from 1 or as names in the header line; None if
    # lines must have two columns
    columns: tuple[str, str] | None = None
    # names that a header may have for the first and the second side, in lower case
    names: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
    score: str | None = None  # the column of the score, as in `columns`; None if not needed


@dataclass(frozen=True)
class TabLayout:
    """The columns of a file."""

    columns: tuple[int, int]  # the columns of the two sides of a pair, counted from 0
    num_columns: int  # number of columns in every line
    header_line: int = 0  # line number of the header, counted from 1; 0 if there is no header
    separator: str = "\t"
    score: int | None = None  # the column of the score, counted from 0; None if it is not needed
    names: tuple[str, ...] = ()  # names of the columns of a CSV file with records; else empty

    def sides(self, line: str) -> tuple[str, str] | None:
        """Returns the two sides of a line; None if it does not have `num_columns` columns."""
        cells = line.split(self.separator)
        if len(cells) != self.num_columns:
            return None
        return cells[self.columns[0]], cells[self.columns[1]]


def are_json_lines(data: bytes) -> bool:
    """Returns whether lines are JSON, judged by the first line that is not blank."""
    begin = len(data) - len(data.lstrip())
    end = data.find(b"\n", begin)
    line = data[begin : len(data) if end < 0 else end]
    if not line.startswith((b"{", b"[")):
        return False
    try:
        return isinstance(orjson.loads(line), dict | list)
    except orjson.JSONDecodeError:
        return b"\t" not in line


def tab_layout(data: bytes, name: str, first_line: int, options: TabOptions) -> TabLayout:
    """Detects the layout of a file of separated lines from lines of its beginning.

    ``first_line`` is the line number of the first of them. The separator is ` ||| ` if it is in
    most of the lines and no line has a tab.

    Raises:
        UserError: There are more than two columns and no columns were named, a named column
            does not exist or is named twice, or most cells are quoted as in CSV.
    """
    end = data.rfind(b"\n", 0, SAMPLE_BYTES) + 1
    sample = data[: end or None].decode(errors="replace").split("\n")
    numbered = [(n, line.rstrip("\r")) for n, line in enumerate(sample, first_line) if line.strip()]
    separator, bars = SEPARATORS
    num_with_bars = sum(bars in line for _, line in numbered)
    if 2 * num_with_bars > len(numbered) and not any(separator in line for _, line in numbered):
        separator = bars
    rows = [(n, line.split(separator)) for n, line in numbered]
    layout = column_layout(rows, name, options)
    layout = replace(layout, separator=separator)
    _check_quoting([line for n, line in numbered if n != layout.header_line], name, layout)
    return layout


def column_layout(
    rows: Sequence[tuple[int, Sequence[str]]], name: str, options: TabOptions
) -> TabLayout:
    """Finds the header and the columns of the pair from numbered rows; see `tab_layout`."""
    if not rows:
        return TabLayout((0, 1), 2)
    num_columns = Counter(len(row) for _, row in rows).most_common(1)[0][0]
    first_row = rows[0][1]
    titles = [title.strip().strip('"').lstrip("#").strip().lower() for title in first_row]
    wanted = None if options.columns is None else tuple(map(_parse_column, options.columns))
    names_title = wanted is not None and any(isinstance(column, str) for column in wanted)
    words = _HEADER_WORDS.union({(options.score or "score").lower()}, *options.names)
    score_column = None if options.score is None else _parse_column(options.score)
    has_header = (
        names_title
        or isinstance(score_column, str)  # it must be among the titles
        or (len(titles) > 1 and all(title in words for title in titles))
    )
    header_line = rows[0][0] if has_header else 0
    score = None
    if score_column is not None:
        score = _column_index(score_column, titles, num_columns, name, "--pair-score")
    titled = [[k for k, title in enumerate(titles) if title in names] for names in options.names]
    others = [k for k in range(num_columns) if k != score]
    if wanted is not None:
        first, second = (
            _column_index(column, titles, num_columns, name, "--pair-columns") for column in wanted
        )
        if first == second:
            raise UserError(f"--pair-columns: {name}: the two columns are the same")
        columns = (first, second)
    elif has_header and len(titles) == num_columns and _is_one_each(*titled):
        columns = (titled[0][0], titled[1][0])
    elif len(others) > 2:
        shown = ", ".join(cell[:30] for cell in first_row)
        raise UserError(
            f"ambiguous pair columns: {name}:{rows[0][0]}: has {num_columns} columns "
            f"({shown:.300}): select two with --pair-columns, by number from 1 or by name in the "
            "header"
        )
    elif score is not None and len(others) == 2:
        columns = (others[0], others[1])
    else:
        columns, num_columns = (0, 1), 2
    return TabLayout(columns, num_columns, header_line, score=score)


def _is_one_each(first: list[int], second: list[int]) -> bool:
    return len(first) == len(second) == 1 and first != second


def unquoted(cell: str) -> str | None:
    """Returns the text of a cell that is quoted as in CSV; None for any other cell.

    The cell must contain doubled quotation marks. Without them, it may be a sentence in quotation
    marks, and the result is None.
    """
    if len(cell) < 4 or cell[0] != '"' or cell[-1] != '"':
        return None
    inner = cell[1:-1]
    if '""' not in inner or '"' in inner.replace('""', ""):
        return None
    return inner.replace('""', '"')


def _parse_column(column: str) -> int | str:
    return int(column) - 1 if column.isascii() and column.isdigit() else column.lower()


def _column_index(
    column: int | str, titles: list[str], num_columns: int, name: str, flag: str
) -> int:
    if isinstance(column, str):
        if column in titles:
            return titles.index(column)
        shown = ", ".join(title[:30] for title in titles)
        raise UserError(f"{flag}: {name}: no column {column} in the header ({shown:.300})")
    if not 0 <= column < num_columns:
        raise UserError(
            f"{flag}: {name}: there is no column {column + 1}, only columns 1 to {num_columns}"
        )
    return column


def _check_quoting(lines: list[str], name: str, layout: TabLayout) -> None:
    pairs = [sides for line in lines if (sides := layout.sides(line)) is not None]
    num_quoted = sum(
        all(len(side) > 1 and side[0] == side[-1] == '"' for side in pair) for pair in pairs
    )
    if num_quoted * 2 > len(pairs):
        raise UserError(
            f"quoted as in CSV: {name}: {num_quoted} of the first {len(pairs)} pairs: convert it "
            "to plain tab-separated lines or as jsonl"
        )
