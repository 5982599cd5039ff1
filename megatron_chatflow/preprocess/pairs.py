r"""Converts sentence pairs to documents.

Pairs are rows of two columns or JSON objects with a key for each language. Each pair is converted
to one or two documents, or is dropped by a filter and counted by reason. A document is a
translation instruction with loss on the target, or both sides in sequence with loss on all tokens.

Users can define templates in a YAML file::

    templates:                     # a hash of the pair selects one
      - prompt: "Put this into {target_language}: {source}\n"
        response: "{target}"
      - text: "{source} = {target}"    # no prompt: loss on all tokens
"""

import hashlib
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_chatflow.config.yaml_file import parse_yaml
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.languages import is_identified_as_other, is_language_code
from megatron_chatflow.preprocess.pair_filters import is_mostly, numbers_of, punctuation_share
from megatron_chatflow.preprocess.records import value_at
from megatron_chatflow.preprocess.tab_separated import TabOptions
from megatron_chatflow.preprocess.templates import document_of_chat
from megatron_chatflow.tokenizer.chat_template import JinjaTemplate, chat_of_exchanges
from megatron_chatflow.tokenizer.documents import BadLineError, Document, DroppedError, Segment

NAMES = {"source", "target", "source_language", "target_language"}
PairDirection = Literal["both", "forward", "backward", "hash"]
PairLevel = Literal["sentence", "document"]


@dataclass(frozen=True)
class PairText:
    """A template for pairs, with placeholders such as `{source}`.

    The response has loss. If there is a prompt, which has none, an end-of-sequence token follows.
    """

    prompt: str
    response: str


