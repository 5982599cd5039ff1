"""Messages about configuration errors.

`describe` converts a pydantic `ValidationError` to one line such as
``train.seed: must be at least 0, not -1``. `did_you_mean` suggests the closest known name.
"""

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_chatflow.config.fields import shorten
from megatron_chatflow.errors import UserError

_CUTOFF = 0.8
"""Minimum similarity at which a name counts as misspelled."""

_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping of keys",
    "dict_type": "a mapping of names",
    "int_type": "a whole number",
    "string_type": "text; quote it",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `` (did you mean X?)`` for the closest known word, or "" if none is close.

    Leading dashes are ignored, because they would make all flags similar.
    """
    names = {name.lstrip("-"): name for name in known}
    matches = difflib.get_close_matches(word.lstrip("-"), list(names), n=1, cutoff=_CUTOFF)
    return f" (did you mean {names[matches[0]]}?)" if matches else ""


def _path(location: tuple[str | int, ...]) -> str:
    """Formats a pydantic location for a message, such as ``data.schedule.knots[0].at``."""
    parts = [
        f"[{part}]" if isinstance(part, int) else f".{_show(part)}"
        for part in location
        if part != "[key]"
    ]
    return "".join(parts).removeprefix(".")


def describe(error: ValidationError, root: type) -> str:
    """Describes the first problem of validating a mapping as the class ``root`` in one line."""
    problems = error.errors(include_url=False)
    # Report an unknown key first: it is often a misspelling of a required key, which pydantic then
    # reports as missing. A list in which every element is invalid is reported as too short.
    order = {"unexpected_keyword_argument": 0, "missing": 2, "too_short": 3}
    problems.sort(key=lambda problem: order.get(problem["type"], 1))
    first = problems[0]
    path = _path(first["loc"])
    cause = first.get("ctx", {}).get("error")
    kind, value = first["type"], first["input"]
    if kind == "unexpected_keyword_argument":
        return f"{path}: unknown key{_suggest(root, first['loc'])}"
    if kind == "missing" or value is None:
        return f"{path}: is missing{_hint(root, first['loc'])}"
    if isinstance(cause, UserError):
        message = str(cause)
        # The messages of checks across fields already begin with a path.
        return message if message.startswith(tuple(_paths(root))) else f"{path}: {message}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return f"{path}: must be {words} {first['ctx'][name]}, not {shorten(value)}"
    if kind in _EXPECTED:
        return f"{path}: must be {_EXPECTED[kind]}, not {shorten(value)}"
    if kind == "literal_error":
        return f"{path}: must be {first['ctx']['expected']}, not {shorten(value)}"
    limits = first.get("ctx", {})
    if kind == "too_long" or (kind == "too_short" and limits["min_length"] > 1):
        few = "at least" if kind == "too_short" else "at most"
        number = limits["min_length"] if kind == "too_short" else limits["max_length"]
        return f"{path}: must have {few} {number} values, not {limits['actual_length']}"
    if kind in ("too_short", "string_too_short"):
        return f"{path}: must not be empty"
    return f"{path}: {first['msg']}"


def _show(part: int | str) -> str:
    text = str(part)
    return text if text.isprintable() else repr(text)[1:-1]


def _paths(root: type) -> list[str]:
    return [f"{field.name}." for field in fields(root)]


def _class_at(root: type, location: tuple[int | str, ...]) -> type | None:
    """Returns the configuration class at ``location``, or None if there is none."""
    current: Any = root
    for part in location:
        if is_dataclass(current):
            current = get_type_hints(current).get(str(part))
        elif get_origin(current) is dict:
            current = get_args(current)[1]
        elif get_origin(current) is tuple:
            current = get_args(current)[0]
        if get_origin(current) in (Union, UnionType):
            current = next(arm for arm in get_args(current) if arm is not type(None))
    return current if isinstance(current, type) and is_dataclass(current) else None


def _suggest(root: type, location: tuple[int | str, ...]) -> str:
    known = _class_at(root, location[:-1])
    key = str(location[-1])
    if known is None:
        return ""
    names = [field.name for field in fields(known)]
    if suggestion := did_you_mean(key, names):
        return suggestion
    sections = {
        f"{section}.{field.name}"
        for section, kind in get_type_hints(root).items()
        if is_dataclass(kind)
        for field in fields(kind)
    }
    for path in sorted(sections):
        if path.split(".")[1] == key:
            return f" (did you mean {path}?)"
    return f"; known are {', '.join(names)}"


def _hint(root: type, location: tuple[int | str, ...]) -> str:
    known = _class_at(root, location[:-1])
    if known is None:
        return ""
    kept: dict[str, FieldInfo] = known.__pydantic_fields__  # type: ignore[attr-defined]
    description = kept[str(location[-1])].description
    return f" ({description})" if description else ""
