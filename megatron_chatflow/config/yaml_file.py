"""Reads and writes YAML strictly.

Scalars follow the core schema of YAML 1.2, so ``3e-4`` is a number and a source named ``no`` keeps
its name. Duplicate keys, cycles and tags that would create objects are errors, and the message
names the file and the line.
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
# PyYAML accepts them as escapes; UTF-8 cannot represent them.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """A safe loader that implements the core schema and rejects duplicate keys."""

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
                    None, None, f"duplicate key {key_node.value}", key_node.start_mark
                )
            seen.add(key_node.value)
        super().flatten_mapping(node)
        # Keep only the last value of each key. Nested merges would otherwise double the number of
        # pairs at every level.
        node.value = list({pair[0].value: pair for pair in node.value}.values())

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        if half := _SURROGATE.search(node.value):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"\\u{ord(half[0]):x} is half of a character: write the character itself",
                node.start_mark,
            )
        return str(super().construct_scalar(node))

    def construct_decimal_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)

    def construct_decimal_float(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes text that `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Some non-printable characters, such as U+0085, are line breaks unless they are escaped.
        style = None if text.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, _pattern, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_decimal_float)


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parses a YAML document that contains a mapping or nothing; ``name`` names it in messages.

    Raises:
        UserError: If the text is not YAML, has a duplicate key, an unsafe tag or a cycle, or is not
            a mapping.
    """
    try:
        document = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}:{line} {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())  # some messages have several lines
        raise UserError(f"{name}: is not valid YAML: {reason}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UserError(f"{name}: must be a mapping of keys, not a list or a single value")
    return document


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that contains a mapping, as `parse_yaml` does."""
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
    """Serializes plain data as YAML and keeps its order. `parse_yaml` restores the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
