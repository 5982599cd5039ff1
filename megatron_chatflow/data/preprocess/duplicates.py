"""Knows which documents have been there before, exactly, in memory that does not grow with them.

In: 128-bit hashes of documents, in order. Out: for each whether it is the first of its kind.

New hashes gather in memory; when there are many they become a sorted run on disk, in an unnamed
file that is mapped to be searched. What is held in memory is at most one such run.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.mapped_file import map_file
from megatron_chatflow.data.staged_file import told_to_the_user

HASHES_PER_RUN = 1 << 19  # about 50 MB while they are Python's


HASH_RECORD = np.dtype([("hash", "<u8", (2,)), ("num_text_bytes", "<i8")])  # of one document


def hash_records(
    hashes: npt.NDArray[np.uint64], num_text_bytes: npt.NDArray[np.int64]
) -> npt.NDArray[np.void]:
    """What a part notes about its documents: `HASH_RECORD`[num_documents]."""
    records = np.empty(len(hashes), HASH_RECORD)
    records["hash"], records["num_text_bytes"] = hashes, num_text_bytes
    return records


def hashes_of(texts: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """128-bit BLAKE2b of each text, as uint64[num_texts, 2]."""
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


class SeenHashes:
    """The set of all hashes so far."""

    def __init__(self, folder: Path) -> None:
        """Begins empty.

        Args:
            folder: Where runs lie; their files have no names, and vanish with this object.
        """
        self._folder = folder
        self._recent: set[bytes] = set()
        self._runs: list[npt.NDArray[np.uint64]] = []  # [length, 2], sorted by the first column

    def add(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Adds hashes.

        Args:
            hashes: uint64[n, 2].

        Returns:
            bool[n], whether each is new; of equal ones in one call only the first is.

        Raises:
            UserError: The disk has no room for a run.
        """
        is_new = np.ones(len(hashes), np.bool_)
        for run in self._runs:
            is_new &= ~_contained(hashes, run)
        for k in np.flatnonzero(is_new).tolist():
            digest = hashes[k].tobytes()
            is_new[k] = digest not in self._recent
            self._recent.add(digest)
        if len(self._recent) >= HASHES_PER_RUN:
            self._write_run()
        return is_new

    def _write_run(self) -> None:
        recent = np.frombuffer(b"".join(self._recent), "<u8").reshape(-1, 2)
        self._recent.clear()
        # Unbuffered: a buffer whose bytes do not fit on the disk raises once more when it closes.
        with (
            told_to_the_user(self._folder),
            tempfile.TemporaryFile(dir=self._folder, buffering=0) as file,
        ):
            write_at(file.fileno(), recent[np.argsort(recent[:, 0], kind="stable")].tobytes(), 0)
            self._runs.append(map_file(file).view("<u8").reshape(-1, 2))


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Writes all of ``data`` at a position of a file.

    Raises:
        OSError: The disk is full or failing.
    """
    view = memoryview(data)
    while view:
        num_written = os.pwrite(descriptor, view, offset)
        view, offset = view[num_written:], offset + num_written


def _contained(
    hashes: npt.NDArray[np.uint64], run: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Which hashes a sorted run has."""
    first = run[:, 0]
    position = np.searchsorted(first, hashes[:, 0])
    found = np.zeros(len(hashes), np.bool_)
    while True:  # more than once only where two hashes share their first half
        inside = position < len(run)
        at = np.where(inside, position, 0)
        same_half = inside & (first[at] == hashes[:, 0])
        found |= same_half & (run[at, 1] == hashes[:, 1])
        if not (same_half & ~found).any():
            return found
        position = position + 1
