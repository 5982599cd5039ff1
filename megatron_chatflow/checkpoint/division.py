"""Who writes what of a tensor that data parallelism replicates or cuts, decided without a message.

In: a range of a flattened tensor, or the pieces that every replica holds. Out: the boxes that make
up the range, and one replica's share of the pieces. Every rank comes to the same answer by itself.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_chatflow.checkpoint.shard_plan import TensorPiece

# Replicated pieces are cut no smaller: every piece is an entry in the index.
_SMALLEST_CUT_BYTES = 8 * 2**20

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box begins, and its shape."""


def boxes_of_range(begin: int, end: int, shape: Sequence[int]) -> list[Box]:
    """Cuts values [begin, end) of a flattened tensor into boxes of the tensor.

    The distributed optimizer cuts flat buffers anywhere, and a checkpoint holds boxes: of a matrix
    the rest of a row, whole rows, and the beginning of a row.

    Args:
        begin: First value.
        end: Behind the last one.
        shape: The tensor's, of at least one axis.

    Returns:
        At most ``2 * len(shape) - 1`` boxes, whose values follow each other in the range.
    """
    if begin >= end:
        return []
    if len(shape) == 1:
        return [((begin,), (end - begin,))]
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:
        return _inside_row(begin // row, begin % row, end - begin // row * row, shape)
    boxes = _inside_row(first - 1, begin - (first - 1) * row, row, shape) if begin % row else []
    if first < last:
        boxes.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + _inside_row(last, 0, end - last * row, shape)


def _inside_row(number: int, begin: int, end: int, shape: Sequence[int]) -> list[Box]:
    inner = boxes_of_range(begin, end, shape[1:])
    return [((number, *offsets), (1, *sizes)) for offsets, sizes in inner]


def share_of(pieces: Sequence[TensorPiece], rank: int, num_replicas: int) -> list[TensorPiece]:
    """What one of several replicas writes of the pieces that all of them hold.

    Large pieces are cut by rows; then each goes, the largest first, to whoever has least.

    Args:
        pieces: The same on every replica, values included.
        rank: Which replica.
        num_replicas: How many.
    """
    if num_replicas == 1:
        return list(pieces)
    cut = [part for piece in pieces for part in _cut(piece, num_replicas)]
    order = sorted(range(len(cut)), key=lambda number: -_num_bytes(cut[number]))
    loads = [0] * num_replicas
    mine = []
    for number in order:
        least = loads.index(min(loads))
        loads[least] += _num_bytes(cut[number])
        if least == rank:
            mine.append(number)
    return [cut[number] for number in sorted(mine)]


def _num_bytes(piece: TensorPiece) -> int:
    return piece.values.numel() * piece.values.element_size()


def _cut(piece: TensorPiece, num_parts: int) -> list[TensorPiece]:
    """Cuts a piece along its first axis that is longer than 1 into at most so many blocks."""
    axis = next((axis for axis, size in enumerate(piece.sizes) if size > 1), None)
    num_parts = min(num_parts, _num_bytes(piece) // _SMALLEST_CUT_BYTES)
    if axis is None or num_parts < 2:
        return [piece]
    num_rows = piece.sizes[axis]
    bounds = [num_rows * number // num_parts for number in range(num_parts + 1)]
    rows = piece.values.reshape(num_rows, -1)
    return [
        replace(
            piece,
            offsets=_with(piece.offsets, axis, piece.offsets[axis] + first),
            sizes=_with(piece.sizes, axis, last - first),
            values=rows[first:last],
        )
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
        if first < last
    ]


def _with(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
