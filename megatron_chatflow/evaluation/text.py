"""Computes loss, perplexity and bits per byte of a model on text, pairs and chats.

Inputs are the files that `tools/preprocess_data.py` accepts. Bits per byte divide by the bytes of
the text itself, so they are comparable across vocabularies.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, get_args

from tqdm import tqdm

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.models import LanguageModel, with_prefix
from megatron_chatflow.preprocess.encode import encode_segments
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusFormat, CorpusSettings
from megatron_chatflow.tokenizer.documents import Document
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding

logger = logging.getLogger(__name__)
DEFAULT_TEMPLATE = "chatflow"
FORMATS: tuple[CorpusFormat, ...] = get_args(CorpusFormat)
_ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class TextSource:
    """Text to evaluate on."""

    name: str
    path: str  # file, folder or glob pattern
    settings: CorpusSettings

    @classmethod
    def parse(cls, text: str, encoding: str = "utf-8") -> "TextSource":
        """Reads ``name=path`` or ``name:format=path``.

        Raises:
            UserError: The value has another form, or the encoding is unknown.
        """
        left, _, path = text.partition("=")
        name, _, given = left.partition(":")
        kind = given or "text"
        if not name or not path or kind not in FORMATS:
            raise UserError(
                f"--source: {text!r} is not NAME=FILE or NAME:FORMAT=FILE; FORMAT is one of "
                f"{', '.join(FORMATS)}"
            )
        keys = ("messages",) if kind == "chat" else ("text",)
        settings = CorpusSettings(
            format=kind,
            json_keys=keys,
            template=DEFAULT_TEMPLATE,
            encoding=canonical_encoding(encoding),
        )
        return cls(name, path, settings)

    def with_template_of(self, model: LanguageModel) -> "TextSource":
        """Returns the source with the model's chat template.

        Raises:
            UserError: The model's template does not mark the answers.
        """
        template = model.chat_template
        if self.settings.format != "chat" or template is None:
            return self
        if isinstance(template, str):
            return replace(self, settings=replace(self.settings, template=template))
        template.check()
        return replace(self, settings=replace(self.settings, chat_template=template))

    def documents(self, num_dropped: Counter[str]) -> Iterator[Document | str]:
        """Iterates over the documents and counts dropped records by reason in ``num_dropped``."""
        settings = replace(self.settings, txt_documents="line")
        reader = CorpusReader(find_inputs([self.path]), settings)
        for chunk in reader.chunks():
            parsed = parse_chunk(chunk, self.settings)
            num_dropped.update(parsed.num_dropped)
            for documents in parsed.documents.values():
                yield from documents


@dataclass
class TextResult:
    """Result of a model on a source."""

    nats: float = 0.0  # sum of the negative log-probabilities of the loss tokens
    num_tokens: int = 0  # number of loss tokens
    num_bytes: int = 0  # UTF-8 bytes of the text of the loss tokens
    num_documents: int = 0
    # number of dropped records by reason
    num_dropped: Counter[str] = field(default_factory=Counter)

    @property
    def loss(self) -> float:
        """Mean loss per token, in nats."""
        return self.nats / self.num_tokens if self.num_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per byte of text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Returns the object for a results file."""
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
    """Evaluates a model on a source, on at most ``max_documents`` documents.

    Long documents are split into windows, each starting with the last token of the previous one.
    Unless texts start with BOS, the first token of a document has no loss, and its bytes are not
    counted.

    Raises:
        UserError: The source has no documents.
    """
    result = TextResult()
    rows: list[list[int]] = []
    masks: list[list[int]] = []

    def add_rows() -> None:
        for log_probs, mask in zip(model.log_probs(rows), masks, strict=True):
            result.nats -= float(log_probs @ mask)
            result.num_tokens += sum(mask)
        rows.clear()
        masks.clear()

    source = source.with_template_of(model)
    documents = islice(source.documents(result.num_dropped), max_documents)
    for document in tqdm(documents, desc=source.name, unit="doc", disable=None):
        ids, mask, num_bytes = encode_document(model, document)
        result.num_bytes += num_bytes
        result.num_documents += 1
        # Every row but the first begins with the last token of the row before.
        for begin in range(0, len(ids) - 1, model.max_length):
            row_mask = mask[begin + 1 : begin + 1 + model.max_length]
            if any(row_mask):
                rows.append(ids[begin : begin + 1 + model.max_length])
                masks.append(row_mask)
        if len(rows) >= _ROWS_AT_A_TIME:
            add_rows()
    add_rows()
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.num_dropped.most_common())
    if not result.num_documents:
        raise UserError(
            f"--source: {source.path} contains no documents in the given format"
            + (f" (dropped: {reasons})" if reasons else "")
        )
    if reasons:
        logger.warning("%s: dropped records: %s", source.name, reasons)
    return result


def encode_document(
    model: LanguageModel, document: Document | str
) -> tuple[list[int], list[int], int]:
    """Returns a document's ids with the model's prefix, their loss mask, and its loss bytes."""
    if isinstance(document, str):
        ids = model.tokenizer.encode(document)
        mask = [1] * len(ids)
        num_bytes = len(document.encode("utf-8", "replace"))
    else:
        ids, mask, _ = encode_segments(model.tokenizer, document.segments)
        num_bytes = sum(
            len(segment.text.encode("utf-8", "replace"))
            for segment in document.segments
            if segment.loss and segment.kind == "text"  # control tokens are not text
        )
    whole = with_prefix(ids, model.prefix_ids)
    mask = [0] * (len(whole) - len(ids)) + mask
    if mask[:1] == [1]:
        mask[0] = 0
        first = int(model.tokenizer.num_bytes_per_id[whole[0]]) - model.num_prefix_bytes
        num_bytes -= min(num_bytes, max(0, first))
    return whole, mask, num_bytes
