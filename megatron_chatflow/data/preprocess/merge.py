"""Joins datasets into one, with their loss masks and sidecars.

In: prefixes of datasets that the same tokenizer made. Out: one dataset with their documents in
that order; of the parts of a job with `--dedup`, the documents that no earlier part has.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow import __version__
from megatron_chatflow.data.fingerprint import block_hash, files_of, refuse_other_hash
from megatron_chatflow.data.indexed import (
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
)
from megatron_chatflow.data.preprocess.merge_parts import (
    LeftOut,
    PartsPolicy,
    are_parts_to_compare,
    copy_new_documents,
    find_repeats,
    without_repeats,
)
from megatron_chatflow.data.preprocess.repeats import Repeats
from megatron_chatflow.data.sidecar import (
    DOCUMENT_SUFFIX,
    appends_bos,
    loss_mask_prefix,
    read_sidecar,
    refuse_other_counts,
    sidecar_bytes,
    sidecar_path,
)
from megatron_chatflow.data.staged_file import StagedFile, publish_all, remove_file
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_output_file

logger = logging.getLogger(__name__)
SUMS = ("num_documents", "num_tokens", "num_loss_tokens", "num_text_bytes", "num_bad_lines")


@dataclass(frozen=True)
class _Input:
    """A dataset to merge, as it was found when it was checked.

    Attributes:
        prefix: Without `.bin` or `.idx`.
        dtype: Of its ids.
        num_documents: In it.
        sidecar: What lies beside it, if anything.
        has_mask: Whether it has a loss mask.
    """

    prefix: Path
    dtype: np.dtype[Any]
    num_documents: int
    sidecar: dict[str, Any] | None
    has_mask: bool


def find_datasets(inputs: Sequence[str]) -> list[Path]:
    """The prefixes of datasets, in order.

    Args:
        inputs: Prefixes (or names of their `.bin` or `.idx`), or folders, of which every
            `*_document.idx` counts, by name.

    Raises:
        UserError: A folder has none.
    """
    prefixes = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found = sorted(path.glob(f"*{DOCUMENT_SUFFIX}.idx"))
            if not found:
                raise UserError(f"no dataset in folder: {path}: no *{DOCUMENT_SUFFIX}.idx")
            prefixes += [file.with_suffix("") for file in found]
        else:
            prefixes.append(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)
    return prefixes


def merge_datasets(
    prefixes: Sequence[Path],
    output_prefix: str | Path,
    *,
    overwrite: bool = False,
    policy: PartsPolicy | None = None,
) -> int:
    """Writes all documents of some datasets into one.

    Datasets of different integer types are written as the narrowest type that holds them all. One
    dataset is open at a time, so their number is not limited.

    Args:
        prefixes: The datasets', in order.
        output_prefix: The new dataset's; end it in `_document`.
        overwrite: Whether a dataset of that name is replaced.
        policy: What is let pass where they are the parts of one job.

    Returns:
        The number of documents.

    Raises:
        UserError: They are of several tokenizers, some have a loss mask and some have none, one is
            damaged, the output exists, or parts of one job are not all there.
    """
    existing = _outputs_to_replace(prefixes, Path(output_prefix), overwrite=overwrite)
    mask_prefix = loss_mask_prefix(output_prefix)
    inputs = [_check_input(prefix) for prefix in prefixes]
    dtype = _common_dtype(inputs)
    _check_alike(inputs)
    _warn_of_repeated(inputs)
    sidecars = [given.sidecar for given in inputs]
    policy = policy or PartsPolicy()
    if not all(sidecars):
        logger.warning("no sidecar written: not every input has one")
    compare = are_parts_to_compare(prefixes, sidecars, policy)
    repeats = None
    if compare:
        num_documents = [given.num_documents for given in inputs]
        repeats = find_repeats(prefixes, sidecars, num_documents, Path(output_prefix).parent)

    staged: list[StagedFile] = []
    try:
        files: list[StagedFile] = []
        named: dict[str, StagedFile] = {}
        left_out_of_masks: list[LeftOut] = []
        if inputs[0].has_mask:
            masks = [loss_mask_prefix(prefix) for prefix in prefixes]
            mask_files, left_out_of_masks = _write(
                mask_prefix, masks, np.dtype(np.uint8), staged, repeats
            )
            named["loss_mask_bin"] = mask_files[0]
            files += mask_files
        (bin_file, idx_file), left_out = _write(
            Path(output_prefix), prefixes, dtype, staged, repeats
        )
        named |= {"bin": bin_file, "idx": idx_file}
        files.append(bin_file)
        known = [sidecar for sidecar in sidecars if sidecar is not None]
        if repeats is not None:
            known = without_repeats(
                prefixes, known, repeats, left_out, left_out_of_masks or left_out
            )
        if len(known) == len(sidecars):
            files.append(_sidecar(output_prefix, _merged(known, named, policy), staged))
        for path in existing:
            remove_file(path)
        publish_all([*files, idx_file])
    finally:
        for file in staged:
            file.discard()
        if repeats is not None:
            repeats.close()
    return sum(given.num_documents for given in inputs) - sum(
        part.num_documents for part in left_out
    )


def _sidecar(prefix: str | Path, content: dict[str, Any], staged: list[StagedFile]) -> StagedFile:
    """Writes a sidecar beside its name."""
    file = StagedFile(sidecar_path(prefix))
    staged.append(file)
    file.write(sidecar_bytes(content))
    return file


def _outputs_to_replace(
    prefixes: Sequence[Path], output_prefix: Path, *, overwrite: bool
) -> list[Path]:
    """The files of an older dataset of the output's name; refuses what may not be replaced."""
    if not prefixes:
        raise UserError("nothing to merge: name at least one dataset after --input")
    outputs = [idx_path, bin_path, sidecar_path]
    mask_prefix = loss_mask_prefix(output_prefix)
    existing = [make(output_prefix) for make in outputs] + [idx_path(mask_prefix)]
    existing.append(bin_path(mask_prefix))
    for path in existing:
        check_output_file(path)
    existing = [path for path in existing if path.exists()]
    if existing and not overwrite:
        raise UserError(f"output exists: {existing[0]}: choose another prefix or use --overwrite")
    if any(output_prefix.resolve() == prefix.resolve() for prefix in prefixes):
        raise UserError(f"output is also an input: {output_prefix}: choose another prefix")
    return existing


