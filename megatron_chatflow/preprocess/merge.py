"""Merges datasets of one tokenizer with their loss masks and sidecars.

The documents keep their order. If the datasets are the partitions of one job, no partition may be
missing, and the limits of the job apply to all of them together. If that job used `--dedup`,
documents that repeat a document of an earlier partition are dropped.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow import __version__
from megatron_chatflow.data.fingerprint import block_hash, check_recorded_hash, dataset_files
from megatron_chatflow.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path, idx_path
from megatron_chatflow.data.sidecar import (
    DOCUMENT_SUFFIX,
    appends_bos,
    check_counts,
    hashes_path,
    loss_mask_prefix,
    read_sidecar,
    settings_of,
    sha256_of,
    sidecar_bytes,
    sidecar_path,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    StagedFile,
    as_user_error,
    check_output_file,
    publish_all,
    remove_file,
)
from megatron_chatflow.preprocess.dedup import DuplicateMarks, num_hashes_of
from megatron_chatflow.preprocess.dropped import check_dropped_share

COPY_TOKENS = 1 << 22  # tokens that are copied at once
COPY_SEQUENCES = 1 << 20

logger = logging.getLogger(__name__)
SUMS = ("num_documents", "num_tokens", "num_loss_tokens", "num_text_bytes", "num_bad_lines")


@dataclass(frozen=True)
class PartitionPolicy:
    """Limits that are checked when the partitions of one job are merged."""

    allow_missing: bool = False  # whether partitions may be missing
    # maximum number of bad lines in all partitions; None for the limit in their sidecars
    max_bad_lines: int | None = None
    # maximum share of dropped records in all partitions, from 0 to 1; None for the limit in their
    # sidecars
    max_dropped_share: float | None = None


@dataclass(frozen=True)
class DuplicateCounts:
    """Counts of the repeated documents of a partition that are not copied.

    `num_nonzero` counts the tokens that are not 0, which in a loss mask are those with loss.
    """

    num_documents: int
    num_tokens: int
    num_nonzero: int


def check_partitions(
    prefixes: Sequence[Path], sidecars: Sequence[dict[str, Any] | None], policy: PartitionPolicy
) -> bool:
    """Checks the partitions among the datasets to merge.

    Returns whether the datasets are partitions of one job with `--dedup`, which may have documents
    in common.

    Raises:
        UserError: A partition is missing or given twice, partitions made with `--dedup` are
            from different jobs, or the partitions together have too many bad lines or dropped
            records.
    """
    parts = [None if sidecar is None else sidecar.get("part") for sidecar in sidecars]
    known = [sidecar for sidecar in sidecars if sidecar is not None and sidecar.get("part")]
    if not known:
        return False
    first = known[0]
    dedup = any(num_hashes_of(sidecar["settings"]) for sidecar in known)
    same_job = all(
        part and part[1] == first["part"][1] and settings_of(sidecar) == settings_of(first)
        for part, sidecar in zip(parts, known, strict=False)
    )
    if len(known) < len(sidecars) or not same_job:
        if dedup:
            raise UserError(
                f"not from one job: {prefixes[0]} and the others: partitions made with --dedup "
                "can be merged only with those of the same job and options: merge each job "
                "separately"
            )
        return False
    numbers = [sidecar["part"][0] for sidecar in known]
    count = first["part"][1]
    for number in range(count):
        found = [str(prefix) for n, prefix in zip(numbers, prefixes, strict=True) if n == number]
        if len(found) > 1:
            raise UserError(
                f"the same partition twice: {' and '.join(found)}: merge each key separately"
            )
        if not found and not policy.allow_missing:
            raise UserError(
                f"partition {number}/{count} of {prefixes[0]} is missing: create it with --shard "
                f"{number}/{count}, or use --allow-missing"
            )
    limit = policy.max_bad_lines
    if limit is None:
        limit = max(sidecar.get("max_bad_lines", 0) for sidecar in known)
    num_bad = sum(sidecar["num_bad_lines"] for sidecar in known)
    if num_bad > limit:
        raise UserError(
            f"too many bad lines: {num_bad} in all partitions of {prefixes[0]}, more than "
            f"{limit}: correct the input, or raise --max-bad-lines"
        )
    share = policy.max_dropped_share
    if share is None:  # sidecars of earlier versions have no limit
        share = max(sidecar.get("max_dropped_share", 1.0) for sidecar in known)
    dropped: Counter[str] = Counter()
    for sidecar in known:
        dropped.update(sidecar["dropped"])
    num_documents = sum(sidecar["num_documents"] for sidecar in known)
    counts = {**first, "dropped": dropped, "num_documents": num_documents}
    check_dropped_share(counts, prefixes[0], share)
    return dedup


def copy_new_documents(
    writer: IndexedDatasetWriter, dataset: IndexedDataset, repeats: DuplicateMarks, number: int
) -> DuplicateCounts:
    """Appends the documents of a partition, or their loss masks, that repeat no earlier document.

    Returns counts of the documents that were not copied.

    Raises:
        UserError: A document does not have exactly one sequence.
    """
    if dataset.num_documents != len(dataset):
        raise UserError(
            f"not a partition of a job: {dataset.prefix}: has {len(dataset)} sequences in "
            f"{dataset.num_documents} documents: create this partition again"
        )
    num_documents = num_tokens = num_nonzero = 0
    begin, count = 0, len(dataset)
    while begin < count:
        offset = int(dataset.sequence_pointers[begin])
        limit = offset + COPY_TOKENS * dataset.dtype.itemsize
        end = min(int(dataset.sequence_pointers.searchsorted(limit)), begin + COPY_SEQUENCES)
        end = min(max(end, begin + 1), count)
        lengths = dataset.sequence_lengths[begin:end]
        first = offset // dataset.dtype.itemsize
        tokens = dataset.tokens[first : first + int(lengths.sum(dtype=np.int64))]
        repeated = repeats.of_partition(number, begin, end)
        repeated_tokens = tokens[np.repeat(repeated, lengths)]
        num_documents += int(repeated.sum())
        num_tokens += len(repeated_tokens)
        num_nonzero += int(np.count_nonzero(repeated_tokens))
        kept = tokens[np.repeat(~repeated, lengths)].astype(writer.dtype, copy=False)
        writer.add_documents(kept, lengths[~repeated])
        begin = end
    return DuplicateCounts(num_documents, num_tokens, num_nonzero)


def without_repeats(
    prefixes: Sequence[Path],
    sidecars: Sequence[dict[str, Any]],
    repeats: DuplicateMarks,
    duplicates: Sequence[DuplicateCounts],
    mask_duplicates: Sequence[DuplicateCounts],
) -> list[dict[str, Any]]:
    """Returns the sidecars of the partitions without the counts of repeated documents.

    Text has no loss masks, so ``mask_duplicates`` has the elements of ``duplicates``.

    Raises:
        UserError: A partition has more repeated documents, tokens or bytes than its sidecar
            counts.
    """
    counted = []
    for number, sidecar in enumerate(sidecars):
        part, mask = duplicates[number], mask_duplicates[number]
        num_loss_tokens = part.num_tokens if mask is part else mask.num_nonzero
        dropped = Counter(sidecar["dropped"])
        dropped["duplicate"] += part.num_documents
        less = {
            "num_documents": part.num_documents,
            "num_tokens": part.num_tokens,
            "num_loss_tokens": num_loss_tokens,
            "num_text_bytes": repeats.num_repeated_bytes(number),
        }
        kept = {name: sidecar[name] - n for name, n in less.items()}
        wrong = next((name for name, n in kept.items() if n < 0), None)
        if wrong is not None:
            raise UserError(
                f"damaged partition: {prefixes[number]}: its .hashes count more repeated {wrong} "
                "than its .json counts in total: create this partition again"
            )
        counted.append({**sidecar, **kept, "dropped": dict(+dropped)})
    return counted


@dataclass(frozen=True)
class _Input:
    """A validated dataset to merge. Its sidecar is None if it has none."""

    prefix: Path
    dtype: np.dtype[Any]
    num_documents: int
    sidecar: dict[str, Any] | None
    has_mask: bool


def find_datasets(inputs: Sequence[str]) -> list[Path]:
    """Returns the prefixes of the datasets named by ``inputs``, in order.

    These are prefixes, paths of `.bin` or `.idx` files, or folders. A folder stands for every
    `*_document.idx` in it, sorted by name.

    Raises:
        UserError: A folder has no dataset.
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
    policy: PartitionPolicy | None = None,
) -> int:
    """Merges datasets into one and returns its number of documents.

    Datasets with different integer types are written in the narrowest type that can represent all
    of them. Only one dataset is open at a time, so the number of datasets is not limited. The
    output prefix should end in `_document`.

    Raises:
        UserError: The datasets have different tokenizers, only some of them have a loss mask or
            BOS, a dataset is damaged, the output exists, or `check_partitions` failed.
    """
    output_prefix = Path(output_prefix)
    existing = _outputs_to_replace(prefixes, output_prefix, overwrite=overwrite)
    inputs = [_check_input(prefix) for prefix in prefixes]
    dtype = _common_dtype(inputs)
    _check_alike(inputs)
    _warn_of_repeated(inputs)
    sidecars = [given.sidecar for given in inputs]
    known = [sidecar for sidecar in sidecars if sidecar is not None]
    if len(known) < len(sidecars):
        logger.warning("writing no sidecar, because some inputs have none")
    policy = policy or PartitionPolicy()
    compare = check_partitions(prefixes, sidecars, policy)
    num_documents = [given.num_documents for given in inputs]
    with ExitStack() as stack:
        repeats = None
        if compare:
            folder = output_prefix.parent
            with as_user_error(folder):
                folder.mkdir(parents=True, exist_ok=True)
            paths = [hashes_path(prefix) for prefix in prefixes]
            num_hashes = num_hashes_of(known[0]["settings"])
            repeats = DuplicateMarks(paths, num_documents, folder, num_hashes)
            stack.callback(repeats.close)
            for prefix, sidecar, path in zip(prefixes, known, paths, strict=True):
                check_recorded_hash(prefix, sidecar, "sha256", "hashes", path, sha256_of(path))
        (bin_file, idx_file), duplicates = _write(output_prefix, prefixes, dtype, stack, repeats)
        files, named = [bin_file], {"bin": bin_file, "idx": idx_file}
        mask_duplicates = duplicates
        if inputs[0].has_mask:
            masks = [loss_mask_prefix(prefix) for prefix in prefixes]
            mask_files, mask_duplicates = _write(
                loss_mask_prefix(output_prefix), masks, np.dtype(np.uint8), stack, repeats
            )
            files, named["loss_mask_bin"] = [*mask_files, bin_file], mask_files[0]
        if len(known) == len(sidecars):
            if repeats is not None:
                known = without_repeats(prefixes, known, repeats, duplicates, mask_duplicates)
            sidecar_file = stack.enter_context(StagedFile(sidecar_path(output_prefix)))
            sidecar_file.write(sidecar_bytes(_merged(known, named, policy)))
            files.append(sidecar_file)
        for path in existing:
            remove_file(path)
        publish_all([*files, idx_file])
    return sum(num_documents) - sum(part.num_documents for part in duplicates)


