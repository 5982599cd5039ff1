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
import numpy.typing as npt

from megatron_chatflow.data.build_once import build_once
from megatron_chatflow.data.fingerprint import sampled_hash
from megatron_chatflow.data.indexed import bin_path
from megatron_chatflow.data.mapped_file import release_pages
from megatron_chatflow.data.packing_cache import Packing, load_packing, save_packing
from megatron_chatflow.data.samples import check_index, document_begins
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.data.split import Split, document_range, documents_in_split
from megatron_chatflow.native.packing import best_fit
from megatron_chatflow.native.samples import (
    DocumentLists,
    SampleShape,
    TokenFile,
    make_packed_reader,
)

logger = logging.getLogger(__name__)

ALGORITHM_VERSION = 2
"""Raised whenever the same documents would be packed differently. Version 1, which resumed runs may
ask for, packs documents without loss tokens as well; the two agree where there are none."""

_BLOCK = 1 << 14  # documents that are looked at together


def pack_documents(
    files: Sequence[TokenFile],
    split: Split,
    holdout_every: int | None,
    seq_length: int,
    version: int = ALGORITHM_VERSION,
    shares: Sequence[float] | None = None,
) -> Packing:
    """Packs the documents of a split into samples of ``seq_length + 1`` tokens.

    A document that is longer than a sample fills one alone, and its rest is cut off. A document
    whose kept part has no token with loss is left out: it would only take up room.

    Memory peaks below 24 bytes a document of the files: 4 for its length, which then becomes its
    sample; 4 for the order of placement, which is freed before the result is made; 8 in the
    result, and 8 for each sample. Mapped pages are released block by block.

    Args:
        files: The token files.
        split: Whose documents.
        holdout_every: Every k-th document of a file is held out; None for all of them.
        seq_length: Inputs of a sample.
        version: Of the algorithm.
        shares: Of training, validation and test, instead of `holdout_every`.
    """
    capacity = seq_length + 1
    num_documents = sum(file.num_documents for file in files)
    # Documents that are not packed have length 0.
    lengths = np.zeros(
        num_documents, np.int32 if max(num_documents, capacity) < 2**31 else np.int64
    )
    num_tokens = num_truncated = num_truncated_tokens = num_without_loss = first = 0
    for file in files:
        taken = None if shares is None else document_range(file.num_documents, split, shares)
        for begin in range(0, file.num_documents, _BLOCK):
            end = min(begin + _BLOCK, file.num_documents)
            begins = document_begins(file, np.arange(begin, end + 1))
            whole = np.diff(begins)
            check_index(file, whole >= 0)
            kept = np.minimum(whole, capacity)
            kept[~documents_in_split(begin, end, split, holdout_every, taken)] = 0
            without_loss = np.zeros(len(kept), np.bool_)
            if version > 1:
                without_loss = (kept > 0) & ~_have_loss(file, begins[:-1], kept)
            kept[without_loss] = 0
            lengths[first + begin : first + end] = kept
            rest = (whole - kept)[kept == capacity]
            num_tokens += int(kept.sum())
            num_truncated += int(np.count_nonzero(rest))
            num_truncated_tokens += int(rest.sum())
            num_without_loss += int(np.count_nonzero(without_loss))
            for array in (file.document_indices, file.sequence_pointers, file.loss_mask):
                if array is not None:
                    release_pages(array)
        first += file.num_documents
    offsets, documents = best_fit(lengths, capacity)
    return Packing(
        offsets=offsets,
        documents=documents,
        num_tokens=num_tokens,
        num_truncated=num_truncated,
        num_truncated_tokens=num_truncated_tokens,
        num_without_loss=num_without_loss,
    )


def _have_loss(
    file: TokenFile, begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Whether each document has a token with loss.

    The first token of a document is no label, since attention and loss do not cross documents.

    Args:
        file: The token file.
        begins: int64[n], first tokens of documents, ascending.
        lengths: int64[n], tokens of each that count.
    """
    have_labels = lengths > 1
    if file.loss_mask is None or not have_labels.any():
        return np.asarray(have_labels)
    first, end = begins[have_labels] + 1, (begins + lengths)[have_labels]
    # The mask's values are combined from each of these places to the next one.
    edges = np.stack([first, end], axis=1).reshape(-1)[:-1] - first[0]
    mask = file.loss_mask[first[0] : end[-1]]
    found = np.zeros(len(lengths), np.bool_)
    found[have_labels] = np.bitwise_or.reduceat(mask, edges)[::2] != 0
    return found


def packing_key(facts: Sequence[dict[str, Any]], version: int, **settings: Any) -> bytes:
    """Stands for everything that a packing depends on.

    Args:
        facts: Content of each dataset.
        version: Of the algorithm.
        settings: Split, holdout and length of a sample, and the loss masks.

    Returns:
        16 bytes.
    """
    content = {"algorithm": version, "datasets": list(facts), **settings}
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def mask_hashes(files: Sequence[TokenFile], facts: Sequence[dict[str, Any]]) -> list[str | None]:
    """What the loss mask of each dataset is known by; None where every token has loss."""
    hashes: list[str | None] = []
    for file, fact in zip(files, facts, strict=True):
        if file.loss_mask is None:
            hashes.append(None)
        else:
            recorded = fact.get("sha256", {}).get("loss_mask_bin")
            hashes.append(recorded or sampled_hash(bin_path(loss_mask_prefix(file.name))))
    return hashes


def packing_path(prefix: str | Path, key: bytes) -> Path:
    """The cache's file, beside the source's first dataset."""
    return Path(f"{prefix}.packing.{key.hex()[:16]}")


def cached_packing(
    files: Sequence[TokenFile],
    facts: Sequence[dict[str, Any]],
    split: Split,
    holdout_every: int | None,
    seq_length: int,
    version: int = ALGORITHM_VERSION,
    shares: Sequence[float] | None = None,
) -> Packing:
    """The packing of a split, from the disk if it is there.

    Of all processes that share the folder, one computes it and the others wait for its file.

    Args:
        files: The token files.
        facts: Content of each, by which the cache knows them.
        split: Whose documents.
        holdout_every: Every k-th document of a file is held out; None for all of them.
        seq_length: Inputs of a sample.
        version: Of the algorithm.
        shares: Of training, validation and test, instead of `holdout_every`.
    """
    given = {} if shares is None else {"shares": list(shares)}
    key = packing_key(
        facts,
        version,
        split=split,
        holdout_every=holdout_every,
        seq_length=seq_length,
        loss_masks=mask_hashes(files, facts),
        **given,
    )
    path = packing_path(files[0].name, key)

    def build() -> Packing:
        packing = pack_documents(files, split, holdout_every, seq_length, version, shares)
        room = packing.num_samples * (seq_length + 1)
        logger.info(
            "packed %d documents of %s into %d samples, %.1f%% full; %d documents cut by %d "
            "tokens; %d documents without loss tokens left out",
            len(packing.documents),
            files[0].name,
            packing.num_samples,
            100 * packing.num_tokens / max(room, 1),
            packing.num_truncated,
            packing.num_truncated_tokens,
            packing.num_without_loss,
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
        packing: Which documents they hold, and what was left out.
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
        self.packing = packing
        self.num_samples = packing.num_samples
        self.num_tokens = packing.num_tokens
        self.rows = make_packed_reader(label, files, lists, shape._replace(isolate=True))
