"""The configuration of a run.

A YAML file overrides the defaults, and flags override the file. `load_config` returns a frozen,
fully validated `RunConfig`. There is no global configuration.
"""

from megatron_chatflow.config.fields import parse_count, parse_number
from megatron_chatflow.config.flags import RunOptions
from megatron_chatflow.config.load import load_config, load_config_from_argv
from megatron_chatflow.config.run_length import RunLength
from megatron_chatflow.config.sections import (
    CheckpointConfig,
    ControllerConfig,
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
    "ControllerConfig",
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