def read_pair_templates(path: str | Path) -> tuple[PairText, ...]:
    """Reads templates from a YAML file, which has the form shown in the module docstring.

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
    """Settings for filtering pairs and converting them to documents."""

    keys: tuple[str, str] = ("en", "zh")  # JSON keys of the first and the second side
    # columns of the two sides in tab-separated lines, as numbers counted from 1 or as names in the
    # header line; None for files with exactly two columns
    columns: tuple[str, str] | None = None
    # names of the two languages in the translation instruction
    languages: tuple[str, str] = ("English", "Chinese")
    # "plain", "translate", or the path of the YAML file that `texts` were read from
    template: str = "plain"
    # Templates from a YAML file. A hash of the pair selects one of them.
    texts: tuple[PairText, ...] = ()
    # "forward" puts the first side first, "backward" the second side. "both" makes a document in
    # each direction. "hash" selects the direction by a hash of the pair, so that a corpus has about
    # as many documents in each direction.
    direction: PairDirection = "hash"
    # Maximum ratio of the longer to the shorter side in UTF-8 bytes; 0 for no limit. Bytes are used
    # because they vary less between languages than characters.
    max_length_ratio: float = 9.0
    # the script that each side must have, as in `is_mostly`; "any" for no filter
    scripts: tuple[str, str] = ("any", "any")
    # How to convert a JSON object that has a list of sentences on each side. "sentence" makes a
    # pair of each two aligned sentences. "document" makes one pair of all sentences, which are
    # joined with newlines.
    level: PairLevel = "sentence"
    # where the score of a pair is: a JSON key, a column as in `columns`, or the type of a TMX prop
    score: str = "score"
    min_score: float | None = None  # the smallest score that is kept; None if scores are not read
    # "same" drops pairs whose sides have different numbers, as in `numbers_of`
    numbers: Literal["any", "same"] = "any"
    # maximum share of punctuation on either side, as in `punctuation_share`; 0 for no limit
    max_punctuation_ratio: float = 0.0
    # whether to drop pairs of which a side is identified as another language than in `codes`
    identify_languages: bool = False
    # "either" drops a pair if an earlier pair of the job has the same first or second side
    dedup: Literal["none", "either"] = "none"

    @property
    def codes(self) -> tuple[str, str]:
        """The language codes of the two sides: the languages if they are codes, else the keys."""
        return self.languages if all(map(is_language_code, self.languages)) else self.keys

    @property
    def score_name(self) -> str | None:
        """Where the score of a pair is; None if it is not needed."""
        return None if self.min_score is None else self.score

    @property
    def tabs(self) -> TabOptions:
        """Options for finding the pair in rows of columns."""
        first, second = (
            frozenset(name.lower() for name in names)
            for names in zip(self.keys, self.languages, strict=True)
        )
        return TabOptions(self.columns, (first, second), self.score_name)

    def record(self) -> dict[str, Any]:
        """Returns the settings for the sidecar, as versions without some of them wrote them."""
        recorded = asdict(self)
        for name in ("columns", *_LATER_FIELDS):
            if recorded[name] == PairSettings.__dataclass_fields__[name].default:
                del recorded[name]
        return recorded


# Fields that sidecars of the first versions do not have.
_LATER_FIELDS = (
    "score",
    "min_score",
    "numbers",
    "max_punctuation_ratio",
    "identify_languages",
    "dedup",
)


def pairs_of_record(
    record: Mapping[str, Any], keys: tuple[str, str], level: PairLevel
) -> list[tuple[str, str]]:
    """Returns the pairs of a JSON object, whose sides are texts or lists of sentences.

    The sides may also be nested in an object or map under the key `translation`. Lists are
    converted as in `PairSettings.level`.

    Raises:
        BadLineError: A side is missing or is neither text nor a list of texts, only one side is
            a list, or the lists have different lengths and ``level`` is "sentence".
    """
    nested = record.get("translation")
    if isinstance(nested, list):  # a map of a parquet file is a list of keys and values
        nested = dict(item for item in nested if isinstance(item, tuple) and len(item) == 2)
    if isinstance(nested, dict) and keys[0].split(".")[0] not in record:
        record = nested
    sides = {key: value_at(record, key) for key in keys}
    for key, side in sides.items():
        sentences = side if isinstance(side, list) else [side]
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


def check_score(score: Any, settings: PairSettings) -> None:
    """Checks the score of a pair, a number or its text, if there is a `min_score`.

    Raises:
        BadLineError: The score is not a number.
        DroppedError: The score is below the minimum, or is not a number (NaN).
    """
    if settings.min_score is None:
        return
    try:
        value = float(score)
    except (TypeError, ValueError) as error:
        raise BadLineError("score_not_a_number") from error
    if not value >= settings.min_score:
        raise DroppedError("low_score")


def documents_of_pair(
    first: str, second: str, settings: PairSettings, chat_template: str | JinjaTemplate, loss: str
) -> list[Document]:
    """Converts a pair to one document, or to two documents if the direction is "both".

    The chat template, a name in `TEMPLATES` or a template of the user, is that of translation
    instructions. With the loss "all", the prompt has loss too.

    Raises:
        DroppedError: A side is empty, both sides are equal, or a filter dropped the pair.
    """
    first, second = first.strip(), second.strip()
    _filter_pair(first, second, settings)
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
    documents: list[Document] = []
    for source, target, source_language, target_language in sides:
        if settings.texts:
            text = settings.texts[choice % len(settings.texts)]
            values = {"source": source, "target": target}
            values |= {"source_language": source_language, "target_language": target_language}
            segments = [Segment(text.response.format_map(values), True)]
            if text.prompt:
                prompt = Segment(text.prompt.format_map(values), loss == "all")
                segments = [prompt, *segments, Segment("", True, "end")]
            documents.append(Document(tuple(segments)))
        elif settings.template == "plain":
            documents.append(Document((Segment(f"{source}\n{target}", True),)))
        else:
            question = f"Translate the following text into {target_language}.\n\n{source}"
            document = document_of_chat(
                chat_of_exchanges(None, [(question, target)]), chat_template, loss
            )
            # Without cut points, because part of a translation is useless.
            documents.append(Document(document.segments))
    if settings.dedup == "either":
        # The documents of both directions are compared separately, because they share their sides.
        return [
            replace(document, keys=(f"first {k} {first}", f"second {k} {second}"))
            for k, document in enumerate(documents)
        ]
    return documents


def _filter_pair(first: str, second: str, settings: PairSettings) -> None:
    """Raises `DroppedError` if a filter drops a pair. Cheap filters come first."""
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
    if settings.numbers == "same" and numbers_of(first) != numbers_of(second):
        raise DroppedError("different_numbers")
    limit = settings.max_punctuation_ratio
    if limit and max(punctuation_share(first), punctuation_share(second)) > limit:
        raise DroppedError("punctuation_ratio")
    if settings.identify_languages:
        for side, code in zip((first, second), settings.codes, strict=True):
            if is_identified_as_other(side, code):
                raise DroppedError("wrong_language")
