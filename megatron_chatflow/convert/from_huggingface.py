"""Imports a Hugging Face model folder as a checkpoint that training loads at any parallel layout.

The result is a run's folder with iteration 0 in megatron-core's distributed format, from which
``--load CKPT --finetune`` starts, optionally with a larger vocabulary. One process converts the
model, with one tensor in memory at a time, except while rows of new tokens are distilled.
"""

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from megatron_chatflow.checkpoint.files import CARRIED, LATEST, iteration_folder
from megatron_chatflow.convert.distill import with_fitted_rows
from megatron_chatflow.convert.distributed import ChunkToWrite, write_distributed
from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.shape import DTYPES, LlamaShape, shape_of_huggingface
from megatron_chatflow.convert.to_huggingface import Converted
from megatron_chatflow.convert.vocabulary import (
    Resize,
    VocabularyGrowth,
    grow_tensor,
    vocabulary_growth,
)
from megatron_chatflow.convert.weight_map import (
    Join,
    WeightRule,
    check_weights,
    huggingface_shapes,
    join,
    placements,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_new_folder, new_folder
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.small_files import (
    read_model_files,
    replace_tokenizer,
    write_small_files,
)

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

RowBlock = tuple[int, Callable[[], torch.Tensor]]
"""A number of rows, and a function that creates them."""

Read = Callable[[str], torch.Tensor]


def import_huggingface(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    resize: Resize | None = None,
    overwrite: bool = False,
) -> Converted:
    """Writes a Hugging Face folder's model as a checkpoint.

    Args:
        source: The Hugging Face folder.
        output: The new run's folder, which appears when it is complete.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps the stored one.
        resize: A larger vocabulary, if any.
        overwrite: Whether an existing checkpoint folder of that name is replaced.

    Raises:
        UserError: The folder does not hold a supported model, or is damaged or incomplete, or the
            checkpoint cannot be written.
    """
    check_new_folder(output, overwrite=overwrite, mark=LATEST)
    if not source.is_dir():
        raise UserError(f"{source}: folder not found; give a Hugging Face model folder")
    shape = shape_of_huggingface(source)
    weights = HuggingFaceWeights(source)
    check_weights(weights, shape)
    files = read_model_files(source)
    tokenizer = huggingface_tokenizer(source)
    if tokenizer is None:
        logger.warning(
            "%s has no tokenizer files, so the checkpoint is written without a tokenizer", source
        )
    elif tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, but the embedding only "
            f"{shape.vocab_size} rows; put the tokenizer of this model into the folder"
        )
    # A tensor over all layers has one dtype, so a folder with several dtypes becomes fp32.
    stored = {weights.dtype(name) for name in huggingface_shapes(shape)}
    narrow = stored.pop() if len(stored) == 1 else torch.float32
    target = narrow if dtype is None else DTYPES[dtype]
    read: Read = weights.read
    new_rows = None
    if resize is not None:
        if tokenizer is None:
            raise UserError(
                f"{source}: has no tokenizer, so the new tokens cannot be determined; put "
                "the tokenizer of this model into the folder"
            )
        growth = vocabulary_growth(tokenizer, resize.tokenizer, shape.vocab_size)
        if resize.init == "distill":
            tensors = {name: read(name) for name in huggingface_shapes(shape)}
            resize = with_fitted_rows(tensors, shape, tokenizer, growth, resize)
        read, shape = _grown(read, shape, growth, resize)
        new_rows = growth.new_rows
        tokenizer = resize.tokenizer
        files = replace_tokenizer(files, tokenizer)
    chunks = _chunks(shape, target, read)
    num_parameters = sum(torch.Size(size).numel() for size in huggingface_shapes(shape).values())
    num_bytes = num_parameters * target.itemsize
    with new_folder(output, overwrite=overwrite, mark=LATEST, num_bytes=num_bytes) as folder:
        write_checkpoint(folder, chunks, shape, tokenizer, files, new_rows)
    return Converted(output, len(huggingface_shapes(shape)), num_bytes, num_parameters)


