"""Which documents training and validation take: every k-th one of a dataset may be held out.

In: token files, the split, k. Out: stretches of tokens for windows, or documents for packing.
Document d of a dataset is held out when ``d % k == k - 1``; without k, a split takes all of them.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.samples import check_index, document_begins
from megatron_chatflow.native.samples import Runs, TokenFile

Split = Literal["train", "validation"]


def split_runs(files: Sequence[TokenFile], split: Split, holdout_every: int | None) -> Runs:
    """The stretches of tokens that a split takes, in the order of files and documents.

    Memory is one entry for each held-out document, or one for each file.

    Args:
        files: The token files.
        split: Whose documents.
        holdout_every: k; None gives the split every document.
    """
    none = np.zeros(0, np.int64)
    file_parts, begin_parts, length_parts = [none.astype(np.int32)], [none], [none]
    for number, file in enumerate(files):
        begins, ends = _file_runs(file, split, holdout_every)
        check_index(file, begins <= ends)
        file_parts.append(np.full(len(begins), number, np.int32))
        begin_parts.append(begins)
        length_parts.append(ends - begins)
    lengths = np.concatenate(length_parts)
    return Runs(
        file=np.concatenate(file_parts),
        token_begin=np.concatenate(begin_parts),
        cumulative=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
    )


def _file_runs(
    file: TokenFile, split: Split, holdout_every: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Begins and ends, in tokens."""
    if holdout_every is None:
        return np.zeros(1, np.int64), np.array([len(file.tokens)], np.int64)
    held_out = np.arange(holdout_every - 1, file.num_documents, holdout_every, dtype=np.int64)
    begins = document_begins(file, held_out)
    ends = document_begins(file, held_out + 1)
    if split == "validation":
        return begins, ends
    zero, last = np.zeros(1, np.int64), np.array([len(file.tokens)], np.int64)
    return np.concatenate([zero, ends]), np.concatenate([begins, last])


def documents_in_split(
    begin: int, end: int, split: Split, holdout_every: int | None
) -> npt.NDArray[np.bool_]:
    """Whether a split takes each of the documents [begin, end) of one file, bool[end - begin]."""
    if holdout_every is None:
        return np.ones(end - begin, np.bool_)
    held_out = np.arange(begin, end) % holdout_every == holdout_every - 1
    return np.asarray(held_out if split == "validation" else ~held_out)
