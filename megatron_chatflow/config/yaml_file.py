"""Reads and writes YAML strictly.

Scalars follow the core schema of YAML 1.2, so that ``3e-4`` is a number and a source called ``no``
keeps its name. Duplicate keys, cycles and tags that would create objects are refused with the file
and the line.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_chatflow.errors import UserError

_CORE_SCHEMA = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+(?:_[0-9]+)*", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]


class _Loader(yaml.SafeLoader):
    """A safe loader that knows the core schema and sees every key once."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value} comes twice", key_node.start_mark
                )
            seen.add(key_node.value)
        super().flatten_mapping(node)
        # Each key once, its last value: merges of merges would otherwise double at every level.
        node.value = list({pair[0].value: pair for pair in node.value}.values())

    def construct_decimal_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)

    def construct_decimal_float(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Some characters that are not printable, such as U+0085, break lines unless escaped.
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_decimal_float)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping that ``text`` holds.

    Args:
        text: A YAML document.
        name: What messages call it, such as the file's path.

    Raises:
        UserError: The text is no YAML, has a key twice, an unsafe tag or a cycle, or is no mapping.
    """
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}:{line} {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())  # some come on several lines
        raise UserError(f"{name}: is not YAML: {reason}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(f"{name}: must hold sections such as `model:`, not a bare value")
    return document


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: The file cannot be read, or see `parse_yaml`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return parse_yaml(text, str(path))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML in its own order; `parse_yaml` reads back the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
