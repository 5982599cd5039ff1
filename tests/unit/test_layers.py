"""Tests rules that the linter does not check: the order of imports and module docstrings."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = (
    "errors",
    "files",
    "remote",
    "config",
    "runtime",
    "blend",
    "tokenizer",
    "data",
    "preprocess",
    "kernels",
    "model",
    "checkpoint",
    "convert",
    "evaluation",
    "training",
    "simulate",
    "generation",
    "report",
    "pretrain",
    "cli",
)  # each layer may import itself and the layers before it
PACKAGE = sorted((ROOT / "megatron_chatflow").rglob("*.py"))
PYTHON = PACKAGE + [
    path
    for folder in ("tools", "tests", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer(module: list[str]) -> str | None:
    """Returns the layer of a dotted name's parts, or None for the package's top module."""
    return module[1] if len(module) > 1 else None


def imported_layers(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Returns line and layer of every import of the package, including those inside functions."""
    package = list(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(tree):
        modules: list[list[str]] = []
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            modules = [[*base, alias.name] for alias in node.names]
        for module in modules:
            name = layer(module)
            if module[0] == "megatron_chatflow" and name and not name.startswith("__"):
                yield node.lineno, name


@pytest.mark.skipif(sys.version_info < (3, 11), reason="knows no such patterns")
def test_patterns_are_read_by_the_oldest_python() -> None:
    """Python 3.10, which does not run here, refuses atomic groups and possessive quantifiers."""
    parser: Any = re._parser  # type: ignore[attr-defined]
    wrong = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            given = node.args[:1] if isinstance(node, ast.Call) and name.startswith("re.") else []
            if not given or not isinstance(given[0], ast.Constant):
                continue
            parsed = repr(parser.parse(given[0].value))
            if "POSSESSIVE" in parsed or "ATOMIC" in parsed:
                wrong.append(f"{relative(path)}:{node.lineno}")
    assert not wrong


def test_a_layer_imports_only_those_above_it() -> None:
    wrong = []
    for path in PACKAGE:
        own = layer(list(path.relative_to(ROOT).with_suffix("").parts))
        assert own == "__init__" or own in LAYERS, f"{own} is not among the layers of the design"
        # The package's own __init__ lazily imports the names of several layers.
        allowed = LAYERS[: LAYERS.index(own) + 1] if own in LAYERS else LAYERS
        for line, name in imported_layers(path, ast.parse(path.read_text())):
            if name not in allowed:
                wrong.append(f"{relative(path)}:{line}: {own} imports {name}")
    assert not wrong


def test_files_say_what_they_are_for() -> None:
    assert not [
        relative(path) for path in PYTHON if not ast.get_docstring(ast.parse(path.read_text()))
    ]


@pytest.mark.parametrize(
    ("file", "code", "layers"),
    [
        ("training/a.py", "from megatron_chatflow.data.x import y", ["data"]),
        ("training/a.py", "from megatron_chatflow import model, data", ["model", "data"]),
        ("training/a.py", "import megatron_chatflow.data.x as x, os", ["data"]),
        ("training/a.py", "def f():\n    from ..model import x", ["model"]),
        (
            "training/a.py",
            "from . import x\nfrom .b import y\nfrom .. import data",
            ["training"] * 2 + ["data"],
        ),
        ("training/a.py", "from megatron_chatflow import __version__\nimport megatron.core", []),
        ("training/a.py", "import megatron_chatflow", []),
    ],
)
def test_imports_are_found(file: str, code: str, layers: list[str]) -> None:
    path = ROOT / "megatron_chatflow" / file
    assert [name for _, name in imported_layers(path, ast.parse(code))] == layers