def _outputs_to_replace(
    prefixes: Sequence[Path], output_prefix: Path, *, overwrite: bool
) -> list[Path]:
    """Returns the output files that already exist; raises an error if they must not be replaced."""
    if not prefixes:
        raise UserError("nothing to merge: give at least one dataset with --input")
    mask_prefix = loss_mask_prefix(output_prefix)
    existing = [idx_path(output_prefix), bin_path(output_prefix), sidecar_path(output_prefix)]
    existing += [idx_path(mask_prefix), bin_path(mask_prefix)]
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
    stack: ExitStack,
    repeats: DuplicateMarks | None,
) -> tuple[list[StagedFile], list[DuplicateCounts]]:
    """Writes a dataset. Returns its staged files and the counts left out of each partition."""
    writer = IndexedDatasetWriter(prefix, dtype)
    stack.callback(writer.discard)
    duplicates = []
    for number, path in enumerate(inputs):
        dataset = IndexedDataset(path)
        if repeats is None:
            writer.add_dataset(dataset)
        else:
            duplicates.append(copy_new_documents(writer, dataset, repeats, number))
    return writer.seal(), duplicates


def _check_input(prefix: Path) -> _Input:
    """Checks every offset of a dataset and its loss mask, and compares both with the sidecar."""
    dataset = IndexedDataset(prefix)
    dataset.validate()
    sidecar = read_sidecar(prefix)
    has_mask = find_mask(dataset, sidecar) is not None
    if sidecar is not None:
        check_counts(prefix, sidecar, dataset.num_documents, dataset.num_tokens)
        for name, path in dataset_files(prefix, with_loss_mask=has_mask).items():
            check_recorded_hash(prefix, sidecar, "block_hash", name, path, block_hash(path))
    return _Input(prefix, dataset.dtype, dataset.num_documents, sidecar, has_mask)


