"""What is in a dataset, whatever it is called and wherever it lies.

`dataset_facts` are what two copies of the same data share and other data does not; they go into
checkpoints and into the packing cache's key. They rely on the hashes in the sidecar, if there is
one; `block_hash` shows whether the files still are what these hashes were made of.

Digests of a file's leaves: the reference, and the compiled one where it was built.

In: bytes. Out: 16 bytes of BLAKE2b (RFC 7693) for every 64 KiB, joined. Leaves do not depend on
each other, so threads hash parts of a file in any order, and the compiled code eight at a time.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from megatron_chatflow.data.indexed import bin_path, idx_path
from megatron_chatflow.data.samples import TokenFile
from megatron_chatflow.data.sidecar import (
    check_counts,
    loss_mask_prefix,
    read_sidecar,
    sidecar_path,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.extension import load_extension

extension = load_extension("data")


Buffer: TypeAlias = bytes | bytearray | memoryview

LEAF_BYTES = 65536
DIGEST_BYTES = 16


def hash_leaves_reference(data: Buffer) -> bytes:
    """What `hash_leaves` does, one leaf after the other."""
    view = memoryview(data)
    leaves = (view[begin : begin + LEAF_BYTES] for begin in range(0, len(view), LEAF_BYTES))
    return b"".join(hashlib.blake2b(leaf, digest_size=DIGEST_BYTES).digest() for leaf in leaves)


def hash_leaves(data: Buffer) -> bytes:
    """The digests of all leaves of ``data``, which begins where a leaf begins.

    Other threads run meanwhile.
    """
    if extension is None:
        return hash_leaves_reference(data)
    digests: bytes = extension.hash_leaves(data)
    return digests


def root_digest(num_bytes: int, leaf_digests: bytes) -> str:
    """The digest of a whole file, in hexadecimal, from its length and its leaves' digests."""
    length = num_bytes.to_bytes(8, "little")
    return hashlib.blake2b(length + leaf_digests, digest_size=DIGEST_BYTES).hexdigest()


_NUM_BLOCKS = 64
_BLOCK_BYTES = 1 << 18
"""Without a sidecar, files up to 16 MiB are hashed whole, and larger ones in evenly spaced blocks,
so that the time to start does not grow with the corpus. Checkpoints hold these hashes, so neither
number may change."""

_SAMPLE_BYTES = 1 << 12
"""Of each block of `block_hash`: a page, the least that a disk reads. Sidecars hold these hashes,
so this number may not change either."""

_SETTLED_NS = 5_000_000_000

_NUM_CHECKED_BLOCKS = 16
_CHECKED_BLOCK_TOKENS = 1 << 15


class Vocabulary(Protocol):
    """What the data has to know of the run's tokenizer, which is one."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    def pad_id(self) -> int:
        """Fills samples."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's file, hex."""


def dataset_facts(file: TokenFile) -> dict[str, Any]:
    """The facts of one dataset; JSON can hold them.

    With a sidecar they take its hashes; else sizes and hashes of sampled blocks.

    Raises:
        UserError: The sidecar is damaged or describes another dataset.
    """
    counts = {"num_documents": file.num_documents, "num_tokens": len(file.tokens)}
    sidecar = read_sidecar(file.name)
    if sidecar is None:
        hashes = {
            "bin": sampled_hash(bin_path(file.name)),
            "idx": sampled_hash(idx_path(file.name)),
        }
        return {**counts, "sampled_hash": hashes, "tokenizer": None}
    check_counts(file.name, sidecar, **counts)
    return {**counts, "sha256": sidecar["sha256"], "tokenizer": sidecar["tokenizer"]["sha256"]}


def dataset_files(prefix: str | Path, *, with_loss_mask: bool) -> dict[str, Path]:
    """The files of a dataset whose contents are compared, by their names in the sidecar."""
    files = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    if with_loss_mask:
        files["loss_mask_bin"] = bin_path(loss_mask_prefix(prefix))
    return files


