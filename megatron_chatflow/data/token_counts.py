"""Counts the tokens of an epoch that are no padding, or that carry loss, exactly.

Nothing is estimated and no sample is read: the numbers follow from the documents' lengths, and from
the loss masks where there are any, which are read once from begin to end. The number of a source
with loss masks is kept in a small file next to the data.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.mapped_file import release_pages
from megatron_chatflow.data.packing import Packing, build_once
from megatron_chatflow.data.samples import Runs, TokenFile, check_index, document_begins
from megatron_chatflow.files import write_atomically

_BLOCK = 1 << 14  # documents per block


def window_loss_tokens(
    files: Sequence[TokenFile], runs: Runs, num_labels: int, *, isolate: bool
) -> int:
    """Returns the loss tokens of all windows of an epoch.

    Window o has the labels at positions ``o * seq_length + 1`` to ``(o + 1) * seq_length`` of the
    runs, so the windows of an epoch have those from 1 to ``num_labels``, each once. With
    ``isolate``, the first token of a document has no loss.
    """
    total = 0
    for number, file in enumerate(files):
        mine = np.flatnonzero(runs.file == number)
        # The part of every run that is a label.
        first = np.maximum(runs.cumulative[mine], 1)
        last = np.minimum(runs.cumulative[mine + 1], num_labels + 1)
        shift = runs.token_begin[mine] - runs.cumulative[mine]
        begins, ends = (first + shift)[last > first], (last + shift)[last > first]
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            total += _num_with_loss(file, begin, end)
        if isolate and len(begins):
            total -= _num_document_begins(file, begins, ends)
        _release(file)
    return total


def packed_loss_tokens(files: Sequence[TokenFile], packing: Packing, seq_length: int) -> int:
    """Returns the loss tokens of all packed samples of an epoch.

    Every packed document is in one sample, up to ``seq_length + 1`` of its tokens, of which all but
    the first are labels.
    """
    total = before = 0
    documents = np.sort(packing.documents)
    for file in files:
        inside = slice(*np.searchsorted(documents, [before, before + file.num_documents]).tolist())
        mine = documents[inside] - before
        for part in range(0, len(mine), _BLOCK):
            chosen = mine[part : part + _BLOCK]
            begins, ends = document_begins(file, chosen), document_begins(file, chosen + 1)
            check_index(file, begins <= ends)
            ends = np.minimum(ends, begins + seq_length + 1)
            if file.loss_mask is None:
                total += int(np.maximum(ends - begins - 1, 0).sum())
                continue
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                total += _num_with_loss(file, begin + 1, end)
            _release(file)
        before += file.num_documents
    return total


def cached_loss_tokens(files: Sequence[TokenFile], key: bytes, count: Callable[[], int]) -> int:
    """Returns ``count()``, from a file next to the data if it has been counted before.

    ``key`` is a hash of everything that the number depends on. Nothing is kept for sources without
    loss masks, whose numbers follow from the documents' lengths at once.
    """
    if all(file.loss_mask is None for file in files):
        return count()
    path = Path(f"{files[0].name}.loss_tokens.{key.hex()[:16]}")

    def load() -> int | None:
        try:
            content = json.loads(path.read_bytes())
            is_ours = content["key"] == key.hex() and type(content["loss_tokens"]) is int
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return int(content["loss_tokens"]) if is_ours and content["loss_tokens"] >= 0 else None

    def save(number: int) -> None:
        write_atomically(path, json.dumps({"key": key.hex(), "loss_tokens": number}))

    return build_once(path, load=load, build=count, save=save)


def _num_with_loss(file: TokenFile, begin: int, end: int) -> int:
    if file.loss_mask is None:
        return max(end - begin, 0)
    return int(np.count_nonzero(file.loss_mask[begin:end])) if end > begin else 0


def _num_document_begins(
    file: TokenFile, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> int:
    """Returns how many tokens with loss in the ranges are the first of a document."""
    total = 0
    for part in range(0, file.num_documents, _BLOCK):
        numbers = np.arange(part, min(part + _BLOCK, file.num_documents) + 1)
        edges = document_begins(file, numbers)
        check_index(file, np.diff(edges) >= 0)
        firsts = edges[:-1][np.diff(edges) > 0]  # an empty document has no first token
        place = np.searchsorted(begins, firsts, side="right") - 1
        inside = firsts[(place >= 0) & (firsts < ends[np.maximum(place, 0)])]
        if file.loss_mask is None:
            total += len(inside)
        else:
            total += int(np.count_nonzero(file.loss_mask[inside]))
        _release(file)
    return total


def _release(file: TokenFile) -> None:
    for array in (file.document_indices, file.sequence_pointers, file.loss_mask):
        if array is not None:
            release_pages(array)