def _common_dtype(inputs: Sequence[_Input]) -> np.dtype[Any]:
    """Returns the narrowest type that can represent the ids of every dataset."""
    first = inputs[0]
    for given in inputs:
        if (given.dtype.kind == "f") != (first.dtype.kind == "f"):
            raise UserError(
                f"different kinds of data: {given.prefix} has {given.dtype}, {first.prefix} "
                f"{first.dtype}: merge datasets of integers and of floating-point values "
                "separately"
            )
    dtype = np.result_type(*(given.dtype for given in inputs))
    for given in inputs:
        if given.dtype != dtype:
            logger.warning(
                "converting %s from %s to the wider %s", given.prefix, given.dtype, dtype
            )
    return dtype


def _check_alike(inputs: Sequence[_Input]) -> None:
    """Raises an error if the datasets differ in tokenizer, BOS or the presence of a loss mask."""
    with_bos = [g.prefix for g in inputs if g.sidecar is not None and appends_bos(g.sidecar)]
    without = [g.prefix for g in inputs if g.sidecar is not None and not appends_bos(g.sidecar)]
    if with_bos and without:
        raise UserError(
            f"different settings: documents of {with_bos[0]} begin with BOS, but those of "
            f"{without[0]} do not: preprocess one of them again, with or without --append-bos"
        )
    known = [(g.prefix, g.sidecar["tokenizer"]["sha256"]) for g in inputs if g.sidecar is not None]
    for prefix, sha256 in known:
        if sha256 != known[0][1]:
            raise UserError(
                f"different tokenizers: {prefix} was encoded with {sha256[:12]}, but "
                f"{known[0][0]} with {known[0][1][:12]}: preprocess one of them again"
            )
    masked = [given.prefix for given in inputs if given.has_mask]
    unmasked = [given.prefix for given in inputs if not given.has_mask]
    if masked and unmasked:
        raise UserError(
            f"no loss mask: {unmasked[0]}, but {masked[0]} has one: merge datasets with and "
            "without a mask separately"
        )


