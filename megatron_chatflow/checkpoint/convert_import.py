"""A Hugging Face LLaMA folder as a checkpoint that training loads at any parallel layout.

In: a folder with config.json and weights. Out: a run's folder with iteration 0 in megatron-core's
distributed format, from which ``--load CKPT --finetune`` starts. One process; memory holds one
tensor.
"""

import io
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from megatron_chatflow.checkpoint.convert_distributed import ChunkToWrite, write_distributed
from megatron_chatflow.checkpoint.convert_export import Converted
from megatron_chatflow.checkpoint.convert_folder import new_folder
from megatron_chatflow.checkpoint.convert_safetensors import HuggingFaceWeights
from megatron_chatflow.checkpoint.convert_shape import DTYPES, LlamaShape, shape_of_huggingface
from megatron_chatflow.checkpoint.files import LATEST, iteration_folder
from megatron_chatflow.checkpoint.weight_map import (
    Join,
    WeightRule,
    huggingface_shapes,
    join,
    placements,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

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
# Buffers that older transformers stored and that follow from the configuration.
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq",)


def import_huggingface(
    source: Path, output: Path, *, dtype: str | None = None, overwrite: bool = False
) -> Converted:
    """Writes a Hugging Face folder's model as a checkpoint.

    Args:
        source: The Hugging Face folder.
        output: The new run folder; it appears when it is complete.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps each tensor's own.
        overwrite: Whether an earlier checkpoint folder of that name is replaced.

    Raises:
        UserError: The folder is no LLaMA, or is damaged or incomplete, or the checkpoint cannot be
            written.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; name a Hugging Face model folder")
    shape = shape_of_huggingface(source)
    weights = HuggingFaceWeights(source)
    check_weights(weights, shape)
    tokenizer = _find_tokenizer(source, shape)
    target = None if dtype is None else DTYPES[dtype]
    chunks = _chunks(weights, shape, target)
    num_bytes = sum(torch.Size(chunk.sizes).numel() * chunk.dtype.itemsize for chunk in chunks)
    with new_folder(output, overwrite=overwrite, mark=LATEST, num_bytes=num_bytes) as folder:
        write_checkpoint(folder, chunks, shape, tokenizer)
    num_parameters = sum(torch.Size(size).numel() for size in huggingface_shapes(shape).values())
    return Converted(output, len(huggingface_shapes(shape)), num_bytes, num_parameters)


def check_weights(weights: HuggingFaceWeights, shape: LlamaShape) -> None:
    """Compares a folder's tensors with what config.json promises.

    Raises:
        UserError: A tensor is missing, has another shape, or is none of a LLaMA's.
    """
    expected = huggingface_shapes(shape)
    missing = [name for name in expected if name not in weights.files]
    if missing:
        raise UserError(
            f"{weights.folder}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    for name, size in expected.items():
        if weights.shape(name) != size:
            raise UserError(
                f"{weights.files[name]}: {name} is {list(weights.shape(name))} and config.json "
                f"makes it {list(size)}; the two belong to different models"
            )
    for name in weights.files:
        if name in expected or name.endswith(_DERIVED_SUFFIXES):
            continue
        if name == "lm_head.weight" and torch.equal(
            weights.read(name), weights.read("model.embed_tokens.weight")
        ):
            continue  # tied, and stored all the same
        raise UserError(
            f"{weights.files[name]}: {name} is no tensor of this LLaMA; config.json leaves it out"
        )


def write_checkpoint(
    folder: Path,
    chunks: list[ChunkToWrite],
    shape: LlamaShape,
    tokenizer: Tokenizer | None,
    tokenizer_path: Path | None = None,
) -> None:
    """Writes a run folder that holds iteration 0.

    Args:
        folder: An existing folder.
        chunks: The model's tensors.
        shape: The model's shape.
        tokenizer: Recorded for the run, if there is one.
        tokenizer_path: Where it will be found; its own file when None.
    """
    checkpoint = iteration_folder(folder, 0)
    checkpoint.mkdir()
    write_distributed(checkpoint, chunks, _empty_objects(shape.num_layers))
    torch.save({}, checkpoint / "common.pt")
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    form |= {"common_backend": "torch", "common_backend_version": 1}
    (checkpoint / "metadata.json").write_text(json.dumps(form), encoding="utf-8")
    (checkpoint / "state.json").write_text(
        json.dumps(_state(shape, tokenizer), indent=1), encoding="utf-8"
    )
    config: dict[str, Any] = {"model": asdict(shape)}
    config["model"]["make_vocab_size_divisible_by"] = VOCAB_MULTIPLE
    if tokenizer is not None:
        config["tokenizer"] = {
            "tokenizer_type": tokenizer.tokenizer_type,
            "tokenizer_model": str((tokenizer_path or tokenizer.model_path).resolve()),
        }
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (checkpoint / "config.yaml").write_text(text, encoding="utf-8")
    (folder / LATEST).write_text("0\n", encoding="utf-8")


def stored_chunks(
    rule: WeightRule,
    layer: int | None,
    shape: LlamaShape,
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor],
) -> list[ChunkToWrite]:
    """How a tensor is stored: rows below each other in chunks of their own, padding rows as zeros.

    Args:
        rule: Which tensor.
        layer: Its layer, or None.
        shape: The model's shape.
        dtype: Stored dtype.
        read: Gives a Hugging Face tensor by name.
    """
    names = [part.name.format(layer=layer) for part in rule.parts]
    rows, *columns = rule.shape(shape)
    padded = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if rule.has_vocabulary_rows else rows

    def chunk(first: int, count: int, make: Callable[[], torch.Tensor]) -> ChunkToWrite:
        whole, offsets, sizes = (
            (padded, *columns),
            (first, *(0 for _ in columns)),
            (count, *columns),
        )
        if layer is None:
            return ChunkToWrite(rule.megatron, whole, offsets, sizes, dtype, make)
        return ChunkToWrite(  # a layer is a slice of one tensor over all layers
            name=rule.megatron.replace("{layer}.", ""),
            global_shape=(shape.num_layers, *whole),
            offsets=(layer, *offsets),
            sizes=(1, *sizes),
            dtype=dtype,
            make=lambda: make().unsqueeze(0),
        )

    def one(name: str) -> torch.Tensor:
        return read(name).to(dtype)

    if rule.join is Join.QUERY_GROUPS:
        return [chunk(0, rows, lambda: join(rule, shape, [*map(one, names)]))]

    chunks, first = [], 0
    for part, name in zip(rule.parts, names, strict=True):
        count = part.shape(shape)[0]
        chunks.append(chunk(first, count, partial(one, name)))
        first += count
    if padded > rows:
        size = (padded - rows, *columns)
        chunks.append(chunk(rows, padded - rows, lambda: torch.zeros(size, dtype=dtype)))
    return chunks


def _chunks(
    weights: HuggingFaceWeights, shape: LlamaShape, dtype: torch.dtype | None
) -> list[ChunkToWrite]:
    # A tensor over all layers has one dtype, so a folder of mixed ones takes the widest.
    stored = {weights.dtype(name) for name in huggingface_shapes(shape)}
    target = dtype or (stored.pop() if len(stored) == 1 else torch.float32)
    bar = tqdm(total=len(huggingface_shapes(shape)), unit="tensor", desc="import", disable=None)

    def read(name: str) -> torch.Tensor:
        bar.update()
        return weights.read(name)

    return [
        chunk
        for rule, layer in placements(shape)
        for chunk in stored_chunks(rule, layer, shape, target, read)
    ]


def _empty_objects(num_layers: int) -> dict[str, bytes]:
    """What megatron-core's linears expect beside their weights."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return {
        f"decoder.layers.{linear}._extra_state/shard_{layer}_{num_layers}": buffer.getvalue()
        for linear in LINEARS
        for layer in range(num_layers)
    }


def _find_tokenizer(source: Path, shape: LlamaShape) -> Tokenizer | None:
    names = ("tokenizer.model", "tokenizer.json")
    if not any((source / name).is_file() for name in names):
        logger.warning("%s has no tokenizer files: the checkpoint will name no tokenizer", source)
        return None
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} pieces and the embedding "
            f"{shape.vocab_size} rows; give the folder its own tokenizer"
        )
    return tokenizer


def _state(shape: LlamaShape, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A run's state before its first iteration, of which ``--finetune`` reads the model alone."""
    values = asdict(shape)
    model = {
        name: value
        for name, value in values.items()
        if name not in ("max_position_embeddings", "init_method_std")
    }
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
        },
        "model": model,
    }
