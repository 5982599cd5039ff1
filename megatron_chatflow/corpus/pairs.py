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
from megatron_chatflow.corpus.jinja_chats import JinjaTemplate
from megatron_chatflow.corpus.pair_templates import PairText
from megatron_chatflow.corpus.scripts import is_mostly
from megatron_chatflow.corpus.tab_separated import TabLayout, TabOptions
from megatron_chatflow.corpus.templates import document_of_chat

PairDirection = Literal["both", "forward", "backward", "hash"]
PairLevel = Literal["sentence", "document"]


@dataclass(frozen=True)
class PairSettings:
    """How pairs become documents.

    Attributes:
        keys: The JSON keys of the first and the second side.
        columns: Their columns in tab-separated lines, by number from 1 or by name; None where there
            are two.
        languages: What the translation instruction calls them.
        template: "plain", "translate", or the YAML file that `texts` come from.
        texts: The user's own templates, one of which the hash of the pair chooses.
        direction: "forward" has the first side first, "backward" the second, "both" makes two
            documents, "hash" lets a hash of the pair choose, so that a corpus has as many of each.
        max_length_ratio: Longer over shorter side, in UTF-8 bytes (in which languages differ less
            than in characters), above which a pair is left out; 0 for no limit.
        scripts: The script that each side has to be in; "any" for no filter.
        level: What becomes of a JSON object whose sides are lists of sentences: "sentence" makes a
            pair of each two, "document" one pair of all, a sentence a line.
    """

    keys: tuple[str, str] = ("en", "zh")
    columns: tuple[str, str] | None = None
    languages: tuple[str, str] = ("English", "Chinese")
    template: str = "plain"
    texts: tuple[PairText, ...] = ()
    direction: PairDirection = "hash"
    max_length_ratio: float = 9.0
    scripts: tuple[str, str] = ("any", "any")
    level: PairLevel = "sentence"

    @property
    def tabs(self) -> TabOptions:
        """How tab-separated lines hold pairs."""
        first, second = (
            frozenset(name.lower() for name in names)
            for names in zip(self.keys, self.languages, strict=True)
        )
        return TabOptions(self.columns, (first, second))


def pair_of_line(line: str, layout: TabLayout) -> tuple[str, str]:
    """The sides of a tab-separated line.

    Raises:
        BadLineError: It has another number of columns than its file.
    """
    sides = layout.sides(line)
    if sides is None:
        raise BadLineError("wrong_number_of_columns" if "\t" in line else "no_tab")
    return sides


def pairs_of_record(
    record: Mapping[str, Any], keys: tuple[str, str], level: PairLevel
) -> list[tuple[str, str]]:
    """The pairs of a JSON object; its sides may be one level down, as in `{"translation": {}}`.

    Args:
        record: A side is text, or a list of sentences.
        keys: Of the two sides.
        level: What becomes of lists, as in `PairSettings`.

    Raises:
        BadLineError: A side is missing, is neither text nor a list of it, or the sides are not
            alike: one a list and one text, or lists of different length of which sentence pairs
            are to be made.
    """
    nested = record.get("translation")
    sides = nested if isinstance(nested, dict) and keys[0] not in record else record
    for key in keys:
        if key not in sides:
            raise BadLineError(f"no_key_{key}")
        sentences = sides[key] if isinstance(sides[key], list) else [sides[key]]
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise BadLineError(f"not_text_{key}")
    first, second = sides[keys[0]], sides[keys[1]]
    if isinstance(first, str) and isinstance(second, str):
        return [(first, second)]
    if isinstance(first, str) or isinstance(second, str):
        raise BadLineError("list_beside_text")
    if level == "document":
        return [("\n".join(first), "\n".join(second))]
    if len(first) != len(second):
        raise BadLineError("unaligned_sentences")
    return list(zip(first, second, strict=True))


def documents_of_pair(
    first: str, second: str, settings: PairSettings, chat_template: str | JinjaTemplate, loss: str
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
    scripts = settings.scripts
    if not (is_mostly(first, scripts[0]) and is_mostly(second, scripts[1])):
        raise DroppedError("wrong_script")
    digest = hashlib.blake2b(f"{first}\t{second}".encode(), digest_size=3).digest()
    choice = int.from_bytes(digest[1:], "little")
    forward = settings.direction in ("forward", "both")
    backward = settings.direction in ("backward", "both")
    if settings.direction == "hash":
        forward = digest[0] % 2 == 0
        backward = not forward
    names = settings.languages
    sides = [(first, second, *names)] if forward else []
    sides += [(second, first, *names[::-1])] if backward else []
    return [_document(*side, settings, choice, chat_template, loss) for side in sides]


def _document(
    source: str,
    target: str,
    source_language: str,
    target_language: str,
    settings: PairSettings,
    choice: int,
    chat_template: str | JinjaTemplate,
    loss: str,
) -> Document:
    if settings.texts:
        text = settings.texts[choice % len(settings.texts)]
        names = {"source": source, "target": target}
        names |= {"source_language": source_language, "target_language": target_language}
        response = Segment(text.response.format_map(names), True)
        if not text.prompt:
            return Document((response,))
        prompt = Segment(text.prompt.format_map(names), loss == "all")
        return Document((prompt, response, Segment("", True, "end")))
    if settings.template == "plain":
        return Document((Segment(f"{source}\n{target}", True),))
    question = f"Translate the following text into {target_language}.\n\n{source}"
    document = document_of_chat(Chat(None, ((question, target),)), chat_template, loss)
    return Document(document.segments)  # half a translation teaches nothing: not to be cut
