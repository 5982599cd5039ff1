"""Values at paths in records, and placeholders for records that a reader cannot pass on.

A placeholder keeps the place of a record, so that the numbers of later records are right, and the
parser counts it by its reason. The readers and parsers of all formats share this module.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.tokenizer.documents import BadLineError


@dataclass(frozen=True)
class OversizedRecord:
    """A placeholder for a record that was skipped because it is too large."""


@dataclass(frozen=True)
class InvalidUtf8Record:
    """A placeholder for a row whose text is not UTF-8. Parquet files are not checked for that."""


@dataclass(frozen=True)
class RejectedRecord:
    """A placeholder for a record that violates its format or lacks one of the languages."""

    reason: str  # the name under which the record is counted
    is_bad: bool = True  # whether it counts as a bad line


Placeholder = OversizedRecord | InvalidUtf8Record | RejectedRecord


def value_at(record: Mapping[str, Any], key: str) -> Any:
    """Returns the value under a key, or under a path of keys such as "doc.text".

    A key of the record that itself contains dots has precedence.

    Raises:
        BadLineError: The record has no such key.
    """
    if key in record:
        return record[key]
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            keys = ", ".join(sorted(map(str, record)))
            raise BadLineError(f"no_key_{key}", f"no_key_{key} (has {keys:.200})")
        value = value[name]
    return value


def with_value_at(record: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Returns a copy of a record with another value at the place where `value_at` finds one."""
    new = dict(record)
    inner, last = new, key
    if key not in record:
        *names, last = key.split(".")
        for name in names:
            inner[name] = dict(inner[name])
            inner = inner[name]
    inner[last] = value
    return new
