r"""Converts sentence pairs to documents.

Pairs are read from `en<TAB>zh` lines or from JSON objects with a key for each language. Each pair
is converted to one or two documents, or is dropped and counted by reason. A document is a
translation instruction with loss on the target, or both sides in sequence with loss on all tokens.
Filters check the ratio of the sides' lengths and the scripts of their letters.

Users can define templates in a YAML file::

    templates:                     # a hash of the pair selects one
      - prompt: "Put this into {target_language}: {source}\n"
        response: "{target}"
      - text: "{source} = {target}"    # no prompt: loss on all tokens
"""

import hashlib
import string
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_chatflow.config.yaml_file import parse_yaml
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.tab_separated import TabLayout, TabOptions
from megatron_chatflow.preprocess.templates import document_of_chat
from megatron_chatflow.tokenizer.chat_template import Chat, JinjaTemplate
from megatron_chatflow.tokenizer.documents import BadLineError, Document, DroppedError, Segment

# The Unicode blocks of each script, as first and last code point.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x24F), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xFF21, 0xFF5A)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F),),
    "hebrew": ((0x590, 0x5FF),),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "devanagari": ((0x900, 0x97F),),
    "thai": ((0xE00, 0xE7F),),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF)),
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
}
ANY_SCRIPT = "any"

NAMES = {"source", "target", "source_language", "target_language"}
PairDirection = Literal["both", "forward", "backward", "hash"]
PairLevel = Literal["sentence", "document"]


def is_mostly(text: str, script: str) -> bool:
    """Returns whether at least half of a text's letters, in UTF-8 bytes, are of a script.

    Letters are weighted by their size in UTF-8, because one Chinese character carries as much
    information as several Latin letters.

    Args:
        text: The text. The result is True for a text without letters.
        script: A key of `SCRIPTS`, or "any", for which the result is always True.
    """
    if script == ANY_SCRIPT:
        return True
    block_edges = [edge for first, last in SCRIPTS[script] for edge in (first, last + 1)]
    num_bytes = num_inside = 0
    for character in text:
        if character.isalpha():
            letter = ord(character)
            weight = 1 if letter < 0x80 else 2 if letter < 0x800 else 3
            num_bytes += weight
            num_inside += weight * (bisect_right(block_edges, letter) % 2)
    return 2 * num_inside >= num_bytes


@dataclass(frozen=True)
class PairText:
    """A template for pairs, with placeholders such as `{source}`.

    Attributes:
        prompt: Text without loss; empty if there is no prompt.
        response: Text with loss. If there is a prompt, an end-of-sequence token follows.
    """

    prompt: str
    response: str


def read_pair_templates(path: str | Path) -> tuple[PairText, ...]:
    """Reads templates from a YAML file, which has the form shown in the module docstring.

    Args:
        path: The YAML file.

    Raises:
        UserError: The file cannot be read, is not valid YAML, or does not have this form.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read pair template: {path}: {error.strerror}: use plain, translate or an "
            "existing file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"not valid YAML: {path}: {error}: save it as UTF-8") from error
    entries = parse_yaml(text, str(path)).get("templates")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"no templates: {path}: must contain a list called templates")
    return tuple(_pair_text(entry, f"{path}: templates[{k}]") for k, entry in enumerate(entries))


def _pair_text(entry: Any, where: str) -> PairText:
    keys = set(entry) if isinstance(entry, dict) else set()
    if keys not in ({"text"}, {"prompt", "response"}):
        raise UserError(f"{where}: must contain either text, or prompt and response")
    for key in keys:
        try:
            names = {
                name for _, name, _, _ in string.Formatter().parse(entry[key]) if name is not None
            }
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}.{key}: {error}: double literal braces") from error
        if names - NAMES:
            unknown = ", ".join(sorted(names - NAMES))
            raise UserError(
                f"{where}.{key}: unknown placeholder {unknown}: use {', '.join(sorted(NAMES))}"
            )
    if "{target}" not in entry.get("text", entry.get("response")):
        raise UserError(f"{where}: no target text: use {{target}} in text or response")
    return PairText(entry.get("prompt", ""), entry.get("text", entry.get("response")))


@dataclass(frozen=True)
class PairSettings:
    """Settings for filtering pairs and converting them to documents.

    Attributes:
        keys: JSON keys of the first and the second side.
        columns: Columns of the two sides in tab-separated lines, as numbers counted from 1 or as
            names in the header line; None for files with exactly two columns.
        languages: Names of the two languages in the translation instruction.
        template: "plain", "translate", or the path of the YAML file that `texts` were read from.
        texts: Templates from a YAML file. A hash of the pair selects one of them.
        direction: "forward" puts the first side first, "backward" the second side. "both" makes a
            document in each direction. "hash" selects the direction by a hash of the pair, so that
            a corpus has about as many documents in each direction.
        max_length_ratio: Maximum ratio of the longer to the shorter side in UTF-8 bytes; 0 for no
            limit. Bytes are used because they vary less between languages than characters.
        scripts: The script that each side must have, as in `is_mostly`; "any" for no filter.
        level: How to convert a JSON object that has a list of sentences on each side. "sentence"
            makes a pair of each two aligned sentences. "document" makes one pair of all sentences,
            which are joined with newlines.
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
        """Options for finding the pair in tab-separated lines."""
        first, second = (
            frozenset(name.lower() for name in names)
            for names in zip(self.keys, self.languages, strict=True)
        )
        return TabOptions(self.columns, (first, second))


def pair_of_line(line: str, layout: TabLayout) -> tuple[str, str]:
    """Returns the two sides of a tab-separated line.

    Raises:
        BadLineError: The number of columns differs from the layout of the file.
    """
    sides = layout.sides(line)
    if sides is None:
        raise BadLineError("wrong_number_of_columns" if "\t" in line else "no_tab")
    return sides


def pairs_of_record(
    record: Mapping[str, Any], keys: tuple[str, str], level: PairLevel
) -> list[tuple[str, str]]:
    """Returns the pairs of a JSON object.

    The sides may also be nested in an object under the key `translation`.

    Args:
        record: The JSON object. Each side is a text or a list of sentences.
        keys: The keys of the two sides.
        level: How to convert lists, as in `PairSettings`.

    Raises:
        BadLineError: A side is missing or is neither text nor a list of texts, only one side is a
            list, or the lists have different lengths and ``level`` is "sentence".
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
    """Converts a pair to one document, or to two documents if the direction is "both".

    Args:
        first: The first side.
        second: The second side.
        settings: Direction, template and filters.
        chat_template: The chat template for translation instructions: a name in `TEMPLATES`, or a
            template of the user.
        loss: "response" for loss on the response, "all" for loss on the prompt too. Only used for
            documents with a prompt.

    Raises:
        DroppedError: A side is empty, both sides are equal, or a filter dropped the pair.
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
    return Document(
        document.segments
    )  # without cut points, because part of a translation is useless
