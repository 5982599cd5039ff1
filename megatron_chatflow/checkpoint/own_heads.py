"""Padded attention heads at the border of a checkpoint, which holds the model's own heads only.

In: boxes of padded matrices. Out: what of them is the model's own; and marks on tensors to load, by
which megatron-core fills the rest with zeros. A checkpoint is so the same at every layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values

from megatron_chatflow.checkpoint.shard_plan import TensorPiece

OwnSizes = Mapping[str, tuple[int, int]]
"""As `config.model_shape.own_sizes` gives them."""


def own_sizes_of(chunks: list[Any]) -> OwnSizes:
    """Of model chunks as `model.llama.build_llama` built them."""
    sizes: OwnSizes = chunks[0].own_sizes
    return sizes


def own_part(
    name: str, begin: Sequence[int], data: torch.Tensor, own_sizes: OwnSizes
) -> torch.Tensor | None:
    """What of a matrix's slice is the model's own: a view, or None if nothing is.

    Args:
        name: Whose end tells which matrix it is.
        begin: Where the slice begins, an offset an axis.
        data: The slice, of any number of axes before the last two.
        own_sizes: What is padded.
    """
    found = _find(name, own_sizes)
    if found is None:
        return data
    axis, size = found
    axis -= 2
    length = min(data.shape[axis], size - begin[axis])
    return data.narrow(axis, 0, length) if length > 0 else None


def own_piece(piece: TensorPiece, own_sizes: OwnSizes) -> TensorPiece | None:
    """What of a piece is the model's own: itself where nothing is padded, None if nothing is."""
    found = _find(piece.name, own_sizes)
    if found is None:
        return piece
    own = own_part(piece.name, piece.offsets, piece.values.view(piece.sizes), own_sizes)
    if own is None:
        return None
    # Where all layers are one tensor, the axes of layers come first.
    axis = found[0] + len(piece.global_shape) - 2
    whole = (*piece.global_shape[:axis], found[1], *piece.global_shape[axis + 1 :])
    return replace(piece, global_shape=whole, sizes=tuple(own.shape), values=own)


def own_pieces(pieces: Sequence[TensorPiece], own_sizes: OwnSizes) -> list[TensorPiece]:
    """What of pieces is the model's own."""
    own = [own_piece(piece, own_sizes) for piece in pieces]
    return [piece for piece in own if piece is not None]


def expect_own_heads(state: dict[str, Any], own_sizes: OwnSizes) -> None:
    """Lets padded tensors of a sharded state be loaded from the model's own, zeros behind them."""
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and _find(tensor.key, own_sizes) is not None:
            tensor.allow_shape_mismatch = True


def _find(name: str, own_sizes: OwnSizes) -> tuple[int, int] | None:
    return next((found for end, found in own_sizes.items() if name.endswith(end)), None)
