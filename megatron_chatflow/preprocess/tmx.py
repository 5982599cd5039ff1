"""Reads translation memories (TMX) as a stream of sentence pairs.

The parser is expat. It reads no external file, and a file that declares entities of its own is
refused, because entities can expand to any amount of text. Only one translation unit is in memory
at a time. Text in native codes (`bpt`, `ept`, `it`, `ph`, `ut`) is formatting and is left out; that
in highlighted text (`hi`) is kept.
"""

from collections.abc import Iterator
from typing import Any, NoReturn
from xml.parsers import expat

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.languages import find_language
from megatron_chatflow.preprocess.records import OversizedRecord, Placeholder, RejectedRecord

# What a variant or a property counts towards the size of its unit in addition to its text, so that
# the memory of a unit with many empty ones is limited too.
_ELEMENT_BYTES = 64
_MAX_DEPTH = 100  # of elements; expat keeps all that are open
_MAX_TAG_CHARACTERS = 100  # no language code is longer, and tags are cached
_NATIVE_CODES = frozenset(["bpt", "ept", "it", "ph", "ut"])


class TmxParser:
    """Parses the bytes of a TMX file to pairs.

    Attributes:
        rows: The units that have been parsed since the list was emptied. A unit is a list of the
            two sides and, if ``score`` is set, the score, or a placeholder.
    """

    def __init__(
        self,
        name: str,
        languages: tuple[str, str],
        *,
        score: str | None,
        max_record_bytes: int,
        encoding: str | None,
    ) -> None:
        """Initializes the parser.

        Args:
            name: Name of the file in messages.
            languages: Language codes of the two sides. If a unit has the code and a variant, such
                as "zh" and "zh-TW", the code is taken; of several variants, the first.
            score: Type of the `<prop>` that has a unit's score; None if the score is not needed.
            max_record_bytes: Maximum size of the text of a unit.
            encoding: Encoding of the bytes; None for the one that the file declares.
        """
        self.rows: list[list[str] | Placeholder] = []
        self._name = name
        self._languages = languages
        self._score = score
        self._max_record_bytes = max_record_bytes
        self._is_tmx = False
        self._texts: list[tuple[str, str]] = []  # language and text of each variant of the unit
        self._props: dict[str, str] = {}
        self._language = ""
        self._prop = ""
        self._parts: list[str] | None = None  # of the text that is being read
        self._num_ignored_levels = 0
        self._num_text_bytes = 0  # of the unit
        self._num_bytes_fed = 0
        self._depth = 0
        parser: Any = expat.ParserCreate(encoding)
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._add_text
        parser.EntityDeclHandler = self._refuse_entity
        parser.SkippedEntityHandler = self._refuse_unknown_entity
        self._parser = parser

    def feed(self, block: bytes, *, is_last: bool = False) -> None:
        """Parses the next bytes of the file.

        Raises:
            UserError: The file is not well-formed XML, is not TMX, declares entities or uses
                unknown ones, or has a tag or comment larger than ``max_record_bytes``.
        """
        self._num_bytes_fed += len(block)
        try:
            self._parser.Parse(block, is_last)
        except expat.ExpatError as error:
            raise UserError(
                f"malformed XML: {self._name}:{error.lineno}: {expat.ErrorString(error.code)}: "
                "correct the file, or set --encoding if its encoding is not the one it declares"
            ) from error
        except (LookupError, ValueError) as error:  # an encoding that expat does not support
            raise UserError(
                f"cannot read: {self._name}: {error}: set --encoding to the file's encoding"
            ) from error

        # expat keeps what it cannot parse yet. Text is parsed in parts, but a tag only as a whole.
        num_kept = self._num_bytes_fed - max(self._parser.CurrentByteIndex, 0)
        if not is_last and num_kept > self._max_record_bytes + len(block):
            raise UserError(
                f"malformed XML: {self._name}:{self._parser.CurrentLineNumber}: a tag or comment "
                f"is larger than --max-record-bytes ({self._max_record_bytes}): correct the file"
            )

    def _start(self, element: str, attributes: dict[str, str]) -> None:
        # The names of TMX are in lower case, but some tools write capitals.
        element = element.lower()
        if not self._is_tmx:
            if element != "tmx":
                raise UserError(
                    f"not TMX: {self._name}: its first element is {element:.40}: convert it to "
                    "TMX, tsv or jsonl"
                )
            self._is_tmx = True
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise UserError(
                f"malformed XML: {self._name}:{self._parser.CurrentLineNumber}: more than "
                f"{_MAX_DEPTH} elements in each other: correct the file"
            )
        if element == "tu":
            self._texts, self._props, self._num_text_bytes = [], {}, 0
        elif element == "tuv":
            language = _attribute(attributes, "xml:lang") or _attribute(attributes, "lang")
            self._language = language[:_MAX_TAG_CHARACTERS]
        elif element == "seg":
            self._parts, self._num_ignored_levels = [], 0
        elif element == "prop":
            self._prop = _attribute(attributes, "type")
            self._parts = []
        elif self._parts is not None and (self._num_ignored_levels or element in _NATIVE_CODES):
            self._num_ignored_levels += 1

    def _end(self, element: str) -> None:
        element = element.lower()
        self._depth -= 1
        if element in ("seg", "prop"):
            text = "".join(self._parts or [])
            self._parts = None
            title = self._language if element == "seg" else self._prop
            self._num_text_bytes += _ELEMENT_BYTES + len(title)
            if self._num_text_bytes > self._max_record_bytes:
                return
            if element == "seg":
                self._texts.append((title, text))
            else:
                self._props.setdefault(title, text.strip())
        elif element == "tu":
            self.rows.append(self._unit())
            self._texts = []
        elif self._num_ignored_levels:
            self._num_ignored_levels -= 1

    def _add_text(self, text: str) -> None:
        if self._parts is None or self._num_ignored_levels:
            return
        self._num_text_bytes += len(text.encode())
        if self._num_text_bytes <= self._max_record_bytes:
            self._parts.append(text)

    def _unit(self) -> list[str] | Placeholder:
        if self._num_text_bytes > self._max_record_bytes:
            return OversizedRecord()
        sides = []
        tags = [language for language, _ in self._texts]
        for code in self._languages:
            found = find_language(tags, code, self._languages)
            if found is None:
                return RejectedRecord(f"no_language_{code}", is_bad=False)
            sides.append(self._texts[found][1])
        if self._score is None:
            return sides
        if self._score not in self._props:
            return RejectedRecord(f"no_key_{self._score}")
        return [*sides, self._props[self._score]]

    def _refuse_entity(self, entity: str, *_: object) -> NoReturn:
        raise UserError(
            f"refused: {self._name}: declares the XML entity {entity:.40}: replace entities by "
            "their text"
        )

    def _refuse_unknown_entity(self, entity: str, _: bool) -> NoReturn:
        # With a document type, expat leaves out entities that the file does not declare.
        raise UserError(
            f"refused: {self._name}:{self._parser.CurrentLineNumber}: the XML entity {entity:.40} "
            "is not declared: replace it by its text"
        )


def _attribute(attributes: dict[str, str], name: str) -> str:
    """Returns an attribute whose name may be in capitals; an empty text if there is none."""
    if name in attributes:
        return attributes[name]
    return next((value for key, value in attributes.items() if key.lower() == name), "")


def read_tmx(
    blocks: Iterator[bytes], parser: TmxParser, chunk_bytes: int
) -> Iterator[list[list[str] | Placeholder]]:
    """Yields the units of a file in lists of about ``chunk_bytes`` of XML.

    Raises:
        UserError: See `TmxParser.feed`.
    """
    num_bytes = 0
    for block in blocks:
        parser.feed(block)
        num_bytes += len(block)
        if num_bytes >= chunk_bytes and parser.rows:
            yield parser.rows
            parser.rows, num_bytes = [], 0
    parser.feed(b"", is_last=True)
    if parser.rows:
        yield parser.rows
