"""Reads the rows of CSV files with the standard library's parser.

Cells may be quoted, and quoted cells may contain line ends, so a file is parsed from its beginning
by one process. The delimiter is a comma, or the semicolon or tab that spreadsheets write in some
languages: the mark of which most of the first lines have the same number.

A quotation mark that is not closed or not doubled can hide where the next row begins. What follows
would be read as rows that the file does not have, so the file is refused, unless the row is on one
line and its quotation marks are balanced.
"""

import csv
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.records import OversizedRecord, Placeholder, RejectedRecord

NUM_SAMPLE_ROWS = 100  # rows that the columns are found from
_NUM_SAMPLE_CHARACTERS = 1 << 16  # of the lines that the delimiter is found from
_NUM_ROWS_PER_CHUNK = 1000
_DELIMITERS = (",", ";", "\t")
_QUOTED = re.compile(r'"[^"]*(?:"|\Z)')
Row = list[str] | Placeholder


def csv_rows(
    lines: Iterator[str], name: str, max_record_bytes: int, chunk_bytes: int
) -> Iterator[list[Row]]:
    """Yields rows in lists of about ``chunk_bytes``. Blank lines are empty rows.

    ``lines`` keep their ends. A row of one line that is not valid CSV, such as one with a quotation
    mark in a cell that is not quoted, becomes a `RejectedRecord`.

    Raises:
        UserError: A quoted cell has no closing quotation mark, is longer than ``max_record_bytes``,
            or contains a quotation mark that is not doubled, so that its end is not known.
    """
    sample = _sample(lines)
    delimiter = _delimiter_of(sample)
    record: list[str] = []  # lines of the row that is parsed

    def recorded() -> Iterator[str]:
        for line in chain(sample, lines):
            record.append(line)
            yield line

    reader = csv.reader(recorded(), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    num_bytes = 0
    previous_limit = csv.field_size_limit()
    while True:
        begin = reader.line_num + 1
        record.clear()
        row: Row
        try:
            # The limit applies to all parsers of the process, so it is set only while one runs. It
            # counts characters, which have at least one byte.
            csv.field_size_limit(max_record_bytes)
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            row = _rejected(str(error), record, f"{name}:{begin}", max_record_bytes)
        finally:
            csv.field_size_limit(previous_limit)
        if isinstance(row, list):
            size = sum(map(len, row))  # in characters if they cannot have too many bytes
            if 4 * size > max_record_bytes:
                size = sum(len(cell.encode("utf-8", "surrogateescape")) for cell in row)
            num_bytes += size
            if size > max_record_bytes:
                row = OversizedRecord()
            elif '"' in "".join(row) and not _is_quoted(record, delimiter):
                row = RejectedRecord("malformed_csv")
        rows.append(row)
        if num_bytes >= chunk_bytes or len(rows) >= _NUM_ROWS_PER_CHUNK:
            yield rows
            rows, num_bytes = [], 0
    if rows:
        yield rows


def _sample(lines: Iterator[str]) -> list[str]:
    sample: list[str] = []
    num_characters = 0
    for line in lines:
        sample.append(line)
        num_characters += len(line)
        if len(sample) >= NUM_SAMPLE_ROWS or num_characters >= _NUM_SAMPLE_CHARACTERS:
            break
    return sample


def _delimiter_of(sample: Sequence[str]) -> str:
    """Returns the mark with the same number outside quoted cells in most of the lines.

    If there is none, it is the first mark that the first line has.
    """
    lines = [line for line in _QUOTED.sub("", "".join(sample)).split("\n") if line.strip(" \r")]
    num_lines: dict[str, int] = {}  # with the most common number of a mark
    for mark in _DELIMITERS:
        numbers = Counter(line.count(mark) for line in lines if mark in line)
        num_lines[mark] = max(numbers.values(), default=0)
    best = max(_DELIMITERS, key=lambda mark: num_lines[mark])
    if 2 * num_lines[best] > len(lines):
        return best
    return next((mark for mark in _DELIMITERS if lines and mark in lines[0]), ",")


def _rejected(
    error: str, record: Sequence[str], where: str, max_record_bytes: int
) -> OversizedRecord | RejectedRecord:
    """Returns the placeholder of a row that csv rejects, or raises an error if its end is unknown.

    After an error, csv goes on with the next line.
    """
    if "unexpected end" in error:
        raise UserError(
            f"malformed CSV: {where}: a quotation mark is not closed before the end of the file: "
            "double it, or quote the cell that contains it"
        )
    is_large = "field limit" in error
    if len(record) > 1 or record[0].count('"') % 2:
        if is_large:
            raise UserError(
                f"malformed CSV: {where}: a quoted cell is longer than --max-record-bytes "
                f"({max_record_bytes}): close its quotation mark, or raise --max-record-bytes"
            )
        raise UserError(
            f"malformed CSV: {where}: a quotation mark in a quoted cell is not doubled, so the end "
            "of the cell is not known: double it"
        )
    return OversizedRecord() if is_large else RejectedRecord("malformed_csv")


def _is_quoted(record: Sequence[str], delimiter: str) -> bool:
    """Returns whether all quotation marks in a row are in quoted cells, as csv does not check."""
    text = "".join(record).rstrip("\r\n")
    position = 0
    while True:
        if text[position : position + 1] == '"':
            while text[position : position + 1] == '"':  # a doubled mark separates two parts
                position = text.index('"', position + 1) + 1
            position = len(text) if position == len(text) else position + 1
        else:
            end = text.find(delimiter, position)
            end = len(text) if end < 0 else end
            if text.find('"', position, end) >= 0:
                return False
            position = min(end + 1, len(text))
        if position == len(text):
            return True
