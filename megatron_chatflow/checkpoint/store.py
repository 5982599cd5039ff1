"""A run's checkpoints: weights and optimizer state at any parallel layout, and the run's own state.

In: the model's chunks and the optimizer, and a checkpoint's folder. Out: their state as shards to
save, or read back into them; `saver` writes. Nothing random is drawn after initialisation (dropout
is 0 and the data's order is a function of the seed), so no generator's state is kept.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch.distributed.checkpoint.filesystem import FileSystemReader
from typing_extensions import TypedDict

from megatron_chatflow.checkpoint import megatron, optimizer_state
from megatron_chatflow.checkpoint.background import reason
from megatron_chatflow.checkpoint.division import share_of
from megatron_chatflow.checkpoint.files import read_state
from megatron_chatflow.checkpoint.manifest import damage, refuse_damage
from megatron_chatflow.checkpoint.own_heads import expect_own_heads, own_pieces, own_sizes_of
from megatron_chatflow.checkpoint.safe_index import read_index
from megatron_chatflow.checkpoint.shard_plan import StoredObject, TensorPiece
from megatron_chatflow.config.units import shorten
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.agreement import in_agreement
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.megatron import data_parallel_group
from megatron_chatflow.runtime.ranks import Ranks

_COUNTS = ("iteration", "consumed_samples", "consumed_tokens")


@with_config(ConfigDict(strict=True, extra="allow"))
class _RecordedSource(TypedDict, total=False):
    """What a resume reads of a source's fingerprint; versions recorded more and more of it."""

    datasets: list[dict[str, Any]] | None
    block_hash: list[dict[str, str]]
    packing: int | None
    seq_length: int | None
    holdout_every: int | None
    num_samples: int


_SOURCES = TypeAdapter(dict[str, _RecordedSource])


@dataclass(frozen=True)
class RunState:
    """What a run must know to go on, besides weights and optimizer.

    Attributes:
        iteration: Steps taken.
        consumed_samples: Samples of the blend consumed.
        consumed_tokens: The same in tokens.
        blend: The blend's state.
        schedule: The schedule, with the number of samples an iteration that it began with.
        sources: Each source's fingerprint by name.
        tokenizer: ``type``, ``sha256``, ``vocab_size``, and ``add_bos_token`` (whether the model's
            texts begin with BOS; earlier versions did not record it).
        model: The model's shape.
        guard: What judging the next steps takes; empty in checkpoints that had none.
        data_seeds: The seeds of each source's order by name: pairs of the first epoch and the seed
            from there on; empty in checkpoints that had none.
    """

    iteration: int
    consumed_samples: int
    consumed_tokens: int
    blend: dict[str, Any]
    schedule: dict[str, Any]
    sources: dict[str, Any]
    tokenizer: dict[str, Any]
    model: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)
    data_seeds: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> "RunState":
        """Reads a checkpoint's state.

        Raises:
            UserError: The folder holds none, or it lacks a part, or one is of the wrong type.
        """
        state = read_state(checkpoint)
        for name, value in state.items():
            kind = int if name in _COUNTS else dict
            if name in cls.__dataclass_fields__ and type(value) is not kind:
                raise UserError(
                    f"{checkpoint / 'state.json'}: {name} is {shorten(value)} and no "
                    f"{'number' if kind is int else 'object'}; load another checkpoint"
                )
        try:
            _SOURCES.validate_python(state.get("sources", {}))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(key)[:40] for key in ("sources", *problem["loc"]))
            raise UserError(
                f"{checkpoint / 'state.json'}: {place}: {problem['msg'][:120]}; load another "
                "checkpoint"
            ) from error
        try:
            return cls(**state)
        except TypeError as error:
            raise UserError(
                f"{checkpoint / 'state.json'}: is of another version ({error}); load another "
                "checkpoint"
            ) from None


def _model_state(chunks: list[Any]) -> dict[str, Any]:
    """The weights, divided as they lie on this rank."""
    return {
        name: chunk.sharded_state_dict()
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }


