"""Writes a run folder that holds a model before its first iteration.

In: what makes each tensor, the model's shape, the tokenizer. Out: ``iter_0000000`` in
megatron-core's distributed format, with the files that a run finds beside its weights.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_chatflow.checkpoint.carried_files import CARRIED
from megatron_chatflow.checkpoint.convert_distributed import ChunkToWrite, write_distributed
from megatron_chatflow.checkpoint.convert_shape import LlamaShape
from megatron_chatflow.checkpoint.files import LATEST, iteration_folder
from megatron_chatflow.checkpoint.weight_map import WeightRule
from megatron_chatflow.tokenizer import Tokenizer
from megatron_chatflow.tokenizer.small_files import write_small_files

# Rows of the vocabulary are padded to a multiple of this, the default of --make-vocab-size-
# divisible-by; a run with another multiple loads the same rows.
VOCAB_MULTIPLE = 128
# megatron-core's linears keep an object beside their weight, empty without Transformer Engine.
LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)

# Rows, and what gives them.
Piece = tuple[int, Callable[[], torch.Tensor]]


def write_checkpoint(
    folder: Path,
    chunks: Sequence[ChunkToWrite],
    shape: LlamaShape,
    tokenizer: Tokenizer | None,
    files: Mapping[str, bytes],
) -> None:
    """Writes a run folder that holds iteration 0.

    Args:
        folder: An existing folder.
        chunks: The model's tensors.
        shape: The model's shape.
        tokenizer: Recorded for the run, if there is one.
        files: The base model's small files, which the checkpoint carries.

    Raises:
        UserError: What making a chunk raised.
        OSError: The disk is full or not writable.
    """
    checkpoint = iteration_folder(folder, 0)
    checkpoint.mkdir()
    write_distributed(checkpoint, chunks, _empty_objects(shape.num_layers))
    torch.save({}, checkpoint / "common.pt")
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    form |= {"common_backend": "torch", "common_backend_version": 1}
    (checkpoint / "metadata.json").write_text(json.dumps(form), encoding="utf-8")
    state = json.dumps(_state(shape, tokenizer), indent=1)
    (checkpoint / "state.json").write_text(state, encoding="utf-8")
    write_small_files(checkpoint / CARRIED, files)
    config: dict[str, Any] = {"model": asdict(shape)}
    config["model"]["make_vocab_size_divisible_by"] = VOCAB_MULTIPLE
    if tokenizer is not None:
        config["tokenizer"] = {
            "tokenizer_type": tokenizer.tokenizer_type,
            "tokenizer_model": str(tokenizer.model_path.resolve()),
        }
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (checkpoint / "config.yaml").write_text(text, encoding="utf-8")
    (folder / LATEST).write_text("0\n", encoding="utf-8")


def stored_chunks(
    rule: WeightRule,
    layer: int | None,
    shape: LlamaShape,
    dtype: torch.dtype,
    pieces: Sequence[Piece],
) -> list[ChunkToWrite]:
    """How a tensor is stored: each piece a chunk, then padding rows of the vocabulary as zeros.

    Args:
        rule: Which tensor.
        layer: Its layer, or None.
        shape: The model's shape.
        dtype: Stored dtype.
        pieces: The tensor's rows from top to bottom.
    """
    rows, *columns = rule.shape(shape)
    padded = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if rule.has_vocabulary_rows else rows
    assert sum(count for count, _ in pieces) == rows, f"{rule.megatron} has other rows"
    if padded > rows:
        size = (padded - rows, *columns)
        pieces = [*pieces, (padded - rows, lambda: torch.zeros(size))]
    chunks, first = [], 0
    for count, make in pieces:
        chunks.append(_chunk(rule, layer, shape, dtype, (padded, *columns), first, count, make))
        first += count
    return chunks


def _chunk(
    rule: WeightRule,
    layer: int | None,
    shape: LlamaShape,
    dtype: torch.dtype,
    whole: tuple[int, ...],
    first: int,
    count: int,
    make: Callable[[], torch.Tensor],
) -> ChunkToWrite:
    offsets, sizes = (first, *(0 for _ in whole[1:])), (count, *whole[1:])
    if layer is None:
        return ChunkToWrite(rule.megatron, whole, offsets, sizes, dtype, lambda: make().to(dtype))
    return ChunkToWrite(  # a layer is a slice of one tensor over all layers
        name=rule.megatron.replace("{layer}.", ""),
        global_shape=(shape.num_layers, *whole),
        offsets=(layer, *offsets),
        sizes=(1, *sizes),
        dtype=dtype,
        make=lambda: make().to(dtype).unsqueeze(0),
    )


def _empty_objects(num_layers: int) -> dict[str, bytes]:
    """What megatron-core's linears expect beside their weights."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return {
        f"decoder.layers.{linear}._extra_state/shard_{layer}_{num_layers}": buffer.getvalue()
        for linear in LINEARS
        for layer in range(num_layers)
    }


def _state(shape: LlamaShape, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A run's state before its first iteration, of which ``--finetune`` reads the model alone."""
    return {
        "iteration": 0,
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "blend": {},
        "schedule": {},
        "sources": {},
        "tokenizer": {
            "type": tokenizer.tokenizer_type if tokenizer else None,
            "sha256": tokenizer.fingerprint if tokenizer else None,
            "vocab_size": tokenizer.vocab_size if tokenizer else shape.vocab_size,
            "add_bos_token": tokenizer.add_bos_token if tokenizer else False,
        },
        "model": shape.recorded(),
    }
