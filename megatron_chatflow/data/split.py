"""Which documents of a dataset training, validation and test take.

There are two ways to hold documents out. With ``holdout_every`` k, document d is for validation
when ``d % k == k - 1``. With ``shares``, as in Megatron-LM, the documents of each dataset are cut
in order: the first are for training, those that follow for validation, the last for test. Without
either, a split takes every document.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.samples import check_index, document_begins
from megatron_chatflow.native.samples import Runs, TokenFile

Split = Literal["train", "validation", "test"]
_SPLITS: tuple[Split, ...] = get_args(Split)


def document_range(num_documents: int, split: Split, shares: Sequence[float]) -> tuple[int, int]:
    """The first document of a split, and the one after its last, rounded as Megatron-LM rounds.

    Args:
        num_documents: Of one dataset.
        split: Whose documents.
        shares: Of training, validation and test, of sum 1.
    """
    ends = [0.0, *accumulate(shares)]
    number = _SPLITS.index(split)
    begin, end = (round(ends[n] * float(num_documents)) for n in (number, number + 1))
    return begin, end


def split_runs(
    files: Sequence[TokenFile],
    split: Split,
    holdout_every: int | None,
    shares: Sequence[float] | None = None,
) -> Runs:
    """The stretches of tokens that a split takes, in the order of files and documents.

    Memory is one entry for each held-out document, or one for each file.

    Args:
        files: The token files.
        split: Whose documents.
        holdout_every: k; None gives the split every document.
        shares: Of training, validation and test, instead.
    """
    none = np.zeros(0, np.int64)
    file_parts, begin_parts, length_parts = [none.astype(np.int32)], [none], [none]
    for number, file in enumerate(files):
        begins, ends = _file_runs(file, split, holdout_every, shares)
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
    file: TokenFile, split: Split, holdout_every: int | None, shares: Sequence[float] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Begins and ends, in tokens."""
    if shares is not None:
        documents = np.array(document_range(file.num_documents, split, shares), np.int64)
        edges = document_begins(file, documents)
        return edges[:1], edges[1:]
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
    begin: int,
    end: int,
    split: Split,
    holdout_every: int | None,
    taken: tuple[int, int] | None = None,
) -> npt.NDArray[np.bool_]:
    """Whether a split takes each of the documents [begin, end) of one file, bool[end - begin].

    Args:
        begin: The first document that is asked about.
        end: The one after the last.
        split: Whose documents.
        holdout_every: k; None gives the split every document.
        taken: What `document_range` returned for the file, instead.
    """
    if taken is not None:
        documents = np.arange(begin, end)
        return np.asarray((taken[0] <= documents) & (documents < taken[1]))
    if holdout_every is None:
        return np.ones(end - begin, np.bool_)
    held_out = np.arange(begin, end) % holdout_every == holdout_every - 1
    return np.asarray(held_out if split == "validation" else ~held_out)
