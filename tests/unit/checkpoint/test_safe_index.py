"""Tests that an index written by any Python version is read, and that other pickles are refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_chatflow.checkpoint.index import read_index
from megatron_chatflow.errors import UserError


class _ByName:
    """Pickles like an enum member in Python 3.11.0 to 3.11.3."""

    def __init__(self, owner: Any, name: str) -> None:
        self._call = (getattr, (owner, name))

    def __reduce__(self) -> Any:
        return self._call


def _write(folder: Path, memory_format: Any) -> None:
    size = torch.Size((2,))

    class Properties(TensorProperties):
        def __reduce__(self) -> Any:
            state = (torch.float32, torch.strided, False, memory_format, False)
            return TensorProperties, (), state

    chunk = ChunkStorageMetadata(offsets=torch.Size((0,)), sizes=size)
    entry = TensorStorageMetadata(Properties(dtype=torch.float32), size, [chunk])
    places = {MetadataIndex("weight", (0,)): _StorageInfo("__0_0.distcp", 0, 8)}
    index = Metadata(state_dict_metadata={"weight": entry}, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(index, protocol=4))


def test_an_enum_by_value_and_by_name(tmp_path: Path) -> None:
    for member in (
        _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT,
        _ByName(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"),
    ):
        _write(tmp_path, member)
        properties = read_index(tmp_path).state_dict_metadata["weight"].properties
        assert properties.memory_format is torch.contiguous_format


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (Metadata, "__init__"),
    ],
)
def test_nothing_else_is_got_by_name(tmp_path: Path, owner: Any, name: str) -> None:
    _write(tmp_path, _ByName(owner, name))
    with pytest.raises(UserError, match="is not allowed in an index"):
        read_index(tmp_path)


DEEP = 100_000


@pytest.mark.parametrize(
    "key",
    [
        b")" + b"\x85" * DEEP,
        b")" + b"\x94\x85" * DEEP,
        b")" + b"K\x01\x86" * DEEP,
        b")" + b"2\x86" * DEEP,
        b")" + b"q\x07h\x07\x86" * DEEP,
        b"(" * DEEP + b")" + b"t" * DEEP,
    ],
    ids=["one", "memoized", "two", "twice", "from the memo", "marked"],
)
def test_tuples_nested_deeply_do_not_end_the_process(tmp_path: Path, key: bytes) -> None:
    """Hashing them as keys of a dictionary overflows the stack."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04}" + key + b"K\x01s.")
    with pytest.raises(UserError, match="tuples are nested too deeply"):
        read_index(tmp_path)
