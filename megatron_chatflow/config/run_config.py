"""The whole configuration of a run.

In: a mapping by section. Out: one frozen object that is complete and consistent, and that writes
itself as YAML that reads back as the same object.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from megatron_chatflow.config.fault_section import FaultConfig
from megatron_chatflow.config.fields import CONFIG
from megatron_chatflow.config.logging_section import LoggingConfig
from megatron_chatflow.config.problems import describe
from megatron_chatflow.config.run_length import RunLength
from megatron_chatflow.config.sections import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
    TrainConfig,
)
from megatron_chatflow.config.validation import check
from megatron_chatflow.config.yaml_file import dump_yaml
from megatron_chatflow.errors import UserError


def to_plain(value: Any) -> Any:
    """A configuration, or a part of one, as dicts, lists, text and numbers alone."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RunConfig:
    """A run's configuration by section, checked as a whole when it is made."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        check(self)
        return self

    @property
    def num_iterations(self) -> int:
        """Iterations of a run of this global batch size; `RunLength` knows of other ones."""
        return RunLength.of(self).last_iteration

    @property
    def num_samples(self) -> int:
        """Samples of a run of this global batch size; ``train_samples`` counts whole batches."""
        return RunLength.of(self).num_samples

    @property
    def hang_timeout_minutes(self) -> float:
        """Minutes without progress after which a rank counts as hung; 0: never."""
        given = self.faults.hang_timeout_minutes
        return self.parallel.distributed_timeout_minutes / 2 if given is None else given

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model between them."""
        return (
            self.parallel.tensor_model_parallel_size
            * self.parallel.pipeline_model_parallel_size
            * self.parallel.context_parallel_size
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Makes a configuration of a mapping by section; what is left out has its default.

        Raises:
            UserError: A key is unknown, a value of the wrong type, or values do not go together.
        """
        # A section that is left out is validated as an empty one: the message then names the field.
        given = {key: value for key, value in values.items() if value is not None}
        sections: dict[str, Any] = {field.name: {} for field in fields(cls)}
        try:
            return _adapter.validate_python({**sections, **given})
        except ValidationError as error:
            raise UserError(describe(error, cls)) from None
        except RecursionError:
            raise UserError("the configuration is nested too deeply") from None

    def to_dict(self) -> dict[str, Any]:
        """Every field, resolved, as dicts, lists, text and numbers alone."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    def to_yaml(self) -> str:
        """Every field, resolved; reading it back gives an equal configuration."""
        return dump_yaml(self.to_dict())


_adapter = TypeAdapter(RunConfig)
