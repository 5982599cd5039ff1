"""Rank facts as one value: who this process is, and its place in every parallel group.

In: the environment that ``torchrun`` sets. Out: `ProcessRank` before the groups exist and `Ranks`
after. Both are frozen; nothing else in the package asks a global for a rank.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_chatflow.errors import UserError


@dataclass(frozen=True)
class ProcessRank:
    """This process among all of the job's, as its launcher says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "ProcessRank":
        """Reads torchrun's variables; without them this is the only process.

        Raises:
            UserError: A variable is there and is not a number in its range.
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
                raise UserError(f"environment variable {name}: {text!r} is not a rank or a size")
            values[name] = int(text)
        if values["RANK"] >= values["WORLD_SIZE"]:
            raise UserError(
                f"environment variable RANK: {values['RANK']} is not below WORLD_SIZE "
                f"{values['WORLD_SIZE']}; launch with torchrun"
            )
        return cls(
            rank=values["RANK"],
            world_size=values["WORLD_SIZE"],
            local_rank=values["LOCAL_RANK"],
            local_world_size=values["LOCAL_WORLD_SIZE"],
        )


@dataclass(frozen=True)
class Ranks:
    """This process's place in every parallel group, and the device that it computes on."""

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
        """Whether this process writes the log, the metrics and the checkpoint's own files."""
        return self.process.rank == 0
