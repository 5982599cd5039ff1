r"""Measures of transfer between languages that are computed from losses alone.

Accuracies of small models are at chance, but their losses are not. A probe writes token sequences
and marks the spans to score (`ScoredRow`), and reduces the log-probabilities of the spans to named
numbers with standard errors:

- ``copy``: how much less a random token string costs when it is repeated. In-context copying needs
  no language, and may collapse in continued training on another one.
- ``fewshot``: how much less an answer costs after solved examples.
- ``translation``: how much less a sentence costs after its translation, in both directions.
- ``pairs``: how often a grammatical sentence has more probability than its minimally changed twin.

`parse_probe` reads ``NAME[,KEY=VALUE...][:FILE]``. What is drawn depends on the file, the settings
and the seed alone, so all models receive the same texts. `Probe.prepare` encodes them for a
tokenizer, and `evaluate_probe` evaluates an exported model. `PackedRows` of the rows gives the
same numbers in training.
"""

import json
import math
import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.scoring import FloatArray, ScoredRow, score_rows
from megatron_chatflow.preprocess.chats import chat_of
from megatron_chatflow.preprocess.encode import encode_segments
from megatron_chatflow.preprocess.pairs import PairSettings, PairText
from megatron_chatflow.preprocess.parse import parse_chunk, parse_records
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.preprocess.templates import TEMPLATES, document_of_chat
from megatron_chatflow.tokenizer import Tokenizer
from megatron_chatflow.tokenizer.chat_template import chat_of_exchanges
from megatron_chatflow.tokenizer.documents import Segment

_MAX_RECORDS = 20_000  # records of a file from which texts are drawn
_MAX_TEXT_BYTES = 1 << 22  # of the text whose tokens are counted
_ESCAPES = {"n": "\n", "t": "\t"}

ProbeResult = dict[str, float]
"""Numbers by name. The standard error of a number has its name with ``_stderr``."""


@dataclass(frozen=True)
class PreparedProbe:
    """A probe, encoded for one tokenizer."""

    label: str  # name in logs and results
    rows: Sequence[ScoredRow]
    # Reduces the log-probability of every span, float64[num_spans] in nats, to the result.
    summarize: Callable[[FloatArray], ProbeResult]


@dataclass
class Probe(ABC):
    """Settings and texts of a probe.

    The fields of subclasses are the keys that `parse_probe` accepts. The constructor reads the
    file.
    """

    name: ClassVar[str]
    needs_file: ClassVar[bool] = True

    path: str = ""  # the file, or "" for none
    label: str = ""  # name in logs and results; "" for the probe's name and the file's
    seed: int = 1234  # seed of everything that is drawn

    def __post_init__(self) -> None:
        """Checks the settings and reads the file.

        Raises:
            UserError: A setting is out of range, or the file cannot be used.
        """
        if self.needs_file and not self.path:
            raise UserError(f"{self.name}: needs a file; write {self.name}:FILE")
        if not self.label:
            stem = Path(self.path).name.split(".")[0]
            self.label = f"{self.name} {stem}" if stem else self.name
        for one in fields(self):
            value = getattr(self, one.name)
            least = one.metadata.get("least", 0)
            if isinstance(value, int) and value < least:
                raise UserError(f"{self.name}: {one.name} must be at least {least}, not {value}")
        self._read()

    @abstractmethod
    def _read(self) -> None:
        """Reads the file."""

    @abstractmethod
    def prepare(
        self, tokenizer: Tokenizer, prefix_ids: Sequence[int], max_length: int
    ) -> PreparedProbe:
        """Encodes the probe for a model.

        Args:
            tokenizer: Tokenizer of the model.
            prefix_ids: Ids before every text: BOS, or nothing.
            max_length: Maximum number of tokens that the model reads at once.

        Raises:
            UserError: No text fits into ``max_length`` tokens.
        """

    def _random(self, *key: object) -> random.Random:
        """Returns a generator for one purpose."""
        return random.Random(" ".join(map(str, (self.seed, *key))))

    def _no_room(self, max_length: int) -> UserError:
        return UserError(
            f"{self.label}: no text fits into {max_length} tokens; shorten the texts, or raise the "
            "context length"
        )


def _count(default: int, least: int = 1) -> Any:
    return field(default=default, metadata={"least": least})


