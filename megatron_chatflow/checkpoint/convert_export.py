"""A training checkpoint as a Hugging Face folder.

In: a distributed checkpoint of any parallel layout. Out: safetensors, `config.json`,
`generation_config.json` and the tokenizer, which `transformers` loads as `LlamaForCausalLM`. One
process reads tensor by tensor; memory holds one tensor.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_chatflow.checkpoint.convert_distributed import DistributedReader
from megatron_chatflow.checkpoint.convert_folder import new_folder
from megatron_chatflow.checkpoint.convert_safetensors import write_shards
from megatron_chatflow.checkpoint.convert_shape import (
    DTYPES,
    LlamaShape,
    huggingface_config,
    trained_shape,
)
from megatron_chatflow.checkpoint.convert_template import TokenizerChoice, chat_template
from megatron_chatflow.checkpoint.files import read_state, resolve_checkpoint
from megatron_chatflow.checkpoint.manifest import refuse_small_damage
from megatron_chatflow.checkpoint.recorded_config import read_run_config
from megatron_chatflow.checkpoint.weight_map import huggingface_shapes, placements, split
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        folder: Where.
        num_tensors: Tensors.
        num_bytes: Bytes of their values.
        num_parameters: Values.
        has_masters: Whether they are the optimizer's fp32 master weights.
    """

    folder: Path
    num_tensors: int
    num_bytes: int
    num_parameters: int
    has_masters: bool = False

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"wrote {self.folder}: {self.num_tensors} tensors, {self.num_parameters:,} parameters, "
            f"{self.num_bytes / 1e6:,.1f} MB"
            + (", from the optimizer's fp32 master weights" if self.has_masters else "")
        )


def find_checkpoint(path: Path) -> Path:
    """The ``iter_`` folder that a path means: itself, or the latest of a run.

    Raises:
        UserError: There is none, or one of its small files is not as it was saved.
    """
    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        raise UserError(
            f"{path}: holds no checkpoint; name a run's folder or one of its iter_ ones"
        )
    refuse_small_damage(checkpoint)
    return checkpoint


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    tokenizer: TokenizerChoice | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Converted:
    """Writes a checkpoint as a Hugging Face folder.

    Args:
        checkpoint: A run's folder, or one of its ``iter_`` folders.
        output: The new folder; it appears when it is complete.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None keeps the stored one. Another one than the
            stored bf16 comes from the optimizer's fp32 master weights, where the checkpoint has
            them; rounded to bf16 they are the stored weights, bit for bit.
        tokenizer: Which tokenizer and chat template; None takes the run's.
        max_shard_bytes: The most bytes of a safetensors file.
        overwrite: Whether an earlier export of that name is replaced.

    Raises:
        UserError: The checkpoint is damaged or of another model, the tokenizer is not the run's,
            or the folder cannot be written.
    """
    checkpoint = find_checkpoint(checkpoint)
    shape = trained_shape(checkpoint)
    reader = DistributedReader(checkpoint)
    check_shapes(reader, shape)
    stored = reader.dtype(*placements(shape)[0])
    target = stored if dtype is None else DTYPES[dtype]
    if target != stored and stored == torch.bfloat16:
        # The weights are these, rounded: another precision than theirs rounds once and not twice.
        reader = DistributedReader(checkpoint, masters=True)
        check_shapes(reader, shape)
    chosen = run_tokenizer(checkpoint, tokenizer or TokenizerChoice())
    template = None
    if chosen is not None:
        asked = tokenizer.chat_template if tokenizer else None
        template = chat_template(checkpoint, chosen.model_path, asked)
    shapes = huggingface_shapes(shape)
    num_parameters = sum(torch.Size(size).numel() for size in shapes.values())
    num_bytes = num_parameters * target.itemsize
    with new_folder(output, overwrite=overwrite, mark="config.json", num_bytes=num_bytes) as folder:
        write_shards(folder, shapes, target, _tensors(reader, shape), max_shard_bytes)
        _write_configs(folder, shape, target, chosen)
        if chosen is not None:
            recorded = read_state(checkpoint).get("tokenizer") or {}
            begins = recorded.get("add_bos_token") is True or chosen.add_bos_token
            chosen.save_pretrained(folder, template, begins)
    has_masters = stored != reader.dtype(*placements(shape)[0])
    return Converted(output, len(shapes), num_bytes, num_parameters, has_masters)


