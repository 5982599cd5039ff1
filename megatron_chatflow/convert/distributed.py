"""Reads and writes distributed checkpoints tensor by tensor, in one process without any group.

In: a checkpoint folder in torch's distributed format. Out: its tensors, one at a time, whatever
parallel layout wrote them; or a new such folder from tensors that are made when their turn comes.
Memory holds one tensor. Nothing in a file is executed, see `safe_index` and `safe_reader`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_chatflow.checkpoint.index import read_index
from megatron_chatflow.checkpoint.layout import ALIGNMENT, Plan, frame, index_files, plan_tensor
from megatron_chatflow.checkpoint.reader import first_line, read_record
from megatron_chatflow.convert.shape import TORCH_NAMES
from megatron_chatflow.convert.weight_map import WeightRule
from megatron_chatflow.errors import UserError

# Before a weight's name: where the plain and the distributed optimizer keep fp32 master weights.
MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")


class DistributedReader:
    """The tensors of a distributed checkpoint.

    Attributes:
        folder: Where it lies.
        tensors: Name to the global tensor's metadata.
    """

    def __init__(self, folder: Path, *, masters: bool = False) -> None:
        """Opens a checkpoint.

        Args:
            folder: An ``iter_`` folder.
            masters: Whether rules find the optimizer's fp32 master weights, where it has them.

        Raises:
            UserError: It holds no checkpoint, or a damaged one.
        """
        self.folder = folder
        self._prefixes = (*MASTER_PREFIXES, "") if masters else ("",)
        index = read_index(folder)
        self._places: Mapping[MetadataIndex, Any] = index.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def find(self, rule: WeightRule, layer: int | None) -> tuple[str, int | None]:
        """Where a rule's tensor lies: its name, and the index on a leading layer axis or None.

        megatron-core stores equal layers as one tensor with a layer axis, others one by one.

        Raises:
            UserError: The checkpoint has no such tensor.
        """
        for prefix, template in product(self._prefixes, (rule.megatron, *rule.aliases)):
            stacked = prefix + template.replace("{layer}.", "")
            if stacked in self.tensors:
                return stacked, layer
            single = prefix + template.format(layer=layer)
            if single in self.tensors:
                return single, None
        raise UserError(
            f"{self.folder}: has no tensor {rule.megatron.format(layer=layer)}; "
            "it is a checkpoint of another model"
        )

    def shape(self, rule: WeightRule, layer: int | None) -> tuple[int, ...]:
        """Shape of a rule's tensor as stored, padding rows included."""
        name, index = self.find(rule, layer)
        size = tuple(self.tensors[name].size)
        return size if index is None else size[1:]

    def dtype(self, rule: WeightRule, layer: int | None) -> torch.dtype:
        """Dtype of a rule's tensor as stored.

        Raises:
            UserError: It is none of fp32, bf16 and fp16.
        """
        name, _ = self.find(rule, layer)
        dtype: torch.dtype = self.tensors[name].properties.dtype
        if dtype not in TORCH_NAMES:
            raise UserError(
                f"{self.folder}: {name} is {dtype} and neither fp32, bf16 nor fp16; use another "
                "checkpoint"
            )
        return dtype

    def read(self, rule: WeightRule, layer: int | None) -> torch.Tensor:
        """Reads a rule's tensor, put together from the shards that hold it.

        Raises:
            UserError: A file is missing, cut short or damaged.
        """
        name, index = self.find(rule, layer)
        entry = self.tensors[name]
        size = tuple(entry.size)
        if index is None:
            begin, end = [0] * len(size), list(size)
        else:
            num_layers = size[0] if size else 0
            if index >= num_layers:
                raise UserError(f"{self.folder}: {name} has {num_layers} layers, not {index + 1}")
            begin, end = [index] + [0] * (len(size) - 1), [index + 1, *size[1:]]
        box = self._read_box(name, begin, end)
        return box if index is None else box[0]

    def read_whole(self, name: str) -> torch.Tensor:
        """Reads a whole stored tensor.

        Raises:
            UserError: A file is missing, cut short or damaged.
        """
        size = list(self.tensors[name].size)
        return self._read_box(name, [0] * len(size), size)

    def _read_box(self, name: str, begin: list[int], end: list[int]) -> torch.Tensor:
        entry = self.tensors[name]
        box = torch.empty(
            [e - b for b, e in zip(begin, end, strict=True)], dtype=entry.properties.dtype
        )
        for chunk in entry.chunks:  # which cover the tensor exactly, as `read_index` has checked
            self._copy_overlap(name, chunk, begin, end, box)
        return box

    def _copy_overlap(
        self,
        name: str,
        chunk: ChunkStorageMetadata,
        begin: Sequence[int],
        end: Sequence[int],
        box: torch.Tensor,
    ) -> None:
        """Copies what a stored chunk holds of the box."""
        source, target = [], []
        for b, e, offset, length in zip(begin, end, chunk.offsets, chunk.sizes, strict=True):
            first, last = max(b, offset), min(e, offset + length)
            if first >= last:
                return
            source.append(slice(first - offset, last - offset))
            target.append(slice(first - b, last - b))
        stored = self._load_chunk(name, chunk)
        box[tuple(target)].copy_(stored[tuple(source)])

    def _load_chunk(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._places[MetadataIndex(name, chunk.offsets)]
        path = self.folder / place.relative_path
        dtype = self.tensors[name].properties.dtype
        try:
            with open(path, "rb") as file:
                return read_record(file, place, chunk.sizes, dtype)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; use another checkpoint") from None
        except Exception as error:  # a cut or damaged shard fails in any of torch's readers
            raise UserError(
                f"{path}: is damaged at {name} ({first_line(error)}); use another checkpoint"
            ) from None


@dataclass(frozen=True)
class ChunkToWrite:
    """A piece of a global tensor that is made when its turn to be written comes.

    Attributes:
        name: The global tensor's name.
        global_shape: Its shape.
        offsets: Where the piece begins.
        sizes: The piece's shape.
        dtype: Of the tensor.
        make: Gives the piece.
    """

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def write_distributed(
    folder: Path, chunks: Sequence[ChunkToWrite], objects: Mapping[str, bytes]
) -> None:
    """Writes a distributed checkpoint's tensors and index, one chunk in memory at a time.

    The same chunks give the same bytes; torch's own writer adds a random id and the folder's path.

    Args:
        folder: An existing folder.
        chunks: All pieces of all tensors, written in this order.
        objects: Names and bytes of stored objects that are no tensors.

    Raises:
        UserError: What making a chunk raised.
        OSError: The disk is full or not writable.
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
