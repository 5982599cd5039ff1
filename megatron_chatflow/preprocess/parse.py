"""Parses chunks of input to documents.

`parse_chunk` depends only on a `Chunk` and the `CorpusSettings`, so any process can call it. It
returns documents by output key and counts of dropped and repaired records.

A line is bad if it has malformed JSON, bytes that are not UTF-8, or a missing key. Bad lines are
dropped and counted, and the job fails if there are too many. A lone surrogate in a JSON escape is
replaced by U+FFFD and counted. The same applies to invalid bytes in a `.txt` file and, with
`invalid_utf8="replace"`, in any line. If more than a few characters are invalid, the text probably
has another encoding, and a `UserError` is raised.
"""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.chats import chat_of
from megatron_chatflow.preprocess.pairs import (
    check_score,
    documents_of_pair,
    pairs_of_record,
)
from megatron_chatflow.preprocess.readers import (
    RECORD_BYTES_PER_VALUE,
    Chunk,
    num_json_values,
)
from megatron_chatflow.preprocess.records import (
    InvalidUtf8Record,
    OversizedRecord,
    RejectedRecord,
    value_at,
)
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.preprocess.tab_separated import unquoted
from megatron_chatflow.preprocess.templates import document_of_chat
from megatron_chatflow.tokenizer.documents import BadLineError, Document, DroppedError, ParsedChunk
from megatron_chatflow.tokenizer.text_encoding import check_share_of_invalid, num_invalid_characters


