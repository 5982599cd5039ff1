"""Loss, perplexity and bits per byte of a model on text, pairs and chats.

In: files as `tools/preprocess_data.py` takes them. Out: sums over the tokens that carry loss. Bits
per byte divide by the bytes of the text itself and so compare models of different vocabularies.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, get_args

from tqdm import tqdm

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.models import LanguageModel, with_prefix
from megatron_chatflow.preprocess.encode import encode_segments
from megatron_chatflow.preprocess.parse import CorpusFormat, CorpusSettings, parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.tokenizer.documents import Document, Segment
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding

logger = logging.getLogger(__name__)
DEFAULT_TEMPLATE = "chatflow"
FORMATS: tuple[CorpusFormat, ...] = get_args(CorpusFormat)
_ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class TextSource:
    """Text to evaluate on.

    Attributes:
        name: Of the source.
        path: Its file, folder or glob.
        settings: What it holds.
        uses_own_template: Whether chats are written in the model's own template, if it has one,
            and not in that of the settings.
    """

    name: str
    path: str
    settings: CorpusSettings
    uses_own_template: bool = False

    @classmethod
    def parse(cls, text: str, template: str | None = None, encoding: str = "utf-8") -> "TextSource":
        """Reads ``name=path`` or ``name:format=path``.

        Args:
            text: As given on the command line.
            template: Chat template of chats; None takes the model's own.
            encoding: Of the text in files of text and JSON.

        Raises:
            UserError: It is of another form, or there is no such encoding.
        """
        left, _, path = text.partition("=")
        name, _, given = left.partition(":")
        kind = given or "text"
        if not name or not path or kind not in FORMATS:
            raise UserError(
                f"--source: {text!r} is not NAME=FILE or NAME:FORMAT=FILE with a format of "
                f"{', '.join(FORMATS)}"
            )
        keys = ("messages",) if kind == "chat" else ("text",)
        settings = CorpusSettings(
            format=kind,
            json_keys=keys,
            template=template or DEFAULT_TEMPLATE,
            encoding=canonical_encoding(encoding),
        )
        return cls(name, path, settings, uses_own_template=template is None)

    def with_template_of(self, model: LanguageModel) -> "TextSource":
        """The source with the chat template in which a model is asked.

        Raises:
            UserError: The model's template does not say where answers are.
        """
        template = model.chat_template
        if not self.uses_own_template or self.settings.format != "chat" or template is None:
            return self
        if isinstance(template, str):
            return replace(self, settings=replace(self.settings, template=template))
        template.check()
        return replace(self, settings=replace(self.settings, chat_template=template))

    def documents(self, num_dropped: Counter[str] | None = None) -> Iterator[Document | str]:
        """The documents, one by one.

        Args:
            num_dropped: Counts, by reason, what was left out so far.
        """
        settings = replace(self.settings, txt_documents="line")
        reader = CorpusReader(find_inputs([self.path]), settings.read_options)
        for chunk in reader.chunks():
            parsed = parse_chunk(chunk, self.settings)
            if num_dropped is not None:
                num_dropped.update(parsed.num_dropped)
            for documents in parsed.documents.values():
                yield from documents


@dataclass(frozen=True)
class TextResult:
    """What a model made of a source.

    Attributes:
        nats: Sum of the negative log-probabilities of the loss tokens.
        num_tokens: Loss tokens.
        num_bytes: UTF-8 bytes of the text behind the loss tokens.
        num_documents: Documents.
        num_dropped: Records left out, by reason.
    """

    nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0
    num_documents: int = 0
    num_dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return self.nats / self.num_tokens if self.num_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Loss over the bytes of text, in bits."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The object of a results file."""
        return {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "bits_per_byte": self.bits_per_byte,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "num_documents": self.num_documents,
            "num_dropped": dict(self.num_dropped),
        }


def evaluate_text(
    model: LanguageModel, source: TextSource, max_documents: int | None = None
) -> TextResult:
    """Evaluates a model on a source.

    Long documents are read in windows, each beginning with the last token of the one before. A
    document's first token, which nothing precedes unless texts begin with BOS, has no loss, and its
    bytes are not counted.

    Args:
        model: The model.
        source: The text.
        max_documents: Look at no more than the first ones.

    Raises:
        UserError: The source holds no document.
    """
    result = TextResult()
    rows: list[list[int]] = []
    masks: list[list[int]] = []
    source = source.with_template_of(model)
    num_dropped: Counter[str] = Counter()
    documents = islice(source.documents(num_dropped), max_documents)
    for document in tqdm(documents, desc=source.name, unit="doc", disable=None):
        ids, mask, num_bytes = encode_document(model, document)
        result = replace(
            result,
            num_bytes=result.num_bytes + num_bytes,
            num_documents=result.num_documents + 1,
        )
        for row, row_mask in _windows(model.max_length, ids, mask):
            rows.append(row)
            masks.append(row_mask)
        if len(rows) >= _ROWS_AT_A_TIME:
            result = _add(result, model, rows, masks)
            rows, masks = [], []
    reasons = ", ".join(f"{count} {reason}" for reason, count in num_dropped.most_common())
    if not result.num_documents:
        raise UserError(
            f"--source: {source.path} holds no document of the format that was named"
            + (f" (left out: {reasons})" if reasons else "")
        )
    if reasons:
        logger.warning("%s: records left out: %s", source.name, reasons)
    return replace(_add(result, model, rows, masks), num_dropped=dict(num_dropped))


def encode_document(
    model: LanguageModel, document: Document | str
) -> tuple[list[int], list[int], int]:
    """A document's ids as the model's texts begin, which carry loss, and their bytes of text."""
    if isinstance(document, str):
        ids = model.tokenizer.encode(document)
        mask = [1] * len(ids)
        num_bytes = len(document.encode("utf-8", "replace"))
    else:
        ids, mask, _ = encode_segments(model.tokenizer, document.segments)
        num_bytes = sum(map(_num_loss_bytes, document.segments))
    whole = with_prefix(ids, model.prefix_ids)
    mask = [0] * (len(whole) - len(ids)) + mask
    if mask[:1] == [1]:
        mask[0] = 0
        first = int(model.tokenizer.num_bytes_per_id[whole[0]]) - model.num_prefix_bytes
        num_bytes -= min(num_bytes, max(0, first))
    return whole, mask, num_bytes


def _num_loss_bytes(segment: Segment) -> int:
    """Bytes of text that carry loss; control tokens are no text."""
    is_text = segment.loss and segment.kind == "text"
    return len(segment.text.encode("utf-8", "replace")) if is_text else 0


def _windows(
    max_length: int, ids: list[int], mask: list[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Rows that a model can read at once, with the loss mask of all but their first tokens."""
    for begin in range(0, len(ids) - 1, max_length):
        row_mask = mask[begin + 1 : begin + 1 + max_length]
        if any(row_mask):
            yield ids[begin : begin + 1 + max_length], row_mask


def _add(
    result: TextResult, model: LanguageModel, rows: list[list[int]], masks: Iterable[list[int]]
) -> TextResult:
    nats, num_tokens = result.nats, result.num_tokens
    for log_probs, mask in zip(model.log_probs(rows), masks, strict=True):
        nats -= float(log_probs @ mask)
        num_tokens += sum(mask)
    return replace(result, nats=nats, num_tokens=num_tokens)
