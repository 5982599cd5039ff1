"""Packings on disk, beside the data that they belong to.

In: a packing and the key of what it was computed from. Out: a file that all processes of a node map
and share. A file with another key, another length or another digest than its own counts as absent:
the packing is then computed anew.

Layout, little endian: the header below, int64[num_samples + 1] first places of the samples in the
list that follows, int64[num_documents] documents.
"""

import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.mapped_file import map_file
from megatron_chatflow.data.staged_file import StagedFile, publish_all

_MAGIC = b"MCFPACK2"
# magic, key, num_samples, num_documents, then the counts of `Packing` in their order
_FACTS = struct.Struct("<8s16s6Q")
_DIGEST_BYTES = 16
_HEADER_BYTES = _FACTS.size + _DIGEST_BYTES


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
