"""Whether datasets are the parts of one job, and what that asks of merging them.

In: their sidecars. Out: a `UserError` where parts are missing or have too many bad lines together,
and the repetitions between parts that a job with `--dedup` leaves to the merge.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.data.fingerprint import refuse_other_hash
from megatron_chatflow.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_chatflow.data.preprocess.dropped import check_left_over
from megatron_chatflow.data.preprocess.repeats import Repeats
from megatron_chatflow.data.sidecar import hashes_path, settings_of, sha256_of
from megatron_chatflow.data.staged_file import told_to_the_user
from megatron_chatflow.errors import UserError

COPY_TOKENS = 1 << 22  # that are held in memory at once
COPY_SEQUENCES = 1 << 20


@dataclass(frozen=True)
class PartsPolicy:
    """What is let pass when the parts of one job are merged.

    Attributes:
        allow_missing: Whether not every part has to be there.
        max_bad_lines: Of all parts together; None for what the parts were made with.
        max_dropped_share: Of all records of all parts; None for what the parts were made with.
    """

    allow_missing: bool = False
    max_bad_lines: int | None = None
    max_dropped_share: float | None = None


@dataclass(frozen=True)
class LeftOut:
    """What was not taken over from a part.

    Attributes:
        num_documents: Repetitions of earlier parts' documents.
        num_tokens: In these.
        num_nonzero: Tokens of these that are not 0; of a loss mask, those with loss.
    """

    num_documents: int
    num_tokens: int
    num_nonzero: int


def are_parts_to_compare(
    prefixes: Sequence[Path], sidecars: Sequence[dict[str, Any] | None], policy: PartsPolicy
) -> bool:
    """Checks datasets that are parts of one job, and says whether they may repeat each other.

    Args:
        prefixes: The datasets', for messages.
        sidecars: What lies beside them.
        policy: What is let pass.

    Returns:
        Whether the job was to drop duplicates. False for datasets that are not parts of one job.

    Raises:
        UserError: A part is missing, there twice, or from another job with `--dedup`; or the parts
            have too many bad lines or left-out records together.
    """
    parts = [None if sidecar is None else sidecar.get("part") for sidecar in sidecars]
    known = [sidecar for sidecar in sidecars if sidecar is not None and sidecar.get("part")]
    if not known:
        return False
    first = known[0]
    dedup = any(sidecar["settings"].get("dedup") for sidecar in known)
    same_job = all(
        part and part[1] == first["part"][1] and settings_of(sidecar) == settings_of(first)
        for part, sidecar in zip(parts, known, strict=False)
    )
    if len(known) < len(sidecars) or not same_job:
        if dedup:
            raise UserError(
                f"not one job: {prefixes[0]} and the others: documents of parts that were made "
                "with --dedup are compared when they are merged: merge each job's parts by "
                "themselves, all made with the same options"
            )
        return False
    numbers = [sidecar["part"][0] for sidecar in known]
    count = first["part"][1]
    for number in range(count):
        found = [str(prefix) for n, prefix in zip(numbers, prefixes, strict=True) if n == number]
        if len(found) > 1:
            raise UserError(f"the same part twice: {' and '.join(found)}: merge each key by itself")
        if not found and not policy.allow_missing:
            raise UserError(
                f"part {number}/{count} is missing beside {prefixes[0]}: make it with "
                f"--shard {number}/{count}, or merge with --allow-missing"
            )
    limit = policy.max_bad_lines
    if limit is None:
        limit = max(sidecar.get("max_bad_lines", 0) for sidecar in known)
    num_bad = sum(sidecar["num_bad_lines"] for sidecar in known)
    if num_bad > limit:
        raise UserError(
            f"too many bad lines: {num_bad} in all parts of {prefixes[0]}, more than {limit}: "
            "mend the input, or raise --max-bad-lines"
        )
    share = policy.max_dropped_share
    if share is None:  # parts that an earlier version made have no limit
        share = max(sidecar.get("max_dropped_share", 1.0) for sidecar in known)
    dropped: Counter[str] = Counter()
    for sidecar in known:
        dropped.update(sidecar["dropped"])
    num_documents = sum(sidecar["num_documents"] for sidecar in known)
    counts = {**first, "dropped": dropped, "num_documents": num_documents}
    check_left_over(counts, prefixes[0], share)
    return dedup


def find_repeats(
    prefixes: Sequence[Path],
    sidecars: Sequence[dict[str, Any] | None],
    num_documents: Sequence[int],
    folder: Path,
) -> Repeats:
    """The documents of each part that an earlier one has.

    Args:
        prefixes: Of the parts, in order.
        sidecars: What lies beside them.
        num_documents: Of each part.
        folder: Where temporary files lie.

    Raises:
        UserError: The hashes beside a part are missing or damaged.
    """
    with told_to_the_user(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [hashes_path(prefix) for prefix in prefixes]
    repeats = Repeats(paths, num_documents, folder)
    try:
        for prefix, sidecar, path in zip(prefixes, sidecars, paths, strict=True):
            if sidecar is not None:
                refuse_other_hash(prefix, sidecar, "sha256", "hashes", path, sha256_of(path))
    except BaseException:
        repeats.close()
        raise
    return repeats


def copy_new_documents(
    writer: IndexedDatasetWriter, dataset: IndexedDataset, repeats: Repeats, number: int
) -> LeftOut:
    """Appends what no earlier part has, of documents of one sequence each.

    Args:
        writer: Of the merged dataset.
        dataset: A part, or its loss mask.
        repeats: Of all parts.
        number: Of this part among them.

    Raises:
        UserError: Its documents are not of one sequence each.
    """
    if dataset.num_documents != len(dataset):
        raise UserError(
            f"not a part of a job: {dataset.prefix}: has {len(dataset)} sequences in "
            f"{dataset.num_documents} documents: make this part again"
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
        repeated = repeats.of_part(number, begin, end)
        left_out = tokens[np.repeat(repeated, lengths)]
        num_documents += int(repeated.sum())
        num_tokens += len(left_out)
        num_nonzero += int(np.count_nonzero(left_out))
        kept = tokens[np.repeat(~repeated, lengths)].astype(writer.dtype, copy=False)
        writer.add_documents(kept, lengths[~repeated])
        begin = end
    return LeftOut(num_documents, num_tokens, num_nonzero)


def without_repeats(
    prefixes: Sequence[Path],
    sidecars: Sequence[dict[str, Any]],
    repeats: Repeats,
    left_out: Sequence[LeftOut],
    left_out_of_masks: Sequence[LeftOut],
) -> list[dict[str, Any]]:
    """The parts' sidecars, less what was left out of each.

    Args:
        prefixes: The parts', for messages.
        sidecars: Of the parts.
        repeats: Of all parts.
        left_out: Of each part's documents.
        left_out_of_masks: Of each part's loss mask; of text, which has none, the same.

    Raises:
        UserError: More is left out of a part than its sidecar says that it has.
    """
    counted = []
    for number, sidecar in enumerate(sidecars):
        part, mask = left_out[number], left_out_of_masks[number]
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
                f"damaged part: {prefixes[number]}: its .hashes count more {wrong} as repeated "
                "than its .json counts in all: make this part again"
            )
        counted.append({**sidecar, **kept, "dropped": dict(+dropped)})
    return counted
