"""Rows of a batch, read from many sources into given buffers: the reference and the compiled part.

In: readers, which of them and which of its samples each row takes. Out: filled buffers, and the
attention segments of each micro-batch.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.extension import extension
from megatron_chatflow.native.samples import RowReader

DIGEST_BYTES = 16


class Buffers(NamedTuple):
    """Where rows go; contiguous, perhaps pinned.

    Attributes:
        tokens: int64[num_rows, seq_length].
        labels: int64[num_rows, seq_length].
        loss_mask: float32[num_rows, seq_length].
        digests: int64[num_rows, 2].
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    digests: npt.NDArray[np.int64]


def sample_digest(
    tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Hashes one sample: blake2b-128 of its tokens, little endian, and then of its loss mask.

    Args:
        tokens: int32[seq_length + 1].
        loss_mask: uint8[seq_length].

    Returns:
        int64[2], the digest's 16 bytes as two little-endian words.
    """
    digest = blake2b(tokens.astype("<i4", copy=False).tobytes(), digest_size=DIGEST_BYTES)
    digest.update(loss_mask.tobytes())
    return np.frombuffer(digest.digest(), "<i8").astype(np.int64)


def read_rows_reference(
    readers: Sequence[RowReader],
    reader_of_row: npt.NDArray[np.int64],
    ordinals: npt.NDArray[np.int64],
    micro_batch_size: int,
    buffers: Buffers,
) -> list[npt.NDArray[np.int32]]:
    """Reads rows into buffers.

    Args:
        readers: Of all sources.
        reader_of_row: int64[num_rows].
        ordinals: int64[num_rows], which of its reader's samples each row is.
        micro_batch_size: Rows of a micro-batch; divides their number.
        buffers: Of ``num_rows`` rows.

    Returns:
        For each micro-batch its cu_seqlens: int32[num_segments + 1], begins of the segments in its
        flattened rows, and their end.

    Raises:
        ValueError: A row cannot be read; the message begins with its reader's label.
    """
    num_rows, seq_length = buffers.tokens.shape
    segments: list[npt.NDArray[np.int32]] = []
    for first in range(0, num_rows, micro_batch_size):
        begins = []
        for row in range(first, first + micro_batch_size):
            reader = readers[int(reader_of_row[row])]
            tokens, loss_mask, cu_seqlens = reader.read(int(ordinals[row]))
            buffers.tokens[row] = tokens[:-1]
            buffers.labels[row] = tokens[1:]
            buffers.loss_mask[row] = loss_mask
            buffers.digests[row] = sample_digest(tokens, loss_mask)
            begins.append(cu_seqlens[:-1] + (row - first) * seq_length)
        end = np.array([micro_batch_size * seq_length])
        segments.append(np.concatenate([*begins, end]).astype(np.int32))
    return segments


def read_rows(
    readers: Sequence[Any],
    reader_of_row: npt.NDArray[np.int64],
    ordinals: npt.NDArray[np.int64],
    micro_batch_size: int,
    buffers: Buffers,
) -> list[npt.NDArray[np.int32]]:
    """The compiled `read_rows_reference`, or the reference itself where nothing is compiled.

    The readers are those of `megatron_chatflow.native.samples.make_window_reader` and
    `make_packed_reader`. The global interpreter lock is released.
    """
    if extension is None:
        return read_rows_reference(readers, reader_of_row, ordinals, micro_batch_size, buffers)
    segments: list[npt.NDArray[np.int32]] = extension.read_rows(
        readers, reader_of_row, ordinals, micro_batch_size, *buffers
    )
    return segments