@dataclass
class CopyProbe(Probe):
    """Loss on the first occurrence of a random token string against that on its repetitions.

    The first token of an occurrence is not scored, because nothing announces the repetition. The
    tokens of a string are distinct, so that each determines its successor. They are drawn from the
    vocabulary's tokens that are whole characters, or from the most frequent tokens of a text.
    """

    name: ClassVar[str] = "copy"
    needs_file: ClassVar[bool] = False

    length: int = _count(64, 2)  # number of tokens of a string
    strings: int = _count(32)  # number of strings
    repeats: int = _count(2, 2)  # number of occurrences of a string
    tokens: int = _count(1000)  # number of most frequent tokens of the file to draw from

    def _read(self) -> None:
        self._texts: list[str] = []
        if self.path:
            size = 0
            for text in _texts(self.path):
                self._texts.append(text)
                size += len(text.encode("utf-8", "replace"))
                if size > _MAX_TEXT_BYTES:
                    break
            if not self._texts:
                raise UserError(f"{self.path}: contains no text; write one JSON object per line")

    def prepare(
        self, tokenizer: Tokenizer, prefix_ids: Sequence[int], max_length: int
    ) -> PreparedProbe:
        """Draws the strings."""
        num_ids = len(prefix_ids) + self.repeats * self.length
        if num_ids > max_length + 1:
            raise UserError(
                f"{self.label}: {self.repeats} occurrences of {self.length} tokens do not fit "
                f"into {max_length} tokens; lower length or repeats"
            )
        candidates = self._candidates(tokenizer)
        if len(candidates) < self.length:
            raise UserError(
                f"{self.label}: only {len(candidates)} tokens to draw strings of {self.length} "
                "from; lower length, raise tokens or give more text"
            )
        rng = self._random("copy")
        rows, num_bytes = [], []
        for _ in range(self.strings):
            string = rng.sample(candidates, self.length)
            begins = [len(prefix_ids) + k * self.length for k in range(self.repeats)]
            spans = [(begin + 1, begin + self.length) for begin in begins]
            rows.append(ScoredRow([*prefix_ids, *string * self.repeats], spans))
            num_bytes.append(int(tokenizer.num_bytes_per_id[string[1:]].sum()))

        def summarize(log_probs: FloatArray) -> ProbeResult:
            bits = _bits(log_probs).reshape(self.strings, self.repeats)
            occurrences = {"first": bits[:, 0], "second": bits[:, 1]}
            if self.repeats > 2:
                occurrences["last"] = bits[:, -1]
            occurrences["gain"] = bits[:, 0] - bits[:, 1]
            result: ProbeResult = {"num_strings": self.strings}
            num_tokens = np.full(self.strings, self.length - 1)
            for unit, counts in (("token", num_tokens), ("byte", np.array(num_bytes))):
                for which, values in occurrences.items():
                    result |= _ratio(f"{which}_bits_per_{unit}", values, counts)
            return result

        return PreparedProbe(self.label, rows, summarize)

    def _candidates(self, tokenizer: Tokenizer) -> list[int]:
        control = {tokenizer.control_id(name) for name in tokenizer.control_tokens}
        if not self.path:
            ids = np.flatnonzero(tokenizer.num_bytes_per_id > 0).tolist()
            return [i for i in ids if i not in control and _is_whole(tokenizer, i)]
        counts: Counter[int] = Counter()
        for ids in tokenizer.encode_batch(self._texts):
            counts.update(ids)
        ordered = sorted(counts, key=lambda i: (-counts[i], i))
        kept = (i for i in ordered if i not in control and _is_whole(tokenizer, i))
        return list(islice(kept, self.tokens))


def _is_whole(tokenizer: Tokenizer, token_id: int) -> bool:
    """Returns whether a token is text rather than a part of a character."""
    text = tokenizer.decode([token_id])
    return bool(text) and "\ufffd" not in text


