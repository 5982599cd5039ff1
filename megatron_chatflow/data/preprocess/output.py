"""The files of one output key: documents, loss mask, sidecar.

In: encoded documents in order. Out: the files, complete, under their final names together.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow import __version__
from megatron_chatflow.data.indexed import (
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    optimal_dtype,
)
from megatron_chatflow.data.preprocess.duplicates import SeenHashes
from megatron_chatflow.data.preprocess.encode import EncodedDocuments
from megatron_chatflow.data.sidecar import (
    DOCUMENT_SUFFIX,
    FORMAT_VERSION,
    loss_mask_prefix,
    sidecar_bytes,
    sidecar_path,
)
from megatron_chatflow.data.staged_file import StagedFile
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer


def document_prefix(output_prefix: str, key: str) -> Path:
    """Megatron's name for the dataset of a JSON key."""
    return Path(f"{output_prefix}_{key}{DOCUMENT_SUFFIX}")


def output_paths(output_prefix: str, key: str) -> list[Path]:
    """Every name that a key's outputs may have; the `.idx` by which a dataset is found first."""
    prefix = document_prefix(output_prefix, key)
    mask = loss_mask_prefix(prefix)
    return [
        idx_path(prefix),
        bin_path(prefix),
        sidecar_path(prefix),
        idx_path(mask),
        bin_path(mask),
    ]


class KeyOutput:
    """Writes one key's files."""

    def __init__(self, output_prefix: str, key: str, tokenizer: Tokenizer, with_mask: bool) -> None:
        """Opens the files beside their final names.

        Args:
            output_prefix: Path that the names begin with.
            key: The output key.
            tokenizer: What made the ids.
            with_mask: Whether there is a loss mask.

        Raises:
            UserError: The files cannot be made there.
        """
        self.prefix = document_prefix(output_prefix, key)
        self.tokenizer = tokenizer
        self.num_text_bytes = 0
        self.num_loss_tokens = 0
        self.num_dropped: Counter[str] = Counter()
        self.num_repaired: Counter[str] = Counter()
        self._seen: SeenHashes | None = None
        self._sidecar: StagedFile | None = None
        self.documents = IndexedDatasetWriter(self.prefix, optimal_dtype(tokenizer.vocab_size))
        self.mask: IndexedDatasetWriter | None = None
        if with_mask:
            try:
                self.mask = IndexedDatasetWriter(loss_mask_prefix(self.prefix), np.uint8)
            except UserError:
                self.documents.discard()
                raise

    def add(self, encoded: EncodedDocuments) -> None:
        """Appends documents, where they come with hashes only those that are new."""
        if encoded.hashes is not None:
            if self._seen is None:
                self._seen = SeenHashes(self.prefix.parent)
            encoded.keep(self._seen.add(encoded.hashes), "duplicate")
        self.documents.add_documents(encoded.tokens, encoded.lengths)
        self.num_loss_tokens += len(encoded.tokens)
        if self.mask is not None:
            assert encoded.loss_mask is not None
            self.mask.add_documents(encoded.loss_mask, encoded.lengths)
            self.num_loss_tokens -= int(np.count_nonzero(encoded.loss_mask == 0))
        self.num_text_bytes += int(encoded.text_bytes.sum())
        self.num_dropped.update(encoded.num_dropped)
        self.num_repaired.update(encoded.num_repaired)

    def seal(
        self, inputs: list[dict[str, Any]], settings: dict[str, Any]
    ) -> tuple[list[StagedFile], dict[str, Any]]:
        """Completes the files beside their final names.

        Args:
            inputs: Name and size of each input.
            settings: What else they depend on.

        Returns:
            The files in the order in which to publish them, and the sidecar's content.
        """
        files = [] if self.mask is None else self.mask.seal()
        bin_file, idx_file = self.documents.seal()
        hashes = {"bin": bin_file.sha256, "idx": idx_file.sha256}
        if self.mask is not None:
            hashes["loss_mask_bin"] = self.mask.bin_file.sha256
        content = {
            "format_version": FORMAT_VERSION,
            "tool_version": __version__,
            "tokenizer": {
                "type": self.tokenizer.tokenizer_type,
                "sha256": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "settings": settings,
            "inputs": inputs,
            "num_documents": self.documents.num_documents,
            "num_tokens": self.documents.num_tokens,
            "num_loss_tokens": self.num_loss_tokens,
            "num_text_bytes": self.num_text_bytes,
            "dropped": dict(sorted(self.num_dropped.items())),
            "repaired": dict(sorted(self.num_repaired.items())),
            "sha256": hashes,
        }
        self._sidecar = StagedFile(sidecar_path(self.prefix))
        self._sidecar.write(sidecar_bytes(content))
        self._sidecar.seal()
        return [*files, bin_file, self._sidecar, idx_file], content

    def discard(self) -> None:
        """Removes what has not been published."""
        self.documents.discard()
        if self.mask is not None:
            self.mask.discard()
        if self._sidecar is not None:
            self._sidecar.discard()
