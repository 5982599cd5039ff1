"""Inspects datasets.

`Inspection` validates all files of a dataset and shows counts, a histogram of lengths and decoded
documents with their loss spans. `first_difference` compares two datasets.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.indexed import IndexedDataset, bin_path, idx_path
from megatron_chatflow.data.sidecar import (
    check_counts,
    loss_mask_prefix,
    read_sidecar,
    sha256_of,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.merge import find_mask
from megatron_chatflow.tokenizer import Tokenizer

BLOCK = 1 << 22
BAR_WIDTH = 40
LOSS_COLOR = "\x1b[32m"
PROMPT_COLOR = "\x1b[2m"
CONTROL_COLOR = "\x1b[4m"
END_COLOR = "\x1b[0m"


class Inspection:
    """Validates and describes a dataset with its loss mask and sidecar."""

    def __init__(self, prefix: str | Path) -> None:
        """Opens the dataset and checks every offset of the dataset and its loss mask.

        Raises:
            UserError: The dataset, its mask or its sidecar is damaged.
        """
        self.dataset = IndexedDataset(prefix)
        self.dataset.validate()
        self.sidecar = read_sidecar(prefix)
        self.mask = find_mask(self.dataset, self.sidecar)
        if self.sidecar is not None:
            check_counts(prefix, self.sidecar, self.dataset.num_documents, self.dataset.num_tokens)

    def check_hashes(self) -> None:
        """Raises `UserError` if a file differs from the SHA-256 in the sidecar, if there is one."""
        recorded = {} if self.sidecar is None else self.sidecar["sha256"]
        paths = {"idx": idx_path(self.dataset.prefix), "bin": bin_path(self.dataset.prefix)}
        paths["loss_mask_bin"] = bin_path(loss_mask_prefix(self.dataset.prefix))
        for name, path in paths.items():
            if name in recorded and sha256_of(path) != recorded[name]:
                raise UserError(
                    f"damaged dataset: {path}: does not match the hash in its sidecar: copy the "
                    "dataset or preprocess it again"
                )

    def check_ids(self, vocab_size: int) -> None:
        """Raises `UserError`, which names the first one, if there are ids outside a vocabulary."""
        tokens = self.dataset.tokens
        for begin in range(0, len(tokens), BLOCK):
            block = tokens[begin : begin + BLOCK]
            outside = (block < 0) | (block >= vocab_size)
            if outside.any():
                position = begin + int(outside.argmax())
                pointer = position * self.dataset.dtype.itemsize
                after = self.dataset.sequence_pointers.searchsorted(pointer, side="right")
                raise UserError(
                    f"id outside the vocabulary: {self.dataset.prefix}: {tokens[position]} in "
                    f"sequence {after - 1} at byte {pointer}, but the vocabulary size is "
                    f"{vocab_size}"
                )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises `UserError` if the sidecar, if there is one, has the hash of another tokenizer."""
        if self.sidecar is not None:
            made_by = self.sidecar["tokenizer"]["sha256"]
            if made_by != tokenizer.fingerprint:
                raise UserError(
                    f"encoded with another tokenizer: {self.dataset.prefix}: {made_by[:12]} "
                    f"instead of {tokenizer.fingerprint[:12]}: check --tokenizer-model"
                )

    def describe(self) -> str:
        """Returns counts and the histogram of lengths as text."""
        dataset = self.dataset
        lengths = dataset.sequence_lengths
        lines = [
            f"{dataset.prefix}",
            f"  documents   {dataset.num_documents}",
            f"  sequences   {len(dataset)}",
            f"  tokens      {dataset.num_tokens} ({dataset.dtype})",
        ]
        if self.mask is not None:
            blocks = range(0, self.mask.num_tokens, BLOCK)
            num_loss = sum(int(np.count_nonzero(self.mask.tokens[b : b + BLOCK])) for b in blocks)
            share = num_loss / max(dataset.num_tokens, 1)
            lines.append(f"  with loss   {num_loss} ({share:.1%})")
        if self.sidecar is not None:
            lines += _sidecar_lines(self.sidecar)
        if len(lengths):
            mean = dataset.num_tokens / len(lengths)
            lines.append(f"  lengths     {lengths.min()} to {lengths.max()}, mean {mean:.1f}")
            lines += _histogram(lengths)
        return "\n".join(lines)

    def sample(self, index: int, tokenizer: Tokenizer, *, colored: bool) -> str:
        """Decodes the ``index``-th sequence and marks its loss spans. Control tokens are named.

        If ``colored`` is set, loss spans have ANSI colors, and control tokens are underlined.
        Otherwise, loss spans are enclosed in ``<<`` and ``>>``.
        """
        ids = self.dataset[index].tolist()
        loss = None if self.mask is None else self.mask[index].astype(bool)
        boundaries = [] if loss is None else (np.flatnonzero(np.diff(loss)) + 1).tolist()
        text = f"--- sequence {index}: {len(ids)} tokens\n"
        had_loss = False
        for begin, part, is_control in _decoded(ids, boundaries, tokenizer):
            has_loss = loss is not None and bool(loss[begin])
            if colored:
                color = LOSS_COLOR if has_loss else "" if loss is None else PROMPT_COLOR
                color += CONTROL_COLOR if is_control else ""
                text += f"{color}{part}{END_COLOR}" if color else part
                continue
            text += "<<" * (has_loss and not had_loss) + ">>" * (had_loss and not has_loss)
            text += part
            had_loss = has_loss
        return text + ">>" * had_loss