@dataclass
class FewShotProbe(Probe):
    r"""Bits of an answer without examples against those after solved examples.

    The file has questions and answers in the formats of chats; records of several exchanges or with
    a system text are ignored. Examples are drawn for each question from the others of the file. A
    prompt is ``question\nanswer\n\nquestion\n``, or that of a chat template. The answer's end is
    not scored.
    """

    name: ClassVar[str] = "fewshot"

    questions: int = _count(64)  # maximum number of questions
    shots: int = _count(4)  # number of examples before a question
    max_bytes: int = _count(256)  # maximum UTF-8 bytes of a question and its answer
    template: str = "plain"  # "plain", or a name in `TEMPLATES`

    def _read(self) -> None:
        if self.template not in ("plain", *TEMPLATES):
            names = ", ".join(("plain", *TEMPLATES))
            raise UserError(f"{self.name}: template {self.template!r} is not one of {names}")
        known: dict[str, str] = {}
        for question, answer in _exchanges(self.path):
            if len((question + answer).encode("utf-8", "replace")) <= self.max_bytes:
                known.setdefault(question, answer)
        exchanges = list(known.items())
        if len(exchanges) <= self.shots:
            raise UserError(
                f"{self.path}: has {len(exchanges)} questions of at most {self.max_bytes} bytes "
                f"with one answer, too few for {self.shots} examples; give more, or raise max_bytes"
            )
        asked = self._random("questions").sample(
            range(len(exchanges)), min(self.questions, len(exchanges))
        )
        # Each question with its examples.
        self.items: list[tuple[tuple[str, str], list[tuple[str, str]]]] = []
        for number in asked:
            drawn = self._random("examples", exchanges[number][0]).sample(
                range(len(exchanges) - 1), self.shots
            )
            examples = [exchanges[k + (k >= number)] for k in drawn]
            self.items.append((exchanges[number], examples))

    def prepare(
        self, tokenizer: Tokenizer, prefix_ids: Sequence[int], max_length: int
    ) -> PreparedProbe:
        """Encodes the questions; those whose examples do not fit are left out and counted."""
        rows, num_bytes, num_too_long = [], [], 0
        for question, examples in self.items:
            both = [self._row(question, shown, tokenizer, prefix_ids) for shown in ([], examples)]
            if max(len(row.ids) for row in both) > max_length + 1:
                num_too_long += 1
                continue
            rows += both
            num_bytes.append(len(question[1].encode("utf-8", "replace")))
        if not rows:
            raise self._no_room(max_length)

        def summarize(log_probs: FloatArray) -> ProbeResult:
            without, after = _bits(log_probs).reshape(-1, 2).T
            counts = np.array(num_bytes)
            return {
                "num_questions": len(num_bytes),
                "num_too_long": num_too_long,
                **_ratio("0_shot_bits_per_byte", without, counts),
                **_ratio(f"{self.shots}_shot_bits_per_byte", after, counts),
                **_ratio("gain_bits_per_byte", without - after, counts),
            }

        return PreparedProbe(self.label, rows, summarize)

    def _row(
        self,
        question: tuple[str, str],
        examples: Sequence[tuple[str, str]],
        tokenizer: Tokenizer,
        prefix_ids: Sequence[int],
    ) -> ScoredRow:
        prompt: list[Segment] = []
        for example in examples:
            asked, answer, after = self._segments(example)
            prompt += [*asked, answer, *after]
        asked, answer, _ = self._segments(question)
        shown = [Segment(s.text, False, s.kind) for s in (*prompt, *asked)]
        ids, mask, _ = encode_segments(tokenizer, [*shown, answer])
        whole = [*prefix_ids, *ids]
        return ScoredRow(whole, [(len(whole) - sum(mask), len(whole))])

    def _segments(
        self, exchange: tuple[str, str]
    ) -> tuple[Sequence[Segment], Segment, Sequence[Segment]]:
        """Returns the segments before the answer, the answer, and those after it."""
        if self.template == "plain":
            question, answer = exchange
            return (
                [Segment(f"{question}\n", False)],
                Segment(answer, True),
                [Segment("\n\n", False)],
            )
        chat = chat_of_exchanges(None, (exchange,))
        segments = document_of_chat(chat, self.template, "response").segments
        number = next(k for k, segment in enumerate(segments) if segment.loss)
        return segments[:number], segments[number], segments[number + 1 :]


