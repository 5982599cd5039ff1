"""Joins datasets into one, with their loss masks and sidecars.

In: prefixes of datasets that the same tokenizer made. Out: one dataset with their documents in
that order; of the parts of a job with `--dedup`, the documents that no earlier part has.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_chatflow import __version__
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
    sidecar_bytes,
    sidecar_path,
)
from megatron_chatflow.data.staged_file import StagedFile, publish_all
from megatron_chatflow.errors import UserError

logger = logging.getLogger(__name__)
SUMS = ("num_documents", "num_tokens", "num_loss_tokens", "num_text_bytes", "num_bad_lines")


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

    Args:
        prefixes: The datasets', in order.
        output_prefix: The new dataset's; end it in `_document`.
        overwrite: Whether a dataset of that name is replaced.
        policy: What is let pass where they are the parts of one job.

    Returns:
        The number of documents.

    Raises:
        UserError: They are of several dtypes or tokenizers, some have a loss mask and some have
            none, one is damaged, the output exists, or parts of one job are not all there.
    """
    existing = _outputs_to_replace(prefixes, Path(output_prefix), overwrite=overwrite)
    mask_prefix = loss_mask_prefix(output_prefix)
    datasets, sidecars = [IndexedDataset(p) for p in prefixes], [read_sidecar(p) for p in prefixes]
    _check_alike(datasets, sidecars)
    masks = _masks_of(datasets)
    policy = policy or PartsPolicy()
    if not all(sidecars):
        logger.warning("no sidecar written: not every input has one")
    compare = are_parts_to_compare(prefixes, sidecars, policy)
    repeats = find_repeats(datasets, Path(output_prefix).parent) if compare else None

    staged: list[StagedFile] = []
    try:
        files: list[StagedFile] = []
        hashes: dict[str, str] = {}
        left_out_of_masks: list[LeftOut] = []
        if masks:
            mask_files, left_out_of_masks = _write(mask_prefix, masks, staged, repeats)
            hashes["loss_mask_bin"] = mask_files[0].sha256
            files += mask_files
        (bin_file, idx_file), left_out = _write(Path(output_prefix), datasets, staged, repeats)
        hashes.update(bin=bin_file.sha256, idx=idx_file.sha256)
        files.append(bin_file)
        known = [sidecar for sidecar in sidecars if sidecar is not None]
        if repeats is not None:
            known = without_repeats(known, repeats, left_out, left_out_of_masks or left_out)
        if len(known) == len(sidecars):
            files.append(_sidecar(output_prefix, _merged(known, hashes, policy), staged))
        for path in existing:
            path.unlink()
        publish_all([*files, idx_file])
    finally:
        for file in staged:
            file.discard()
        if repeats is not None:
            repeats.close()
    return _num_documents(datasets) - _num_documents(left_out)


def _num_documents(parts: Sequence[IndexedDataset] | Sequence[LeftOut]) -> int:
    return sum(part.num_documents for part in parts)


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
    existing = [path for path in [*existing, bin_path(mask_prefix)] if path.exists()]
    if existing and not overwrite:
        raise UserError(f"output exists: {existing[0]}: choose another prefix or use --overwrite")
    if any(output_prefix.resolve() == prefix.resolve() for prefix in prefixes):
        raise UserError(f"output is also an input: {output_prefix}: choose another prefix")
    return existing


def _write(
    prefix: Path,
    datasets: list[IndexedDataset],
    staged: list[StagedFile],
    repeats: Repeats | None,
) -> tuple[list[StagedFile], list[LeftOut]]:
    """Writes a dataset; returns its files, and what was left out of each part."""
    writer = IndexedDatasetWriter(prefix, datasets[0].dtype)
    staged += [writer.bin_file, writer.idx_file]
    left_out = []
    for number, dataset in enumerate(datasets):
        if repeats is None:
            writer.add_dataset(dataset)
        else:
            left_out.append(copy_new_documents(writer, dataset, repeats, number))
    return writer.seal(), left_out


def _check_alike(datasets: list[IndexedDataset], sidecars: list[dict[str, Any] | None]) -> None:
    first = datasets[0]
    for dataset in datasets:
        dataset.validate()
        if dataset.dtype != first.dtype:
            raise UserError(
                f"different dtypes: {dataset.prefix} has {dataset.dtype}, {first.prefix} "
                f"{first.dtype}: preprocess them with one tokenizer"
            )
    described = [(d, s) for d, s in zip(datasets, sidecars, strict=True) if s is not None]
    with_bos = [dataset for dataset, sidecar in described if appends_bos(sidecar)]
    without = [dataset for dataset, sidecar in described if not appends_bos(sidecar)]
    if with_bos and without:
        raise UserError(
            f"different beginnings: documents of {with_bos[0].prefix} begin with BOS, those of "
            f"{without[0].prefix} do not: preprocess one again, with or without --append-bos"
        )
    known = [(dataset, sidecar["tokenizer"]) for dataset, sidecar in described]
    for dataset, tokenizer in known:
        if tokenizer["sha256"] != known[0][1]["sha256"]:
            raise UserError(
                f"different tokenizers: {dataset.prefix} was made with {tokenizer['sha256'][:12]}, "
                f"{known[0][0].prefix} with {known[0][1]['sha256'][:12]}: preprocess one again"
            )


def _masks_of(datasets: list[IndexedDataset]) -> list[IndexedDataset]:
    """Every dataset's loss mask; none if none has one."""
    prefixes = [loss_mask_prefix(dataset.prefix) for dataset in datasets]
    present = [idx_path(prefix).exists() for prefix in prefixes]
    if not any(present):
        return []
    if not all(present):
        without = datasets[present.index(False)].prefix
        raise UserError(
            f"no loss mask: {without}, but {datasets[present.index(True)].prefix} has one: "
            "merge those with a mask and those without into two datasets"
        )
    return [open_mask(dataset) for dataset in datasets]


def open_mask(dataset: IndexedDataset) -> IndexedDataset:
    """The loss mask of a dataset.

    Raises:
        UserError: It is damaged, or has other sequences than the dataset.
    """
    mask = IndexedDataset(loss_mask_prefix(dataset.prefix))
    mask.validate()
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
    sidecars: list[dict[str, Any]], hashes: dict[str, str], policy: PartsPolicy
) -> dict[str, Any]:
    """One sidecar for all."""
    merged = dict(sidecars[0])
    merged.pop("part", None)
    if policy.max_bad_lines is not None:
        merged["max_bad_lines"] = policy.max_bad_lines
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
    merged["sha256"] = hashes
    return merged
