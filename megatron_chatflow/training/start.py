"""Selects the checkpoint that a run starts from, the same one on every rank.

Checkpoints may lie on each node's local disk, and on a shared file system a node may see the file
that names the latest checkpoint with a delay. Therefore rank 0 selects a checkpoint, and every rank
looks for that same checkpoint in the folder that its own configuration names.
"""

import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_chatflow.checkpoint.files import (
    LATEST,
    identity,
    is_iteration_folder,
    resolve_checkpoint,
)
from megatron_chatflow.config import CheckpointConfig, RunConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.ranks import Ranks, format_ranks, gather_objects

logger = logging.getLogger(__name__)

_SECONDS_TO_APPEAR = 5.0  # shared file systems cache listings
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class InitialCheckpoint:
    """The checkpoint that a run starts from."""

    folder: Path  # folder in which this rank reads it
    option: str  # option of the ``checkpoint`` section that names it
    weights_only: bool  # whether a new run starts from its weights instead of resuming it

    @property
    def is_huggingface(self) -> bool:
        """Whether the checkpoint is a Hugging Face folder."""
        return self.option == "load_hf"


def find_initial_checkpoint(config: RunConfig) -> InitialCheckpoint | None:
    """Finds the checkpoint that this process on its own would start from; None for a fresh start.

    Raises:
        UserError: A checkpoint that is required does not exist.
    """
    settings = config.checkpoint
    if settings.load is not None:
        checkpoint = resolve_checkpoint(Path(settings.load))
        if checkpoint is not None:
            return InitialCheckpoint(checkpoint, "load", weights_only=settings.finetune)
        if settings.finetune:
            raise UserError(
                f"checkpoint.load: {settings.load} contains no checkpoint, but --finetune needs "
                "its weights; give the folder of a run or one of its iter_ folders"
            )
    if settings.pretrained_checkpoint is not None:
        checkpoint = resolve_checkpoint(Path(settings.pretrained_checkpoint))
        if checkpoint is None:
            raise UserError(
                f"checkpoint.pretrained_checkpoint: {settings.pretrained_checkpoint} contains no "
                "checkpoint; give the folder of a run or one of its iter_ folders"
            )
        return InitialCheckpoint(checkpoint, "pretrained_checkpoint", weights_only=True)
    if settings.load_hf is not None:
        return InitialCheckpoint(Path(settings.load_hf), "load_hf", weights_only=True)
    if settings.load is not None:
        logger.warning(
            "checkpoint.load: %s contains no checkpoint; starting from scratch", settings.load
        )
    return None


def check_save_folder(settings: CheckpointConfig, checkpoint: InitialCheckpoint | None) -> None:
    """Checks that ``--save`` holds no checkpoints of another run, which would be overwritten."""
    if settings.save is None or not Path(settings.save).is_dir():
        return
    save = Path(settings.save).resolve()
    if checkpoint is not None and not checkpoint.weights_only:
        if save in (checkpoint.folder.parent.resolve(), checkpoint.folder.resolve().parent):
            return
    has_latest = (save / LATEST).exists()
    # A run killed while it published its first checkpoint starts anew, by the same command.
    if not has_latest and settings.load is not None and Path(settings.load).resolve() == save:
        return
    if has_latest or any(is_iteration_folder(path) for path in save.glob("iter_*")):
        raise UserError(
            f"checkpoint.save: {settings.save} contains checkpoints of another run, which this "
            f"run would overwrite; resume that run with --load {settings.save}, or use another "
            "--save"
        )


def resolve_initial_checkpoint(config: RunConfig, ranks: Ranks) -> InitialCheckpoint | None:
    """Selects the checkpoint that all ranks start from; every rank calls it.

    Returns:
        The checkpoint; None for a fresh start.

    Raises:
        UserError: On every rank, if a rank does not see the checkpoint that rank 0 selected.
    """
    if ranks.process.world_size == 1:
        return find_initial_checkpoint(config)
    own, problem = None, ""
    try:
        own = find_initial_checkpoint(config)
    except UserError as error:
        problem = str(error)
    first_identity = _identity(own) if ranks.process.rank == 0 else ""
    chosen: list[Any] = [(own, problem, first_identity)]
    torch.distributed.broadcast_object_list(chosen, src=0)
    first, first_problem, first_identity = chosen[0]
    if first_problem:
        raise UserError(first_problem)
    found, mismatch = _find_on_this_rank(first, first_identity, config, own, problem)
    _raise_if_ranks_differ(first, gather_objects(mismatch))
    return found


def _identity(own: InitialCheckpoint | None) -> str:
    """Returns the identity of a checkpoint; "" if there is none or it cannot be read."""
    with suppress(UserError, OSError):  # opening it reports what is wrong with it
        if own is not None:
            return identity(own.folder, is_huggingface=own.is_huggingface)
    return ""


def _find_on_this_rank(
    first: InitialCheckpoint | None,
    first_identity: str,
    config: RunConfig,
    own: InitialCheckpoint | None,
    problem: str,
) -> tuple[InitialCheckpoint | None, str | None]:
    """Returns rank 0's choice as this rank sees it, and what differs if anything does."""
    if first is None:
        return None, problem or (None if own is None else f"found {own.folder}")
    named = getattr(config.checkpoint, first.option)
    if named is None:
        return None, f"started without --{first.option.replace('_', '-')}"
    folder = Path(named)
    if not first.is_huggingface and not is_iteration_folder(folder):
        folder = folder / first.folder.name
    weights_only = first.option != "load" or config.checkpoint.finetune
    checkpoint = InitialCheckpoint(folder, first.option, weights_only)
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while True:
        mismatch = _find_mismatch(checkpoint, first_identity)
        if mismatch is None or time.monotonic() >= deadline:
            return checkpoint, mismatch
        time.sleep(_PAUSE_SECONDS)


def _find_mismatch(checkpoint: InitialCheckpoint, first_identity: str) -> str | None:
    """Returns what is wrong with this rank's checkpoint; None if it is rank 0's."""
    if not checkpoint.folder.is_dir():
        return f"found no {checkpoint.folder}"
    if not first_identity:
        return None
    try:
        own = identity(checkpoint.folder, is_huggingface=checkpoint.is_huggingface)
    except (UserError, OSError) as error:
        return f"could not read it ({error})"
    is_same = own == first_identity
    return None if is_same else f"found a different checkpoint at {checkpoint.folder}"


def _raise_if_ranks_differ(first: InitialCheckpoint | None, mismatches: list[str | None]) -> None:
    others: dict[str, list[int]] = {}
    for rank, mismatch in enumerate(mismatches):
        if mismatch is not None:
            others.setdefault(mismatch, []).append(rank)
    if not others:
        return
    listing = "; ".join(f"{format_ranks(ranks)} {mismatch}" for mismatch, ranks in others.items())
    option, text = "load", "found no checkpoint and would start from scratch"
    if first is not None:
        option, text = first.option, f"starts from {first.folder}"
    raise UserError(
        f"checkpoint.{option}: the ranks would start from different checkpoints: rank 0 {text}; "
        f"{listing}; use a folder that every node can read, or copy the whole checkpoint to each "
        "node"
    )
