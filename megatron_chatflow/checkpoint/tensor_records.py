"""Tensors as `torch.save` would write them, without copying them.

In: a dtype and a shape. Out: the bytes that stand before and behind the tensor's values. A
distributed checkpoint stores every piece of a tensor as such a record, a zip archive with one
stored entry for the values (ZIP APPNOTE 6.3.9, sections 4.3 and 4.5.3); writing the archive's
frame by hand is what lets values go from the staging buffer to the disk as they lie.
"""

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

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
