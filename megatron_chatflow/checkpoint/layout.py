"""What a rank writes: which shards of which tensors, where in its file, and the index of it all.

In: shards of global tensors and small objects. Out: the layout of this rank's file, its bytes range
by range, and torch's index (`Metadata`) of every rank's. The format is torch's distributed one,
which torch, megatron-core and this package's converter read at any parallel layout.

Tensors as `torch.save` would write them, without copying them.

In: a dtype and a shape. Out: the bytes that stand before and behind the tensor's values. A
distributed checkpoint stores every shard of a tensor as such a record, a zip archive with one
stored entry for the values (ZIP APPNOTE 6.3.9, sections 4.3 and 4.5.3); writing the archive's
frame by hand is what lets values go from the staging buffer to the disk as they lie.

Who writes what of a tensor that data parallelism replicates or cuts, decided without a message.

In: a range of a flattened tensor, or the shards that every replica holds. Out: the boxes that make
up the range, and one replica's share of the shards. Every rank comes to the same answer by itself.

Padded attention heads at the border of a checkpoint, which holds the model's own heads only.

In: boxes of padded matrices. Out: what of them is the model's own; and marks on tensors to load, by
which megatron-core fills the rest with zeros. A checkpoint is so the same at every layout.
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
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
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
_UINT32_MAX = 0xFFFFFFFF
_VERSION = 45  # the version of the format that knows sizes above 4 GiB
_PADDING_FIELD = 0x4246


class _Storage:
    """Stands for the values in the pickle."""


class _Tensor:
    """Pickles as a contiguous tensor of the stored values does."""

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
    """What stands around a tensor's values.

    Attributes:
        head: Before them; ends at a multiple of 64 bytes of the file.
        num_bytes: Of the values.
        tail: Behind them.
    """

    head: bytes
    num_bytes: int
    tail: bytes

    @property
    def length(self) -> int:
        """Bytes of the whole record."""
        return len(self.head) + self.num_bytes + len(self.tail)


def _pickled(dtype: torch.dtype, shape: tuple[int, ...], num_values: int) -> bytes:
    file = io.BytesIO()
    if dtype not in _STORAGES:
        raise ValueError(f"a checkpoint cannot hold tensors of {dtype}")
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
    """The frame of a contiguous tensor.

    Args:
        dtype: Of its values.
        shape: Its shape.
        phase: Where the record begins in the file, modulo 64.

    Raises:
        ValueError: Checkpoints do not hold this dtype.
    """
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
    # Values have no checksum here, as in torch's own faster mode; the file's hash guards them.
    central += _central_header(name, num_bytes, 0, len(head))
    large = struct.pack("<2H2Q", 1, 16, num_bytes, num_bytes) if num_bytes >= _UINT32_MAX else b""
    values = phase + len(head) + 30 + len(name) + len(large) + 4
    padding = -values % ALIGNMENT
    extra = large + struct.pack("<2H", _PADDING_FIELD, padding) + b"\0" * padding
    head += _local_header(name, num_bytes, 0, extra)
    return Frame(head, num_bytes, _end(central, num_entries + 1, len(head) + num_bytes))


def _end(central: bytes, num_entries: int, offset: int) -> bytes:
    """The central directory and what ends an archive, with the records for large ones."""
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


Plan = dict[str, Any]
"""What a rank tells of its file: ``file``, ``tensors`` and ``objects``, as JSON holds it."""


@dataclass(frozen=True)
class TensorShard:
    """A box of a global tensor.

    Attributes:
        name: The global tensor's.
        global_shape: Its shape.
        offsets: Where the box begins.
        sizes: The box's shape.
        values: The box, of any shape with as many values in the same order.
        may_differ: Whether a stored tensor with another number of rows may fill it.
    """

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    values: torch.Tensor
    may_differ: bool = False


@dataclass(frozen=True)
class StoredObject:
    """Something that is no tensor.

    Attributes:
        name: Its name.
        content: As `torch.save` wrote it.
    """

    name: str
    content: bytes


def _length(part: bytes | torch.Tensor) -> int:
    return len(part) if isinstance(part, bytes) else part.numel() * part.element_size()


@dataclass
class FileImage:
    """A rank's file before it is one.

    Attributes:
        plan: What is in it.
        num_bytes: Its length.
    """

    plan: Plan
    num_bytes: int = 0
    _parts: list[bytes | torch.Tensor] = field(default_factory=list)
    _offsets: list[int] = field(default_factory=list)

    def _append(self, part: bytes | torch.Tensor) -> None:
        self._parts.append(part)
        self._offsets.append(self.num_bytes)
        self.num_bytes += _length(part)

    def copy(self, begin: int, end: int, target: torch.Tensor) -> None:
        """Copies bytes [begin, end) of the file into ``target``, uint8, as long or longer.

        Copies from a GPU are under way when it returns; synchronize before the bytes are used.
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
        plan: What is in a file.
        name: The global tensor's.
        dtype: Its dtype.
        box: Shape of the global tensor, offsets and shape of the shard.
        begin: Where the shard's record begins in the file, in bytes.
        length: The record's length in bytes.
    """
    parts = [list(part) for part in box]
    plan["tensors"].append([name, str(dtype).removeprefix("torch."), *parts, begin, length])


def build_file_image(
    file_name: str, shards: Sequence[TensorShard], objects: Sequence[StoredObject]
) -> FileImage:
    """Puts a rank's shards one behind the other, the values at multiples of 64 bytes.

    Raises:
        ValueError: A tensor's dtype is none that checkpoints hold.
    """
    plan: Plan = {"file": file_name, "tensors": [], "objects": []}
    image = FileImage(plan)
    for shard in shards:
        begin = image.num_bytes
        around = frame(shard.values.dtype, shard.sizes, begin % ALIGNMENT)
        for part in (around.head, shard.values.detach(), around.tail):
            image._append(part)
        box = (shard.global_shape, shard.offsets, shard.sizes)
        plan_tensor(plan, shard.name, shard.values.dtype, box, begin, around.length)
    for stored in objects:
        plan["objects"].append([stored.name, image.num_bytes, len(stored.content)])
        image._append(stored.content)
    return image


def index_files(plans: Sequence[Plan]) -> dict[str, bytes]:
    """The index of every rank's file: the contents of ``.metadata`` and ``tensor_index.json``.

    They depend on what the plans say alone, not on which of their texts are the same object, which
    pickle would write once.

    Raises:
        ValueError: A tensor is not covered exactly, or a shard is there twice.
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
                raise ValueError(f"{name} at {offsets} is saved by two ranks")
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


