"""Ranks and process groups, and steps in which every rank must succeed.

`ProcessRank` describes this process before the parallel groups exist, and `Ranks` its place in all
of them. Both are frozen, and no other module reads a rank from a global. This module is also the
typed boundary to megatron-core's parallel state, which has no type annotations.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from megatron_chatflow.errors import UserError


@dataclass(frozen=True)
class ProcessRank:
    """Rank of this process in the job, as set by its launcher."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ProcessRank":
        """Reads torchrun's environment variables; without them this is the only process.

        Raises:
            UserError: A variable is not a number in its range.
        """
        values = {}
        for name, default in (
            ("RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_RANK", "0"),
            ("LOCAL_WORLD_SIZE", environment.get("WORLD_SIZE", "1")),
        ):
            text = environment.get(name, default)
            if not text.isdecimal():
                raise UserError(
                    f"environment variable {name}: {text!r} is not a non-negative integer; "
                    "launch with torchrun"
                )
            values[name] = int(text)
        if values["RANK"] >= values["WORLD_SIZE"]:
            raise UserError(
                f"environment variable RANK: {values['RANK']} must be below WORLD_SIZE "
                f"{values['WORLD_SIZE']}; launch with torchrun"
            )
        return cls(**{name.lower(): value for name, value in values.items()})


@dataclass(frozen=True)
class Ranks:
    """This process's place in every parallel group, and its device."""

    process: ProcessRank
    device: torch.device
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_parallel_rank: int
    pipeline_parallel_size: int
    context_parallel_rank: int
    context_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def is_cuda(self) -> bool:
        """Whether this process computes on a GPU."""
        return self.device.type == "cuda"

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes the loss."""
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    @property
    def is_reporter(self) -> bool:
        """Whether this process writes the log, the metrics and the checkpoint's metadata."""
        return self.process.rank == 0


def initialize_groups(
    *,
    process: ProcessRank,
    device: torch.device,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    num_model_chunks: int,
    context_parallel_size: int,
    timeout: timedelta,
) -> Ranks:
    """Creates megatron-core's process groups and returns this process's place in them."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_model_chunks if num_model_chunks > 1 else None,
        context_parallel_size=context_parallel_size,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
        # NCCL needs additional gloo groups for CPU tensors; over gloo they would be duplicates.
        create_gloo_process_groups=device.type == "cuda",
    )
    return Ranks(
        process=process,
        device=device,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=tensor_model_parallel_size,
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel_size=pipeline_model_parallel_size,
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=context_parallel_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def seed_model_parallel(seed: int) -> None:
    """Seeds megatron-core's random tracker, with a separate stream per tensor-parallel rank."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def tensor_parallel_group() -> ProcessGroup:
    """Returns the ranks that hold shards of the same layers."""
    return cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group())


def pipeline_parallel_group() -> ProcessGroup:
    """Returns the ranks that hold consecutive layers of one replica."""
    return cast(ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def context_parallel_group() -> ProcessGroup:
    """Returns the ranks that hold different tokens of the same samples."""
    return cast(ProcessGroup, parallel_state.get_context_parallel_group())


def data_parallel_group(*, with_context_parallel: bool = False) -> ProcessGroup:
    """Returns the ranks that hold the same weights and read different samples or tokens."""
    group: ProcessGroup = parallel_state.get_data_parallel_group(
        with_context_parallel=with_context_parallel
    )
    return group


def destroy_groups() -> None:
    """Destroys megatron-core's groups, so that the process can create others.

    megatron-core only forgets its groups, whose threads would wake up 100 times a second each.
    """
    parallel_state.destroy_model_parallel()
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


_Result = TypeVar("_Result")
_MAX_NAMED = 8


class PeerError(UserError):
    """A user error on other ranks, which report it themselves."""


def gather_objects(value: Any) -> list[Any]:
    """Gathers every rank's value, ordered by rank; every rank calls it."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def run_on_all_ranks(step: Callable[[], _Result]) -> _Result:
    """Runs a step without collectives on every rank; raises on every rank if one of them fails.

    Otherwise the ranks that succeeded would continue into a collective and hang.

    Raises:
        UserError: The step failed on this rank; the message names the ranks with the same error
            unless all have it.
        PeerError: The step failed on other ranks only.
    """
    error: UserError | None = None
    try:
        result = step()
    except UserError as caught:
        error = caught
    messages = gather_objects(None if error is None else str(error))
    if not any(messages):
        return result
    if error is None:
        first = next(message for message in messages if message)
        those = [rank for rank, message in enumerate(messages) if message]
        raise PeerError(f"{format_ranks(those)}: {first}")
    same = [rank for rank, message in enumerate(messages) if message == str(error)]
    if len(same) == len(messages):
        raise error
    raise UserError(f"{format_ranks(same)}: {error}") from error


def format_ranks(ranks: Sequence[int]) -> str:
    """Formats ranks as ``rank 3``, ``ranks 0, 3, 4``, or the first few of many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:_MAX_NAMED]))}{more}"
