"""Findings: suspicious properties of a run's data that do not justify refusing the run.

Each finding is one line that names the source, the observation and the remedy. `RunInputs.findings`
collects them. The dry run prints them, and every start logs them as warnings.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_chatflow.config import DataConfig
from megatron_chatflow.data.indexed import idx_path
from megatron_chatflow.data.packing import Packing
from megatron_chatflow.data.samples import TokenFile, document_begins
from megatron_chatflow.data.sidecar import appends_eod, loss_mask_prefix, read_sidecar
from megatron_chatflow.data.source import Source, has_weight
from megatron_chatflow.tokenizer import Tokenizer

MANY_CUT_TOKENS = 0.01
"""Truncation by packing is reported if it cuts off more than this share of a source's tokens."""

NUM_ENDS = 256
"""Number of documents per source that are checked for EOD, evenly spaced over its datasets."""

END_TOKENS = 4
"""A document counts as terminated if its last `END_TOKENS` tokens include a control token. More
than one token is checked because chat templates may append a newline."""


def data_findings(
    data: DataConfig, sources: Sequence[Source], held_out: Sequence[Source], tokenizer: Tokenizer
) -> list[str]:
    """Reports suspicious properties of the training and validation datasets, one line each."""
    findings: list[str] = []
    labelled = [(f"data.sources.{source.name}", source) for source in sources]
    for source in held_out:
        # Without validation paths, the files are those of the training split.
        if data.sources[source.name].validation_paths:
            labelled.append((f"data.sources.{source.name}.validation_paths", source))
    for label, source in labelled:
        findings += _file_findings(data, label, source)
        findings += _missing_ends(label, source.files, tokenizer)
        if source.packing is not None:
            findings += _packing_losses(label, source.packing, source.fingerprint()["seq_length"])
    trained = _datasets([source for source in sources if has_weight(data, source.name)])
    return findings + _same_data(trained) + _validation_on_training_data(trained, held_out)


def _file_findings(data: DataConfig, label: str, source: Source) -> Iterator[str]:
    """Reports datasets of unknown or unchecked origin, and loss masks that are ignored."""

    def phrase(names: Sequence[str]) -> str:
        verb = "has" if len(names) == 1 else "have"
        return f"{label}: {len(names)} of {len(source.files)} datasets {verb}"

    pairs = zip(source.files, source.fingerprint()["datasets"], strict=True)
    unknown = [file.name for file, facts in pairs if not facts["tokenizer"]]
    if unknown:
        yield (
            f"{phrase(unknown)} no .json (first: {unknown[0]}.json), so the tokenizer that they "
            "were encoded with is unknown: decode a few documents with tools/inspect_dataset.py, "
            "or preprocess the data again"
        )
    names = [file.name for file in source.files]
    # Sidecars of earlier versions lack the hashes that every start compares.
    old = [name for name in names if "block_hash" not in (read_sidecar(name) or {"block_hash": 0})]
    if old and not data.data_verify:
        yield (
            f"{phrase(old)} a .json of an earlier version, without block_hash, so the contents "
            "of the files are not checked at the start: use --data-verify to check all bytes, or "
            f"write the dataset with hashes by tools/merge_datasets.py (first: {old[0]}.json)"
        )
    masked = [name for name in names if idx_path(loss_mask_prefix(name)).exists()]
    if masked and data.sources[source.name].loss is None:  # an explicit `loss: all` is intended
        yield (
            f"{phrase(masked)} loss masks, which the default (loss: all) ignores, so prompts are "
            "trained like answers: set loss: response, or set loss: all to confirm this (first: "
            f"{masked[0]})"
        )