def parts_to_save(
    chunks: list[Any], optimizer: Any, ranks: Ranks
) -> tuple[list[TensorPiece], list[StoredObject], bytes]:
    """What this rank writes: weights and optimizer state; nothing is gathered or copied.

    What data-parallel ranks hold alike is shared out among them.

    Args:
        chunks: Model chunks, with or without gradient buffers around them.
        optimizer: megatron-core's.
        ranks: This process's place.

    Returns:
        Pieces of tensors, small objects, and what is the same on every rank as ``common.pt``
        holds it.
    """
    with device_mode(ranks.device):
        bare = unwrapped(chunks)
        model = _model_state(bare)
        parts = megatron.parameter_parts(model)
        cut: list[TensorPiece] = []
        alike, objects, common = megatron.sharded_parts(
            model, {"optimizer": optimizer_state.common_state(optimizer)}
        )
        for held in optimizer_state.held_states(optimizer):
            to_save = [part for part in parts[held.parameter] if part.is_main]
            (cut if held.is_cut else alike).extend(optimizer_state.pieces_of(held, to_save))
    own_sizes = own_sizes_of(bare)
    group = data_parallel_group(with_context_parallel=True)
    mine = share_of(own_pieces(alike, own_sizes), group.rank(), group.size())
    return [*mine, *own_pieces(cut, own_sizes)], objects, common


def _chunk_names(chunks: list[Any]) -> list[str]:
    """Where each chunk stands in the state, as in Megatron; tensors go by names of their own."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _take_weights(chunks: list[Any], loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name])


def unwrapped(chunks: list[Any]) -> list[Any]:
    """Model chunks without the gradient buffers around them."""
    return [getattr(chunk, "module", chunk) for chunk in chunks]


def all_agree(is_fine: bool, device: torch.device) -> bool:
    """Whether all is fine on every rank; every rank calls it."""
    flag = torch.tensor([int(is_fine)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def _reason(error: BaseException) -> str:
    """What the system said, under torch's wrapping."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return str(error) if isinstance(error, UserError) else reason(error)


def _load_model(
    chunks: list[Any], checkpoint: Path, reader: FileSystemReader | None
) -> dict[str, Any]:
    """Fills the weights; returns what is the same on every rank."""
    read_index(checkpoint)
    try:
        state = _model_state(chunks)
        expect_own_heads(state, own_sizes_of(chunks))
        loaded = megatron.load_sharded(state, checkpoint, reader)
        _take_weights(chunks, loaded)
    except (Exception, megatron.CheckpointException) as error:
        line = _reason(error)
        if line.startswith(str(checkpoint)):
            raise UserError(line) from error
        raise UserError(
            f"{checkpoint}: cannot be loaded: {line}; load another checkpoint"
        ) from error
    return loaded


def load_weights(
    checkpoint: Path,
    chunks: list[Any],
    ranks: Ranks,
    reader: FileSystemReader | None = None,
    optimizer: Any = None,
) -> None:
    """Reads the model's weights alone, at whatever layout they were saved; every rank calls it.

    Args:
        checkpoint: An ``iter_`` folder.
        chunks: Model chunks, with or without gradient buffers around them.
        ranks: This process's place.
        reader: Reads it; None for what lies there as it is.
        optimizer: megatron-core's, whose master weights become the checkpoint's, unrounded.

    Raises:
        UserError: On every rank, if one cannot read its part.
    """
    bare = unwrapped(chunks)
    with device_mode(ranks.device):
        _load_model(bare, checkpoint, reader)
        if optimizer is not None:
            layout = _layout(bare)
            in_agreement(
                lambda: optimizer_state.load_master_weights(optimizer, layout, checkpoint, reader)
            )


def _layout(bare: list[Any]) -> optimizer_state.Layout:
    parts = megatron.parameter_parts(_model_state(bare))
    return optimizer_state.Layout(parts, own_sizes_of(bare))


def load_checkpoint(
    checkpoint: Path,
    chunks: list[Any],
    optimizer: Any,
    ranks: Ranks,
    reader: FileSystemReader | None = None,
) -> None:
    """Reads weights and optimizer state, of the plain or the distributed one; every rank calls it.

    Raises:
        UserError: On every rank, if one cannot read its part.
    """
    bare = unwrapped(chunks)
    with device_mode(ranks.device):
        common = _load_model(bare, checkpoint, reader)
        layout = _layout(bare)
        state = common.get("optimizer")
        in_agreement(lambda: optimizer_state.load(optimizer, layout, state, checkpoint, reader))


def verify_checkpoint(checkpoint: Path, ranks: Ranks) -> None:
    """Reads every file again and compares hashes; every rank calls it and reads its share.

    Raises:
        UserError: A file is not what was saved, on every rank with the names of all such files.
    """
    world_size = ranks.process.world_size
    found = damage(checkpoint, part=ranks.process.rank, num_parts=world_size)
    gathered: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(gathered, found)
    refuse_damage(checkpoint, [line for lines in gathered for line in lines])