class _Parser:
    def __init__(self, chunk: Chunk, settings: CorpusSettings) -> None:
        self.chunk = chunk
        self.settings = settings
        self.result = ParsedChunk({key: [] for key in settings.json_keys})
        self.num_dropped: Counter[str] = Counter()
        self.num_repaired: Counter[str] = Counter()
        self.num_invalid = 0  # characters that replace invalid UTF-8
        self.first_invalid = chunk.first_line
        self.number = chunk.first_line  # of the current record

    def parse(self) -> ParsedChunk:
        chunk = self.chunk
        if chunk.kind == "objects":
            self._all(enumerate(chunk.data, chunk.first_line), self._take_record)
        elif chunk.kind == "rows":
            self._all(enumerate(chunk.data, chunk.first_line), self._take_row)
        elif chunk.kind == "text":
            self._all([(chunk.first_line, chunk.data)], self._take_text)
        else:
            lines = enumerate(io.BytesIO(chunk.data), chunk.first_line)
            kept = (
                (number, line.removesuffix(b"\n")) for number, line in lines if not line.isspace()
            )
            take: Callable[[bytes], None] = self._take_line
            if chunk.kind == "text_lines":
                take = self._take_text
            if len(chunk.data) > self.settings.max_record_bytes // RECORD_BYTES_PER_VALUE:
                take = self._take_bounded(take)
            self._all(kept, take)
        if self.num_invalid:
            where = f"{chunk.name}:{self.first_invalid}"
            data = chunk.data if chunk.kind != "rows" else _bytes_of_rows(chunk.data)
            check_share_of_invalid(self.num_invalid, data, where)
        self.result.num_dropped = dict(self.num_dropped)
        self.result.num_repaired = dict(+self.num_repaired)
        return self.result

    def _all(self, items: Iterable[tuple[int, Any]], take: Callable[[Any], None]) -> None:
        for number, item in items:
            self.number = number
            try:
                take(item)
            except BadLineError as error:
                self.num_dropped[error.reason] += 1
                self.result.num_bad += 1
                num_before = self.result.bad_lines.get(error.reason, 0)
                self.result.bad_lines[error.reason] = num_before + 1
                if self.result.first_bad is None:
                    self.result.first_bad = f"{self.chunk.name}:{number}: {error.detail}"
            except DroppedError as error:
                self.num_dropped[error.reason] += 1

    def _take_bounded(self, take: Callable[[bytes], None]) -> Callable[[bytes], None]:
        """Wraps ``take`` to reject lines that exceed the limits on size and number of values."""
        limit = self.settings.max_record_bytes
        is_json = self.chunk.kind == "lines" and self.chunk.layout is None

        def take_bounded(line: bytes) -> None:
            if len(line) > limit:
                raise self._too_large()
            num_values = limit // RECORD_BYTES_PER_VALUE
            if is_json and len(line) > num_values and num_json_values(line) > num_values:
                raise BadLineError(
                    "record_too_large",
                    f"record_too_large: more than {num_values} values: raise --max-record-bytes",
                )
            take(line)

        return take_bounded

    def _too_large(self) -> BadLineError:
        limit = self.settings.max_record_bytes
        return BadLineError(
            "record_too_large",
            f"record_too_large: more than {limit} bytes: check that the file consists of lines, "
            "or raise --max-record-bytes",
        )

    def _take_line(self, line: bytes) -> None:
        layout = self.chunk.layout
        if layout is not None:
            if self.number == layout.header_line:
                raise DroppedError("header")
            text = self._decode(line.rstrip(b"\r"))
            cells = text.split(layout.separator)
            if len(cells) != layout.num_columns:
                no_separator = "no_tab" if layout.separator == "\t" else "no_separator"
                raise BadLineError("wrong_number_of_columns" if len(cells) > 1 else no_separator)
            if layout.score is not None:
                check_score(cells[layout.score], self.settings.pairs)
            pair = [cells[column] for column in layout.columns]
            texts = [unquoted(side) for side in pair]
            self.num_repaired["csv_quotes"] += any(text is not None for text in texts)
            first, second = (t or side for t, side in zip(texts, pair, strict=True))
            self._take_pair(first, second)
            return
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = self._repaired_record(line)
        self._take_record(record)

    def _take_row(self, row: Any) -> None:
        """Adds a row of cells, in which bytes that are not UTF-8 are lone surrogates."""
        if not isinstance(row, list):
            self._take_record(row)
            return
        if not row:  # a blank line of a CSV file
            return
        layout = self.chunk.layout
        assert layout is not None
        if self.number == layout.header_line:
            raise DroppedError("header")
        if len(row) != layout.num_columns:
            raise BadLineError("wrong_number_of_columns")
        cells = [
            cell if _is_text(cell) else self._decode(cell.encode("utf-8", "surrogateescape"))
            for cell in row
        ]
        if self.settings.format != "pairs":
            self._take_record(dict(zip(layout.names, cells, strict=True)))
            return
        if layout.score is not None:
            check_score(cells[layout.score], self.settings.pairs)
        first, second = layout.columns
        self._take_pair(cells[first], cells[second])

    def _take_record(self, record: Any) -> None:
        settings = self.settings
        if type(record) is not dict:
            if isinstance(record, OversizedRecord):
                raise self._too_large()
            if isinstance(record, InvalidUtf8Record):
                raise BadLineError("not_utf8")
            if isinstance(record, RejectedRecord):
                raise (BadLineError if record.is_bad else DroppedError)(record.reason)
            if not (type(record) is list and settings.format == "chat"):
                raise BadLineError("not_an_object")
        if settings.format == "text":
            texts = [_text_at(record, key) for key in settings.json_keys]
            for key, text in zip(settings.json_keys, texts, strict=True):
                self.result.documents[key].append(text)
        elif settings.format == "pairs":
            if settings.pairs.score_name is not None:
                check_score(value_at(record, settings.pairs.score_name), settings.pairs)
            for pair in pairs_of_record(record, settings.pairs.keys, settings.pairs.level):
                try:
                    self._take_pair(*pair)
                except DroppedError as error:  # a filter dropped the pair, but not the others
                    self.num_dropped[error.reason] += 1
        else:
            key = settings.json_keys[0]
            if "." in key and isinstance(record, dict):
                with suppress(BadLineError):  # the messages may be under another key
                    record = {**record, key: value_at(record, key)}
            chat = chat_of(record, key, settings.chats)
            template = settings.chat_template or settings.template
            document = document_of_chat(chat, template, settings.loss)
            self.result.documents[key].append(document)

    def _take_pair(self, first: str, second: str) -> None:
        settings = self.settings
        documents: list[Document] = documents_of_pair(
            first,
            second,
            settings.pairs,
            settings.chat_template or settings.template,
            settings.loss,
        )
        self.result.documents[settings.json_keys[0]].extend(documents)

    def _take_text(self, data: bytes) -> None:
        """Adds text outside JSON: a `.txt` file or one of its lines."""
        if b"\0" in data:
            number = self.number + data.count(b"\n", 0, data.index(b"\0"))
            raise UserError(
                f"not text: {self.chunk.name}:{number}: contains a NUL character, so it may be "
                "binary or UTF-16: set --encoding, or remove the character (tr -d '\\0')"
            )
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            text = self._replaced(data, error)
        if self.chunk.kind == "text_lines":
            text = text.removesuffix("\r")
        self.result.documents[self.settings.json_keys[0]].append(text)

    def _decode(self, line: bytes) -> str:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            if self.settings.invalid_utf8 == "drop":
                raise BadLineError("not_utf8") from error
            return self._replaced(line, error)

    def _replaced(self, data: bytes, error: UnicodeDecodeError) -> str:
        """Decodes ``data`` with U+FFFD for invalid UTF-8 and counts the replaced characters."""
        text = data.decode(errors="replace")
        self.num_repaired["invalid_utf8"] += 1
        if not self.num_invalid:
            self.first_invalid = self.number + data.count(b"\n", 0, error.start)
        self.num_invalid += num_invalid_characters(data, text)
        return text

    def _repaired_record(self, line: bytes) -> Any:
        """Parses a line that orjson rejected. Lone surrogates are replaced and counted."""
        text = self._decode(line)
        try:
            record = json.loads(text)
            repaired = _without_surrogates(record)
        except (ValueError, RecursionError) as error:
            raise BadLineError("malformed_json") from error
        if repaired != record:
            self.num_repaired["lone_surrogate"] += 1
        return repaired


