"""Writes the output files of one key: documents, loss mask and sidecar.

`KeyOutput` appends encoded documents to staged files. The files get their final names together
after all of them are complete.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow import __version__
from megatron_chatflow.data.fingerprint import block_hash
from megatron_chatflow.data.indexed import IndexedDatasetWriter, bin_path, idx_path, optimal_dtype
from megatron_chatflow.data.sidecar import (
    DOCUMENT_SUFFIX,
    FORMAT_VERSION,
    hashes_path,
    loss_mask_prefix,
    sidecar_bytes,
    sidecar_path,
)
from megatron_chatflow.files import StagedFile
from megatron_chatflow.preprocess.dedup import SeenHashes, hash_records
from megatron_chatflow.preprocess.encode import EncodedDocuments
from megatron_chatflow.preprocess.settings import PreprocessSettings
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
from megatron_chatflow.tokenizer import Tokenizer


def template_record(settings: PreprocessSettings) -> dict[str, Any]:
    """Returns the sidecar's `template` entry as `{"template": {...}}`, or `{}` for text.

    The entry has the keys `format`, `name` and `loss`, and `train_on` if chats have loss on other
    messages than all answers. Chats, and translations written as chats,
    also have `jinja`, the source of the template, its `sha256`, and `variables` if any are set.
    Pairs also have `direction`.
    Pairs with templates from a YAML file have `texts`, and translations written as chats have
    `chat_template`, the name of the chat template.
    """
    corpus = settings.corpus
    if corpus.format == "text":
        return {}
    record: dict[str, Any] = {"format": corpus.format, "name": corpus.chat_name}
    record["loss"] = corpus.loss
    if corpus.format == "chat" and corpus.chats.train_on != ("all",):
        record["train_on"] = list(corpus.chats.train_on)
    if corpus.format == "pairs":
        pairs = corpus.pairs
        record |= {"name": pairs.template, "direction": pairs.direction}
        if pairs.texts:
            record["texts"] = [
                {"prompt": text.prompt, "response": text.response} for text in pairs.texts
            ]
            return {"template": record}
        if pairs.template == "plain":
            return {"template": {**record, "loss": "all"}}
        record["chat_template"] = corpus.chat_name
    jinja = corpus.chat_template
    source = JINJA_TEMPLATES[corpus.template] if jinja is None else jinja.source
    record |= {"jinja": source, "sha256": hashlib.sha256(source.encode()).hexdigest()}
    if jinja is not None and jinja.variables:
        record["variables"] = dict(jinja.variables)
    return {"template": record}


def document_prefix(output_prefix: str, key: str) -> Path:
    """Returns the prefix of the dataset of a JSON key, as Megatron-LM names it."""
    return Path(f"{output_prefix}_{key}{DOCUMENT_SUFFIX}")


def output_paths(output_prefix: str, key: str) -> list[Path]:
    """Returns all paths that the outputs of a key may have. The dataset's `.idx` is the first."""
    return dataset_paths(document_prefix(output_prefix, key))


def dataset_paths(prefix: Path) -> list[Path]:
    """Returns all paths that the files of a dataset may have. Its `.idx` is the first."""
    mask = loss_mask_prefix(prefix)
    return [
        idx_path(prefix),
        bin_path(prefix),
        sidecar_path(prefix),
        idx_path(mask),
        bin_path(mask),
        hashes_path(prefix),
    ]


