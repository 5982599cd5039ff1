"""Reads and writes distributed checkpoints tensor by tensor, in one process without process groups.

`DistributedReader` reads single tensors of a checkpoint, whatever parallel layout wrote it.
`write_distributed` writes a checkpoint from tensors that are created one at a time. Memory holds
one tensor. Nothing in a file is executed, see `checkpoint.index` and `checkpoint.reader`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_chatflow.checkpoint.layout import (
    ALIGNMENT,
    Plan,
    TensorShard,
    frame,
    index_files,
    plan_tensor,
)
from megatron_chatflow.checkpoint.reader import SafeReader, read_shard
from megatron_chatflow.convert.shape import TORCH_NAMES
from megatron_chatflow.convert.weight_map import WeightRule
from megatron_chatflow.errors import UserError

# Prefixes of the names of fp32 master weights in the plain and the distributed optimizer.
MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")
# Prefix of the names of the moving average of the weights.
AVERAGE_PREFIX = "optimizer.state.ema."


class DistributedReader:
    """The tensors of a distributed checkpoint; ``tensors`` holds their metadata by name."""

    def __init__(self, folder: Path, *, masters: bool = False, average: bool = False) -> None:
        """Opens an ``iter_`` folder.

        ``masters`` is whether to prefer the optimizer's fp32 master weights over the weights.
        ``average`` is whether to read the moving average of the weights instead of them.

        Raises:
            UserError: The index is damaged, or there is no average.
        """
        self.folder = folder
        self._prefixes = (*MASTER_PREFIXES, "") if masters else ("",)
        self._reader = SafeReader(folder)
        self._reader.advice = "use another checkpoint"
        self._index = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._index, True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        if average:
            self._prefixes = (AVERAGE_PREFIX,)
            if not any(name.startswith(AVERAGE_PREFIX) for name in self.tensors):
                raise UserError(
                    f"{folder}: holds no moving average of the weights; train with --ema-decay, "
                    "or export the weights"
                )

    def find(self, rule: WeightRule, layer: int | None) -> tuple[str, int | None]:
        """Returns the name of a rule's tensor, and the index on its layer axis or None.

        megatron-core stores equal layers as one tensor with a layer axis, and others separately.
        """
        for prefix in self._prefixes:
            stacked = prefix + rule.megatron.replace("{layer}.", "")
            if stacked in self.tensors:
                return stacked, layer
            single = prefix + rule.megatron.format(layer=layer)
            if single in self.tensors:
                return single, None
        raise UserError(
            f"{self.folder}: has no tensor {rule.megatron.format(layer=layer)}; the checkpoint "
            "belongs to another model"
        )

    def shape(self, rule: WeightRule, layer: int | None) -> tuple[int, ...]:
        """Returns the stored shape of a rule's tensor, including padding rows."""
        name, index = self.find(rule, layer)
        size = tuple(self.tensors[name].size)
        return size if index is None else size[1:]

    def dtype(self, rule: WeightRule, layer: int | None) -> torch.dtype:
        """Returns the stored dtype of a rule's tensor, which must be fp32, bf16 or fp16."""
        name, _ = self.find(rule, layer)
        dtype: torch.dtype = self.tensors[name].properties.dtype
        if dtype not in TORCH_NAMES:
            raise UserError(
                f"{self.folder}: {name} is {dtype}, but must be fp32, bf16 or fp16; use "
                "another checkpoint"
            )
        return dtype

    def read(self, rule: WeightRule, layer: int | None) -> torch.Tensor:
        """Reads a rule's tensor from its shards."""
        name, index = self.find(rule, layer)
        entry = self.tensors[name]
        size = tuple(entry.size)
        if index is None:
            begin, end = [0] * len(size), list(size)
        else:
            num_layers = size[0] if size else 0
            if index >= num_layers:
                raise UserError(
                    f"{self.folder}: {name} has only {num_layers} layers, but layer {index} was "
                    "requested"
                )
            begin, end = [index] + [0] * (len(size) - 1), [index + 1, *size[1:]]
        box = self._read_box(name, begin, end)
        return box if index is None else box[0]

    def read_whole(self, name: str) -> torch.Tensor:
        """Reads a whole stored tensor."""
        size = list(self.tensors[name].size)
        return self._read_box(name, [0] * len(size), size)

    def _read_box(self, name: str, begin: list[int], end: list[int]) -> torch.Tensor:
        entry = self.tensors[name]
        sizes = tuple(e - b for b, e in zip(begin, end, strict=True))
        box = torch.empty(sizes, dtype=entry.properties.dtype)
        shard = TensorShard(name, tuple(entry.size), tuple(begin), sizes, box)
        read_shard(shard, self.folder, self._reader, self._index)
        return box


@dataclass(frozen=True)
class ChunkToWrite:
    """A chunk of a global tensor, created when it is written."""

    name: str  # the global tensor's name
    global_shape: tuple[int, ...]  # the global tensor's shape
    offsets: tuple[int, ...]  # where the chunk begins
    sizes: tuple[int, ...]  # the chunk's shape
    dtype: torch.dtype  # the tensor's dtype
    make: Callable[[], torch.Tensor]  # creates the chunk


def write_distributed(
    folder: Path, chunks: Sequence[ChunkToWrite], objects: Mapping[str, bytes]
) -> None:
    """Writes a distributed checkpoint's tensors and index, one chunk in memory at a time.

    Equal chunks give equal bytes; torch's writer would add a random id and the folder's path.
    ``objects`` are stored objects that are not tensors.
    """
    plan: Plan = {"file": "__0_0.distcp", "tensors": [], "objects": []}
    with open(folder / plan["file"], "wb") as file:
        for chunk in chunks:
            begin = file.tell()
            around = frame(chunk.dtype, chunk.sizes, begin % ALIGNMENT)
            values = chunk.make().contiguous()
            assert values.dtype == chunk.dtype and tuple(values.shape) == chunk.sizes, chunk.name
            file.write(around.head)
            file.write(values.view(-1).view(torch.uint8).numpy().data)
            file.write(around.tail)
            box = (chunk.global_shape, chunk.offsets, chunk.sizes)
            plan_tensor(plan, chunk.name, chunk.dtype, box, begin, around.length)
        for name, content in objects.items():
            plan["objects"].append([name, file.tell(), len(content)])
            file.write(content)
    for name, content in index_files([plan]).items():
        (folder / name).write_bytes(content)