def parse_chunk(chunk: Chunk, settings: CorpusSettings) -> ParsedChunk:
    """Parses every record of a chunk to documents, with counts of dropped and repaired records.

    Raises:
        UserError: Text has a NUL character or too many bytes that are not UTF-8.
    """
    return _Parser(chunk, settings).parse()


class _RecordParser(_Parser):
    def __init__(self, chunk: Chunk, settings: CorpusSettings, needs_text: bool) -> None:
        super().__init__(chunk, settings)
        self.needs_text = needs_text
        self.records: list[tuple[int, dict[str, Any]]] = []

    def _take_record(self, record: Any) -> None:
        if self.needs_text or type(record) is not dict:
            super()._take_record(record)  # raises an error if the record cannot be used
        self.records.append((self.number, record))

    def _take_text(self, data: bytes) -> None:
        super()._take_text(data)
        (key,) = self.settings.json_keys
        self.records.append((self.number, {key: self.result.documents[key][-1]}))


@dataclass
class ParsedRecords:
    """The records of one chunk of input and the statistics of its parsing."""

    # line or record number in the file, counted from 1, and all fields of the record
    records: list[tuple[int, dict[str, Any]]]
    parsed: ParsedChunk  # texts, and statistics as in `parse_chunk`


def parse_records(
    chunk: Chunk, settings: CorpusSettings, *, needs_text: bool = True
) -> ParsedRecords:
    """Parses the records of a chunk of plain text with all their fields, as `parse_chunk` does.

    A line of text becomes a record with one field. Without ``needs_text``, records without the
    settings' keys are kept.

    Raises:
        UserError: As in `parse_chunk`.
    """
    parser = _RecordParser(chunk, settings, needs_text)
    parsed = parser.parse()
    return ParsedRecords(parser.records, parsed)


def _text_at(record: dict[str, Any], key: str) -> str:
    text = value_at(record, key)
    if type(text) is not str:
        raise BadLineError(f"not_text_{key}")
    return text


def _is_text(cell: str) -> bool:
    """Returns whether a cell has no lone surrogates."""
    if cell.isascii():
        return True
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bytes_of_rows(rows: list[Any]) -> bytes:
    cells = (cell for row in rows if isinstance(row, list) for cell in row)
    return b"\n".join(cell.encode("utf-8", "surrogateescape") for cell in cells)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(v) for key, v in value.items()}
    return value
