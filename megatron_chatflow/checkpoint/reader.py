"""Reads checkpoint files without trusting them.

`SafeReader` is torch's reader with two changes: the index is read by `checkpoint.index`, and
tensors are loaded with ``weights_only``. A file that is missing, truncated or damaged raises an
error that names it. `fill` reads shards of tensors in place.
"""

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from megatron_chatflow.checkpoint.index import read_index
from megatron_chatflow.checkpoint.layout import TensorShard
from megatron_chatflow.errors import UserError


def read_record(
    file: io.BufferedReader, place: Any, sizes: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Reads a chunk of a tensor, whose position, shape and dtype come from the index.

    Raises:
        ValueError: The record is not a tensor of this shape and dtype. Reading a damaged record may
            raise any other exception.
    """
    record = _read_bytes(file, place)
    if zipfile.is_zipfile(record):  # a compressed entry could expand to gigabytes
        with zipfile.ZipFile(record) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("a tensor is compressed, which is not supported")
    record.seek(0)
    tensor: torch.Tensor = torch.load(record, map_location="cpu", weights_only=True)
    fault = tensor_fault(tensor)
    if fault is not None:
        raise ValueError(fault)
    tensor = tensor.detach()
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(sizes):
        raise ValueError(
            f"a tensor is {tensor.dtype} of shape {list(tensor.shape)}, but the index says "
            f"{dtype} of shape {list(sizes)}"
        )
    return tensor


def tensor_fault(value: Any) -> str | None:
    """Returns why a loaded value is not an ordinary CPU tensor; None if it is one."""
    if not isinstance(value, torch.Tensor):
        return "found an object instead of a tensor"
    if value.is_nested or value.layout != torch.strided:
        return "a tensor is sparse or nested"
    if value.is_quantized:
        return "a tensor is quantized"
    if value.device.type != "cpu":
        return f"a tensor's values are missing (its device is {value.device.type})"
    return None


def _read_bytes(file: io.BufferedReader, place: Any) -> io.BytesIO:
    if place.offset + place.length > os.fstat(file.fileno()).st_size:
        raise ValueError("the file is truncated")
    file.seek(place.offset)
    return io.BytesIO(file.read(place.length))


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


class SafeReader(FileSystemReader):
    """torch's file reader with a safe index and errors that name the file."""

    advice = "load another checkpoint"

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Reads and checks the index."""
        return read_index(Path(self.path))

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        """Prepares to read with an index."""
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._chunks = {
            MetadataIndex(name, chunk.offsets): (chunk.sizes, entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
        }

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Reads the items of a plan; raises `UserError` for a missing or damaged file."""
        by_file: dict[str, list[tuple[int, ReadItem]]] = {}
        for item in plan.items:
            place = self.storage_data.get(item.storage_index)
            if place is None:
                raise UserError(
                    f"{self.path}: .metadata has no location for a chunk of "
                    f"{item.storage_index.fqn}; {self.advice}"
                )
            by_file.setdefault(place.relative_path, []).append((place.offset, item))
        for name, items in by_file.items():
            path = Path(self.path) / name
            where = ""
            try:
                with open(path, "rb") as file:
                    for _, item in sorted(items, key=lambda entry: entry[0]):
                        where = f" at {item.storage_index.fqn}"
                        self._read_item(file, item, planner)
            except FileNotFoundError:
                raise UserError(f"{path}: is missing; {self.advice}") from None
            except Exception as error:  # a damaged record may raise anything in torch
                raise UserError(
                    f"{path}: is damaged{where} ({first_line(error)}); {self.advice}"
                ) from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, file: io.BufferedReader, item: ReadItem, planner: LoadPlanner) -> None:
        place = self.storage_data[item.storage_index]
        if item.type is LoadItemType.BYTE_IO:
            planner.load_bytes(item, _read_bytes(file, place))
            return
        stored = read_record(file, place, *self._chunks[item.storage_index])
        for axis, (first, length) in enumerate(
            zip(item.storage_offsets, item.lengths, strict=True)
        ):
            stored = stored.narrow(axis, first, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != stored.shape:
            raise ValueError("a tensor has a different shape than in the model")
        if target.is_floating_point() != stored.is_floating_point():
            raise ValueError(f"a tensor is {stored.dtype}, but {target.dtype} in the model")
        target.copy_(stored)
        planner.commit_tensor(item, target)


class _ShardPlanner(LoadPlanner):
    """Reads boxes into the tensors of shards."""

    def __init__(self, folder: Path, shards: Sequence[TensorShard], index: Metadata) -> None:
        self._by_name: dict[str, list[TensorShard]] = {}
        for shard in shards:
            self._by_name.setdefault(shard.name, []).append(shard)
        self.items: list[ReadItem] = []
        for name, wanted in self._by_name.items():
            entry = index.state_dict_metadata.get(name)
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"{folder}: has no tensor {name}; load another checkpoint")
            _check_shape(folder, wanted[0], tuple(entry.size))
            # Chunks cover the tensor exactly, as `read_index` has checked.
            self.items += create_read_items_for_chunk_list(name, entry, [_box(p) for p in wanted])

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        number = read_item.dest_index.index
        assert number is not None
        shard = self._by_name[read_item.dest_index.fqn][number]
        target = shard.values.view(shard.sizes)
        for axis, (first, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(axis, first, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the tensor is the shard's own memory."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Is never called, because the plan reads tensors only; the base class requires it."""
        raise NotImplementedError("the plan contains only tensors")

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Nothing to do: the constructor makes the plan."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self.items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


def _box(shard: TensorShard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes))


def _check_shape(folder: Path, shard: TensorShard, stored: tuple[int, ...]) -> None:
    wanted = shard.global_shape
    is_same = stored == wanted
    if shard.may_differ:  # only in rows
        is_same = len(stored) == len(wanted) and stored[1:] == wanted[1:]
    if not is_same:
        raise UserError(
            f"{folder}: {shard.name} has shape {stored}, but this model expects {wanted}; load a "
            "checkpoint of this model"
        )


def fill(shards: Sequence[TensorShard], folder: Path, reader: FileSystemReader) -> None:
    """Reads shards in place, without communication; rows that the checkpoint lacks become 0."""
    index = reader.read_metadata()
    planner = _ShardPlanner(folder, shards, index)
    for shard in shards:
        if shard.may_differ:
            shard.values.zero_()
    reader.set_up_storage_reader(index, True)
    reader.read_data(LoadPlan(planner.items), planner).wait()


def read_shard(shard: TensorShard, folder: Path, reader: SafeReader, index: Metadata) -> None:
    """Reads a shard in place with a reader that is set up for the folder's index."""
    planner = _ShardPlanner(folder, [shard], index)
    reader.read_data(LoadPlan(planner.items), planner)