@dataclass
class TranslationProbe(Probe):
    """Translation information: bits of a sentence less its bits after its translation.

    The conditional sequence is ``prompt`` and the target, where ``{source}`` in the prompt is the
    translation. The unconditional one has the same tokens without those of the source. The texts
    before and after the source and the target are encoded separately, so that both sequences have
    exactly the same other tokens; see `_begin`. `{source_language}` and `{target_language}` in the
    prompt are the keys of the sides.
    """

    name: ClassVar[str] = "translation"

    first: str = "en"  # key of the first side in the records, and its name in the results
    second: str = "zh"  # key of the second side
    pairs: int = _count(128)  # maximum number of pairs
    max_bytes: int = _count(512)  # maximum UTF-8 bytes of each side
    prompt: str = "{source}\n"  # text before the target

    def _read(self) -> None:
        if self.prompt.count("{source}") != 1:
            raise UserError(f"{self.name}: prompt must contain {{source}} once")
        texts = (PairText("{source}", "{target}"),)
        keys = (self.first, self.second)
        pairs = PairSettings(keys=keys, languages=keys, texts=texts, direction="forward")
        settings = CorpusSettings(format="pairs", pairs=pairs, txt_documents="line")
        known: list[tuple[str, str]] = []
        num_dropped: Counter[str] = Counter()
        for chunk in CorpusReader(find_inputs([self.path], settings.sides), settings).chunks():
            parsed = parse_chunk(chunk, settings)
            num_dropped.update(parsed.num_dropped)
            for document in parsed.documents["text"]:
                sides = [segment.text for segment in document.segments]  # type: ignore[union-attr]
                if max(len(side.encode("utf-8", "replace")) for side in sides) <= self.max_bytes:
                    known.append((sides[0], sides[1]))
            if len(known) >= _MAX_RECORDS:
                break
        known = list(dict.fromkeys(known[:_MAX_RECORDS]))
        if not known:
            raise _nothing(self.path, f"pairs of at most {self.max_bytes} bytes", num_dropped)
        self.items = self._random("pairs").sample(known, min(self.pairs, len(known)))

    def prepare(
        self, tokenizer: Tokenizer, prefix_ids: Sequence[int], max_length: int
    ) -> PreparedProbe:
        """Encodes the pairs; those that do not fit are left out and counted."""
        rows, num_bytes, num_too_long = [], [], 0
        for pair in self.items:
            both = [
                row
                for side in (0, 1)
                for row in self._rows(pair[1 - side], pair[side], side, tokenizer, prefix_ids)
            ]
            if max(len(row.ids) for row in both) > max_length + 1:
                num_too_long += 1
                continue
            rows += both
            num_bytes.append([len(side.encode("utf-8", "replace")) for side in pair])
        if not rows:
            raise self._no_room(max_length)

        def summarize(log_probs: FloatArray) -> ProbeResult:
            bits = _bits(log_probs).reshape(-1, 2, 2)  # pair, target side, without and with source
            result: ProbeResult = {"num_pairs": len(num_bytes), "num_too_long": num_too_long}
            names, counts = (self.first, self.second), np.array(num_bytes)
            for side, name in enumerate(names):
                alone, given = bits[:, side, 0], bits[:, side, 1]
                source = names[1 - side]
                result |= _ratio(f"{name}_bits_per_byte", alone, counts[:, side])
                result |= _ratio(f"{name}_given_{source}_bits_per_byte", given, counts[:, side])
                gain = f"{name}_gain_from_{source}_bits_per"
                result |= _ratio(f"{gain}_byte", alone - given, counts[:, side])
                result |= _ratio(f"{gain}_pair", alone - given, np.ones(len(counts)))
            return result

        return PreparedProbe(self.label, rows, summarize)

    def _rows(
        self,
        source: str,
        target: str,
        target_side: int,
        tokenizer: Tokenizer,
        prefix_ids: Sequence[int],
    ) -> Iterator[ScoredRow]:
        """Yields the target without and with its source."""
        names = (self.first, self.second)
        prompt = self.prompt.replace("{source_language}", names[1 - target_side])
        before, after = prompt.replace("{target_language}", names[target_side]).split("{source}")
        encode = tokenizer.encode_continuation
        begin = [*_begin(tokenizer, prefix_ids), *tokenizer.encode(before)]
        source_ids = encode(source) if before else tokenizer.encode(source)
        after_ids, target_ids = encode(after), encode(target)
        for given in ([], source_ids):
            ids = [*begin, *given, *after_ids, *target_ids]
            yield ScoredRow(ids, [(len(ids) - len(target_ids), len(ids))])


