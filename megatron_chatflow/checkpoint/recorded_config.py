"""Reads the values that conversion needs from a checkpoint's ``config.yaml``, without trusting it.

Everything else in the file is ignored, because it may be of another version of this package.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_chatflow.config.fields import FilePath, Location, PositiveNumber, Size
from megatron_chatflow.config.problems import describe
from megatron_chatflow.config.yaml_file import read_yaml
from megatron_chatflow.errors import UserError

_LENIENT = ConfigDict(extra="ignore")


def _or_empty(value: Any) -> Any:
    return {} if value is None else value


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class RecordedModel:
    """Settings that do not change the tensors and are only recorded in config.yaml."""

    max_position_embeddings: Size = 4096
    init_method_std: PositiveNumber = 0.02


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class RecordedTokenizer:
    """The tokenizer's path."""

    tokenizer_model: FilePath | None = None


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class RecordedSource:
    """A source's datasets."""

    paths: tuple[Location, ...] = ()


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class RecordedData:
    """The data settings of the run."""

    seq_length: Size | None = None
    sources: Annotated[dict[str, RecordedSource], BeforeValidator(_or_empty)] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True, config=_LENIENT)
class RecordedConfig:
    """The parts of config.yaml that conversion reads, with defaults for missing ones."""

    model: Annotated[RecordedModel, BeforeValidator(_or_empty)] = RecordedModel()
    tokenizer: Annotated[RecordedTokenizer, BeforeValidator(_or_empty)] = RecordedTokenizer()
    data: Annotated[RecordedData, BeforeValidator(_or_empty)] = field(default_factory=RecordedData)


_adapter = TypeAdapter(RecordedConfig)


def read_run_config(checkpoint: Path) -> RecordedConfig:
    """Reads the configuration beside a checkpoint's weights; defaults if there is none."""
    path = checkpoint / "config.yaml"
    if not path.is_file():
        return RecordedConfig()
    try:
        return _adapter.validate_python(read_yaml(path))
    except UserError as error:
        raise UserError(f"{error}; restore the file or move it away") from None
    except ValidationError as error:
        raise UserError(
            f"{path}: {describe(error, RecordedConfig)}; restore the file or move it away"
        ) from None