def _write(
    prefix: Path,
    inputs: Sequence[Path],
    dtype: np.dtype[Any],
    staged: list[StagedFile],
    repeats: Repeats | None,
) -> tuple[list[StagedFile], list[LeftOut]]:
    """Writes a dataset; returns its files, and what was left out of each part."""
    writer = IndexedDatasetWriter(prefix, dtype)
    staged += [writer.bin_file, writer.idx_file]
    left_out = []
    for number, path in enumerate(inputs):
        dataset = IndexedDataset(path)
        if repeats is None:
            writer.add_dataset(dataset)
        else:
            left_out.append(copy_new_documents(writer, dataset, repeats, number))
    return writer.seal(), left_out


def _check_input(prefix: Path) -> _Input:
    """Checks every offset of a dataset and of its loss mask, and compares it with its sidecar."""
    dataset = IndexedDataset(prefix)
    dataset.validate()
    sidecar = read_sidecar(prefix)
    has_mask = find_mask(dataset, sidecar) is not None
    if sidecar is not None:
        refuse_other_counts(prefix, sidecar, dataset.num_documents, dataset.num_tokens)
        for name, path in files_of(prefix, with_loss_mask=has_mask).items():
            refuse_other_hash(prefix, sidecar, "block_hash", name, path, block_hash(path))
    return _Input(prefix, dataset.dtype, dataset.num_documents, sidecar, has_mask)


def _common_dtype(inputs: Sequence[_Input]) -> np.dtype[Any]:
    """The narrowest type that holds the ids of every dataset."""
    first = inputs[0]
    for given in inputs:
        if (given.dtype.kind == "f") != (first.dtype.kind == "f"):
            raise UserError(
                f"not token ids alone: {given.prefix} has {given.dtype}, {first.prefix} "
                f"{first.dtype}: merge datasets of integers and of floating-point values "
                "separately"
            )
    dtype = np.result_type(*(given.dtype for given in inputs))
    for given in inputs:
        if given.dtype != dtype:
            logger.warning("%s is widened from %s to %s", given.prefix, given.dtype, dtype)
    return dtype


