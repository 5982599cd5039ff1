"""What a run shows of itself: the ``logging`` section of its configuration.

In: mappings as YAML gives them. Out: an immutable object, like those of `sections`.
"""

from typing import Annotated

from pydantic import Field, StrictInt
from pydantic.dataclasses import dataclass

from megatron_chatflow.config.fields import (
    CONFIG,
    Count,
    FilePath,
    Name,
    PositiveCount,
    Size,
    Switch,
)

Rank = Annotated[StrictInt, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LoggingConfig:
    """What is written while the run goes on."""

    log_interval: PositiveCount = Field(
        default=1, description="iterations between logs, each a mean over those since the last"
    )
    metrics_every_iteration: Switch = Field(
        default=True, description="a row of metrics.jsonl for every iteration, not for every log"
    )
    tensorboard: Switch = Field(
        default=True, description="write TensorBoard files beside the metrics"
    )
    log_straggler: Switch = Field(
        default=False, description="time every rank's computing and waiting, and name the slowest"
    )
    straggler_minmax_count: Size = Field(default=1, description="ranks that are named as slowest")
    profile: Switch = Field(
        default=False,
        description="profile some iterations: NVTX ranges between cudaProfilerStart and -Stop",
    )
    use_pytorch_profiler: Switch = Field(
        default=False, description="profile by torch's profiler, into a trace in the run's folder"
    )
    profile_step_start: Count = Field(default=10, description="iterations before the profile")
    profile_step_end: PositiveCount = Field(
        default=12, description="the last iteration of the profile"
    )
    profile_ranks: tuple[Rank, ...] = Field(
        default=(0,), min_length=1, description="ranks that are profiled"
    )
    wandb_project: Name | None = Field(
        default=None, description="project at Weights & Biases; nothing is sent when unset"
    )
    wandb_exp_name: Name | None = Field(
        default=None, description="name of the run there; that of checkpoint.save when unset"
    )
    wandb_entity: Name | None = Field(default=None, description="team or user there")
    wandb_save_dir: FilePath | None = Field(
        default=None, description="folder of its local files; that of checkpoint.save when unset"
    )
