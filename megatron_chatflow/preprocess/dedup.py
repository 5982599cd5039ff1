"""Exact deduplication of documents by 128-bit hashes, in bounded memory.

`SeenHashes` finds repeated documents while a job runs. New hashes are collected in memory. When
there are `HASHES_PER_RUN` of them, they are sorted and moved to an unnamed memory-mapped file, so
that memory does not grow with the corpus.

`DuplicateMarks` finds documents that repeat a document of an earlier partition, from the hashes
that each partition records. It distributes all hashes to buckets in an unnamed file and sorts each
bucket separately, so that memory depends neither on the number of documents nor on the number of
partitions.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.mapped_file import map_file
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import as_user_error

HASHES_PER_RUN = 1 << 19  # about 50 MB as Python objects


HASH_RECORD = np.dtype([("hash", "<u8", (2,)), ("num_text_bytes", "<i8")])  # one per document

BLOCK = 1 << 17  # hashes that are read at once: 3 MB; a multiple of those of a document
HASHES_PER_BUCKET = 1 << 19  # about 40 MB while a bucket is sorted
MAX_BUCKET_BITS = 12
_PLACED = np.dtype([("hash", "<u8", (2,)), ("index", "<i8")])


def num_hashes_of(recorded: Mapping[str, Any]) -> int:
    """Returns the hashes of each document, by the settings in a sidecar: 0 without dedup."""
    if (recorded.get("pairs") or {}).get("dedup", "none") == "either":
        return 2
    return int(recorded.get("dedup", False))


def hash_records(
    hashes: npt.NDArray[np.uint64], num_text_bytes: npt.NDArray[np.int64]
) -> npt.NDArray[np.void]:
    """Builds the records of a partition's `.hashes` file: `HASH_RECORD`[num_documents]."""
    records = np.empty(len(hashes), HASH_RECORD)
    records["hash"], records["num_text_bytes"] = hashes, num_text_bytes
    return records