def _warn_of_repeated(inputs: Sequence[_Input]) -> None:
    """Logs a warning for a dataset that is given twice, under the same name or as a copy."""
    seen: dict[object, Path] = {}
    for given in inputs:
        keys: list[object] = [given.prefix.resolve()]
        if given.sidecar is not None and given.num_documents:
            keys.append(given.sidecar["sha256"]["bin"])
        earlier = next((seen[key] for key in keys if key in seen), None)
        if earlier is not None:
            logger.warning(
                "%s contains the same documents as %s, so they are in the output twice",
                given.prefix,
                "an earlier input" if earlier == given.prefix else earlier,
            )
        for key in keys:
            seen.setdefault(key, given.prefix)


def find_mask(dataset: IndexedDataset, sidecar: Mapping[str, Any] | None) -> IndexedDataset | None:
    """Opens and validates the loss mask of a dataset, a uint8 dataset; None if it has no mask.

    Raises:
        UserError: The mask is damaged, or its sequence lengths differ from the dataset's. Also
            if only one of its two files exists, or if the sidecar lists a mask that does not
            exist.
    """
    prefix = loss_mask_prefix(dataset.prefix)
    missing = [path for path in (idx_path(prefix), bin_path(prefix)) if not path.exists()]
    if missing and sidecar is not None and "loss_mask_bin" in sidecar["sha256"]:
        raise UserError(
            f"no loss mask: {missing[0]}: the sidecar of {dataset.prefix} lists one: copy or "
            "preprocess it again"
        )
    if len(missing) == 2:
        return None
    mask = IndexedDataset(prefix)
    mask.validate()
    if mask.dtype != np.uint8:
        raise UserError(
            f"not a loss mask: {mask.prefix}: contains {mask.dtype} instead of uint8: preprocess "
            "the data again"
        )
    num_common = min(len(mask), len(dataset))
    agree = mask.sequence_lengths[:num_common] == dataset.sequence_lengths[:num_common]
    if len(mask) != len(dataset) or not agree.all():
        bad = num_common if agree.all() else int(agree.argmin())
        raise UserError(
            f"loss mask does not fit: {mask.prefix}: its length differs from {dataset.prefix} at "
            f"sequence {bad}: preprocess the data again"
        )
    return mask


def _merged(
    sidecars: list[dict[str, Any]], named: dict[str, StagedFile], policy: PartitionPolicy
) -> dict[str, Any]:
    merged = dict(sidecars[0])
    merged.pop("part", None)
    for name in ("max_bad_lines", "max_dropped_share"):
        if getattr(policy, name) is not None:
            merged[name] = getattr(policy, name)
    if any(sidecar.get("template") != merged.get("template") for sidecar in sidecars):
        logger.warning(
            "the inputs were written with different templates, so the merged sidecar names none"
        )
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