@dataclass
class MinimalPairsProbe(Probe):
    """Share of minimal pairs whose good sentence has more probability than the bad one.

    The file has JSON lines with ``good``, ``bad`` and, optionally, ``kind``. All tokens of a
    sentence count; see `_begin`.
    """

    name: ClassVar[str] = "pairs"

    pairs: int = _count(512)  # maximum number of pairs

    def _read(self) -> None:
        known = list(dict.fromkeys(_minimal_pairs(Path(self.path))))
        self.items = self._random("pairs").sample(known, min(self.pairs, len(known)))

    def prepare(
        self, tokenizer: Tokenizer, prefix_ids: Sequence[int], max_length: int
    ) -> PreparedProbe:
        """Encodes the sentences; pairs that do not fit are left out and counted."""
        begin = _begin(tokenizer, prefix_ids)
        rows, kinds, num_too_long = [], [], 0
        for good, bad, kind in self.items:
            both = [[*begin, *ids] for ids in tokenizer.encode_batch([good, bad])]
            if max(map(len, both)) > max_length + 1:
                num_too_long += 1
                continue
            rows += [ScoredRow(ids, [(len(begin), len(ids))]) for ids in both]
            kinds.append(kind)
        if not rows:
            raise self._no_room(max_length)

        def summarize(log_probs: FloatArray) -> ProbeResult:
            good, bad = _bits(log_probs).reshape(-1, 2).T
            is_right, ones = (good < bad).astype(np.float64), np.ones(len(kinds))
            result: ProbeResult = {
                "num_pairs": len(kinds),
                "num_too_long": num_too_long,
                "accuracy": float(is_right.mean()),
                "accuracy_stderr": float(np.sqrt(is_right.var() / len(kinds))),
                **_ratio("difference_bits", bad - good, ones),
            }
            for kind in sorted(set(kinds) - {""}):
                chosen = np.array([one == kind for one in kinds])
                few = is_right[chosen]
                result[f"{kind}_accuracy"] = float(few.mean())
                result[f"{kind}_accuracy_stderr"] = float(np.sqrt(few.var() / len(few)))
                result |= _ratio(f"{kind}_difference_bits", (bad - good)[chosen], ones[chosen])
            return result

        return PreparedProbe(self.label, rows, summarize)


PROBES: Mapping[str, type[Probe]] = {
    one.name: one for one in (CopyProbe, FewShotProbe, TranslationProbe, MinimalPairsProbe)
}


def parse_probes(texts: Sequence[str], setting: str) -> list[Probe]:
    """Reads probes; ``setting`` is the flag or key that they are from.

    Raises:
        UserError: A probe is invalid, or two have the same label.
    """
    probes = []
    for text in texts:
        try:
            probes.append(parse_probe(text))
        except UserError as error:
            raise UserError(f"{setting}: {error}") from None
    for label, count in Counter(probe.label for probe in probes).items():
        if count > 1:
            raise UserError(
                f"{setting}: {count} probes are called {label!r}; add label=NAME to one of them"
            )
    return probes


def parse_probe(text: str) -> Probe:
    r"""Reads ``NAME[,KEY=VALUE...][:FILE]``.

    In values, ``\,`` and ``\:`` are a comma and a colon, and ``\n`` is a line end.

    Raises:
        UserError: The name, a key, a value or the file is invalid.
    """
    head = re.match(r"(?:\\.|[^\\:])*", text, re.DOTALL)
    end = head.end() if head else 0
    name, *options = re.findall(r"(?:\\.|[^\\,])+", text[:end], re.DOTALL) or [""]
    if name not in PROBES:
        raise UserError(
            f"{text!r} is not NAME[,KEY=VALUE...][:FILE]; NAME is one of {', '.join(PROBES)}"
        )
    kind = PROBES[name]
    # The annotations of the fields are int and str.
    types = {one.name: one.type for one in fields(kind) if one.name != "path"}
    values: dict[str, Any] = {}
    for option in options:
        key, is_given, value = option.partition("=")
        if key not in types or not is_given:
            raise UserError(
                f"{name}: {option!r} is not KEY=VALUE; KEY is one of {', '.join(types)}"
            )
        value = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), value, flags=re.DOTALL)
        if types[key] is int and not re.fullmatch(r"[0-9]{1,9}", value):
            raise UserError(f"{name}: {key} must be a whole number, not {value!r}")
        values[key] = int(value) if types[key] is int else value
    return kind(path=text[end + 1 :], **values)