def hashes_of(texts: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """Returns the 128-bit BLAKE2b hash of each text as uint64[num_texts, 2]."""
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


class SeenHashes:
    """A set of hashes that keeps most of its elements on disk."""

    def __init__(self, folder: Path) -> None:
        """Creates an empty set with unnamed files in a folder, which are freed with this object."""
        self._folder = folder
        self._recent: set[bytes] = set()
        self._runs: list[npt.NDArray[np.uint64]] = []  # [length, 2], sorted by the first column

    def add(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Adds hashes, uint64[n, 2], and returns which of them are new, bool[n].

        If ``hashes`` has equal elements, only the first of them is new.

        Raises:
            UserError: The disk is full.
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
        # Unbuffered, because a buffered file on a full disk raises a second time when it is closed.
        with (
            as_user_error(self._folder),
            tempfile.TemporaryFile(dir=self._folder, buffering=0) as file,
        ):
            write_at(file.fileno(), recent[np.argsort(recent[:, 0], kind="stable")].tobytes(), 0)
            self._runs.append(map_file(file).view("<u8").reshape(-1, 2))


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Writes all of ``data`` at a byte offset of a file.

    Raises:
        OSError: The write failed, for example because the disk is full.
    """
    view = memoryview(data)
    while view:
        num_written = os.pwrite(descriptor, view, offset)
        view, offset = view[num_written:], offset + num_written


def _contained(
    hashes: npt.NDArray[np.uint64], run: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Returns bool[n], True for each hash that is in a sorted run."""
    first = run[:, 0]
    position = np.searchsorted(first, hashes[:, 0])
    found = np.zeros(len(hashes), np.bool_)
    while True:  # repeats only if different hashes have equal first halves
        inside = position < len(run)
        at = np.where(inside, position, 0)
        same_half = inside & (first[at] == hashes[:, 0])
        found |= same_half & (run[at, 1] == hashes[:, 1])
        if not (same_half & ~found).any():
            return found
        position = position + 1


class DuplicateMarks:
    """Marks the documents that repeat an earlier document. The marks are stored on disk."""

    def __init__(
        self,
        paths: Sequence[Path],
        num_documents: Sequence[int],
        folder: Path,
        num_hashes: int = 1,
    ) -> None:
        """Reads the `.hashes` files of the partitions twice and marks repeated documents.

        Each document has ``num_hashes`` hashes in succession, and repeats an earlier one if it has
        one of its hashes. Temporary files in ``folder`` need 25 bytes per hash.

        Raises:
            UserError: A file is missing or has the wrong length, or the disk is full.
        """
        self._num_hashes = num_hashes
        self._paths = list(paths)
        self._begins = np.concatenate([[0], num_hashes * np.cumsum(num_documents)]).tolist()
        for path, number in zip(paths, num_documents, strict=True):
            num_bytes = number * num_hashes * HASH_RECORD.itemsize
            if not path.exists() or path.stat().st_size != num_bytes:
                raise UserError(
                    f"no hashes of {number} documents: {path}: merging the partitions of a job "
                    "with --dedup needs their .hashes files: create this partition again"
                )
        with as_user_error(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=0)
        try:
            with as_user_error(folder):
                self._file.truncate(max(self._begins[-1], 1))
                self._mark(folder)
        except BaseException:
            self._file.close()
            raise

    def of_partition(self, number: int, begin: int, end: int) -> npt.NDArray[np.bool_]:
        """Returns bool[end - begin], True for each repeated document in a range of a partition."""
        size, offset = (count * self._num_hashes for count in (end - begin, begin))
        data = os.pread(self._file.fileno(), size, self._begins[number] + offset)
        marks = np.frombuffer(data, np.bool_).reshape(-1, self._num_hashes)
        return np.asarray(marks.any(axis=1))

    def num_repeated_bytes(self, number: int) -> int:
        """Returns the size of the text in the repeated documents of a partition, in UTF-8 bytes."""
        total = begin = 0
        for records in _blocks(self._paths[number]):
            num_bytes = records["num_text_bytes"][:: self._num_hashes]
            marks = self.of_partition(number, begin, begin + len(num_bytes))
            total += int(num_bytes[marks].sum())
            begin += len(num_bytes)
        return total

    def close(self) -> None:
        """Frees the disk space."""
        self._file.close()

    def _mark(self, folder: Path) -> None:
        bits = 0
        while self._begins[-1] >> bits > HASHES_PER_BUCKET and bits < MAX_BUCKET_BITS:
            bits += 1
        sizes = np.zeros(1 << bits, np.int64)
        for path in self._paths:
            for records in _blocks(path):
                sizes += np.bincount(_buckets(records["hash"], bits), minlength=len(sizes))
        ends = np.cumsum(sizes)
        with tempfile.TemporaryFile(dir=folder) as placed:
            self._fill_buckets(placed.fileno(), bits, ends - sizes)
            for begin, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True):
                size, offset = (end - begin) * _PLACED.itemsize, begin * _PLACED.itemsize
                bucket = np.frombuffer(_read(placed.fileno(), size, offset), _PLACED)
                self._mark_bucket(bucket)

    def _fill_buckets(self, placed: int, bits: int, positions: npt.NDArray[np.int64]) -> None:
        """Writes each hash and the index of its document to its bucket."""
        index = 0
        for path in self._paths:
            for records in _blocks(path):
                given = np.empty(len(records), _PLACED)
                given["hash"] = records["hash"]
                given["index"] = np.arange(index, index + len(records))
                index += len(records)
                buckets = _buckets(given["hash"], bits)
                given = given[np.argsort(buckets, kind="stable")]
                counts = np.bincount(buckets, minlength=len(positions))
                begin = 0
                for bucket in np.flatnonzero(counts).tolist():
                    end = begin + int(counts[bucket])
                    offset = int(positions[bucket]) * _PLACED.itemsize
                    write_at(placed, given[begin:end].tobytes(), offset)
                    begin = end
                positions = positions + counts

    def _mark_bucket(self, bucket: npt.NDArray[np.void]) -> None:
        order = np.lexsort((bucket["index"], bucket["hash"][:, 1], bucket["hash"][:, 0]))
        hashes = bucket["hash"][order]
        same = (hashes[1:] == hashes[:-1]).all(axis=1)
        repeated = bucket["index"][order[1:][same]]
        for index in repeated.tolist():
            write_at(self._file.fileno(), b"\1", index)


def _buckets(hashes: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.int64]:
    """Returns the bucket of each hash, which is given by its top ``bits`` bits."""
    if bits == 0:
        return np.zeros(len(hashes), np.int64)
    return (hashes[:, 0] >> np.uint64(64 - bits)).astype(np.int64)


def _blocks(path: Path) -> Iterator[npt.NDArray[np.void]]:
    try:
        with path.open("rb") as file:
            while data := file.read(BLOCK * HASH_RECORD.itemsize):
                yield np.frombuffer(data, HASH_RECORD)
    except OSError as error:
        raise UserError(f"cannot read: {path}: {error.strerror}") from error


def _read(descriptor: int, size: int, offset: int) -> bytes:
    parts = []
    while size and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)