class KeyOutput:
    """Writes the output files of one key."""

    def __init__(self, settings: PreprocessSettings, key: str, tokenizer: Tokenizer) -> None:
        """Creates staged files in the folder of the output.

        Raises:
            UserError: A file cannot be created.
        """
        self.prefix = document_prefix(settings.output_prefix, key)
        self.settings = settings
        self.tokenizer = tokenizer
        self.num_text_bytes = 0
        self.num_loss_tokens = 0
        self.num_dropped: Counter[str] = Counter()
        self.num_repaired: Counter[str] = Counter()
        self._seen: SeenHashes | None = None
        self._hashes: StagedFile | None = None
        self._sidecar: StagedFile | None = None
        self.documents = IndexedDatasetWriter(self.prefix, optimal_dtype(tokenizer.vocab_size))
        self.mask: IndexedDatasetWriter | None = None
        try:
            if settings.corpus.has_loss_mask:
                self.mask = IndexedDatasetWriter(loss_mask_prefix(self.prefix), np.uint8)
            if settings.num_hashes and settings.shard is not None:
                self._hashes = StagedFile(hashes_path(self.prefix))
        except BaseException:
            self.discard()
            raise

    def add(self, encoded: EncodedDocuments) -> None:
        """Appends documents. If they have hashes, documents that were added before are dropped.

        A document with several hashes is dropped if an earlier one, kept or not, has one of them.
        A partition keeps such documents until it is merged, because those that it would drop also
        decide about documents of later partitions.
        """
        num_hashes = self.settings.num_hashes
        if encoded.hashes is not None and (num_hashes == 1 or self.settings.shard is None):
            if self._seen is None:
                self._seen = SeenHashes(self.prefix.parent)
            is_new = self._seen.add(encoded.hashes.reshape(-1, 2)).reshape(-1, num_hashes)
            encoded.keep(np.asarray(is_new.all(axis=1)), "duplicate")
        if self._hashes is not None and encoded.hashes is not None:
            records = hash_records(
                encoded.hashes.reshape(-1, 2), np.repeat(encoded.text_bytes, num_hashes)
            )
            self._hashes.write(records.tobytes())
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
        self, inputs: list[dict[str, Any]], num_bad_lines: int
    ) -> tuple[list[StagedFile], dict[str, Any]]:
        """Completes the staged files, including the sidecar.

        Returns the files in the order in which they must be published, and the sidecar's content.
        It lists the ``inputs`` with name and size in bytes.
        """
        files = [] if self.mask is None else self.mask.seal()
        bin_file, idx_file = self.documents.seal()
        named = {"bin": bin_file, "idx": idx_file}
        if self.mask is not None:
            named["loss_mask_bin"] = self.mask.bin_file
        hashes = {name: file.sha256 for name, file in named.items()}
        if self._hashes is not None:
            self._hashes.seal()
            hashes["hashes"] = self._hashes.sha256
            files.append(self._hashes)
        content = {
            "format_version": FORMAT_VERSION,
            "tool_version": __version__,
            "tokenizer": {
                "type": self.tokenizer.tokenizer_type,
                "sha256": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
            },
            **template_record(self.settings),
            "settings": self.settings.record(),
            "inputs": inputs,
            "num_documents": self.documents.num_documents,
            "num_tokens": self.documents.num_tokens,
            "num_loss_tokens": self.num_loss_tokens,
            "num_text_bytes": self.num_text_bytes,
            "dropped": dict(sorted(self.num_dropped.items())),
            "repaired": dict(sorted(self.num_repaired.items())),
            "num_bad_lines": num_bad_lines,
            "max_bad_lines": self.settings.max_bad_lines,
            "max_dropped_share": self.settings.max_dropped_share,
            "sha256": hashes,
            "block_hash": {name: block_hash(file.partial_path) for name, file in named.items()},
        }
        if self.settings.shard is not None:
            content["part"] = list(self.settings.shard)
        self._sidecar = StagedFile(sidecar_path(self.prefix))
        self._sidecar.write(sidecar_bytes(content))
        self._sidecar.seal()
        return [*files, bin_file, self._sidecar, idx_file], content

    def discard(self) -> None:
        """Removes the files that have not been published."""
        self.documents.discard()
        if self.mask is not None:
            self.mask.discard()
        for file in (self._hashes, self._sidecar):
            if file is not None:
                file.discard()
