"""Fingerprints: hashes that identify the contents of a dataset independently of names and paths.

`dataset_facts` returns equal facts for two copies of the same data. The facts are recorded in
checkpoints and are part of the key of the packing cache. They contain the hashes of the sidecar, or
hashes of sampled blocks if there is no sidecar. `block_hash` samples the files to check that they
still match the sidecar.
"""

import os
import time
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

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

_NUM_BLOCKS = 64
_BLOCK_BYTES = 1 << 18
"""Without a sidecar, files up to 16 MiB are hashed as a whole and larger ones in evenly spaced
blocks, so that the time to start does not grow with the corpus. Checkpoints contain these hashes,
so neither number may change."""

_SAMPLE_BYTES = 1 << 12
"""Bytes per block of `block_hash`: a page, the minimum that a disk reads. Sidecars contain these
hashes, so this number may not change either."""

_SETTLED_NS = 5_000_000_000
"""A file modified less than 5 s ago is always read again, because file system clocks are coarse."""

_NUM_CHECKED_BLOCKS = 16
_CHECKED_BLOCK_TOKENS = 1 << 15


class Vocabulary(Protocol):
    """The part of a `Tokenizer` that the data depends on."""

    vocab_size: int
    pad_id: int
    fingerprint: str


def dataset_facts(file: TokenFile) -> dict[str, Any]:
    """Returns the JSON-compatible facts of one dataset.

    These are ``num_documents``, ``num_tokens``, ``tokenizer`` (the SHA-256 of the tokenizer's file,
    or None without a sidecar), and ``sha256`` of the sidecar or ``sampled_hash`` without one.

    Raises:
        UserError: The sidecar is damaged or describes another dataset, or a file cannot be
            read.
    """
    counts = {"num_documents": file.num_documents, "num_tokens": len(file.tokens)}
    sidecar = read_sidecar(file.name)
    if sidecar is None:
        files = dataset_files(file.name, with_loss_mask=False)
        hashes = {name: sampled_hash(path) for name, path in files.items()}
        return {**counts, "sampled_hash": hashes, "tokenizer": None}
    check_counts(file.name, sidecar, **counts)
    return {**counts, "sha256": sidecar["sha256"], "tokenizer": sidecar["tokenizer"]["sha256"]}


def dataset_files(prefix: str | Path, *, with_loss_mask: bool) -> dict[str, Path]:
    """Returns the paths of the files that are compared with the sidecar, by name in the sidecar."""
    files = {"bin": bin_path(prefix), "idx": idx_path(prefix)}
    if with_loss_mask:
        files["loss_mask_bin"] = bin_path(loss_mask_prefix(prefix))
    return files


def check_recorded_hash(
    prefix: str | Path, sidecar: Mapping[str, Any], key: str, name: str, path: Path, found: str
) -> None:
    """Compares the hash of a file with that below ``key`` and ``name`` in its sidecar, if any.

    ``key`` is ``block_hash`` or ``sha256``. Sidecars of earlier versions may lack it; then nothing
    is compared.

    Raises:
        UserError: The sidecar records a different hash.
    """
    recorded = sidecar.get(key, {}).get(name)
    if recorded not in (None, found):
        raise UserError(
            f"wrong contents: {path}: does not match the hash in {sidecar_path(prefix)}: copy "
            "the dataset with its .json again, or preprocess the data again"
        )


def block_hash(path: Path) -> str:
    """Returns BLAKE2b-128 of a file's size and of 64 evenly spaced pages, in hexadecimal.

    Every node reads these pages at every start: 256 KiB per file, independent of the file's size.
    500 datasets of three files (96,000 reads, 375 MiB) took 0.5 s of processor time from the page
    cache and 1.2 s from a disk. Files up to 256 KiB are read as a whole. The first and the last
    page are included. This detects a truncated file that was padded to its full size, any
    contiguous change of more than 1/63 of the file and, with 99 % probability, a change of 7 % of
    its pages. It does not detect a single changed document. ``--data-verify`` and
    ``tools/inspect_dataset.py`` compare all bytes.

    Raises:
        UserError: The file cannot be read.
    """
    return _hash_blocks(path, _SAMPLE_BYTES)


def sampled_hash(path: Path) -> str:
    """Returns BLAKE2b-128 of a file's size and of up to 64 blocks of 256 KiB, in hexadecimal.

    The result is cached until the file is modified, because training, validation and test may use
    the same files.

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
    """Checks that a dataset was encoded with the run's tokenizer, without reading all of it.

    Without a recorded tokenizer, the ids in 16 evenly spaced blocks of 32,768 tokens are compared
    with the vocabulary size. ``facts`` are those of `dataset_facts`.

    Raises:
        UserError: The sidecar names another tokenizer, or an id in one of the sampled blocks is
            outside the vocabulary.
    """
    made_with = facts["tokenizer"]
    if made_with == tokenizer.fingerprint:
        return
    if made_with is not None:
        raise UserError(
            f"{file.name} was encoded with another tokenizer (sha256 {made_with[:12]}...) than "
            f"the run's (sha256 {tokenizer.fingerprint[:12]}...): preprocess it with the run's "
            "tokenizer, or set tokenizer.tokenizer_model to its own"
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
                f"vocabulary of {tokenizer.vocab_size}: preprocess it with the run's tokenizer"
            )
