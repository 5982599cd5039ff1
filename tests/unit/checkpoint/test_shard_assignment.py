"""Ranges of flattened tensors become boxes, and replicas share pieces, without loss or overlap."""

import math
import random

import pytest
import torch

from megatron_chatflow.checkpoint import layout as division
from megatron_chatflow.checkpoint.layout import TensorShard, assign_shards, boxes_of_range


@pytest.mark.parametrize("shape", [(7,), (5, 6), (1, 9), (8, 1), (3, 4, 5), (2, 1, 3, 4)])
def test_boxes_hold_exactly_the_range_in_its_order(shape: tuple[int, ...]) -> None:
    num_values = math.prod(shape)
    tensor = torch.arange(num_values).view(shape)
    for begin in range(num_values + 1):
        for end in range(begin, num_values + 1):
            boxes = boxes_of_range(begin, end, shape)
            assert len(boxes) <= 2 * len(shape) - 1
            found: list[int] = []
            for offsets, sizes in boxes:
                box = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
                assert tuple(box.shape) == tuple(sizes)
                found += box.flatten().tolist()
            assert found == list(range(begin, end))


def _pieces(rng: random.Random) -> list[TensorShard]:
    pieces = []
    for number in range(rng.randint(1, 12)):
        shape = tuple(rng.randint(1, 40) for _ in range(rng.randint(1, 3)))
        values = torch.rand(math.prod(shape)).view(shape)
        pieces.append(TensorShard(f"t{number}", shape, (0,) * len(shape), shape, values))
    return pieces


def test_replicas_share_every_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(division, "_SMALLEST_CUT_BYTES", 64)
    rng = random.Random(3)
    for _ in range(40):
        pieces, num_replicas = _pieces(rng), rng.randint(1, 5)
        whole = {piece.name: torch.full(piece.global_shape, torch.nan) for piece in pieces}
        loads = []
        for rank in range(num_replicas):
            share = assign_shards(pieces, rank, num_replicas)
            loads.append(sum(piece.values.numel() for piece in share))
            for piece in share:
                place = whole[piece.name][
                    tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))
                ]
                assert place.isnan().all(), "written twice"
                place.copy_(piece.values.view(piece.sizes))
        for piece in pieces:
            assert torch.equal(whole[piece.name], piece.values)
        largest = max(piece.values.numel() for piece in pieces)
        assert max(loads) - min(loads) <= max(largest / num_replicas * 2, 64)
