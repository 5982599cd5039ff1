"""What a rank writes: which pieces of which tensors, where in its file, and the index of it all.

In: pieces of global tensors and small objects. Out: the layout of this rank's file, its bytes range
by range, and torch's index (`Metadata`) of every rank's. The format is torch's distributed one,
which torch, megatron-core and this package's converter read at any parallel layout.
"""

import pickle
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
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

from megatron_chatflow.checkpoint.safe_index import (
    METADATA,
    TENSOR_INDEX,
    coverage_fault,
    index_json,
)
from megatron_chatflow.checkpoint.tensor_records import ALIGNMENT, frame

Plan = dict[str, Any]
"""What a rank tells of its file: ``file``, ``tensors`` and ``objects``, as JSON holds it."""


@dataclass(frozen=True)
class TensorPiece:
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
    """Adds a tensor's piece to a plan.

    Args:
        plan: What is in a file.
        name: The global tensor's.
        dtype: Its dtype.
        box: Shape of the global tensor, offsets and shape of the piece.
        begin: Where the piece's record begins in the file, in bytes.
        length: The record's length in bytes.
    """
    parts = [list(part) for part in box]
    plan["tensors"].append([name, str(dtype).removeprefix("torch."), *parts, begin, length])


def lay_out(
    file_name: str, pieces: Sequence[TensorPiece], objects: Sequence[StoredObject]
) -> FileImage:
    """Puts a rank's pieces one behind the other, the values at multiples of 64 bytes.

    Raises:
        ValueError: A tensor's dtype is none that checkpoints hold.
    """
    plan: Plan = {"file": file_name, "tensors": [], "objects": []}
    image = FileImage(plan)
    for piece in pieces:
        begin = image.num_bytes
        around = frame(piece.values.dtype, piece.sizes, begin % ALIGNMENT)
        for part in (around.head, piece.values.detach(), around.tail):
            image._append(part)
        box = (piece.global_shape, piece.offsets, piece.sizes)
        plan_tensor(plan, piece.name, piece.values.dtype, box, begin, around.length)
    for stored in objects:
        plan["objects"].append([stored.name, image.num_bytes, len(stored.content)])
        image._append(stored.content)
    return image


def index_files(plans: Sequence[Plan]) -> dict[str, bytes]:
    """The index of every rank's file: the contents of ``.metadata`` and ``tensor_index.json``.

    They depend on what the plans say alone, not on which of their texts are the same object, which
    pickle would write once.

    Raises:
        ValueError: A tensor is not covered exactly, or a piece is there twice.
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
