"""A Hugging Face LLaMA folder as a checkpoint that training loads at any parallel layout.

In: a folder with config.json and weights; for a larger vocabulary, its tokenizer and how new rows
begin. Out: a run's folder with iteration 0 in megatron-core's distributed format, from which
``--load CKPT --finetune`` starts. One process; memory holds one tensor.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_chatflow.checkpoint.convert_check import check_weights
from megatron_chatflow.checkpoint.convert_distributed import ChunkToWrite
from megatron_chatflow.checkpoint.convert_export import Converted
from megatron_chatflow.checkpoint.convert_folder import check_new_folder, new_folder
from megatron_chatflow.checkpoint.convert_safetensors import HuggingFaceWeights
from megatron_chatflow.checkpoint.convert_shape import DTYPES, LlamaShape, shape_of_huggingface
from megatron_chatflow.checkpoint.convert_store import Piece, stored_chunks, write_checkpoint
from megatron_chatflow.checkpoint.convert_vocabulary import Resize, grow_tensor, vocabulary_growth
from megatron_chatflow.checkpoint.files import LATEST
from megatron_chatflow.checkpoint.weight_map import (
    Join,
    WeightRule,
    huggingface_shapes,
    join,
    placements,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.small_files import read_model_files, replace_tokenizer

logger = logging.getLogger(__name__)

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
        output: The new run folder; it appears when it is complete.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps each tensor's own.
        resize: A larger vocabulary for the model.
        overwrite: Whether an earlier checkpoint folder of that name is replaced.

    Raises:
        UserError: The folder is no LLaMA, or is damaged or incomplete, or the checkpoint cannot be
            written.
    """
    check_new_folder(output, overwrite=overwrite, mark=LATEST)
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; name a Hugging Face model folder")
    shape = shape_of_huggingface(source)
    weights = HuggingFaceWeights(source)
    check_weights(weights, shape)
    files = read_model_files(source)
    tokenizer = huggingface_tokenizer(source)
    if tokenizer is None:
        logger.warning("%s has no tokenizer files: the checkpoint will name no tokenizer", source)
    elif tokenizer.vocab_size > shape.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} pieces and the embedding "
            f"{shape.vocab_size} rows; give the folder its own tokenizer"
        )
    # A tensor over all layers has one dtype, so a folder of mixed ones takes the widest.
    stored = {weights.dtype(name) for name in huggingface_shapes(shape)}
    narrow = stored.pop() if len(stored) == 1 else torch.float32
    target = narrow if dtype is None else DTYPES[dtype]
    read: Read = weights.read
    if resize is not None:
        if tokenizer is None:
            raise UserError(f"{source}: has no tokenizer, from which a larger one could go on")
        read, shape = _grown(read, shape, tokenizer, resize)
        tokenizer = resize.tokenizer
        files = replace_tokenizer(files, tokenizer)
    chunks = _chunks(shape, target, read)
    num_parameters = sum(torch.Size(size).numel() for size in huggingface_shapes(shape).values())
    num_bytes = num_parameters * target.itemsize
    with new_folder(output, overwrite=overwrite, mark=LATEST, num_bytes=num_bytes) as folder:
        write_checkpoint(folder, chunks, shape, tokenizer, files)
    return Converted(output, len(huggingface_shapes(shape)), num_bytes, num_parameters)


def _grown(
    read: Read, shape: LlamaShape, tokenizer: Tokenizer, resize: Resize
) -> tuple[Read, LlamaShape]:
    """A way to read the model with the larger vocabulary, and its shape."""
    growth = vocabulary_growth(tokenizer, resize.tokenizer, shape.vocab_size)

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
            rule, layer, shape, dtype, _pieces(rule, layer, shape, read_counted)
        )
    ]


def _pieces(rule: WeightRule, layer: int | None, shape: LlamaShape, read: Read) -> list[Piece]:
    """Rows of a megatron-core tensor; those that lie below each other are read one by one."""
    names = [part.name.format(layer=layer) for part in rule.parts]
    if rule.join is Join.QUERY_GROUPS:
        return [(rule.shape(shape)[0], lambda: join(rule, shape, [read(name) for name in names]))]
    return [
        (part.shape(shape)[0], partial(read, name))
        for part, name in zip(rule.parts, names, strict=True)
    ]


def huggingface_tokenizer(source: Path) -> Tokenizer | None:
    """A folder's or file's tokenizer; None where a folder has none."""
    names = ("tokenizer.model", "tokenizer.json")
    if source.is_dir() and not any((source / name).is_file() for name in names):
        return None
    return load_tokenizer(source)
