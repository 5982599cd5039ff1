"""The layout of checkpoint files: which shards a rank writes, where in its file, and the index.

The format is torch's distributed checkpoint, which torch, megatron-core and this package's
converter load at any parallel layout. A rank's file is a sequence of records, one for each shard,
each of them a zip archive as `torch.save` writes it, with one stored entry for the values (ZIP
APPNOTE 6.3.9, sections 4.3 and 4.5.3). The bytes around the values are generated here, so that
values go from the staging buffer to the disk without another copy.

Every rank computes the same division of replicated shards by itself, without communication.
Padded attention heads are left out, so that a checkpoint is the same at every parallel layout.
"""

import io
import math
import pickle
import struct
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_chatflow.checkpoint.index import METADATA, TENSOR_INDEX, coverage_fault, index_json

ALIGNMENT = 64
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
_MIN_SHARD_BYTES = 8 * 2**20  # replicated shards are split no smaller: each is an index entry
_UINT32_MAX = 0xFFFFFFFF
_VERSION = 45  # the ZIP version that supports sizes above 4 GiB
_PADDING_FIELD = 0x4246


Plan = dict[str, Any]
"""A rank's description of its file as JSON: ``file``, ``tensors`` and ``objects``."""


@dataclass(frozen=True)
class SplitFp32:
    """fp32 values as transformer-engine's Adam stores them with ``store_param_remainders``.

    As integers, the bits of a value are those of ``rounded``, followed by 16 zeros, plus the
    remainder. ``rounded`` are the model's weights, so that master weights take 2 bytes.
    """

    rounded: torch.Tensor  # bfloat16[n]
    remainders: torch.Tensor  # int16[n]

    def joined(self) -> torch.Tensor:
        """Returns the values, of the same shape."""
        high = self.rounded.view(torch.int16).to(torch.int32) << 16
        return (high + self.remainders).view(torch.float32)

    def set(self, values: torch.Tensor) -> None:
        """Sets the remainders to those of ``values``, float32[n], which ``rounded`` is near.

        A value exactly between two bf16 values may have been rounded towards 0, which no remainder
        expresses; the next fp32 value towards 0 takes its place.
        """
        high = self.rounded.view(torch.int16).to(torch.int32) << 16
        low = values.view(torch.int32) - high
        self.remainders.copy_(low.clamp_(-(1 << 15), (1 << 15) - 1))


@dataclass(frozen=True)
class TensorShard:
    """A box of a global tensor."""

    name: str  # the global tensor's name
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]  # where the box begins
    sizes: tuple[int, ...]  # the box's shape
    values: torch.Tensor  # the values in order, in a tensor of any shape
    # whether a stored tensor with another number of rows may be loaded into it
    may_differ: bool = False
    # int16, of the same shape: completes bf16 values to fp32 values when they are saved
    remainders: torch.Tensor | None = None

    @property
    def parts(self) -> "torch.Tensor | SplitFp32":
        """The values as they are saved."""
        values = self.values.detach()
        return values if self.remainders is None else SplitFp32(values, self.remainders)


@dataclass(frozen=True)
class StoredObject:
    """A stored object that is not a tensor."""

    name: str
    content: bytes  # its bytes as `torch.save` wrote them


_Part = bytes | torch.Tensor | SplitFp32


def _length(part: _Part) -> int:
    if isinstance(part, bytes):
        return len(part)
    if isinstance(part, SplitFp32):
        return part.rounded.numel() * torch.float32.itemsize
    return part.numel() * part.element_size()


@dataclass
class FileImage:
    """The content of a rank's file, of which any range of bytes can be copied."""

    plan: Plan  # the description of the content
    num_bytes: int = 0  # the file's length
    _parts: list[_Part] = field(default_factory=list)
    _offsets: list[int] = field(default_factory=list)

    def _append(self, part: _Part) -> None:
        self._parts.append(part)
        self._offsets.append(self.num_bytes)
        self.num_bytes += _length(part)

    def copy(self, begin: int, end: int, target: torch.Tensor) -> None:
        """Copies bytes [begin, end) of the file into ``target``, a uint8 tensor.

        Copies from a GPU are asynchronous; synchronize before using the bytes.
        """
        number = max(0, bisect_right(self._offsets, begin) - 1)
        for offset, part in zip(self._offsets[number:], self._parts[number:], strict=True):
            if offset >= end:
                break
            length = _length(part)
            first, last = max(begin, offset), min(end, offset + length)
            if first >= last:
                continue
            place = target[first - begin : last - begin]
            if isinstance(part, SplitFp32):
                part = part.joined()
            if isinstance(part, bytes):
                taken = bytearray(part[first - offset : last - offset])
                place.copy_(torch.frombuffer(taken, dtype=torch.uint8))
            elif last - first == length:
                place.view(part.dtype).view(part.shape).copy_(part, non_blocking=True)
            else:
                flat = part.contiguous().view(-1).view(torch.uint8)
                place.copy_(flat[first - offset : last - offset], non_blocking=True)


