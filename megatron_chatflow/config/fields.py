"""Types of configuration fields and the parsers that they use.

The types are strict. Text is accepted as a number only if it has a documented unit, an exponent or
underscores, and a boolean is never accepted as a number. A parser raises a `UserError` with the
expected form of the value.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from reprlib import Repr
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

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import is_url, refuse_url
from megatron_chatflow.remote import CachedPath, parse_location, refuse_magic, refuse_web

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

_NUMBER = r"[+-]?[0-9](?:_?[0-9])*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?"
_COUNT = re.compile(rf"({_NUMBER})\s?([KMBTkmbt]?)")
_EXPONENT = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][+-]?[0-9]{1,3}")
_NUM_BYTES = re.compile(rf"({_NUMBER})\s?([KMGT])(i?)B", re.IGNORECASE)
_WINDOW = re.compile(r"\(?\s*(-?[0-9]{1,10})\s*,\s*(-?[0-9]{1,10})\s*\)?")
_SHARE = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_LARGEST_COUNT = 2**63 - 1

_shortener = Repr()
_shortener.maxlevel = 2
_shortener.maxstring = _shortener.maxother = 60


def shorten(value: object) -> str:
    """Formats a value for a message, shortened and on one line."""
    return _shortener.repr(value)


def parse_count(value: object) -> int:
    """Parses a count of samples, tokens or iterations.

    Args:
        value: An ``int``; a whole ``float``; or text with a unit (``5M``, ``1.5B``, ``8K``,
            ``1T``; powers of 1000), an exponent (``1e6``) or underscores (``1_000_000``). Text
            without any of these, such as ``'3'``, is rejected, because it is a quoted number.

    Raises:
        UserError: If the value has another form, is not whole, or does not fit into 64 bits.
    """
    if not isinstance(value, bool) and isinstance(value, Integral):
        count = Decimal(int(value))
    elif isinstance(value, float):
        count = Decimal(value)
    elif isinstance(value, str) and (match := _COUNT.fullmatch(value)):
        if value.lstrip("+-").isdigit():
            raise UserError(
                f"must be a number, not the text {shorten(value)}; write it without quotes"
            )
        count = Decimal(match[1].replace("_", "")) * UNITS.get(match[2].upper(), 1)
    else:
        raise UserError(f"must be a count such as 500, 8K, 5M, 1.5B or 1T, not {shorten(value)}")
    if not count.is_finite() or count != count.to_integral_value():
        raise UserError(f"must be a whole number, not {shorten(value)}")
    if abs(count) > _LARGEST_COUNT:
        raise UserError(f"must be below 2**63, not {shorten(value)}")
    return int(count)


def parse_num_bytes(text: str) -> int:
    """Parses a size in bytes in the notation of Hugging Face: ``5GB``, ``500MB`` or ``2GiB``.

    KB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB are powers of 1024. A number without
    a unit and the units of `parse_count` are accepted too (``5B`` is 5 billion).
    """
    text = text.strip()
    match = _NUM_BYTES.fullmatch(text)
    try:
        if match:
            power = "KMGT".index(match[2].upper()) + 1
            size = Decimal(match[1].replace("_", "")) * (1024 if match[3] else 1000) ** power
            num_bytes = int(size) if size == size.to_integral_value() else 0
        else:
            num_bytes = int(text) if text.isdecimal() else parse_count(text)
    except UserError:
        num_bytes = 0
    if not 0 < num_bytes <= _LARGEST_COUNT:
        raise UserError(f"must be a size such as 5GB, 500MB or 2GiB, not {shorten(text)}")
    return num_bytes


def parse_number(value: object) -> float:
    """Parses a real number, also text such as ``3e-4``, because common YAML readers return text."""
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            return float(value)
        except OverflowError:
            raise UserError(
                f"must be a number that fits into a float, not {shorten(value)}"
            ) from None
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    raise UserError(f"must be a number, not {shorten(value)}")


def differing_numbers(one: float, other: float, num_digits: int = 6) -> tuple[str, str]:
    """Formats two numbers with enough digits to show that they differ, at least ``num_digits``."""
    digits = num_digits
    while one != other and f"{one:.{digits}g}" == f"{other:.{digits}g}":
        digits += 1
    return f"{one:.{digits}g}", f"{other:.{digits}g}"


def parse_weight(value: object) -> int | float:
    """Parses the weight of a source, a finite number of at least 0. Integers remain integers."""
    is_integer = not isinstance(value, bool) and isinstance(value, Integral)
    number = int(value) if is_integer else parse_number(value)  # type: ignore[call-overload]
    if not 0 <= number < math.inf:
        raise UserError(f"must be a finite number of at least 0, not {shorten(value)}")
    return number


def parse_window(value: object) -> object:
    """Parses Megatron-LM's ``--window-size LEFT,RIGHT``, also in the parentheses of a tuple.

    Returns the two numbers.
    """
    given = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    match = _WINDOW.fullmatch(given) if isinstance(given, str) else None
    if match is not None:
        return int(match[1]), int(match[2])
    if isinstance(value, list | tuple) and len(value) == 2:
        return value
    raise UserError(f"must be two numbers such as 4095,0, not {shorten(given)}")


def parse_shares(value: object) -> tuple[float, float, float]:
    """Parses the shares of Megatron-LM's ``--split``: one to three numbers such as ``969,30,1``.

    Returns the shares of training, validation and test, normalized to a sum of 1. Omitted shares
    are 0.
    """
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else []
    if not 1 <= len(words) <= 3 or not all(_SHARE.fullmatch(word) for word in words):
        raise UserError(
            f"must be shares of training, validation and test such as 969,30,1, not "
            f"{shorten(value)}"
        )
    shares = [float(word) for word in words] + [0.0] * (3 - len(words))
    if not shares[0]:
        raise UserError(f"must have a training share above 0, not {shorten(value)}")
    total = sum(shares)
    train, validation, test = (share / total for share in shares)
    return train, validation, test


CONFIG = ConfigDict(extra="forbid", validate_default=False, use_attribute_docstrings=True)


def _parse_path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value).strip() or "\0" in str(value):
        raise UserError(f"must be a path, not {shorten(value)}")
    refuse_url(value)
    return Path(value).expanduser()


def _parse_location(value: object) -> Path:
    if isinstance(value, CachedPath):
        return value
    if isinstance(value, str) and is_url(value):
        location = parse_location(value)
        if is_url(location):
            refuse_magic(location)
        return CachedPath.of(location) if is_url(location) else Path(location)
    return _parse_path(value)


def _parse_run_folder(value: object) -> Path:
    if isinstance(value, str) and is_url(value):
        location = parse_location(value)
        if is_url(location):
            raise UserError(
                f"{location}: is a URL, and only local paths are supported here: a run saves to a "
                "local folder, whose checkpoints --save-remote copies to a URL"
            )
        return Path(location)
    return _parse_path(value)


def _parse_remote_folder(value: object) -> str:
    if not isinstance(value, str) or not is_url(value):
        raise UserError(f"must be a URL such as s3://bucket/run, not {shorten(value)}")
    location = parse_location(value).rstrip("/")
    if not is_url(location):
        raise UserError("must be a URL such as s3://bucket/run; local folders need no copy")
    refuse_web(location)
    refuse_magic(location)
    if location.startswith("hf://"):
        raise UserError(
            f"{location}: every file would be a commit of its own; use a store such as s3://, or "
            "upload finished checkpoints with huggingface-cli"
        )
    return location


def _check_shares(value: str) -> str:
    parse_shares(value)
    return value


def _check_name(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise UserError(f"must be a name of printable characters, not {shorten(value)}")
    return value


def _parse_weights(value: Any, parse_mapping: Callable[[Any], Any]) -> Any:
    if isinstance(value, str) and value != "as_planned":
        raise UserError(
            f"must be a mapping from sources to weights, or as_planned, not {shorten(value)}"
        )
    return value if isinstance(value, str) else parse_mapping(value)


Switch = StrictBool
Name = Annotated[StrictStr, AfterValidator(_check_name)]
Shares = Annotated[StrictStr, AfterValidator(_check_shares)]
"""Shares of training, validation and test in the form that `parse_shares` accepts."""
FilePath = Annotated[Path, BeforeValidator(_parse_path)]
Location = Annotated[Path, BeforeValidator(_parse_location)]
"""A local path, or a URL; the path is then that of the local copy, a `CachedPath`."""
RunFolder = Annotated[Path, BeforeValidator(_parse_run_folder)]
RemoteFolder = Annotated[str, BeforeValidator(_parse_remote_folder)]
"""The URL of a folder on a store."""

Size = Annotated[StrictInt, Field(ge=1, lt=2**31)]
"""A dimension or a number of parts: an integer of at least 1, without a unit."""
MAX_LAYERS = 10_000  # a damaged number of layers must not exhaust memory with tensor names
WindowSize = Annotated[tuple[StrictInt, StrictInt], BeforeValidator(parse_window)]
"""Numbers of tokens before and behind a token that attention sees."""
NumLayers = Annotated[StrictInt, Field(ge=1, le=MAX_LAYERS)]
Stride = Annotated[StrictInt, Field(ge=2, lt=2**62)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]

Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
"""A count of samples, tokens or iterations, with an optional unit."""
PositiveCount = Annotated[int, BeforeValidator(parse_count), Field(ge=1)]

NonNegativeNumber = Annotated[
    float, BeforeValidator(parse_number), Field(ge=0, allow_inf_nan=False)
]
PositiveNumber = Annotated[float, BeforeValidator(parse_number), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(parse_number), Field(ge=0, le=1, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(parse_number), Field(ge=0, lt=1, allow_inf_nan=False)]


def _parse_shares_by_source(value: Any, parse_mapping: Callable[[Any], Any]) -> Any:
    if not isinstance(value, dict):
        share = parse_number(value)
        if not 0 <= share <= 1:
            raise UserError(f"must be between 0 and 1, not {shorten(value)}")
        return share
    return parse_mapping(value)


if TYPE_CHECKING:
    SharesBySource = dict[str, float] | float
    KnotWeights = dict[str, float] | Literal["as_planned"]
    ExactWeights = dict[str, int | float]
    ExactKnotWeights = ExactWeights | Literal["as_planned"]
else:  # pydantic adds the members of a union to the path in messages, so there is no union
    SharesBySource = Annotated[dict[Name, Share], WrapValidator(_parse_shares_by_source)]
    KnotWeights = Annotated[dict[Name, NonNegativeNumber], WrapValidator(_parse_weights)]
    ExactWeights = dict[Name, Annotated[Any, BeforeValidator(parse_weight)]]
    ExactKnotWeights = Annotated[ExactWeights, WrapValidator(_parse_weights)]
"""Weights by source, or ``as_planned`` for the weights in the checkpoint's schedule."""