# Replicated shards are cut no smaller: every shard is an entry in the index.
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


def assign_shards(shards: Sequence[TensorShard], rank: int, num_replicas: int) -> list[TensorShard]:
    """What one of several replicas writes of the shards that all of them hold.

    Large shards are cut by rows; then each goes, the largest first, to whoever has least.

    Args:
        shards: The same on every replica, values included.
        rank: Which replica.
        num_replicas: How many.
    """
    if num_replicas == 1:
        return list(shards)
    cut = [part for shard in shards for part in _cut(shard, num_replicas)]
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


def _cut(shard: TensorShard, num_parts: int) -> list[TensorShard]:
    """Cuts a shard along its first axis that is longer than 1 into at most so many blocks."""
    axis = next((axis for axis, size in enumerate(shard.sizes) if size > 1), None)
    num_parts = min(num_parts, _num_bytes(shard) // _SMALLEST_CUT_BYTES)
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
"""As `config.model_shape.unpadded_sizes` gives them."""


def unpadded_sizes_of(chunks: list[Any]) -> UnpaddedSizes:
    """Of model chunks as `model.llama.build_llama` built them."""
    sizes: UnpaddedSizes = chunks[0].unpadded_sizes
    return sizes


def unpadded_values(
    name: str, begin: Sequence[int], data: torch.Tensor, unpadded_sizes: UnpaddedSizes
) -> torch.Tensor | None:
    """What of a matrix's slice is the model's own: a view, or None if nothing is.

    Args:
        name: Whose end tells which matrix it is.
        begin: Where the slice begins, an offset an axis.
        data: The slice, of any number of axes before the last two.
        unpadded_sizes: What is padded.
    """
    found = _find(name, unpadded_sizes)
    if found is None:
        return data
    axis, size = found
    axis -= 2
    length = min(data.shape[axis], size - begin[axis])
    return data.narrow(axis, 0, length) if length > 0 else None


def unpadded_shard(shard: TensorShard, unpadded_sizes: UnpaddedSizes) -> TensorShard | None:
    """What of a shard is the model's own: itself where nothing is padded, None if nothing is."""
    found = _find(shard.name, unpadded_sizes)
    if found is None:
        return shard
    own = unpadded_values(shard.name, shard.offsets, shard.values.view(shard.sizes), unpadded_sizes)
    if own is None:
        return None
    # Where all layers are one tensor, the axes of layers come first.
    axis = found[0] + len(shard.global_shape) - 2
    whole = (*shard.global_shape[:axis], found[1], *shard.global_shape[axis + 1 :])
    return replace(shard, global_shape=whole, sizes=tuple(own.shape), values=own)


def unpadded_shards(
    shards: Sequence[TensorShard], unpadded_sizes: UnpaddedSizes
) -> list[TensorShard]:
    """What of shards is the model's own."""
    own = [unpadded_shard(shard, unpadded_sizes) for shard in shards]
    return [shard for shard in own if shard is not None]


def allow_padded_heads(state: dict[str, Any], unpadded_sizes: UnpaddedSizes) -> None:
    """Lets padded tensors of a sharded state be loaded from the model's own, zeros behind them."""
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and _find(tensor.key, unpadded_sizes) is not None:
            tensor.allow_shape_mismatch = True


def _find(name: str, unpadded_sizes: UnpaddedSizes) -> tuple[int, int] | None:
    return next((found for end, found in unpadded_sizes.items() if name.endswith(end)), None)
