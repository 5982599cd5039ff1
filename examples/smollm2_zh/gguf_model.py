"""Converts a LLaMA in llama.cpp's GGUF format to a Hugging Face folder.

The `gguf` package (extra `demo`) reads and dequantizes the file, one tensor in memory at a time.
The folder has what `transformers` and `tools/convert_checkpoint.py import` need.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from examples.smollm2_zh.gguf_tokenizer import special_ids, write_tokenizer
from megatron_chatflow.convert.safetensors import write_shards
from megatron_chatflow.convert.shape import DTYPES, LlamaShape, huggingface_config
from megatron_chatflow.convert.to_huggingface import MAX_SHARD_BYTES, Converted
from megatron_chatflow.convert.weight_map import huggingface_shapes
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_new_folder, new_folder
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.small_files import (
    read_model_files,
    with_stop_tokens,
    write_small_files,
)

if TYPE_CHECKING:
    from gguf import GGUFReader

_DAMAGED = (ValueError, IndexError, KeyError, OverflowError, OSError)
"""Errors that the `gguf` package raises for truncated files and for other formats."""

# Hugging Face name -> GGUF name.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def convert_gguf(
    path: Path, output: Path, *, dtype: str = "fp32", overwrite: bool = False
) -> Converted:
    """Writes a GGUF model as a Hugging Face folder.

    Args:
        path: The `.gguf` file.
        output: The new folder, which appears when it is complete.
        dtype: ``fp32``, ``bf16`` or ``fp16``. Only fp32 represents the dequantized values exactly.
        overwrite: Whether to replace an earlier output.

    Raises:
        UserError: The `gguf` package is missing, the file is damaged or not a supported LLaMA, or
            the folder cannot be written.
    """
    check_new_folder(output, overwrite=overwrite, mark="config.json")
    reader = open_gguf(path)
    fields = read_fields(reader)
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    shape = shape_of_gguf(path, fields, tensors)
    shapes = huggingface_shapes(shape)
    _check_tensors(path, shapes, tensors)
    target = DTYPES[dtype]
    num_parameters = sum(torch.Size(size).numel() for size in shapes.values())
    num_bytes = num_parameters * target.itemsize
    with new_folder(output, overwrite=overwrite, mark="config.json", num_bytes=num_bytes) as folder:
        weights = ((name, _read(tensors[gguf_name(name)], name, shape)) for name in shapes)
        write_shards(folder, shapes, target, weights, MAX_SHARD_BYTES)
        ids = special_ids(fields)
        _write_json(folder / "config.json", huggingface_config(shape, target, ids))
        write_tokenizer(path, fields, folder, shape.max_position_embeddings)
        known = {name: token_id for name, token_id in ids.items() if token_id is not None}
        files = with_stop_tokens(read_model_files(folder), known, load_tokenizer(folder))
        write_small_files(folder, files)
    return Converted(output, len(shapes), num_bytes, num_parameters)


def open_gguf(path: Path) -> "GGUFReader":
    """Opens a GGUF file memory-mapped.

    Raises:
        UserError: It is missing or damaged, or the `gguf` package is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError("gguf is not installed; run: pip install --editable '.[demo]'") from None
    if not path.is_file():
        raise UserError(f"{path}: file not found; give a .gguf file")
    try:
        return GGUFReader(str(path))
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: is damaged or not a GGUF file ({reason}); download it again"
        ) from None


def read_fields(reader: "GGUFReader") -> dict[str, Any]:
    """Returns a file's key-value pairs as Python values."""
    return {str(name): field.contents() for name, field in reader.fields.items()}


def shape_of_gguf(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> LlamaShape:
    """Reads a model's shape.

    Args:
        path: Named in errors.
        fields: From `read_fields`.
        tensors: Tensors by name. The embedding's shape gives the vocabulary size.

    Raises:
        UserError: It is not a LLaMA, or it has experts, scaled rotary embeddings or uneven heads.
    """
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path}: architecture {architecture!r} is not supported; use a 'llama' model"
        )
    if fields.get("llama.expert_count") or "rope_freqs.weight" in tensors:
        raise UserError(f"{path}: has experts or scaled rotary embeddings, which are not supported")
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(f"{path}: has scaled rotary embeddings, which are not supported")
    numbers = {}
    for key in (
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
        "context_length",
    ):
        value = fields.get(f"llama.{key}")
        if not isinstance(value, (int, float)) or value <= 0:
            raise UserError(f"{path}: llama.{key} is {value!r}; download a complete file")
        numbers[key] = value
    num_heads, hidden_size = int(numbers["attention.head_count"]), int(numbers["embedding_length"])
    num_groups = fields.get("llama.attention.head_count_kv", num_heads)
    head_dim = fields.get("llama.rope.dimension_count", hidden_size // num_heads)
    if (
        not isinstance(num_groups, int)
        or num_heads % num_groups
        or head_dim * num_heads != hidden_size
    ):
        raise UserError(
            f"{path}: {num_heads} heads of {head_dim} with {num_groups} key-value heads do not "
            f"match the hidden size {hidden_size}; such a model is not supported"
        )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: has no tensor token_embd.weight; download a complete file")
    return LlamaShape(
        num_layers=int(numbers["block_count"]),
        hidden_size=hidden_size,
        ffn_hidden_size=int(numbers["feed_forward_length"]),
        num_attention_heads=num_heads,
        num_query_groups=num_groups,
        vocab_size=_shape(tensors["token_embd.weight"])[0],
        max_position_embeddings=int(numbers["context_length"]),
        rotary_base=float(fields.get("llama.rope.freq_base", 10000.0)),
        # Stored in fp32, where 1e-05 reads as 9.999999747378752e-06.
        norm_epsilon=float(f"{numbers['attention.layer_norm_rms_epsilon']:.6g}"),
        init_method_std=0.02,
        untie_embeddings_and_output_weights="output.weight" in tensors,
    )


def gguf_name(name: str) -> str:
    """Returns the GGUF name of a Hugging Face tensor."""
    if match := _LAYER.fullmatch(name):
        return f"blk.{match.group(1)}.{_NAMES[match.group(2)]}.weight"
    return f"{_NAMES[name.removesuffix('.weight')]}.weight"


def unpermute(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Restores the order of rows of query and key projections that llama.cpp permutes.

    GGUF stores the two values of a rotated pair adjacently, Hugging Face half a head apart.

    Args:
        weight: float32[num_heads * head_dim, hidden_size].
        num_heads: Number of query heads or of key heads.

    Returns:
        The same rows, reordered within every head.
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _check_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Any]
) -> None:
    expected = {gguf_name(name): shape for name, shape in shapes.items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{path}: has no tensor {name}; download a complete file")
        if _shape(tensors[name]) != shape:
            raise UserError(
                f"{path}: {name} has shape {list(_shape(tensors[name]))}, expected "
                f"{list(shape)}; such a model is not supported"
            )
    for name in tensors:
        if name not in expected:
            raise UserError(f"{path}: has a tensor {name}, which a LLaMA does not have")


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _read(tensor: Any, name: str, shape: LlamaShape) -> torch.Tensor:
    """Returns a tensor in fp32 and in Hugging Face's order."""
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    values = values.reshape(_shape(tensor))
    if name.endswith("q_proj.weight"):
        values = unpermute(values, shape.num_attention_heads)
    elif name.endswith("k_proj.weight"):
        values = unpermute(values, shape.num_query_groups)
    return torch.from_numpy(np.array(values, order="C"))  # the file is mapped read-only


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
