"""Tests that a checkpoint or model folder cannot make a command read a file outside of it."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_chatflow.checkpoint.direct_file import ALGORITHM, hash_file
from megatron_chatflow.checkpoint.files import (
    MANIFEST,
    latest_iteration,
    read_manifest,
    resolve_checkpoint,
)
from megatron_chatflow.checkpoint.index import read_index
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.errors import UserError

OUTSIDE = (
    "../outside.safetensors",
    "a/../../outside.safetensors",
    "..",
    ".",
    "",
    "a\0b",
    "a" * 999,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder beside a complete file that a path traversal would find."""
    save_file({"w": torch.ones(3)}, tmp_path / "outside.safetensors")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    return tmp_path / "folder"


def names(folder: Path) -> list[str]:
    return [*OUTSIDE, str(folder.parent / "outside.safetensors")]


@pytest.mark.parametrize("number", range(len(OUTSIDE) + 1))
def test_an_index_of_safetensors(folder: Path, number: int) -> None:
    name = names(folder)[number]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="download it again") as caught:
        HuggingFaceWeights(folder)
    assert "\n" not in str(caught.value)
    save_file({"w": torch.ones(3)}, folder / "inside.safetensors")
    index.write_text(json.dumps({"weight_map": {"w": "inside.safetensors"}}))
    HuggingFaceWeights(folder)


def test_an_index_nested_deeply(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is damaged"):
        HuggingFaceWeights(folder)


@pytest.mark.parametrize("number", [n for n in range(len(OUTSIDE) + 1) if n != 6])
def test_an_index_of_a_checkpoint(folder: Path, number: int) -> None:
    def write(name: str) -> None:
        place = _StorageInfo(relative_path=name, offset=0, length=8)
        index = Metadata({}, storage_data={MetadataIndex("w"): place})
        (folder / ".metadata").write_bytes(pickle.dumps(index))

    write("__0_0.distcp")
    read_index(folder)
    write(names(folder)[number])
    with pytest.raises(UserError, match=r"\.metadata: is damaged"):
        read_index(folder)


@pytest.mark.parametrize("number", [n for n in range(len(OUTSIDE) + 1) if n != 6])
def test_a_manifest(folder: Path, number: int) -> None:
    hashed = hash_file(folder.parent / "outside.safetensors")
    entry = {"bytes": hashed.num_bytes, "digest": hashed.digest}
    content = {"algorithm": ALGORITHM, "files": {names(folder)[number]: entry}}
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not a file name within the folder"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "text",
    ["../../x", "/etc", "", "-1", "1e3", "7\n8", "\0", "\u00b2", "9" * 300, "9" * 5000, "nan"],
    ids=lambda text: ascii(text[:9]),
)
def test_the_name_of_the_latest(tmp_path: Path, text: str) -> None:
    (tmp_path / "iter_0000007").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    for read in (latest_iteration, resolve_checkpoint):
        with pytest.raises(UserError, match="is not an iteration") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
