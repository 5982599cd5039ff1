"""Small datasets and stand-in tokenizers that the data tests share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_chatflow.config import DataConfig
from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.data.samples import Sample
from megatron_chatflow.data.sidecar import loss_mask_prefix


@dataclass(frozen=True)
class PlainTokenizer:
    """The attributes of a tokenizer that the data layer reads."""

    vocab_size: int = 1 << 20
    pad_id: int = 3
    fingerprint: str = "f" * 64


def write_dataset(prefix: Path, documents, dtype=np.int32, masks=None) -> str:
    """Writes documents (lists of token ids) and, if given, their loss masks."""
    writer = IndexedDatasetWriter(prefix, dtype)
    for document in documents:
        writer.add_document(np.asarray(document, dtype))
    writer.finalize()
    if masks is not None:
        writer = IndexedDatasetWriter(loss_mask_prefix(prefix), np.uint8)
        for mask in masks:
            writer.add_document(np.asarray(mask, np.uint8))
        writer.finalize()
    return str(prefix)


def numbered_documents(lengths, first: int = 10) -> list[np.ndarray]:
    """Returns documents without repeated tokens: 10, 11, 12, ... over all of them."""
    ends = first + np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]


class BothReaders:
    """Reads samples with the compiled reader and the reference, and asserts that they agree."""

    def __init__(self, samples, reference):
        self.num_samples, self.num_tokens = samples.num_samples, samples.num_tokens
        self._readers = (samples.rows, reference)

    def read(self, ordinal: int) -> Sample:
        """Returns the sample. Raises ValueError if both readers raise it with the same message."""
        compiled, reference = (outcome(reader, ordinal) for reader in self._readers)
        assert compiled == reference
        if isinstance(reference, str):
            raise ValueError(reference)
        return Sample(*self._readers[1].read(ordinal))


def outcome(reader, ordinal: int):
    """Returns the result of a read as plain lists and dtypes, or the message of its ValueError."""
    try:
        return [(array.dtype, array.tolist()) for array in reader.read(ordinal)]
    except ValueError as error:
        return str(error)


def data_config(sources: dict, *, seq_length: int = 8, weights=None, **fields) -> DataConfig:
    weights = weights or dict.fromkeys(sources, 1)
    schedule = {"knots": [{"at": 0, "weights": weights}]}
    return DataConfig(seq_length=seq_length, sources=sources, schedule=schedule, **fields)