def _missing_ends(label: str, files: Sequence[TokenFile], tokenizer: Tokenizer) -> list[str]:
    is_control = tokenizer.num_bytes_per_id == 0
    num_looked_at = num_ended = 0
    first = ""
    for file in files:
        if appends_eod(read_sidecar(file.name)):
            continue
        number = min(file.num_documents, max(NUM_ENDS // len(files), 1))
        documents = np.linspace(0, file.num_documents - 1, number).astype(np.int64)
        begins, ends = document_begins(file, documents), document_begins(file, documents + 1)
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            last_ids = file.tokens[max(begin, end - END_TOKENS) : end].astype(np.int64)
            if len(last_ids) == 0:
                continue
            num_looked_at += 1
            if is_control[last_ids[(last_ids >= 0) & (last_ids < len(is_control))]].any():
                num_ended += 1
            else:
                first = first or file.name
    if num_ended * 2 >= num_looked_at:
        return []
    return [
        f"{label}: {num_looked_at - num_ended} of {num_looked_at} checked documents do not end "
        f"with EOD (id {tokenizer.eos_id}) or another control token, so the model does not learn "
        f"where a document ends: preprocess with --append-eod (first: {first})"
    ]


def _packing_losses(label: str, packing: Packing, seq_length: int) -> list[str]:
    findings = []
    num_packed, num_tokens = len(packing.documents), packing.num_tokens
    if packing.num_without_loss:
        num_documents = num_packed + packing.num_without_loss
        findings.append(
            f"{label}: packing drops {packing.num_without_loss:,} of {num_documents:,} "
            f"documents, which have no loss token in their first {seq_length + 1:,} tokens: "
            "raise data.seq_length if their prompts are longer than that"
        )
    share = packing.num_truncated_tokens / max(num_tokens + packing.num_truncated_tokens, 1)
    if share > MANY_CUT_TOKENS:
        findings.append(
            f"{label}: packing cuts {packing.num_truncated:,} of {num_packed:,} documents to "
            f"{seq_length + 1:,} tokens and drops {packing.num_truncated_tokens:,} tokens "
            f"({share:.1%}): split long documents, raise data.seq_length, or set packing: none"
        )
    return findings


class _Dataset(NamedTuple):
    """One dataset of a source.

    `content` is equal for equal data under different names, and `part` for datasets of which the
    same documents are held out; it is None if none are.
    """

    source: str
    path: str
    content: str
    part: str | None


def _datasets(sources: Sequence[Source]) -> list[_Dataset]:
    datasets = []
    for source in sources:
        fingerprint = source.fingerprint()
        held_out = [fingerprint.get(key) for key in ("holdout_every", "split")]
        part = json.dumps(held_out) if any(held_out) else None
        for file, facts in zip(source.files, fingerprint["datasets"], strict=True):
            if facts["num_documents"]:
                content = json.dumps(facts, sort_keys=True)
                datasets.append(_Dataset(source.name, file.name, content, part))
    return datasets


def _same_data(trained: Sequence[_Dataset]) -> list[str]:
    """Reports datasets that occur twice in the training data."""
    first: dict[str, _Dataset] = {}
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for dataset in trained:
        earlier = first.setdefault(dataset.content, dataset)
        if earlier is not dataset:
            found[dataset.source, earlier.source].append(_name(dataset, earlier))
    findings = []
    for (source, other), names in found.items():
        if source == other:
            findings.append(
                f"data.sources.{source}: {_first_of(names)} is listed twice, so its documents "
                "are seen more often than others: list it once, and raise the source's weight "
                "instead"
            )
        else:
            findings.append(
                f"data.sources.{source}: {_first_of(names)} is also in data.sources.{other}, so "
                "its documents are drawn by both sources, which count epochs separately: list "
                "it in one source only"
            )
    return findings


def _validation_on_training_data(
    trained: Sequence[_Dataset], held_out: Sequence[Source]
) -> list[str]:
    """Reports datasets that are used for both training and validation."""
    # One finding per source is enough, so only the first of equal datasets is kept.
    of_content: dict[str, dict[str, _Dataset]] = defaultdict(dict)
    for dataset in trained:
        of_content[dataset.content].setdefault(dataset.source, dataset)
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for dataset in _datasets(held_out):
        for other in of_content[dataset.content].values():
            # With equal holdout settings, training and validation documents are disjoint.
            if dataset.part is None or dataset.part != other.part:
                found[dataset.source, other.source].append(_name(dataset, other))
    return [
        f"data.sources.{source}: validates on {_first_of(names)}, which data.sources.{other} "
        "trains on, so its validation loss says nothing about unseen text: hold out the same "
        "documents in both"
        for (source, other), names in found.items()
    ]


def _name(dataset: _Dataset, other: _Dataset) -> str:
    same = dataset.path == other.path
    return dataset.path if same else f"{dataset.path} (the same data as {other.path})"


def _first_of(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} others" if len(names) > 1 else names[0]
