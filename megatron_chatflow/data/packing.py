"""Samples of whole documents: chats and pairs packed by best fit, never cut across samples.

In: token files, the split, the length of a sample. Out: any packed sample, read where its documents
lie. The packing is computed once and kept beside the data under the fingerprint of what it depends
on; a change of the data or of the sample's length makes another file.
"""

import json
import logging
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.data.build_once import build_once
from megatron_chatflow.data.packing_cache import Packing, load_packing, save_packing
from megatron_chatflow.data.samples import check_index, document_begins
from megatron_chatflow.data.split import Split, split_documents
from megatron_chatflow.native.packing import best_fit
from megatron_chatflow.native.samples import (
    DocumentLists,
    SampleShape,
    TokenFile,
    make_packed_reader,
)

logger = logging.getLogger(__name__)

ALGORITHM_VERSION = 1
"""Raised whenever the same documents would be packed otherwise."""


def pack_documents(
    files: Sequence[TokenFile], split: Split, holdout_every: int | None, seq_length: int
) -> Packing:
    """Packs the documents of a split into samples of ``seq_length + 1`` tokens.

    A document that is longer than a sample fills one alone, and its rest is cut off.

    Args:
        files: The token files.
        split: Whose documents.
        holdout_every: Every k-th document of a file is held out; None for all of them.
        seq_length: Inputs of a sample.
    """
    capacity = seq_length + 1
    document_parts, length_parts = [], []
    first_document = 0
    for file in files:
        documents = split_documents(file.num_documents, split, holdout_every)
        lengths = document_begins(file, documents + 1) - document_begins(file, documents)
        check_index(file, lengths >= 0)
        length_parts.append(lengths)
        document_parts.append(documents + first_document)
        first_document += file.num_documents
    documents, lengths = np.concatenate(document_parts), np.concatenate(length_parts)
    cut = np.minimum(lengths, capacity)
    samples = best_fit(cut, capacity)
    num_samples = int(samples.max(initial=-1)) + 1
    order = np.argsort(samples, kind="stable")[np.count_nonzero(samples < 0) :]
    sizes = np.bincount(samples[order], minlength=num_samples)
    return Packing(
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)]),
        documents=documents[order],
        num_tokens=int(cut.sum()),
        num_truncated=int(np.count_nonzero(lengths > capacity)),
        num_truncated_tokens=int((lengths - cut).sum()),
    )


def packing_key(facts: Sequence[dict[str, Any]], **settings: Any) -> bytes:
    """Stands for everything that a packing depends on.

    Args:
        facts: Content of each dataset.
        settings: Split, holdout and length of a sample.

    Returns:
        16 bytes.
    """
    content = {"algorithm": ALGORITHM_VERSION, "datasets": list(facts), **settings}
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def packing_path(prefix: str | Path, key: bytes) -> Path:
    """The cache's file, beside the source's first dataset."""
    return Path(f"{prefix}.packing.{key.hex()[:16]}")


def cached_packing(
    files: Sequence[TokenFile],
    facts: Sequence[dict[str, Any]],
    split: Split,
    holdout_every: int | None,
    seq_length: int,
) -> Packing:
    """The packing of a split, from the disk if it is there.

    Of all processes that share the folder, one computes it and the others wait for its file.

    Args:
        files: The token files.
        facts: Content of each, by which the cache knows them.
        split: Whose documents.
        holdout_every: Every k-th document of a file is held out; None for all of them.
        seq_length: Inputs of a sample.
    """
    key = packing_key(facts, split=split, holdout_every=holdout_every, seq_length=seq_length)
    path = packing_path(files[0].name, key)

    def build() -> Packing:
        packing = pack_documents(files, split, holdout_every, seq_length)
        room = packing.num_samples * (seq_length + 1)
        logger.info(
            "packed %d documents of %s into %d samples, %.1f%% full; %d documents cut by %d tokens",
            len(packing.documents),
            files[0].name,
            packing.num_samples,
            100 * packing.num_tokens / max(room, 1),
            packing.num_truncated,
            packing.num_truncated_tokens,
        )
        return packing

    return build_once(
        path,
        load=lambda: load_packing(path, key),
        build=build,
        save=lambda packing: save_packing(path, key, packing),
    )


class PackedSamples:
    """The packed samples of a source.

    Attributes:
        num_samples: Samples in one epoch.
        num_tokens: Tokens of documents in one epoch, padding not counted.
        rows: Reads any of them.
    """

    def __init__(
        self, label: str, files: Sequence[TokenFile], packing: Packing, shape: SampleShape
    ) -> None:
        """Takes the packing; touches no token.

        Args:
            label: Begins every error message of the reader.
            files: The token files.
            packing: Made from these.
            shape: Of the samples; its documents are always isolated.
        """
        num_documents = [file.num_documents for file in files]
        first_documents = np.concatenate([[0], np.cumsum(num_documents)]).astype(np.int64)
        lists = DocumentLists(first_documents, packing.offsets, packing.documents)
        self.num_samples = packing.num_samples
        self.num_tokens = packing.num_tokens
        self.rows = make_packed_reader(label, files, lists, shape._replace(isolate=True))