def check_shapes(reader: DistributedReader, shape: LlamaShape) -> None:
    """Compares stored shapes with the model's; vocabulary rows may be padded.

    Raises:
        UserError: A tensor is missing or has another shape.
    """
    for rule, layer in placements(shape):
        stored, expected = reader.shape(rule, layer), rule.shape(shape)
        is_padded = rule.has_vocabulary_rows and stored[0] >= expected[0]
        if stored[1:] != expected[1:] or not (is_padded or stored[0] == expected[0]):
            raise UserError(
                f"{reader.folder}: {rule.megatron.format(layer=layer)} is {list(stored)} and the "
                f"model's is {list(expected)}; state.json belongs to another checkpoint"
            )


def read_weight(
    reader: DistributedReader, shape: LlamaShape, placement: tuple[Any, int | None]
) -> list[tuple[str, torch.Tensor]]:
    """A megatron-core tensor as its Hugging Face tensors, without padding rows.

    Args:
        reader: The checkpoint.
        shape: The model's shape.
        placement: One of `placements`.

    Returns:
        Names and tensors.
    """
    rule, layer = placement
    whole = reader.read(rule, layer)
    if rule.has_vocabulary_rows:
        whole = whole[: shape.vocab_size]
    names = [part.name.format(layer=layer) for part in rule.parts]
    return list(zip(names, split(rule, shape, whole), strict=True))


def run_tokenizer(checkpoint: Path, choice: TokenizerChoice) -> Tokenizer | None:
    """The tokenizer that a checkpoint was trained with.

    Args:
        checkpoint: An ``iter_`` folder.
        choice: What the user asked for.

    Returns:
        The tokenizer; None where it is left out or was never known.

    Raises:
        UserError: It cannot be found, or is another one.
    """
    recorded = read_state(checkpoint).get("tokenizer") or {}
    if not isinstance(recorded, Mapping):
        raise UserError(
            f"{checkpoint / 'state.json'}: tokenizer is no object; load another checkpoint"
        )
    if choice.leave_out:
        return None
    path = choice.model or read_run_config(checkpoint).tokenizer.tokenizer_model
    if path is None:
        logger.warning("%s names no tokenizer: exporting without one", checkpoint)
        return None
    if not path.exists():
        raise UserError(f"{path}: the run's tokenizer is not there; {choice.advice}")
    tokenizer = load_tokenizer(path, str(recorded.get("type") or "auto"))
    if recorded.get("sha256") not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{path}: is not the tokenizer that {checkpoint} was trained with; {choice.advice}"
        )
    return tokenizer


def _tensors(reader: DistributedReader, shape: LlamaShape) -> Iterator[tuple[str, torch.Tensor]]:
    for placement in tqdm(placements(shape), unit="tensor", desc="export", disable=None):
        yield from read_weight(reader, shape, placement)


def _write_configs(
    folder: Path, shape: LlamaShape, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> None:
    ids: dict[str, int | None] = {}
    if tokenizer is not None:
        ids = {
            "bos_token_id": _known(tokenizer.bos_id),
            "eos_token_id": _known(tokenizer.eos_id),
            "pad_token_id": _known(tokenizer.pad_id),
        }
    _write_json(folder / "config.json", huggingface_config(shape, dtype, ids))
    known = {name: token_id for name, token_id in ids.items() if token_id is not None}
    _write_json(folder / "generation_config.json", {**known, "_from_model_config": False})


def _known(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
