"""Reads the documents of plain-text corpora for commands that write no indexed dataset."""

import logging
from collections.abc import Iterator, Sequence

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding

logger = logging.getLogger(__name__)


def read_texts(
    inputs: Sequence[str], *, json_keys: Sequence[str] = ("text",), encoding: str = "utf-8"
) -> Iterator[str]:
    """Yields the documents of a corpus. Lines that are not documents are counted and skipped.

    Args:
        inputs: Files, folders or globs. Each line of a ``.txt`` file is a document.
        json_keys: The JSON keys of the text.
        encoding: The encoding of the text.

    Raises:
        UserError: An input is missing, or more lines are skipped than are documents.
    """
    settings = CorpusSettings(
        json_keys=tuple(json_keys), txt_documents="line", encoding=canonical_encoding(encoding)
    )
    num_documents = num_bad = 0
    first_bad: str | None = None
    for chunk in CorpusReader(find_inputs(list(inputs)), settings).chunks():
        parsed = parse_chunk(chunk, settings)
        num_bad += parsed.num_bad
        first_bad = first_bad or parsed.first_bad
        for documents in parsed.documents.values():
            texts = [document for document in documents if isinstance(document, str)]
            num_documents += len(texts)
            yield from texts
    if not num_bad:
        return
    found = (
        f"{num_bad} lines are not documents and {num_documents} are; the first bad line is "
        f"{first_bad}"
    )
    if num_bad > num_documents:
        raise UserError(f"{' '.join(inputs)}: {found} (see --encoding and --json-keys)")
    logger.warning("%s: %s", " ".join(inputs), found)
