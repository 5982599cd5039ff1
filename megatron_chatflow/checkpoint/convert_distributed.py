"""Reads and writes distributed checkpoints tensor by tensor, in one process without any group.

In: a checkpoint folder in torch's distributed format. Out: its tensors, one at a time, whatever
parallel layout wrote them; or a new such folder from tensors that are made when their turn comes.
Memory holds one tensor. Nothing in a file is executed: the index is unpickled with a list of
allowed classes, tensors are read as weights only.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_chatflow.checkpoint.safe_index import read_index
from megatron_chatflow.checkpoint.weight_map import WeightRule
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
        """Dtype of a rule's tensor as stored."""
        dtype: torch.dtype = self.tensors[self.find(rule, layer)[0]].properties.dtype
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
            if index >= size[0]:
                raise UserError(f"{self.folder}: {name} has {size[0]} layers, not {index + 1}")
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
        num_filled = 0
        for chunk in entry.chunks:
            num_filled += self._copy_overlap(name, chunk, begin, end, box)
        if num_filled != box.numel():
            raise UserError(f"{self.folder}: {name} has holes; use another checkpoint")
        return box

    def _copy_overlap(
        self,
        name: str,
        chunk: ChunkStorageMetadata,
        begin: Sequence[int],
        end: Sequence[int],
        box: torch.Tensor,
    ) -> int:
        """Copies what a stored chunk holds of the box; returns the number of values."""
        source, target = [], []
        for b, e, offset, length in zip(begin, end, chunk.offsets, chunk.sizes, strict=True):
            first, last = max(b, offset), min(e, offset + length)
            if first >= last:
                return 0
            source.append(slice(first - offset, last - offset))
            target.append(slice(first - b, last - b))
        stored = self._load_chunk(name, chunk)
        view = box[tuple(target)]
        view.copy_(stored[tuple(source)])
        return view.numel()

    def _load_chunk(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise UserError(f"{self.folder}: a shard of {name} is not in the index")
        if getattr(place, "transform_descriptors", None):
            raise UserError(f"{self.folder}: {name} is stored compressed, which is not supported")
        path = self.folder / place.relative_path
        if path.parent != self.folder:
            raise UserError(f"{self.folder}: {name} lies outside the folder; do not trust it")
        try:
            with open(path, "rb") as file:
                file.seek(place.offset)
                raw = file.read(place.length)
            tensor = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; use another checkpoint") from None
        except Exception as error:  # a cut or damaged shard fails in any of torch's readers
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: is damaged at {name} ({reason})") from None
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != tuple(chunk.sizes):
            raise UserError(f"{path}: is damaged at {name}; use another checkpoint")
        return tensor


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


class _LazySavePlanner(SavePlanner):
    """Saves chunks that do not exist until they are asked for."""

    def __init__(self, chunks: Sequence[ChunkToWrite], objects: Mapping[str, bytes]) -> None:
        self._chunks = {(chunk.name, chunk.offsets): chunk for chunk in chunks}
        self._objects = objects

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing to set up: the plan is given."""

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(chunk.name, torch.Size(chunk.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes)
                    ),
                    properties=TensorProperties(dtype=chunk.dtype),
                    size=torch.Size(chunk.global_shape),
                ),
            )
            for chunk in self._chunks.values()
        ]
        items += [
            WriteItem(
                index=MetadataIndex(name),
                type=WriteItemType.BYTE_IO,
                bytes_io_data=BytesIOWriteData(nbytes=len(data)),
            )
            for name, data in self._objects.items()
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[index.fqn])
        assert index.offset is not None
        return self._chunks[index.fqn, tuple(index.offset)].make()


def write_distributed(
    folder: Path, chunks: Sequence[ChunkToWrite], objects: Mapping[str, bytes]
) -> None:
    """Writes a distributed checkpoint's tensors and index, one chunk in memory at a time.

    Args:
        folder: An existing folder.
        chunks: All pieces of all tensors, written in this order.
        objects: Names and bytes of stored objects that are no tensors.

    Raises:
        UserError: What making a chunk raised.
        OSError: The disk is full or not writable.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save({}, storage_writer=writer, planner=_LazySavePlanner(chunks, objects), no_dist=True)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