def _check_alike(inputs: Sequence[_Input]) -> None:
    """Refuses datasets of several tokenizers, and BOS or a loss mask that only some have."""
    with_bos = [g.prefix for g in inputs if g.sidecar is not None and appends_bos(g.sidecar)]
    without = [g.prefix for g in inputs if g.sidecar is not None and not appends_bos(g.sidecar)]
    if with_bos and without:
        raise UserError(
            f"different beginnings: documents of {with_bos[0]} begin with BOS, those of "
            f"{without[0]} do not: preprocess one again, with or without --append-bos"
        )
    known = [(g.prefix, g.sidecar["tokenizer"]["sha256"]) for g in inputs if g.sidecar is not None]
    for prefix, sha256 in known:
        if sha256 != known[0][1]:
            raise UserError(
                f"different tokenizers: {prefix} was made with {sha256[:12]}, {known[0][0]} with "
                f"{known[0][1][:12]}: preprocess one again"
            )
    masked = [given.prefix for given in inputs if given.has_mask]
    unmasked = [given.prefix for given in inputs if not given.has_mask]
    if masked and unmasked:
        raise UserError(
            f"no loss mask: {unmasked[0]}, but {masked[0]} has one: merge those with a mask and "
            "those without into two datasets"
        )


def _warn_of_repeated(inputs: Sequence[_Input]) -> None:
    """Warns of a dataset that is given twice, under one name or as a copy."""
    seen: dict[object, Path] = {}
    for given in inputs:
        keys: list[object] = [given.prefix.resolve()]
        if given.sidecar is not None and given.num_documents:
            keys.append(given.sidecar["sha256"]["bin"])
        earlier = next((seen[key] for key in keys if key in seen), None)
        if earlier is not None:
            logger.warning(
                "%s holds the same documents as %s: they are in the output twice",
                given.prefix,
                "an earlier input" if earlier == given.prefix else earlier,
            )
        for key in keys:
            seen.setdefault(key, given.prefix)


def find_mask(dataset: IndexedDataset, sidecar: Mapping[str, Any] | None) -> IndexedDataset | None:
    """Opens the loss mask of a dataset, if it has one.

    Args:
        dataset: The dataset.
        sidecar: What lies beside it, if anything.

    Raises:
        UserError: The mask is damaged or has other sequences than the dataset; or half of it, or
            the whole mask that the sidecar tells of, is missing.
    """
    prefix = loss_mask_prefix(dataset.prefix)
    missing = [path for path in (idx_path(prefix), bin_path(prefix)) if not path.exists()]
    if missing and sidecar is not None and "loss_mask_bin" in sidecar["sha256"]:
        raise UserError(
            f"no loss mask: {missing[0]}: the sidecar of {dataset.prefix} tells of one: copy or "
            "preprocess it again"
        )
    if len(missing) == 2:
        return None
    mask = IndexedDataset(prefix)
    mask.validate()
    if mask.dtype != np.uint8:
        raise UserError(
            f"not a loss mask: {mask.prefix}: holds {mask.dtype}, not uint8: preprocess the data "
            "again"
        )
    num_common = min(len(mask), len(dataset))
    agree = mask.sequence_lengths[:num_common] == dataset.sequence_lengths[:num_common]
    if len(mask) != len(dataset) or not agree.all():
        bad = num_common if agree.all() else int(agree.argmin())
        raise UserError(
            f"loss mask does not fit: {mask.prefix}: differs from {dataset.prefix} at sequence "
            f"{bad}: preprocess the data again"
        )
    return mask


def _merged(
    sidecars: list[dict[str, Any]], named: dict[str, StagedFile], policy: PartsPolicy
) -> dict[str, Any]:
    """One sidecar for all."""
    merged = dict(sidecars[0])
    merged.pop("part", None)
    if policy.max_bad_lines is not None:
        merged["max_bad_lines"] = policy.max_bad_lines
    if policy.max_dropped_share is not None:
        merged["max_dropped_share"] = policy.max_dropped_share
    if any(sidecar.get("template") != merged.get("template") for sidecar in sidecars):
        logger.warning("written with different templates: the merged sidecar names none")
        merged.pop("template", None)
    merged["tool_version"] = __version__
    merged["inputs"] = [given for sidecar in sidecars for given in sidecar["inputs"]]
    for name in SUMS:
        merged[name] = sum(sidecar.get(name, 0) for sidecar in sidecars)
    for name in ("dropped", "repaired"):
        counts: Counter[str] = Counter()
        for sidecar in sidecars:
            counts.update(sidecar.get(name, {}))
        merged[name] = dict(sorted(counts.items()))
    merged["sha256"] = {name: file.sha256 for name, file in named.items()}
    merged["block_hash"] = {name: block_hash(file.partial_path) for name, file in named.items()}
    return merged
