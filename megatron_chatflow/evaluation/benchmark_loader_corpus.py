"""Made-up corpora for the loader's benchmark.

In: a prefix and a size. Out: a dataset there, of random ids, or a sparse one of any size.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_chatflow.data.indexed import HEADER, MAGIC, IndexedDatasetWriter, bin_path, idx_path
from megatron_chatflow.errors import UserError

VOCAB_SIZE = 32_000


@dataclass(frozen=True)
class BenchmarkVocabulary:
    """Stands for a tokenizer where ids are only copied."""

    vocab_size: int = VOCAB_SIZE
    pad_id: int = 0
    fingerprint: str = ""


def write_corpus(prefix: Path, num_tokens: int) -> None:
    """Writes random ids in documents of lognormal length, about 660 tokens."""
    random = np.random.default_rng(0)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    while writer.num_tokens < num_tokens:
        lengths = random.lognormal(6.0, 1.0, 4096).astype(np.int32).clip(1, 1 << 15)
        # Id 0 is the peer's end of a document, so it ends ours too.
        ids = random.integers(1, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
        ids[np.cumsum(lengths) - 1] = 0
        writer.add_documents(ids, lengths)
    writer.finalize()


def write_sparse_corpus(prefix: Path, num_tokens: int) -> None:
    """Writes a million documents of zeros that take no room on the disk.

    Raises:
        UserError: The file system has no files of that size.
    """
    num_documents = min(num_tokens, 1 << 20)
    ends = np.linspace(0, num_tokens, num_documents + 1).astype(np.int64)
    uint16_code = 8
    try:
        with idx_path(prefix).open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, uint16_code, num_documents, num_documents + 1))
            file.write(np.diff(ends).astype("<i4").tobytes())
            file.write((2 * ends[:-1]).astype("<i8").tobytes())
            file.write(np.arange(num_documents + 1, dtype="<i8").tobytes())
        with bin_path(prefix).open("wb") as file:
            file.truncate(2 * num_tokens)
    except OSError as error:
        raise UserError(f"cannot make a sparse file: {prefix}: {error.strerror}") from error
