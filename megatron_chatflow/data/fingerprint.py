"""What is in a dataset, whatever it is called and wherever it lies.

In: an open dataset and its sidecar, if it has one. Out: facts that two copies of the same data
share and that other data does not: they go into checkpoints and into the packing cache's key.
"""

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_chatflow.data.indexed import bin_path, idx_path
from megatron_chatflow.data.sidecar import read_sidecar, refuse_other_counts
from megatron_chatflow.errors import UserError
from megatron_chatflow.native.samples import TokenFile

_NUM_BLOCKS = 64
_BLOCK_BYTES = 1 << 18
"""Without a sidecar, files up to 16 MiB are hashed whole, and larger ones in evenly spaced blocks,
so that the time to start does not grow with the corpus."""

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
    refuse_other_counts(file.name, sidecar, **counts)
    return {**counts, "sha256": sidecar["sha256"], "tokenizer": sidecar["tokenizer"]["sha256"]}


def sampled_hash(path: Path) -> str:
    """blake2b-128 of a file's size and of up to 64 blocks of it, hex.

    Raises:
        UserError: The file cannot be read.
    """
    digest = blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            digest.update(num_bytes.to_bytes(8, "little"))
            last = max(num_bytes - _BLOCK_BYTES, 0)
            for block in range(_NUM_BLOCKS):
                file.seek(last * block // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
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
