"""The index of a distributed checkpoint, read without trusting it.

In: a checkpoint folder. Out: torch's `Metadata`. torch itself unpickles the file as it is, which
runs whatever somebody put there; here a class that does not belong in an index is refused.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron_chatflow.errors import UserError

# Scanning takes a second for each 5 MB; larger indices are those of large runs, not of fuzzers.
_LARGEST_SCANNED = 4 * 2**20
_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
)
_ALLOWED_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.float16)),
    *(("torch", name) for name in ("bfloat16", "float64", "int64", "int32", "int16", "int8")),
    *(("torch", name) for name in ("uint8", "bool", "strided", "contiguous_format")),
}
_ALLOWED_CLASSES = {
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_class = module in _ALLOWED_MODULES and name in _ALLOWED_CLASSES
        if is_class or (module, name) in _ALLOWED_NAMES:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def _memory_format(owner: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """What stands for ``getattr``, by which Python 3.11.0 to 3.11.3 pickle members of an enum."""
    if owner is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError("builtins.getattr does not belong there")
    return _MEM_FORMAT_ENCODING[name]


def read_index(folder: Path) -> Metadata:
    """Reads ``.metadata``.

    Args:
        folder: An ``iter_`` folder.

    Raises:
        UserError: There is none, it is damaged, or it holds something else than an index.
    """
    path = folder / ".metadata"
    try:
        content = path.read_bytes()
        _check_sizes(content)
        index = _IndexUnpickler(io.BytesIO(content)).load()
        _check_places(index)
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no distributed checkpoint (no .metadata)") from None
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        raise UserError(f"{path}: is damaged ({error}); use another checkpoint") from None
    assert isinstance(index, Metadata)
    return index


def _check_sizes(content: bytes) -> None:
    """Refuses what makes an unpickler take memory beyond all bounds: a place far off in its memo.

    torch's own indices, of pickle's fourth protocol, number no places.
    """
    if len(content) > _LARGEST_SCANNED:
        return
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(content):
            raise ValueError("a value's number is too large")


def _check_places(index: Any) -> None:
    """Refuses an index that is none, or whose parts lie anywhere else than in the folder."""
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise ValueError("no index")
    for place in index.storage_data.values():
        name = place.relative_path
        is_file = Path(name).name == name and name not in ("", "..") and "\0" not in name
        if not is_file or place.offset < 0 or place.length < 0:
            raise ValueError(f"{name!r} is no part of a file of the folder")
    for entry in index.state_dict_metadata.values():
        if not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise ValueError("an entry is none of an index")
