"""Packing: samples of whole documents that are never divided between samples.

The documents are packed by offline best fit (Johnson, "Near-optimal bin packing algorithms", 1973;
for documents: Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024), made
deterministic:

- Documents are placed by descending length; equal ones in their own order.
- A document goes to the sample with the least room that it fits into. Of several such samples, it
  goes to the one that reached this room last. If it fits into none, it starts a new sample.
- Finally, samples are numbered by their first document, so that their order is the corpus's order.

A packing is computed once and cached in a file beside the data, which all processes of a node map.
Its name has a key of everything that the packing depends on. A file with another key, length or
digest is ignored. Layout, little endian: the header `_FACTS` and a digest; int64[num_samples + 1],
begin of each sample's documents in the list that follows; int64[num_documents], the documents.
"""

import json
import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.build_once import build_once
from megatron_chatflow.data.fingerprint import sampled_hash
from megatron_chatflow.data.indexed import bin_path
from megatron_chatflow.data.mapped_file import map_file, release_pages
from megatron_chatflow.data.samples import (
    DocumentLists,
    SampleShape,
    Split,
    TokenFile,
    check_index,
    document_begins,
    document_range,
    documents_in_split,
    make_packed_reader,
)
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.files import StagedFile, publish_all
from megatron_chatflow.runtime.extension import load_extension

extension = load_extension("data")


DocumentsOfSamples = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""int64[num_samples + 1], where each sample's documents begin in the list that follows; and
int64[num_packed], the documents of every sample, ascending."""

logger = logging.getLogger(__name__)
_MAGIC = b"MCFPACK2"
# magic, key, num_samples, num_documents, then the counts of `Packing` in their order
_FACTS = struct.Struct("<8s16s6Q")
_DIGEST_BYTES = 16
_HEADER_BYTES = _FACTS.size + _DIGEST_BYTES
ALGORITHM_VERSION = 2
"""Raised whenever the same documents would be packed differently. Version 1, which resumed runs may
ask for, packs documents without loss tokens as well; the two agree where there are none."""
_BLOCK = 1 << 14  # documents that are looked at together


def best_fit_reference(lengths: npt.NDArray[Any], capacity: int) -> DocumentsOfSamples:
    """Packs documents into samples, none of which is cut.

    Args:
        lengths: Integers[num_documents], tokens in each document, 0 to ``capacity``. Empty
            documents are left out.
        capacity: Tokens that a sample holds.

    Returns:
        The documents of every sample. Samples are in the order of their first documents.

    Raises:
        ValueError: A length is negative or above the capacity.
    """
    samples = _assign(lengths, capacity)
    num_samples = int(samples.max(initial=-1)) + 1
    documents = np.argsort(samples, kind="stable")[np.count_nonzero(samples < 0) :]
    offsets = np.zeros(num_samples + 1, np.int64)
    offsets[1:] = np.cumsum(np.bincount(samples[documents], minlength=num_samples))
    return offsets, documents


def _assign(lengths: npt.NDArray[Any], capacity: int) -> npt.NDArray[np.int64]:
    """The sample of each document, int64[num_documents]; -1 for an empty one."""
    if lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > capacity):
        raise ValueError(f"packing: a length is not between 0 and {capacity}")
    samples = np.full(len(lengths), -1, np.int64)
    open_samples: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room, latest last
    rooms = 0  # bit r is set where open_samples[r] holds any
    num_samples = 0
    for document in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[document])
        if length == 0:
            break
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sample = open_samples[room].pop()
            if not open_samples[room]:
                rooms ^= 1 << room
        else:
            room, sample = capacity, num_samples
            num_samples += 1
        samples[document] = sample
        room -= length
        if room:
            open_samples[room].append(sample)
            rooms |= 1 << room
    return _in_order_of_first(samples, num_samples)


def _in_order_of_first(samples: npt.NDArray[np.int64], num_samples: int) -> npt.NDArray[np.int64]:
    """Numbers the samples anew, by the first document of each."""
    packed = np.flatnonzero(samples >= 0)
    _, first = np.unique(samples[packed], return_index=True)
    rank = np.empty(num_samples, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(num_samples)
    renumbered = samples.copy()
    renumbered[packed] = rank[samples[packed]]
    return renumbered


def best_fit(lengths: npt.NDArray[Any], capacity: int) -> DocumentsOfSamples:
    """The compiled `best_fit_reference`, or the reference itself where nothing is compiled.

    ``lengths`` is int32, or int64 where the capacity or the number of documents needs it. It is
    overwritten: for a large corpus a second array of this size would not fit into memory.
    """
    if extension is None:
        return best_fit_reference(lengths, capacity)
    packed: DocumentsOfSamples = extension.best_fit(lengths, capacity)
    return packed


@dataclass(frozen=True)
class Packing:
    """Which documents each sample holds.

    Attributes:
        offsets: int64[num_samples + 1], where each sample's documents begin in ``documents``.
        documents: int64[num_documents], numbered over all files of the source.
        num_tokens: Tokens of documents in all samples.
        num_truncated: Documents longer than a sample.
        num_truncated_tokens: Their tokens that were cut off.
        num_without_loss: Documents that were left out, as their kept part has no token with loss.
    """

    offsets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    num_tokens: int
    num_truncated: int
    num_truncated_tokens: int
    num_without_loss: int = 0

    @property
    def num_samples(self) -> int:
        """The number of samples."""
        return len(self.offsets) - 1


def save_packing(path: Path, key: bytes, packing: Packing) -> None:
    """Writes a packing, whole or not at all.

    Args:
        path: The file.
        key: 16 bytes that stand for what it was computed from.
        packing: What to write.

    Raises:
        OSError: The disk is full or failing.
        UserError: The folder cannot be written to.
    """
    facts = _FACTS.pack(
        _MAGIC,
        key,
        packing.num_samples,
        len(packing.documents),
        packing.num_tokens,
        packing.num_truncated,
        packing.num_truncated_tokens,
        packing.num_without_loss,
    )
    arrays = [
        np.ascontiguousarray(array, "<i8").view(np.uint8).data
        for array in (packing.offsets, packing.documents)
    ]
    with StagedFile(path) as file:
        file.write(facts + _digest(facts, *arrays))
        for array in arrays:
            file.write(array)
        publish_all([file])


def load_packing(path: Path, key: bytes) -> Packing | None:
    """Maps a packing, if the file is there, whole, and of this key."""
    try:
        data = map_file(path)
    except OSError:  # missing or unreadable
        return None
    if len(data) < _HEADER_BYTES:
        return None
    facts = data[: _FACTS.size].tobytes()
    magic, found_key, num_samples, num_documents, *counts = _FACTS.unpack(facts)
    payload = data[_HEADER_BYTES:]
    if (
        magic != _MAGIC
        or found_key != key
        or len(payload) != 8 * (num_samples + 1 + num_documents)
        or data[_FACTS.size : _HEADER_BYTES].tobytes() != _digest(facts, payload.data)
    ):
        return None
    entries = payload.view("<i8")
    return Packing(entries[: num_samples + 1], entries[num_samples + 1 :], *counts)


def _digest(facts: bytes, *payload: memoryview) -> bytes:
    digest = blake2b(facts, digest_size=_DIGEST_BYTES)
    for part in payload:
        digest.update(part)
    return digest.digest()


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
