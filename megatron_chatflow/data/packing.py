"""Packing: builds samples from whole documents, so that no document is split between samples.

The documents are packed by offline best fit (Johnson, "Near-optimal bin packing algorithms", 1973;
for documents: Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024). The following
rules make the result deterministic:

- Documents are placed in order of descending length, and documents of equal length in the order of
  the corpus.
- A document is placed in the sample with the least free space that is sufficient. Among samples
  with equal free space, the one that was filled last is used. If no sample has enough space, the
  document starts a new sample.
- Finally, samples are numbered in the order of their first documents.

A packing is computed once and cached in a file next to the data. All processes of a node map this
file. Its name contains a hash of everything that the packing depends on (`packing_key`). A file
with a different key, length or digest is ignored. Layout (little endian): the header `_FACTS` and a
digest; int64[num_samples + 1], the begin of each sample's documents in the list that follows;
int64[num_documents], the documents.
"""

import json
import logging
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.fingerprint import sampled_hash
from megatron_chatflow.data.indexed import bin_path
from megatron_chatflow.data.mapped_file import map_file, release_pages
from megatron_chatflow.data.samples import (
    DocumentLists,
    Samples,
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
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import FileLock, StagedFile, publish_all
from megatron_chatflow.runtime import load_extension

extension = load_extension("data")

Content = TypeVar("Content")
DocumentsOfSamples = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Offsets int64[num_samples + 1], the begin of each sample's documents in the second array; and
documents int64[num_packed], ascending within each sample."""

logger = logging.getLogger(__name__)
_MAGIC = b"MCFPACK2"
# magic, key, num_samples, num_documents, then the four counts of `Packing` in order of declaration
_FACTS = struct.Struct("<8s16s6Q")
_DIGEST_BYTES = 16
_HEADER_BYTES = _FACTS.size + _DIGEST_BYTES
ALGORITHM_VERSION = 2
"""Increase it whenever the same documents would be packed differently. Version 1 also packs
documents without loss tokens. It is kept for runs that began with it. Both versions give the same
packing if every document has loss tokens."""
_BLOCK = 1 << 14  # documents per block when lengths are computed


def best_fit_reference(lengths: npt.NDArray[Any], capacity: int) -> DocumentsOfSamples:
    """Packs documents into samples by best fit, without truncating any document.

    ``lengths`` are the tokens in each document, 0 to ``capacity``, integers[num_documents]. Empty
    documents are left out. The samples are in the order of their first documents.

    Raises:
        ValueError: A length is negative or above the capacity.
    """
    if lengths.size and (int(lengths.min()) < 0 or int(lengths.max()) > capacity):
        raise ValueError(f"packing: a length is not between 0 and {capacity}")
    samples = np.full(len(lengths), -1, np.int64)  # of each document; -1 for empty ones
    open_samples: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space, latest last
    rooms = 0  # bit r is set if open_samples[r] is not empty
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
    packed = np.flatnonzero(samples >= 0)
    _, first, number = np.unique(samples[packed], return_index=True, return_inverse=True)
    # Renumber the samples in the order of their first documents.
    number = np.argsort(np.argsort(first, kind="stable"))[number]
    offsets = np.zeros(num_samples + 1, np.int64)
    offsets[1:] = np.cumsum(np.bincount(number, minlength=num_samples))
    return offsets, packed[np.argsort(number, kind="stable")]


def best_fit(lengths: npt.NDArray[Any], capacity: int) -> DocumentsOfSamples:
    """Packs documents into samples; see `best_fit_reference`.

    The C++ version is used if the extension is built. It overwrites ``lengths``, because a second
    array of this size may not fit into memory for a large corpus. They are int32[num_documents], or
    int64 if the capacity or the number of documents exceeds int32.
    """
    if extension is None:
        return best_fit_reference(lengths, capacity)
    packed: DocumentsOfSamples = extension.best_fit(lengths, capacity)
    return packed


@dataclass(frozen=True)
class Packing:
    """The documents of each sample."""

    # int64[num_samples + 1], the begin of each sample's documents in ``documents``
    offsets: npt.NDArray[np.int64]
    # int64[num_packed], document numbers, counted over all files of the source
    documents: npt.NDArray[np.int64]
    num_tokens: int  # number of tokens in all samples, without padding
    num_truncated: int  # number of documents that are longer than a sample
    num_truncated_tokens: int  # number of tokens that were cut off from these documents
    # number of documents that were left out because their first ``seq_length + 1`` tokens contain
    # no token with loss
    num_without_loss: int = 0

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1


def save_packing(path: Path, key: bytes, packing: Packing) -> None:
    """Writes a packing atomically, with the key of `packing_key`.

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
    """Maps a packing; returns None if the file is missing, damaged or has another key."""
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

    A document that is longer than a sample is truncated to fill one sample. A document is left out
    if its first ``seq_length + 1`` tokens contain no token with loss, because it would take up
    space without contributing to training.

    Peak memory is below 24 bytes per document: 4 for its length, which is later overwritten with
    its sample; 4 for the order of placement, which is freed before the result is allocated; 8 in
    the result; and 8 per sample. Mapped pages are released block by block.

    Args:
        files: The token files.
        split: The split.
        holdout_every: Hold out every k-th document of each file; None holds out none.
        seq_length: Number of input tokens per sample.
        version: Version of the algorithm; see `ALGORITHM_VERSION`.
        shares: Shares of training, validation and test, instead of ``holdout_every``.

    Raises:
        UserError: The index of a file is damaged.
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
    """Returns whether each document has a token with loss, bool[n].

    ``begins`` are the first tokens of the documents, ascending, and ``lengths`` the numbers of
    tokens that are kept. The first token of a document is not a label, because attention and loss
    do not cross documents.
    """
    have_labels = lengths > 1
    if file.loss_mask is None or not have_labels.any():
        return np.asarray(have_labels)
    first, end = begins[have_labels] + 1, (begins + lengths)[have_labels]
    # `reduceat` combines the mask's values from each of these positions to the next.
    edges = np.stack([first, end], axis=1).reshape(-1)[:-1] - first[0]
    mask = file.loss_mask[first[0] : end[-1]]
    found = np.zeros(len(lengths), np.bool_)
    found[have_labels] = np.bitwise_or.reduceat(mask, edges)[::2] != 0
    return found


def packing_key(facts: Sequence[dict[str, Any]], version: int, **settings: Any) -> bytes:
    """Hashes everything that a packing depends on to 16 bytes.

    ``facts`` are those of each dataset from `dataset_facts`; ``settings`` are the split, holdout,
    sequence length and hashes of the loss masks.
    """
    content = {"algorithm": version, "datasets": list(facts), **settings}
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()


def mask_hashes(files: Sequence[TokenFile], facts: Sequence[dict[str, Any]]) -> list[str | None]:
    """Returns the hash of each dataset's loss mask in hexadecimal; None if all tokens have loss."""
    hashes: list[str | None] = []
    for file, fact in zip(files, facts, strict=True):
        if file.loss_mask is None:
            hashes.append(None)
        else:
            recorded = fact.get("sha256", {}).get("loss_mask_bin")
            hashes.append(recorded or sampled_hash(bin_path(loss_mask_prefix(file.name))))
    return hashes


def cached_packing(
    files: Sequence[TokenFile],
    facts: Sequence[dict[str, Any]],
    split: Split,
    holdout_every: int | None,
    seq_length: int,
    version: int = ALGORITHM_VERSION,
    shares: Sequence[float] | None = None,
) -> Packing:
    """Returns the packing of `pack_documents`, from the cache file if it exists.

    If several processes share the folder, one of them computes the packing, and the others wait for
    the file. ``facts`` are those of each file from `dataset_facts`, part of the cache's key.
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
    path = Path(f"{files[0].name}.packing.{key.hex()[:16]}")

    def build() -> Packing:
        packing = pack_documents(files, split, holdout_every, seq_length, version, shares)
        room = packing.num_samples * (seq_length + 1)
        logger.info(
            "packed %d documents of %s into %d samples, %.1f%% full; %d documents truncated by "
            "%d tokens; %d documents without loss tokens dropped",
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


def build_once(
    path: Path,
    *,
    load: Callable[[], Content | None],
    build: Callable[[], Content],
    save: Callable[[Content], None],
) -> Content:
    """Loads a file, builds it, or waits until another process has built it.

    No collective communication is used, so processes of different jobs can share the file. If the
    folder is not writable, every process builds the content in memory and logs a warning. If its
    file system has no locks, one process of every machine builds the file.

    Args:
        path: The file. The lock is `<path>.lock`.
        load: Reads the file; returns None if it is missing, damaged or outdated.
        build: Builds the content.
        save: Writes the file atomically; raises OSError or UserError if that fails.
    """
    content = load()
    if content is not None:
        return content
    lock_path = path.with_name(path.name + ".lock")
    try:
        lock = _acquire(lock_path)
        if not lock.is_effective:
            lock.release()
            name = blake2b(str(path.absolute()).encode(), digest_size=16).hexdigest()
            lock = _acquire(Path(tempfile.gettempdir(), f"chatflow-{name}.lock"))
    except OSError as error:
        logger.warning("cannot write next to %s (%s): building in memory", path, error.strerror)
        return build()
    try:
        content = load()  # another process may have built it before the lock was acquired
        if content is not None:
            return content
        content = build()
        try:
            save(content)
        except (OSError, UserError) as error:
            logger.warning("cannot write %s (%s): keeping it in memory", path, error)
        return content
    finally:
        lock.release()


def _acquire(path: Path) -> FileLock:
    lock = FileLock.acquire(path)
    if lock is None:
        logger.info("waiting for %s, which another process is building", path.stem)
        lock = FileLock.acquire(path, wait=True)
    assert lock is not None
    return lock


def make_packed_samples(
    label: str, files: Sequence[TokenFile], packing: Packing, shape: SampleShape
) -> Samples:
    """Creates the packed samples of a source without reading any tokens; ``isolate`` is set.

    Error messages of the reader begin with ``label``.
    """
    num_documents = [file.num_documents for file in files]
    first_documents = np.concatenate([[0], np.cumsum(num_documents)]).astype(np.int64)
    lists = DocumentLists(first_documents, packing.offsets, packing.documents)
    rows = make_packed_reader(label, files, lists, shape._replace(isolate=True))
    return Samples(packing.num_samples, packing.num_tokens, rows)
