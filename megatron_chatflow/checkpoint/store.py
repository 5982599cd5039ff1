"""A run's checkpoints: weights and optimizer state at any parallel layout, and the run's own state.

In: the model's chunks and the optimizer, and a checkpoint's folder. Out: their state as shards to
save, or read back into them; `saver` writes. Nothing random is drawn after initialisation (dropout
is 0 and the data's order is a function of the seed), so no generator's state is kept.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint import megatron
from megatron_chatflow.checkpoint.background import reason
from megatron_chatflow.checkpoint.files import read_state
from megatron_chatflow.checkpoint.grown_reader import GrownReader
from megatron_chatflow.checkpoint.manifest import damage, refuse_damage
from megatron_chatflow.checkpoint.own_heads import expect_own_heads, own_sizes_of
from megatron_chatflow.checkpoint.safe_index import read_index
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks


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
        tokenizer: ``type``, ``sha256`` and ``vocab_size``.
        model: The model's shape.
        guard: What judging the next steps takes; empty in checkpoints that had none.
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

    @classmethod
    def read(cls, checkpoint: Path) -> "RunState":
        """Reads a checkpoint's state.

        Raises:
            UserError: The folder holds none, or it lacks a part.
        """
        state = read_state(checkpoint)
        try:
            return cls(**state)
        except TypeError as error:
            raise UserError(
                f"{checkpoint / 'state.json'}: is of another version ({error}); load another "
                "checkpoint"
            ) from None


def sharded_state(chunks: list[Any], optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    """Weights, and where there is an optimizer its state, divided as they lie on this rank."""
    model = {
        name: chunk.sharded_state_dict()
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }
    state: dict[str, Any] = dict(model)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=megatron.OPTIMIZER_LAYOUT
        )
    if is_loading:
        expect_own_heads(state, own_sizes_of(chunks))
    return state


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
    return reason(error)


def _load_sharded(
    sharded: dict[str, Any], checkpoint: Path, reader: GrownReader | None = None
) -> dict[str, Any]:
    read_index(checkpoint)
    try:
        return megatron.load_sharded(sharded, checkpoint, reader)
    except (Exception, megatron.CheckpointException) as error:
        raise UserError(
            f"{checkpoint}: cannot be loaded: {_reason(error)}; load another checkpoint"
        ) from error


def load_weights(
    checkpoint: Path, chunks: list[Any], ranks: Ranks, reader: GrownReader | None = None
) -> None:
    """Reads the model's weights alone, at whatever layout they were saved; every rank calls it."""
    bare = unwrapped(chunks)
    with device_mode(ranks.device):
        loaded = _load_sharded(sharded_state(bare, None, is_loading=True), checkpoint, reader)
        _take_weights(bare, loaded)


def load_checkpoint(
    checkpoint: Path,
    chunks: list[Any],
    optimizer: Any,
    ranks: Ranks,
    reader: GrownReader | None = None,
) -> None:
    """Reads weights and optimizer state; every rank calls it."""
    bare = unwrapped(chunks)
    with device_mode(ranks.device):
        sharded = sharded_state(bare, optimizer, is_loading=True)
        loaded = _load_sharded(sharded, checkpoint, reader)
        _take_weights(bare, loaded)
        optimizer.load_state_dict(loaded["optimizer"])


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
