"""Reads the rows of CSV files with the standard library's parser.

Cells may be quoted, and quoted cells may contain line ends, so a file is parsed from its beginning
by one process. The delimiter is a comma, or the semicolon or tab that spreadsheets write in some
languages, if the first line has no comma.
"""

import csv
from collections.abc import Iterator

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.records import OversizedRecord, Placeholder, RejectedRecord

NUM_SAMPLE_ROWS = 100  # rows that the columns are found from
_NUM_ROWS_PER_CHUNK = 1000
Row = list[str] | Placeholder


def csv_rows(
    lines: Iterator[str], name: str, max_record_bytes: int, chunk_bytes: int
) -> Iterator[list[Row]]:
    """Yields rows in lists of about ``chunk_bytes``. Blank lines are empty rows.

    ``lines`` keep their ends. A row that is not valid CSV becomes a `RejectedRecord`.

    Raises:
        UserError: The last cell of the file has no closing quotation mark.
    """
    first = next(lines, "")
    delimiters = [mark for mark in (",", ";", "\t") if mark in first] or [","]
    reader = csv.reader(_chain(first, lines), delimiter=delimiters[0], strict=True)
    rows: list[Row] = []
    num_characters = 0
    previous_limit = csv.field_size_limit()
    while True:
        begin = reader.line_num + 1
        row: Row
        try:
            # The limit applies to all parsers of the process, so it is set only while one runs.
            csv.field_size_limit(max_record_bytes)
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(
                    f"malformed CSV: {name}:{begin}: a quotation mark is not closed before the end "
                    "of the file: double it, or quote the cell that contains it"
                ) from error
            is_large = "field limit" in str(error)
            row = OversizedRecord() if is_large else RejectedRecord("malformed_csv")
        finally:
            csv.field_size_limit(previous_limit)
        if isinstance(row, list):
            size = sum(map(len, row))
            num_characters += size
            if size > max_record_bytes:
                row = OversizedRecord()
        rows.append(row)
        if num_characters >= chunk_bytes or len(rows) >= _NUM_ROWS_PER_CHUNK:
            yield rows
            rows, num_characters = [], 0
    if rows:
        yield rows


def _chain(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines
