"""Exports a training checkpoint as a Hugging Face folder.

The checkpoint may have any parallel layout. The folder holds safetensors files, ``config.json`` and
the small files that travel with the model, and `transformers` loads it as the class of
`config.architectures.ARCHITECTURES` that has the model's layers. One process converts the model,
with one tensor in memory at a time.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_chatflow.checkpoint.files import (
    CARRIED,
    check_small_files,
    read_state,
    resolve_checkpoint,
)
from megatron_chatflow.checkpoint.recorded_config import read_run_config
from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.safetensors import write_shards
from megatron_chatflow.convert.shape import DTYPES, LlamaShape, trained_shape
from megatron_chatflow.convert.template import TokenizerChoice, files_of_export
from megatron_chatflow.convert.weight_map import huggingface_shapes, placements, split
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_new_folder, new_folder
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.base import sha256_of
from megatron_chatflow.tokenizer.small_files import write_small_files

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    folder: Path  # the folder that was written
    num_tensors: int
    num_bytes: int  # number of bytes of their values
    num_parameters: int  # number of their values
    has_masters: bool = False  # whether the values are the optimizer's fp32 master weights
    is_average: bool = False  # whether the values are the moving average of the weights

    def __str__(self) -> str:
        """Returns a one-line summary."""
        return (
            f"wrote {self.folder}: {self.num_tensors} tensors, {self.num_parameters:,} parameters, "
            f"{self.num_bytes / 1e6:,.1f} MB"
            + (", from the optimizer's fp32 master weights" if self.has_masters else "")
            + (", the moving average of the weights" if self.is_average else "")
        )


def find_checkpoint(path: Path) -> Path:
    """Returns the ``iter_`` folder at a path: itself, or the latest one of a run."""
    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path}: contains no checkpoint; give the folder of a run or one of its iter_ folders"
        )
    check_small_files(checkpoint)
    return checkpoint


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    average: bool = False,
    tokenizer: TokenizerChoice | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: A run's folder, or one of its ``iter_`` folders.
        output: The new folder, which appears when it is complete.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps the stored one. If the stored dtype is
            bf16 and another one is requested, the weights are converted from the optimizer's fp32
            master weights, if the checkpoint has them.
        average: Whether to write the moving average of the weights instead of the weights.
        tokenizer: The tokenizer and chat template to export; None exports the run's.
        max_shard_bytes: The largest size of a safetensors file in bytes.
        overwrite: Whether an existing export of that name is replaced.

    Raises:
        UserError: The checkpoint is damaged or of another model, the tokenizer is not the run's,
            or the folder cannot be written.
    """
    check_new_folder(output, overwrite=overwrite, mark="config.json")
    checkpoint = find_checkpoint(checkpoint)
    shape = trained_shape(checkpoint)
    reader = DistributedReader(checkpoint)
    check_shapes(reader, shape)
    stored = reader.dtype(*placements(shape)[0])
    target = stored if dtype is None else DTYPES[dtype]
    if average:
        reader = DistributedReader(checkpoint, average=True)
        check_shapes(reader, shape)
    elif target != stored and stored == torch.bfloat16:
        # The weights are rounded master weights: converting the latter avoids rounding twice.
        reader = DistributedReader(checkpoint, masters=True)
        check_shapes(reader, shape)
    choice = tokenizer or TokenizerChoice()
    files = files_of_export(checkpoint, choice, run_tokenizer(checkpoint, choice), shape, target)
    shapes = huggingface_shapes(shape)
    num_parameters = sum(torch.Size(size).numel() for size in shapes.values())
    num_bytes = num_parameters * target.itemsize
    with new_folder(output, overwrite=overwrite, mark="config.json", num_bytes=num_bytes) as folder:
        write_shards(folder, shapes, target, _tensors(reader, shape), max_shard_bytes)
        write_small_files(folder, files)
    has_masters = not average and stored != reader.dtype(*placements(shape)[0])
    return Converted(output, len(shapes), num_bytes, num_parameters, has_masters, average)


def check_shapes(reader: DistributedReader, shape: LlamaShape) -> None:
    """Checks that stored shapes are the model's; vocabulary rows may be padded."""
    for rule, layer in placements(shape):
        stored, expected = reader.shape(rule, layer), rule.shape(shape)
        reader.dtype(rule, layer)  # refuses unsupported dtypes
        is_padded = (
            rule.has_vocabulary_rows
            and len(stored) == len(expected)
            and stored[0] >= expected[0]
            and stored[1:] == expected[1:]
        )
        if not (is_padded or stored == expected):
            raise UserError(
                f"{reader.folder}: {rule.megatron.format(layer=layer)} has shape {list(stored)}, "
                f"but the model expects {list(expected)}; state.json belongs to another "
                "checkpoint"
            )


def read_weight(
    reader: DistributedReader, shape: LlamaShape, placement: tuple[Any, int | None]
) -> list[tuple[str, torch.Tensor]]:
    """Reads a megatron-core tensor as its Hugging Face tensors by name, without padding rows.

    ``placement`` is one of `placements`.
    """
    rule, layer = placement
    whole = reader.read(rule, layer)
    if rule.has_vocabulary_rows:
        whole = whole[: shape.vocab_size]
    names = [part.name.format(layer=layer) for part in rule.parts]
    return list(zip(names, split(rule, shape, whole), strict=True))


def run_tokenizer(checkpoint: Path, choice: TokenizerChoice) -> Tokenizer | None:
    """Loads the tokenizer that a checkpoint was trained with; None if left out or not recorded.

    Raises:
        UserError: The tokenizer cannot be found, or is not the one that was trained with.
    """
    recorded = read_state(checkpoint).get("tokenizer") or {}
    if not isinstance(recorded, Mapping):
        raise UserError(
            f"{checkpoint / 'state.json'}: tokenizer is not an object; load another checkpoint"
        )
    if choice.leave_out:
        return None
    path = choice.model or _carried_tokenizer(checkpoint, recorded)
    path = path or read_run_config(checkpoint).tokenizer.tokenizer_model
    if path is None:
        logger.warning("%s does not record a tokenizer; exporting without one", checkpoint)
        return None
    if not path.exists():
        raise UserError(f"{path}: the run's tokenizer is missing; {choice.advice}")
    tokenizer = load_tokenizer(path, str(recorded.get("type") or "auto"))
    if recorded.get("sha256") not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{path}: is not the tokenizer that {checkpoint} was trained with; {choice.advice}"
        )
    return tokenizer


def _carried_tokenizer(checkpoint: Path, recorded: Mapping[str, Any]) -> Path | None:
    """Returns the path of the tokenizer carried by the checkpoint; None if there is none."""
    for name in ("tokenizer.model", "tokenizer.json"):
        path = checkpoint / CARRIED / name
        if path.is_file() and sha256_of(path.read_bytes()) == recorded.get("sha256"):
            return path
    return None


def _tensors(reader: DistributedReader, shape: LlamaShape) -> Iterator[tuple[str, torch.Tensor]]:
    for placement in tqdm(placements(shape), unit="tensor", desc="export", disable=None):
        yield from read_weight(reader, shape, placement)