def evaluate_probe(model: LanguageModel, probe: Probe) -> ProbeResult:
    """Evaluates an exported model.

    Raises:
        UserError: No text of the probe fits into the model's context.
    """
    prepared = probe.prepare(model.tokenizer, model.prefix_ids, model.max_length)
    return prepared.summarize(score_rows(model, prepared.rows))


def headline_numbers(result: Mapping[str, float]) -> dict[str, float]:
    """Returns the numbers of a result without the counts of its texts and the standard errors."""
    return {
        name: value
        for name, value in result.items()
        if not name.startswith("num_") and not name.endswith("_stderr")
    }


def _begin(tokenizer: Tokenizer, prefix_ids: Sequence[int]) -> list[int]:
    """Returns the ids before a text whose first token is scored: BOS, or EOS without BOS.

    In training, EOS of the document before precedes a text that does not begin with BOS.
    """
    return list(prefix_ids) or [tokenizer.eos_id]


def _bits(log_probs: FloatArray) -> FloatArray:
    return -log_probs / math.log(2)


def _ratio(name: str, sums: FloatArray, counts: Any) -> ProbeResult:
    """Computes the sum over the count with its standard error over the items, if there are two.

    The standard error is that of a ratio estimator (Cochran, "Sampling Techniques", 1977, chapter
    6), which is that of the mean where all counts are 1.
    """
    counts = np.asarray(counts, dtype=np.float64)
    if not counts.sum():
        return {}
    ratio = float(sums.sum() / counts.sum())
    result = {name: ratio}
    if len(sums) > 1:
        residuals = (sums - ratio * counts) / counts.mean()
        variance = float((residuals**2).sum()) / (len(sums) - 1)
        result[f"{name}_stderr"] = math.sqrt(variance / len(sums))
    return result


def _nothing(path: str, what: str, num_dropped: Counter[str]) -> UserError:
    reasons = ", ".join(f"{count} {reason}" for reason, count in num_dropped.most_common())
    return UserError(
        f"{path}: contains no {what} in the known formats"
        + (f" (dropped: {reasons})" if reasons else "; check the file and its keys")
    )


def _texts(path: str) -> Iterator[str]:
    settings = CorpusSettings(txt_documents="line")
    for chunk in CorpusReader(find_inputs([path]), settings).chunks():
        for text in parse_chunk(chunk, settings).documents["text"]:
            if isinstance(text, str) and text:
                yield text


def _exchanges(path: str) -> list[tuple[str, str]]:
    """Reads the chats of a file that are one question and its answer."""
    settings = CorpusSettings(format="chat", json_keys=("messages",))
    found: list[tuple[str, str]] = []
    num_dropped: Counter[str] = Counter()
    for chunk in CorpusReader(find_inputs([path]), settings).chunks():
        read = parse_records(chunk, settings)
        num_dropped.update(read.parsed.num_dropped)
        for _, record in read.records:
            messages = chat_of(record, "messages").messages
            if [message.role for message in messages] == ["user", "assistant"]:
                found.append((messages[0].text.strip(), messages[1].text.strip()))
        if len(found) >= _MAX_RECORDS:
            break
    if not found:
        raise _nothing(path, "chats of one question and its answer", num_dropped)
    return found[:_MAX_RECORDS]


def _minimal_pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields the good sentence, the bad one and the kind of each pair."""
    try:
        # Not `splitlines`, which also splits at U+2028 and U+0085 inside JSON strings.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    is_empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        is_empty = False
        try:
            record = json.loads(line)
            good, bad, kind = record["good"], record["bad"], record.get("kind", "")
            if not all(isinstance(text, str) for text in (good, bad, kind)):
                raise ValueError("not text")
            "".join((good, bad, kind)).encode()  # raises for lone surrogates
            if not good.strip() or not bad.strip() or good == bad:
                raise ValueError("the sentences are empty or equal")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is not a pair ({type(error).__name__}: {error}); write an "
                "object with good, bad and, optionally, kind"
            ) from None
        yield good, bad, kind
    if is_empty:
        raise UserError(f"{path}: contains no pairs; write one JSON object per line")