def plan_tensor(
    plan: Plan, name: str, dtype: torch.dtype, box: Sequence[Sequence[int]], begin: int, length: int
) -> None:
    """Adds a tensor's shard to a plan.

    Args:
        plan: The plan of a file.
        name: The global tensor's name.
        dtype: Its dtype.
        box: The shape of the global tensor, and the offsets and the shape of the shard.
        begin: The position of the shard's record in the file, in bytes.
        length: The record's length in bytes.
    """
    parts = [list(part) for part in box]
    plan["tensors"].append([name, str(dtype).removeprefix("torch."), *parts, begin, length])


def build_file_image(
    file_name: str, shards: Sequence[TensorShard], objects: Sequence[StoredObject]
) -> FileImage:
    """Lays out a rank's shards one after the other, with values at multiples of 64 bytes."""
    plan: Plan = {"file": file_name, "tensors": [], "objects": []}
    image = FileImage(plan)
    for shard in shards:
        begin, parts = image.num_bytes, shard.parts
        dtype = torch.float32 if isinstance(parts, SplitFp32) else parts.dtype
        around = frame(dtype, shard.sizes, begin % ALIGNMENT)
        for part in (around.head, parts, around.tail):
            image._append(part)
        box = (shard.global_shape, shard.offsets, shard.sizes)
        plan_tensor(plan, shard.name, dtype, box, begin, around.length)
    for stored in objects:
        plan["objects"].append([stored.name, image.num_bytes, len(stored.content)])
        image._append(stored.content)
    return image


def index_files(plans: Sequence[Plan]) -> dict[str, bytes]:
    """Returns the index of all ranks' files: contents of ``.metadata`` and ``tensor_index.json``.

    Equal plans give equal bytes. Names are made unique objects first, because pickle writes an
    object once and refers to it afterwards.

    Raises:
        ValueError: The shards do not cover a tensor exactly, or two ranks save the same shard.
    """
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    names: dict[str, str] = {}
    for plan in plans:
        for given, dtype, shape, offsets, sizes, begin, length in plan["tensors"]:
            name = names.setdefault(given, given)
            entry = tensors.setdefault(
                name,
                TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, dtype)), torch.Size(shape), []
                ),
            )
            assert isinstance(entry, TensorStorageMetadata)
            key = MetadataIndex(name, torch.Size(offsets), len(entry.chunks))
            if key in places:
                raise ValueError(f"{name} at offset {offsets} would be saved by two ranks")
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            places[key] = _StorageInfo(plan["file"], begin, length)
        for given, begin, length in plan["objects"]:
            name = names.setdefault(given, given)
            tensors[name] = BytesStorageMetadata()
            places[MetadataIndex(name)] = _StorageInfo(plan["file"], begin, length)
    for name, entry in tensors.items():
        if isinstance(entry, TensorStorageMetadata):
            fault = coverage_fault(entry.size, ((c.offsets, c.sizes) for c in entry.chunks))
            if fault is not None:
                raise ValueError(f"{name} {fault}")
    index = Metadata(state_dict_metadata=tensors, storage_data=places)
    content = pickle.dumps(index, protocol=4)
    return {METADATA: content, TENSOR_INDEX: index_json(index, content)}


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets and the shape of a box."""


def boxes_of_range(begin: int, end: int, shape: Sequence[int]) -> list[Box]:
    """Splits the values [begin, end) of a flattened tensor into boxes of the tensor.

    The distributed optimizer shards flat buffers at arbitrary positions, while a checkpoint holds
    boxes: for a matrix the rest of a row, whole rows, and the beginning of a row. There are at most
    ``2 * len(shape) - 1`` boxes, in the order of their values.
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