def _decoded(
    ids: list[int], boundaries: list[int], tokenizer: Tokenizer
) -> Iterator[tuple[int, str, bool]]:
    """Decodes a sequence in spans that end at ``boundaries`` and at control tokens.

    Yields the position of each span's first id, its text, and whether it is a control token.
    Tokenizers omit control tokens and the space before the first token when they decode. Each span
    is therefore decoded together with the text before it, back to the last control token.
    """
    names = {tokenizer.control_id(name): name for name in tokenizer.control_tokens}
    cuts = {0, len(ids), *boundaries}
    for position, token_id in enumerate(ids):
        if token_id in names:
            cuts |= {position, position + 1}
    run = 0  # position after the last control token
    for begin, end in pairwise(sorted(cuts)):
        if ids[begin] in names:
            yield begin, names[ids[begin]], True
            run = end
        else:
            num_before = len(tokenizer.decode(ids[run:begin]))
            yield begin, tokenizer.decode(ids[run:end])[num_before:], False


def first_difference(first: IndexedDataset, second: IndexedDataset) -> str | None:
    """Describes the first difference of two datasets; None if sequences and documents agree."""
    num_common = min(len(first), len(second))
    for begin in range(0, num_common, 1 << 16):
        end = min(begin + (1 << 16), num_common)
        agree = first.sequence_lengths[begin:end] == second.sequence_lengths[begin:end]
        end = end if agree.all() else begin + int(agree.argmin())
        tokens = [_tokens_between(dataset, begin, end) for dataset in (first, second)]
        if not np.array_equal(tokens[0], tokens[1]):
            for index in range(begin, end):
                same = first[index] == second[index]
                if not same.all():
                    k = int(same.argmin())
                    return f"sequence {index}, token {k}: {first[index][k]} and {second[index][k]}"
        if not agree.all():
            lengths = (int(first.sequence_lengths[end]), int(second.sequence_lengths[end]))
            return f"sequence {end}: {lengths[0]} and {lengths[1]} tokens"
    if len(first) != len(second):
        return f"number of sequences: {len(first)} and {len(second)}"
    if not np.array_equal(first.document_indices, second.document_indices):
        return "documents begin at different sequences"
    return None


def _tokens_between(dataset: IndexedDataset, begin: int, end: int) -> npt.NDArray[Any]:
    if begin == end:
        return dataset.tokens[:0]
    first = int(dataset.sequence_pointers[begin]) // dataset.dtype.itemsize
    last = int(dataset.sequence_pointers[end - 1]) // dataset.dtype.itemsize
    return dataset.tokens[first : last + int(dataset.sequence_lengths[end - 1])]


def _sidecar_lines(sidecar: dict[str, Any]) -> list[str]:
    tokenizer = sidecar["tokenizer"]
    num_bytes = sidecar["num_text_bytes"]
    per_token = num_bytes / max(sidecar["num_tokens"], 1)
    lines = [
        f"  text        {num_bytes} bytes, {per_token:.2f} per token",
        f"  tokenizer   {tokenizer['type']} {tokenizer['sha256'][:12]}",
        f"  vocabulary  {tokenizer['vocab_size']}",
        f"  inputs      {', '.join(given['name'] for given in sidecar['inputs'][:8])}",
    ]
    for name in ("dropped", "repaired"):
        counts = sidecar.get(name) or {}
        if counts:
            lines.append(f"  {name:<11} {', '.join(f'{n} {what}' for what, n in counts.items())}")
    return lines


def _histogram(lengths: npt.NDArray[np.int32]) -> list[str]:
    """Formats a histogram of lengths with bars. The bins are between powers of two."""
    top = int(lengths.max()).bit_length()
    edges = np.array([0, *(1 << k for k in range(top + 1))])
    counts = np.zeros(len(edges) - 1, np.int64)
    for begin in range(0, len(lengths), BLOCK):
        counts += np.histogram(lengths[begin : begin + BLOCK], edges)[0]
    lines = []
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            bar = "#" * max(1, int(BAR_WIDTH * count / counts.max()))
            lines.append(f"  {low:>9} to {high - 1:>9}  {count:>10}  {bar}")
    return lines
