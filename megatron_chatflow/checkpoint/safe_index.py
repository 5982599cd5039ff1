"""The index of a distributed checkpoint, read without trusting it.

In: a checkpoint folder. Out: torch's `Metadata`. torch itself unpickles the file as it is, which
runs whatever somebody put there; here a class that does not belong in an index is refused.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_chatflow.errors import UserError

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
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")


def read_index(folder: Path) -> Metadata:
    """Reads ``.metadata``.

    Args:
        folder: An ``iter_`` folder.

    Raises:
        UserError: There is none, it is damaged, or it holds something else than an index.
    """
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no distributed checkpoint (no .metadata)") from None
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        raise UserError(f"{path}: is damaged ({error}); use another checkpoint") from None
    if not isinstance(index, Metadata):
        raise UserError(f"{path}: is damaged (no index); use another checkpoint")
    return index
