"""A run's checkpoints: weights and optimizer state at any parallel layout, and the run's own state.

In: the model's chunks, the optimizer, the configuration and a `RunState`. Out: a folder
``iter_0000100/`` that appears whole or not at all, and ``latest_checkpointed_iteration.txt``, which
moves only then. Nothing random is drawn after initialisation (dropout is 0 and the data's order is
a function of the seed), so no generator's state is kept.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint import megatron
from megatron_chatflow.checkpoint.files import (
    LATEST,
    fsync_path,
    fsync_tree,
    iteration_folder,
    prune,
    read_state,
    write_atomically,
)
from megatron_chatflow.checkpoint.safe_index import read_index
from megatron_chatflow.config import RunConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks

logger = logging.getLogger(__name__)


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


def _sharded_state(chunks: list[Any], optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    model = {
        name: chunk.sharded_state_dict()
        for name, chunk in zip(_chunk_names(chunks), chunks, strict=True)
    }
    state: dict[str, Any] = dict(model)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=megatron.OPTIMIZER_LAYOUT
        )
    return state


def _chunk_names(chunks: list[Any]) -> list[str]:
    """Where each chunk stands in the state, as in Megatron; tensors go by names of their own."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _take_weights(chunks: list[Any], loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[name])


def _unwrapped(chunks: list[Any]) -> list[Any]:
    return [getattr(chunk, "module", chunk) for chunk in chunks]


def _all_agree(is_fine: bool, device: torch.device) -> bool:
    flag = torch.tensor([int(is_fine)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def save_checkpoint(
    root: Path,
    state: RunState,
    config: RunConfig,
    chunks: list[Any],
    optimizer: Any,
    ranks: Ranks,
) -> bool:
    """Writes ``root/iter_...``; every rank calls it.

    A save that fails (a full disk, a quota, a folder that cannot be written) is logged, leaves
    nothing behind, and leaves the previous checkpoint as it was.

    Args:
        root: The run's folder.
        state: The run's own state.
        config: Resolved configuration, stored beside the weights.
        chunks: Model chunks, with or without gradient buffers around them.
        optimizer: megatron-core's optimizer.
        ranks: This process's place.

    Returns:
        Whether the checkpoint is on the disk.
    """
    begin = time.perf_counter()
    final = iteration_folder(root, state.iteration)
    beside = root / f".{final.name}.saving"

    def write() -> None:
        with device_mode(ranks.device):
            sharded = _sharded_state(_unwrapped(chunks), optimizer, is_loading=False)
            megatron.save_sharded(sharded, beside)

    steps: list[tuple[bool, Callable[[], None]]] = [
        (ranks.is_reporter, lambda: _make_empty(beside)),
        (True, write),
        (ranks.is_reporter, lambda: _publish(root, beside, final, state, config)),
    ]
    for is_mine, step in steps:
        error = _attempt(step) if is_mine else None
        if _all_agree(error is None, ranks.device):
            continue
        if error is not None:
            _log_failure(final, error)
        if ranks.is_reporter:
            shutil.rmtree(beside, ignore_errors=True)
        return False
    if ranks.is_reporter:
        logger.info("saved %s in %.2f s", final, time.perf_counter() - begin)
    return True


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _attempt(step: Callable[[], None]) -> BaseException | None:
    """Runs a step of a save; returns what went wrong."""
    try:
        step()
    # torch wraps what any rank met in an exception that is no `Exception`.
    except (Exception, megatron.CheckpointException) as error:
        return error
    return None


def _log_failure(final: Path, error: BaseException) -> None:
    folder = final.parent
    logger.error(
        "saving %s failed: %s (%.1f GB free there); the previous checkpoint is untouched, training "
        "goes on and the next save tries again",
        final,
        _root_cause(error),
        shutil.disk_usage(folder).free / 1e9 if folder.exists() else 0.0,
    )


def _root_cause(error: BaseException) -> str:
    """What the system said, under torch's wrapping."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _publish(root: Path, beside: Path, final: Path, state: RunState, config: RunConfig) -> None:
    (beside / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (beside / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    fsync_tree(beside)
    if final.exists():
        # The same iteration saved again, after a resume from an earlier one.
        shutil.rmtree(final)
    beside.rename(final)
    fsync_path(root)
    write_atomically(root / LATEST, f"{state.iteration}\n")
    retain = config.checkpoint.save_retain
    if retain is not None:
        prune(root, retain=retain, keep_every=config.checkpoint.save_keep_every)


def _load_sharded(sharded: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    read_index(checkpoint)
    try:
        return megatron.load_sharded(sharded, checkpoint)
    except (Exception, megatron.CheckpointException) as error:
        raise UserError(
            f"{checkpoint}: cannot be loaded: {_root_cause(error)}; load another checkpoint"
        ) from error


def load_weights(checkpoint: Path, chunks: list[Any], ranks: Ranks) -> None:
    """Reads the model's weights alone, at whatever layout they were saved; every rank calls it."""
    bare = _unwrapped(chunks)
    with device_mode(ranks.device):
        loaded = _load_sharded(_sharded_state(bare, None, is_loading=True), checkpoint)
        _take_weights(bare, loaded)


def load_checkpoint(checkpoint: Path, chunks: list[Any], optimizer: Any, ranks: Ranks) -> None:
    """Reads weights and optimizer state; every rank calls it."""
    bare = _unwrapped(chunks)
    with device_mode(ranks.device):
        sharded = _sharded_state(bare, optimizer, is_loading=True)
        loaded = _load_sharded(sharded, checkpoint)
        _take_weights(bare, loaded)
        optimizer.load_state_dict(loaded["optimizer"])