def _grown(
    read: Read, shape: LlamaShape, growth: VocabularyGrowth, resize: Resize
) -> tuple[Read, LlamaShape]:
    """Returns a function that reads the model with the larger vocabulary, and its shape."""

    def read_grown(name: str) -> torch.Tensor:
        return grow_tensor(name, read(name), growth, resize)

    return read_grown, replace(shape, vocab_size=growth.num_rows)


def _chunks(shape: LlamaShape, dtype: torch.dtype, read: Read) -> list[ChunkToWrite]:
    bar = tqdm(total=len(huggingface_shapes(shape)), unit="tensor", desc="import", disable=None)

    def read_counted(name: str) -> torch.Tensor:
        bar.update()
        return read(name)

    return [
        chunk
        for rule, layer in placements(shape)
        for chunk in stored_chunks(
            rule, layer, shape, dtype, _row_blocks(rule, layer, shape, read_counted)
        )
    ]


def _row_blocks(
    rule: WeightRule, layer: int | None, shape: LlamaShape, read: Read
) -> list[RowBlock]:
    """Returns the rows of a megatron-core tensor, in blocks that can be read separately."""
    names = [part.name.format(layer=layer) for part in rule.parts]
    if rule.join is Join.QUERY_GROUPS:
        return [(rule.shape(shape)[0], lambda: join(rule, shape, [read(name) for name in names]))]
    return [
        (part.shape(shape)[0], partial(read, name))
        for part, name in zip(rule.parts, names, strict=True)
    ]


def huggingface_tokenizer(source: Path) -> Tokenizer | None:
    """Loads the tokenizer of a folder or file; None if a folder has none."""
    names = ("tokenizer.model", "tokenizer.json")
    if source.is_dir() and not any((source / name).is_file() for name in names):
        return None
    return load_tokenizer(source)


def write_checkpoint(
    folder: Path,
    chunks: Sequence[ChunkToWrite],
    shape: LlamaShape,
    tokenizer: Tokenizer | None,
    files: Mapping[str, bytes],
    new_rows: tuple[int, int] | None = None,
) -> None:
    """Writes a run's folder with a checkpoint of iteration 0.

    ``files`` are the base model's small files, which the checkpoint carries. ``new_rows`` are the
    rows of a growth of the vocabulary, if there was one.
    """
    checkpoint = iteration_folder(folder, 0)
    checkpoint.mkdir()
    write_distributed(checkpoint, chunks, _empty_objects(shape.num_layers))
    torch.save({}, checkpoint / "common.pt")
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    form |= {"common_backend": "torch", "common_backend_version": 1}
    (checkpoint / "metadata.json").write_text(json.dumps(form), encoding="utf-8")
    state = json.dumps(_state(shape, tokenizer, new_rows), indent=1)
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
    blocks: Sequence[RowBlock],
) -> list[ChunkToWrite]:
    """Returns the chunks of a tensor: one for each block of rows, and one for padding rows."""
    rows, *columns = rule.shape(shape)
    padded = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if rule.has_vocabulary_rows else rows
    assert sum(count for count, _ in blocks) == rows, f"{rule.megatron} has a wrong number of rows"
    if padded > rows:
        size = (padded - rows, *columns)
        blocks = [*blocks, (padded - rows, lambda: torch.zeros(size))]
    chunks, first = [], 0
    for count, make in blocks:
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
    """Returns the objects that megatron-core's linears load beside their weights."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return {
        f"decoder.layers.{linear}._extra_state/shard_{layer}_{num_layers}": buffer.getvalue()
        for linear in LINEARS
        for layer in range(num_layers)
    }


def _state(
    shape: LlamaShape, tokenizer: Tokenizer | None, new_rows: tuple[int, int] | None
) -> dict[str, Any]:
    """Returns a run's state before its first iteration; ``--finetune`` only reads the model."""
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
            **({} if new_rows is None else {"new_rows": list(new_rows)}),
        },
        "model": shape.recorded(),
    }
