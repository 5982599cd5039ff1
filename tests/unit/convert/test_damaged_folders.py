"""Tests Hugging Face folders with well-formed files that have impossible contents."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_shape import SHAPE

from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import huggingface_config, shape_of_huggingface
from megatron_chatflow.convert.weight_map import check_weights, huggingface_shapes
from megatron_chatflow.errors import UserError

NORM = "model.norm.weight"
NAN, INFINITY = float("nan"), float("inf")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {name: torch.ones(size) for name, size in huggingface_shapes(SHAPE).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = huggingface_config(SHAPE, torch.float32, {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_weights(HuggingFaceWeights(folder), shape_of_huggingface(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": ["x"]}, "not the entry of a tensor"),
        ({"shape": [-16]}, "not the entry of a tensor"),
        ({"shape": [16.0]}, "not the entry of a tensor"),
        ({"shape": [7]}, "the shape does not match the number of bytes"),
        ({"dtype": ["F32"]}, "not the entry of a tensor"),
        ({"dtype": "F16"}, "the shape does not match the number of bytes"),
        ({"dtype": "I8"}, "is not fp32, bf16 or fp16"),
        ({"data_offsets": None}, "not the entry of a tensor"),
        ({"data_offsets": ["0", "64"]}, "not the entry of a tensor"),
        ({"data_offsets": [0.0, 64.0]}, "not the entry of a tensor"),
        ({"data_offsets": [0, 32, 64]}, "its values lie outside the file"),
        ({"data_offsets": [64, 0]}, "its values lie outside the file"),
        ({"data_offsets": [0, 2**62]}, "its values lie outside the file"),
    ],
)
def test_headers(folder: Path, change: dict[str, Any], message: str) -> None:
    change_header(folder, lambda header: {**header, NORM: {**header[NORM], **change}})
    refused(folder, rf"model.safetensors: .*{NORM}.*{message}")


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def test_metadata_that_safetensors_refuses(folder: Path) -> None:
    for metadata in ([{"format": "pt"}], "pt", 3, {"format": 1}, {"format": None}):
        change_header(folder, lambda header, found=metadata: {**header, "__metadata__": found})  # type: ignore[misc]
        refused(folder, "is damaged at __metadata__")


def test_headers_that_are_none(folder: Path) -> None:
    for header in ([1, 2], None, 3, "x"):
        change_header(folder, lambda _, header=header: header)  # type: ignore[misc]
        refused(folder, "is damaged at its header")
    change_header(folder, lambda _: {NORM: "x"})
    refused(folder, f"is damaged at {NORM}")
    path = folder / "model.safetensors"
    for content in (b"", b"<html>404</html>", b"version https://git-lfs", b"[" * 10**5):
        path.write_bytes(content)
        refused(folder, "or not a safetensors file")
    path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)
    refused(folder, "or not a safetensors file")
    path.unlink()
    path.mkdir()
    refused(folder, "has no model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": {"a": 1}}, "architecture .* is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most .*, not 1000000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is missing or not a positive number"),
        ({"hidden_size": "16"}, "hidden_size is missing or not a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
        ({"rope_theta": "1e4"}, "rope_theta must be a positive number, not '1e4'"),
        ({"quantization_config": {"bits": 4}}, "the model is quantized"),
        (
            {"max_position_embeddings": 10**30},
            "max_position_embeddings must be at most .*, not 1000000",
        ),
        ({"rms_norm_eps": NAN}, "rms_norm_eps is missing or not a positive number"),
        ({"rms_norm_eps": INFINITY}, "rms_norm_eps is missing or not a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is missing or not a positive number"),
        ({"rope_theta": INFINITY}, "rope_theta must be a positive number, not inf"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number, not 100000000000.*000"),
        ({"rope_scaling": {"type": "linear", "factor": NAN}}, "positive factor, not nan"),
        ({"rope_scaling": {"type": "dynamic", "factor": INFINITY}}, "positive factor, not inf"),
        (
            {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": INFINITY}},
            "positive original_max_position_embeddings, not inf",
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 10**400}}, "positive low_freq_factor"),
    ],
)
def test_configurations(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(folder, f"config.json: .*{message}")


def test_deep_nesting_is_damage(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 10**5)
    refused(folder, "config.json: is damaged")


def test_bin_files_hold_tensors_by_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    sparse = {**tensors, NORM: tensors[NORM].to_sparse()}
    for content in ([torch.ones(2)], torch.ones(2), {1: torch.ones(2)}, {NORM: 3}, sparse):
        torch.save(content, path)
        refused(folder, "pytorch_model.bin: is not a dictionary of tensors")
    torch.save({"state_dict": tensors}, path)
    refused(folder, "save only the state_dict of the model")
    torch.save(tensors, path)
    check_weights(HuggingFaceWeights(folder), shape_of_huggingface(folder))
    path.write_bytes(path.read_bytes()[:-500])
    refused(folder, "pytorch_model.bin: cannot be loaded safely")
    path.write_bytes(b"")
    refused(folder, "pytorch_model.bin: cannot be loaded safely")


def as_shards(folder: Path, suffix: str) -> Path:
    """Splits the weights into two shards and returns their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, shard in enumerate((names[::2], names[1::2])):
        file = f"part-{number}.{suffix}"
        save_shard({name: tensors[name] for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def save_shard(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_hold_every_tensor_once(folder: Path, suffix: str) -> None:
    index = as_shards(folder, suffix)
    check_weights(HuggingFaceWeights(folder), shape_of_huggingface(folder))
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = [folder / f"part-{number}.{suffix}" for number in range(2)]
    contents = [load_shard(path) for path in shards]
    other = next(name for name, file in weight_map.items() if file == shards[1].name)
    # A tensor is in both shards, with different values in the shard that the index does not name.
    save_shard({**contents[0], other: contents[1][other] + 1}, shards[0])
    refused(folder, f"part-1.{suffix}: contains {other}, which part-0.{suffix} contains")
    save_shard(contents[0], shards[0])
    # A tensor is in the index but in no shard.
    save_shard({n: t for n, t in contents[1].items() if n != other}, shards[1])
    refused(folder, f"part-1.{suffix}: does not contain {other}")
    save_shard(contents[1], shards[1])
    # A tensor is in a shard but not in the index, and an extra tensor belongs to no model.
    del weight_map[other]
    index.write_text(json.dumps({"weight_map": weight_map}))
    check_weights(HuggingFaceWeights(folder), shape_of_huggingface(folder))
    save_shard({**contents[0], "extra": torch.ones(2)}, shards[0])
    refused(folder, "extra is not a tensor of the model")
    save_shard(contents[0], shards[0])
    # The index has two entries for its weight map.
    text = index.read_text()
    index.write_text(text.replace("{", '{"weight_map": {}, ', 1))
    refused(folder, "index.json: is damaged")
    # A second model is stored beside the shards.
    index.write_text(text)
    single = folder / index.name.removesuffix(".index.json")
    save_shard({**contents[0], **contents[1]}, single)
    refused(folder, "contains two models")


def test_values_of_safetensors_overlap_nowhere(folder: Path) -> None:
    first, second = "model.layers.0.input_layernorm.weight", "model.norm.weight"

    def shared(header: dict[str, Any]) -> dict[str, Any]:
        offsets = header[first]["data_offsets"]
        return {**header, second: {**header[second], "data_offsets": offsets}}

    good = (folder / "model.safetensors").read_bytes()
    change_header(folder, shared)
    refused(
        folder, r"model.safetensors: is damaged at .* \(values overlap or belong to no tensor\)"
    )
    (folder / "model.safetensors").write_bytes(good)
    change_header(folder, lambda header: {n: e for n, e in header.items() if n != second})
    refused(folder, r"values overlap or belong to no tensor")
    (folder / "model.safetensors").write_bytes(good + b"\0\0")
    refused(folder, r"damaged at its end \(values overlap or belong to no tensor")
    length = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + length].rstrip()
    twice = header[:-1] + b"," + header[1:]
    content = len(twice).to_bytes(8, "little") + twice + good[8 + length :]
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "cannot read its header")


@pytest.mark.filterwarnings("ignore")
def test_bin_files_with_values_of_other_kinds(folder: Path) -> None:
    """A value of another type in place of a tensor is refused, or read as what it is."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    norm = tensors[NORM]
    kinds: dict[str, tuple[Any, str]] = {
        "meta": (norm.to("meta"), "values are missing"),
        "sparse": (norm.to_sparse(), "sparse or nested"),
        "csr": (tensors["lm_head.weight"].to_sparse_csr(), "sparse or nested"),
        "nested": (torch.nested.nested_tensor([norm]), "sparse or nested"),
        "quantized": (torch.quantize_per_tensor(norm, 0.1, 0, torch.qint8), "is quantized"),
        "list": ([norm], "instead of a tensor"),
        "nothing": (None, "instead of a tensor"),
        "int8": (norm.to(torch.int8), "is not fp32, bf16 or fp16"),
        "float64": (norm.double(), "is not fp32, bf16 or fp16"),
        "float8": (norm.to(torch.float8_e4m3fn), "is not fp32, bf16 or fp16"),
        "complex": (norm.to(torch.complex64), "is not fp32, bf16 or fp16"),
        "scalar": (torch.tensor(1.0), r"has shape \[\]"),
        "other shape": (norm.unsqueeze(0).clone(), r"has shape \[1, 16\]"),
    }
    for value, message in kinds.values():
        torch.save({**tensors, NORM: value}, path)
        refused(folder, f"pytorch_model.bin: .*{message}")
    rng = random.Random(0)
    for _ in range(40):  # several at once, at any place
        content: dict[Any, Any] = dict(tensors)
        for name in rng.sample(sorted(tensors), rng.randrange(1, 4)):
            content[rng.choice([name, name, name, 3, None])] = rng.choice(list(kinds.values()))[0]
        torch.save(content, path)
        refused(folder, "pytorch_model.bin: ")
    # Parameters, and views with strides of their own, are tensors.
    odd = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    odd[NORM] = torch.ones(1).expand(16)  # type: ignore[assignment]
    torch.save(odd, path)
    weights = HuggingFaceWeights(folder)
    check_weights(weights, shape_of_huggingface(folder))
    for name, tensor in tensors.items():
        found = weights.read(name)
        assert not found.requires_grad and torch.equal(found, tensor)
