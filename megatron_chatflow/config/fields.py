"""The types that the configuration's fields are made of, strict about what they accept.

In: raw values from YAML, flags or Python. Out: exact Python values; a number is never made from
text beyond the documented units, nor from a boolean.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WrapValidator,
)

from megatron_chatflow.config.units import parse_count, parse_number, parse_shares, shorten
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import refuse_url

CONFIG = ConfigDict(extra="forbid", validate_default=False)


def _parse_path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise UserError(f"must be a path, not {shorten(value)}")
    refuse_url(value)
    return Path(value).expanduser()


def _check_shares(value: str) -> str:
    parse_shares(value)
    return value


def _check_name(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise UserError(f"must be a name that can be printed, not {shorten(value)}")
    return value


def _parse_weights(value: Any, parse_mapping: Callable[[Any], Any]) -> Any:
    if isinstance(value, str) and value != "as_planned":
        raise UserError(f"must be a weight for each source, or as_planned, not {shorten(value)}")
    return value if isinstance(value, str) else parse_mapping(value)


Switch = StrictBool
Name = Annotated[StrictStr, AfterValidator(_check_name)]
Shares = Annotated[StrictStr, AfterValidator(_check_shares)]
"""Shares of training, validation and test, as `parse_shares` reads them."""
FilePath = Annotated[Path, BeforeValidator(_parse_path)]

Size = Annotated[StrictInt, Field(ge=1, lt=2**31)]
"""A dimension or a number of parts: at least 1, written plainly."""
MOST_LAYERS = 10_000  # a damaged number must not fill the memory with names of tensors
NumLayers = Annotated[StrictInt, Field(ge=1, le=MOST_LAYERS)]
Stride = Annotated[StrictInt, Field(ge=2, lt=2**62)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]

Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
"""A count of samples, tokens or iterations, with an optional unit."""
PositiveCount = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]

NonNegativeNumber = Annotated[
    float, BeforeValidator(parse_number), Field(ge=0, allow_inf_nan=False)
]
PositiveNumber = Annotated[float, BeforeValidator(parse_number), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(parse_number), Field(ge=0, lt=1, allow_inf_nan=False)]

if TYPE_CHECKING:
    KnotWeights = dict[str, float] | Literal["as_planned"]
else:  # no union, whose arms pydantic would add to the path in messages
    KnotWeights = Annotated[dict[Name, NonNegativeNumber], WrapValidator(_parse_weights)]
"""Weights by source, or ``as_planned``: what the schedule of the checkpoint says at the knot."""
