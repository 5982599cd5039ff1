"""A run's configuration: defaults < YAML < flags, typed, validated once, no globals.

In: a YAML file and command-line flags. Out: a frozen `RunConfig`.
"""

from megatron_chatflow.config.fields import parse_count, parse_number
from megatron_chatflow.config.flags import RunOptions
from megatron_chatflow.config.load import load_config, load_config_from_argv
from megatron_chatflow.config.run_length import RunLength
from megatron_chatflow.config.sections import (
    CheckpointConfig,
    DataConfig,
    FaultConfig,
    KnotConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    SourceConfig,
    TokenizerConfig,
    TrainConfig,
)
from megatron_chatflow.config.validation import RunConfig, to_plain, validate_for_world

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "FaultConfig",
    "KnotConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "RunLength",
    "RunOptions",
    "ScheduleConfig",
    "SourceConfig",
    "TokenizerConfig",
    "TrainConfig",
    "load_config",
    "load_config_from_argv",
    "parse_count",
    "parse_number",
    "to_plain",
    "validate_for_world",
]
