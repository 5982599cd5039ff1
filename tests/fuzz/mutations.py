"""Damages bytes, JSON values, Python objects and text at random, from a seeded generator."""

import copy
import dataclasses
import json
import random
import string
from collections.abc import Callable, Sequence
from typing import Any

HUGE = [2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 3 * 10**9, 10**19, 10**400]
NUMBERS = [0, 1, -1, 2, 7, 255, 256, 65535, -(2**31), *HUGE, 0.5, 1e308, -0.0]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
STRINGS = ["", " ", "x" * 70_000, "\ud800", "a\nb", "\x00", "../../x", "/dev/null", "\u202e", "名"]
STRINGS += [
    "nan",
    "1e999",
    "true",
    "None",
    "__class__",
    "9" * 5000,
    "\x1b[31m",
    "{{ 7*7 }}",
    "auto",
]
VALUES: list[Any] = [None, True, False, *NUMBERS, *STRINGS]
VALUES += [[], {}, [[]], [1, 2], {"": 0}, {"a\nb" * 9000: -1}, [None] * 1000, [[[[[[]]]]]]]


def mutate_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damages bytes at one to three places.

    Args:
        content: The bytes.
        rng: Generator of the random choices.

    Returns:
        The damaged bytes and the kind of damage, such as ``truncate``.
    """
    changed = bytearray(content)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        name = rng.choice(list(_BYTE_MUTATIONS))
        _BYTE_MUTATIONS[name](changed, rng)
        done.append(name)
    if bytes(changed) == content:
        changed = changed[:-1] if changed else bytearray(b"\0")
        done.append("truncate")
    return bytes(changed), "+".join(done)


def _place(content: bytearray, rng: random.Random) -> int:
    """Draws a position, often near the beginning or the end, where headers and directories are."""
    size = len(content)
    near = min(size, 64)
    return rng.choice(
        [rng.randrange(size + 1), rng.randrange(near + 1), size - rng.randrange(near + 1)]
    )


def _flip(content: bytearray, rng: random.Random) -> None:
    at = _place(content, rng)
    if at < len(content):
        content[at] ^= 1 << rng.randrange(8)


def _set(content: bytearray, rng: random.Random) -> None:
    at = _place(content, rng)
    if at < len(content):
        content[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])


def _delete(content: bytearray, rng: random.Random) -> None:
    at = _place(content, rng)
    del content[at : at + rng.choice([1, 2, 8, rng.randrange(1, 400)])]


def _insert(content: bytearray, rng: random.Random) -> None:
    at = _place(content, rng)
    content[at:at] = rng.randbytes(rng.choice([1, 2, 8, 100]))


def _repeat(content: bytearray, rng: random.Random) -> None:
    begin, at = _place(content, rng), _place(content, rng)
    content[at:at] = content[begin : begin + rng.randrange(1, 400)]


def _truncate(content: bytearray, rng: random.Random) -> None:
    del content[_place(content, rng) :]


def _extend(content: bytearray, rng: random.Random) -> None:
    # Not the whole file: two gzip members or zstd frames are a valid file.
    copy = bytes(content[: min(400, len(content) - 1)])
    content += rng.choice([b"\0" * 8, b"\n", b"{}", rng.randbytes(40), copy])


def _zero(content: bytearray, rng: random.Random) -> None:
    at = _place(content, rng)
    end = min(len(content), at + rng.choice([4, 8, 64, 512]))
    content[at:end] = bytes(end - at)


def _number(content: bytearray, rng: random.Random) -> None:
    """Writes an integer that is large, negative or about the file's size."""
    width = rng.choice([1, 2, 4, 8])
    at = _place(content, rng)
    at -= at % rng.choice([1, width])
    number = rng.choice([0, 1, -1, 127, 2**15, 2**31 - 1, -(2**31), 2**62, -(2**63), len(content)])
    if at + width <= len(content):
        content[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")


def _swap(content: bytearray, rng: random.Random) -> None:
    size = rng.choice([1, 2, 8, max(1, len(content) // 2)])
    a, b = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    b = max(b, a + size)
    if b + size <= len(content):
        first, second = content[a : a + size], content[b : b + size]
        content[a : a + size], content[b : b + size] = second, first


_BYTE_MUTATIONS: dict[str, Callable[[bytearray, random.Random], None]] = {
    "flip": _flip,
    "set": _set,
    "delete": _delete,
    "insert": _insert,
    "repeat": _repeat,
    "truncate": _truncate,
    "extend": _extend,
    "zero": _zero,
    "number": _number,
    "swap": _swap,
}


def places(value: Any, most: int = 20_000) -> list[tuple[Any, Any]]:
    """Returns every container in a value with each of its keys, at most ``most``.

    Dictionaries, lists and dataclasses are containers. The keys of a dataclass are its fields.
    """
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo and len(found) < most:
        container = todo.pop()
        keys = _keys(container)
        found += [(container, key) for key in keys]
        todo += [part for key in keys if _keys(part := get(container, key))]
    return found


def _keys(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value)
    if isinstance(value, list):
        return list(range(len(value)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    return []


def get(container: Any, key: Any) -> Any:
    """Returns the value at a place."""
    return container[key] if isinstance(container, (dict, list)) else getattr(container, key)


def put(container: Any, key: Any, value: Any) -> None:
    """Replaces the value at a place."""
    if isinstance(container, (dict, list)):
        container[key] = value
    else:
        object.__setattr__(container, key, value)


def mutate_object(
    value: Any, rng: random.Random, values: Sequence[Any] = VALUES, depth: int = 0
) -> tuple[Any, str]:
    """Changes a copy of nested containers at one or two places.

    Args:
        value: Nested dictionaries, lists and dataclasses.
        rng: Generator of the random choices.
        values: Values that may replace another one.
        depth: Recursion depth. Callers leave it at its default.

    Returns:
        The copy and the kind of damage, such as ``delete key``.
    """
    changed = copy.deepcopy(value)
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        all_places = places(changed)
        if not all_places:
            return rng.choice(values), "replace all"
        container, key = rng.choice(all_places)
        is_dict, old = isinstance(container, dict), get(container, key)
        what = rng.choice(
            ["replace", "replace", "other", "vary", "vary", "delete", "copy", "rename"]
        )
        if what == "other":
            put(container, key, copy.deepcopy(get(*rng.choice(all_places))))
        elif what == "vary":
            put(container, key, vary(old, rng))
        elif what == "delete" and isinstance(container, (dict, list)):
            del container[key]
        elif what == "copy" and isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(old))
        elif what == "rename" and is_dict:
            del container[key]
            container[rng.choice([f"{key}x", str(key).upper(), "", "model", "\ud800"])] = old
        else:
            put(container, key, copy.deepcopy(rng.choice(values)))
        done.append(f"{what} {str(key)[:40]!r}")
    return changed, ", ".join(done)


def vary(value: Any, rng: random.Random) -> Any:
    """Returns a similar value: a number changed by one or by a factor, text with one edit."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, -value, value * 2, value // 2, float(value)])
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        piece = rng.choice([rng.choice(string.printable), "\u00e9", "", value[:at], "名"])
        return value[:at] + piece + value[at + rng.randrange(2) :]
    if isinstance(value, tuple):
        changed = mutate_object(list(value), rng)[0]
        try:
            return type(value)(changed)
        except TypeError:  # a torch.Size only holds integers
            return tuple(changed)
    if isinstance(value, list):
        return rng.sample(value, len(value))
    return [value]


def mutate_json(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damages a JSON file in its values, its text or its bytes."""
    way = rng.random()
    if way < 0.7:
        value, done = mutate_object(json.loads(content), rng)
        return json.dumps(value).encode("utf-8"), f"value: {done}"
    if way < 0.85:
        return mutate_text(content, rng, JSON_TOKENS)
    changed, done = mutate_bytes(content, rng)
    return changed, f"bytes: {done}"


JSON_TOKENS = [
    *'{}[]:,"',
    "null",
    "NaN",
    "Infinity",
    "1e999",
    "-0",
    "9" * 400,
    "\\u0000",
    "\\ud800",
]
JSON_TOKENS += ["[" * 3000, "\n", "\n\n", "\ufeff", "\r\n", "//", "\x00", '{"a":', "{}", "\\"]


def mutate_text(content: bytes, rng: random.Random, tokens: Sequence[str]) -> tuple[bytes, str]:
    """Inserts tokens of a grammar into text, or replaces parts of it by them."""
    text = content.decode("utf-8", "surrogateescape")
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(tokens) + text[at + rng.choice([0, 0, 1, 5]) :]
    changed = text.encode("utf-8", "surrogateescape")
    return (changed, "tokens") if changed != content else (content + b"}", "tokens")
