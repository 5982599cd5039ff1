"""Sentence pairs: `en<TAB>zh` lines or JSON objects with a key for each language.

In: the two sides of a pair. Out: documents (a translation instruction with loss on the target, or
both sides one after the other with loss on all), or the reason why the pair is left out.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_chatflow.corpus.chats import Chat
from megatron_chatflow.corpus.documents import BadLineError, Document, DroppedError, Segment
from megatron_chatflow.corpus.templates import document_of_chat

PairTemplate = Literal["plain", "translate"]
PairDirection = Literal["both", "forward", "backward", "hash"]


@dataclass(frozen=True)
class PairSettings:
    """How pairs become documents.

    Attributes:
        keys: The JSON keys of the first and the second side.
        languages: What the translation instruction calls them.
        template: "plain" or "translate".
        direction: "forward" has the first side first, "backward" the second, "both" makes two
            documents, "hash" lets a hash of the pair choose, so that a corpus has as many of each.
        max_length_ratio: Longer over shorter side, in UTF-8 bytes (in which languages differ less
            than in characters), above which a pair is left out; 0 for no limit.
    """

    keys: tuple[str, str] = ("en", "zh")
    languages: tuple[str, str] = ("English", "Chinese")
    template: PairTemplate = "plain"
    direction: PairDirection = "hash"
    max_length_ratio: float = 9.0


def pair_of_line(line: str) -> tuple[str, str]:
    """The sides of a tab-separated line; columns after the second are left out.

    Raises:
        BadLineError: There is no tab.
    """
    columns = line.split("\t")
    if len(columns) < 2:
        raise BadLineError("no_tab")
    return columns[0], columns[1]


def pair_of_record(record: Mapping[str, Any], keys: tuple[str, str]) -> tuple[str, str]:
    """The sides of a JSON object, which may hold them one level down, as in `{"translation": {}}`.

    Raises:
        BadLineError: A side is missing or is not text.
    """
    nested = record.get("translation")
    sides = nested if isinstance(nested, dict) and keys[0] not in record else record
    for key in keys:
        if key not in sides:
            raise BadLineError(f"no_key_{key}")
        if not isinstance(sides[key], str):
            raise BadLineError(f"not_text_{key}")
    return sides[keys[0]], sides[keys[1]]


def documents_of_pair(
    first: str, second: str, settings: PairSettings, chat_template: str, loss: str
) -> list[Document]:
    """The one or two documents of a pair.

    Args:
        first: The first side.
        second: The second side.
        settings: Direction, template, filters.
        chat_template: The template of the translation instruction.
        loss: "response" or "all", for the translation instruction.

    Raises:
        DroppedError: A filter leaves the pair out.
    """
    first, second = first.strip(), second.strip()
    if not first or not second:
        raise DroppedError("empty_side")
    if first == second:
        raise DroppedError("identical_sides")
    lengths = sorted((len(first.encode()), len(second.encode())))
    if settings.max_length_ratio and lengths[1] > settings.max_length_ratio * lengths[0]:
        raise DroppedError("length_ratio")
    forward = settings.direction in ("forward", "both")
    backward = settings.direction in ("backward", "both")
    if settings.direction == "hash":
        digest = hashlib.blake2b(f"{first}\t{second}".encode(), digest_size=1).digest()
        forward = digest[0] % 2 == 0
        backward = not forward
    documents = []
    if forward:
        target = settings.languages[1]
        documents.append(_document(first, second, target, settings, chat_template, loss))
    if backward:
        target = settings.languages[0]
        documents.append(_document(second, first, target, settings, chat_template, loss))
    return documents


def _document(
    source: str, target: str, language: str, settings: PairSettings, chat_template: str, loss: str
) -> Document:
    if settings.template == "plain":
        return Document((Segment(f"{source}\n{target}", True),))
    question = f"Translate the following text into {language}.\n\n{source}"
    document = document_of_chat(Chat(None, ((question, target),)), chat_template, loss)
    return Document(document.segments)  # half a translation teaches nothing: not to be cut