def check_recorded_hash(
    prefix: str | Path, sidecar: Mapping[str, Any], key: str, name: str, path: Path, found: str
) -> None:
    """Refuses a file that its sidecar was not written for.

    Args:
        prefix: The dataset's.
        sidecar: What lies beside it.
        key: Of the sidecar, that holds hashes of this kind: ``block_hash`` or ``sha256``. A
            sidecar of an earlier version may lack them.
        name: Of the file there.
        path: The file.
        found: Its hash.

    Raises:
        UserError: The sidecar has another hash.
    """
    recorded = sidecar.get(key, {}).get(name)
    if recorded not in (None, found):
        raise UserError(
            f"other contents: {path}: not the bytes that {sidecar_path(prefix)} was written for, "
            "though as many: copy the dataset with its .json again, or preprocess the data again"
        )


def block_hash(path: Path) -> str:
    """blake2b-128 of a file's size and of 64 evenly spaced pages of it, hex.

    The number of pages bounds the cost of a start, which reads them on every node: 64 pages are
    256 KiB a file, whatever its size. 500 datasets of three files (96,000 reads, 375 MiB) took
    0.5 s of a processor's time from the page cache and 1.2 s from a disk. Files up to 256 KiB are
    read whole. The first and the last page are among them, so a file that was cut and filled up, a
    change of more than 1/63 of a file in one piece, and, at 99 %, one that touches 7 % of its pages
    are seen. A single changed document is not: ``--data-verify`` and ``tools/inspect_dataset.py``
    compare all bytes.

    Raises:
        UserError: The file cannot be read.
    """
    return _hash_blocks(path, _SAMPLE_BYTES)


def sampled_hash(path: Path) -> str:
    """blake2b-128 of a file's size and of up to 64 blocks of 256 KiB of it, hex.

    A file that has not been written to since it was hashed is not read again, because training,
    validation and test of a source have the same files. Clocks of file systems are coarse: a file
    that was written to just now is always read.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read: {path}: {error.strerror}") from error
    if time.time_ns() - status.st_mtime_ns < _SETTLED_NS:
        return _hash_blocks(path, _BLOCK_BYTES)
    return _sampled_hash(path, (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1 << 14)
def _sampled_hash(path: Path, state: tuple[int, ...]) -> str:
    del state  # part of the cache's key
    return _hash_blocks(path, _BLOCK_BYTES)


def _hash_blocks(path: Path, block_bytes: int) -> str:
    digest = blake2b(digest_size=16)
    try:
        with path.open("rb", buffering=0) as file:
            descriptor = file.fileno()
            num_bytes = os.fstat(descriptor).st_size
            digest.update(num_bytes.to_bytes(8, "little"))
            last = max(num_bytes - block_bytes, 0)
            for block in range(_NUM_BLOCKS):
                begin = last * block // (_NUM_BLOCKS - 1)
                digest.update(os.pread(descriptor, block_bytes, begin))
    except OSError as error:
        raise UserError(f"cannot read: {path}: {error.strerror}") from error
    return digest.hexdigest()


def check_tokenizer(file: TokenFile, facts: dict[str, Any], tokenizer: Vocabulary) -> None:
    """Refuses a corpus that another tokenizer made, as far as can be told without reading it all.

    Args:
        file: The token file.
        facts: Of the same file.
        tokenizer: The run's.

    Raises:
        UserError: The sidecar names another tokenizer, or an id in the blocks looked at is outside
            the vocabulary.
    """
    made_with = facts["tokenizer"]
    if made_with == tokenizer.fingerprint:
        return
    if made_with is not None:
        raise UserError(
            f"{file.name} was made with another tokenizer (sha256 {made_with[:12]}...) than the "
            f"run's (sha256 {tokenizer.fingerprint[:12]}...): preprocess it with the run's, or "
            "give its own as tokenizer.tokenizer_model"
        )
    last = max(len(file.tokens) - _CHECKED_BLOCK_TOKENS, 0)
    for block in range(_NUM_CHECKED_BLOCKS):
        begin = last * block // (_NUM_CHECKED_BLOCKS - 1)
        ids = file.tokens[begin : begin + _CHECKED_BLOCK_TOKENS]
        outside = (ids < 0) | (ids >= tokenizer.vocab_size)
        if outside.any():
            at = int(np.argmax(outside))
            raise UserError(
                f"{file.name}: token {begin + at} is id {ids[at]}, outside the tokenizer's "
                f"{tokenizer.vocab_size}: preprocess it with the run's tokenizer"
            )
