"""Tests that flattened ranges become boxes and that replicas share shards without overlap."""

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


def _shards(rng: random.Random) -> list[TensorShard]:
    shards = []
    for number in range(rng.randint(1, 12)):
        shape = tuple(rng.randint(1, 40) for _ in range(rng.randint(1, 3)))
        values = torch.rand(math.prod(shape)).view(shape)
        shards.append(TensorShard(f"t{number}", shape, (0,) * len(shape), shape, values))
    return shards


def test_replicas_share_every_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(division, "_MIN_SHARD_BYTES", 64)
    rng = random.Random(3)
    for _ in range(40):
        shards, num_replicas = _shards(rng), rng.randint(1, 5)
        whole = {shard.name: torch.full(shard.global_shape, torch.nan) for shard in shards}
        loads = []
        for rank in range(num_replicas):
            share = assign_shards(shards, rank, num_replicas)
            loads.append(sum(shard.values.numel() for shard in share))
            for shard in share:
                place = whole[shard.name][
                    tuple(slice(o, o + s) for o, s in zip(shard.offsets, shard.sizes, strict=True))
                ]
                assert place.isnan().all(), "written twice"
                place.copy_(shard.values.view(shard.sizes))
        for shard in shards:
            assert torch.equal(whole[shard.name], shard.values)
        largest = max(shard.values.numel() for shard in shards)
        assert max(loads) - min(loads) <= max(largest / num_replicas * 2, 64)