def assign_shards(shards: Sequence[TensorShard], rank: int, num_replicas: int) -> list[TensorShard]:
    """Returns the part of replicated shards that one replica writes.

    Large shards are split by rows. Then each shard, in descending order of size, is assigned to the
    replica with the fewest bytes.
    """
    if num_replicas == 1:
        return list(shards)
    cut = [part for shard in shards for part in _split(shard, num_replicas)]
    order = sorted(range(len(cut)), key=lambda number: -_num_bytes(cut[number]))
    loads = [0] * num_replicas
    mine = []
    for number in order:
        least = loads.index(min(loads))
        loads[least] += _num_bytes(cut[number])
        if least == rank:
            mine.append(number)
    return [cut[number] for number in sorted(mine)]


def _num_bytes(shard: TensorShard) -> int:
    return shard.values.numel() * shard.values.element_size()


def _split(shard: TensorShard, num_parts: int) -> list[TensorShard]:
    """Splits a shard along its first axis longer than 1 into at most ``num_parts`` shards."""
    axis = next((axis for axis, size in enumerate(shard.sizes) if size > 1), None)
    num_parts = min(num_parts, _num_bytes(shard) // _MIN_SHARD_BYTES)
    if axis is None or num_parts < 2:
        return [shard]
    num_rows = shard.sizes[axis]
    bounds = [num_rows * number // num_parts for number in range(num_parts + 1)]
    rows = shard.values.reshape(num_rows, -1)
    return [
        replace(
            shard,
            offsets=_with(shard.offsets, axis, shard.offsets[axis] + first),
            sizes=_with(shard.sizes, axis, last - first),
            values=rows[first:last],
        )
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
        if first < last
    ]


def _with(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


UnpaddedSizes = Mapping[str, tuple[int, int]]
"""Axis and size of padded tensors by the end of their names, see `config.shape.unpadded_sizes`."""


def unpadded_sizes_of(chunks: list[Any]) -> UnpaddedSizes:
    """Returns the unpadded sizes of model chunks built by `model.llama.build_llama`."""
    sizes: UnpaddedSizes = chunks[0].unpadded_sizes
    return sizes


def unpadded_values(
    name: str, begin: Sequence[int], data: torch.Tensor, unpadded_sizes: UnpaddedSizes
) -> torch.Tensor | None:
    """Returns a view of a tensor's slice without padded heads; None if nothing remains.

    The slice ``data`` may have axes of layers before those of ``begin``, where it begins.
    """
    found = _find(name, unpadded_sizes)
    if found is None:
        return data
    axis, size = found
    length = min(data.shape[axis], size - begin[axis])
    return data.narrow(axis, 0, length) if length > 0 else None


def unpadded_shard(shard: TensorShard, unpadded_sizes: UnpaddedSizes) -> TensorShard | None:
    """Returns a shard without padded heads; None if nothing remains."""
    found = _find(shard.name, unpadded_sizes)
    if found is None:
        return shard
    own, remainders = (
        values
        if values is None
        else unpadded_values(shard.name, shard.offsets, values.view(shard.sizes), unpadded_sizes)
        for values in (shard.values, shard.remainders)
    )
    if own is None:
        return None
    # Where all layers are one tensor, the axes of layers come first.
    axis = found[0] + len(shard.global_shape)
    whole = (*shard.global_shape[:axis], found[1], *shard.global_shape[axis + 1 :])
    return replace(
        shard, global_shape=whole, sizes=tuple(own.shape), values=own, remainders=remainders
    )


def unpadded_shards(
    shards: Sequence[TensorShard], unpadded_sizes: UnpaddedSizes
) -> list[TensorShard]:
    """Returns shards without padded heads."""
    own = [unpadded_shard(shard, unpadded_sizes) for shard in shards]
    return [shard for shard in own if shard is not None]


def allow_padded_heads(state: dict[str, Any], unpadded_sizes: UnpaddedSizes) -> None:
    """Lets megatron-core load padded tensors from unpadded ones and fill the rest with zeros."""
    # Readers of Hugging Face folders import this module and must not wait for megatron-core.
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and _find(tensor.key, unpadded_sizes) is not None:
            tensor.allow_shape_mismatch = True


def _find(name: str, unpadded_sizes: UnpaddedSizes) -> tuple[int, int] | None:
    return next((found for end, found in unpadded_sizes.items() if name.endswith(end)), None)


class _Storage:
    """Stands for the tensor's values in the pickle."""


class _Tensor:
    """Is pickled like a contiguous tensor of the values."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride: list[int] = []
        step = 1
        for length in reversed(self._shape):
            stride.insert(0, step)
            step *= max(length, 1)
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (_Storage(), 0, self._shape, tuple(stride), False, OrderedDict())


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, storage: tuple[Any, ...]) -> None:
        super().__init__(file, protocol=2)
        self._storage = storage

    def persistent_id(self, obj: Any) -> Any:
        return self._storage if isinstance(obj, _Storage) else None


@dataclass(frozen=True)
class Frame:
    """The bytes around a tensor's values in a record."""

    head: bytes  # the bytes before the values; ends at a multiple of 64 bytes in the file
    num_bytes: int  # number of bytes of the values
    tail: bytes  # the bytes after the values

    @property
    def length(self) -> int:
        """The length of the whole record in bytes."""
        return len(self.head) + self.num_bytes + len(self.tail)


def _pickled(dtype: torch.dtype, shape: tuple[int, ...], num_values: int) -> bytes:
    file = io.BytesIO()
    if dtype not in _STORAGES:
        raise ValueError(f"checkpoints do not support tensors of {dtype}")
    _Pickler(file, ("storage", _STORAGES[dtype], "0", "cpu", num_values)).dump(_Tensor(shape))
    return file.getvalue()


def _local_header(name: bytes, size: int, checksum: int, extra: bytes) -> bytes:
    short = min(size, _UINT32_MAX)
    fields = (_VERSION, 0, 0, 0, 0, checksum, short, short, len(name), len(extra))
    return struct.pack("<4s5H3L2H", b"PK\3\4", *fields) + name + extra


def _central_header(name: bytes, size: int, checksum: int, offset: int) -> bytes:
    short = min(size, _UINT32_MAX)
    extra = struct.pack("<2H2Q", 1, 16, size, size) if short == _UINT32_MAX else b""
    fields = (_VERSION, _VERSION, 0, 0, 0, 0, checksum, short, short, len(name), len(extra))
    header = struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields, 0, 0, 0, 0, offset)
    return header + name + extra


@lru_cache(maxsize=4096)
def frame(dtype: torch.dtype, shape: tuple[int, ...], phase: int) -> Frame:
    """Returns the frame of a contiguous tensor's record at a position in the file modulo 64."""
    num_values = torch.Size(shape).numel()
    num_bytes = num_values * dtype.itemsize
    head, central = b"", b""
    num_entries = 0
    for name, content in (
        (b"archive/data.pkl", _pickled(dtype, shape, num_values)),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    ):
        checksum = zlib.crc32(content)
        central += _central_header(name, len(content), checksum, len(head))
        head += _local_header(name, len(content), checksum, b"") + content
        num_entries += 1
    name = b"archive/data/0"
    # The values have no CRC, as in torch's faster mode; `hashes.json` protects them.
    central += _central_header(name, num_bytes, 0, len(head))
    large = struct.pack("<2H2Q", 1, 16, num_bytes, num_bytes) if num_bytes >= _UINT32_MAX else b""
    values = phase + len(head) + 30 + len(name) + len(large) + 4
    padding = -values % ALIGNMENT
    extra = large + struct.pack("<2H", _PADDING_FIELD, padding) + b"\0" * padding
    head += _local_header(name, num_bytes, 0, extra)
    return Frame(head, num_bytes, _end(central, num_entries + 1, len(head) + num_bytes))


def _end(central: bytes, num_entries: int, offset: int) -> bytes:
    """Returns the central directory and the end records, including those for large archives."""
    large_end = struct.pack(
        "<4sQ2H2L4Q",
        *(b"PK\6\6", 44, _VERSION, _VERSION, 0, 0),
        *(num_entries, num_entries, len(central), offset),
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, offset + len(central), 1)
    end = struct.pack(
        "<4s4H2LH",
        *(b"PK\5\6", 0, 0, num_entries, num_entries),
        *(len(central), min(offset, _UINT32_MAX), 0),
    )
    return central + large_end + locator + end
