"""Substitutes for libraries that need a GPU, with the recorded signatures of their releases.

`tools/record_signatures.py` creates the record from unpacked sources.
"""

import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECORD: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("foreign_signatures.json").read_text(encoding="utf-8")
)


def signature(parameters: list[str]) -> inspect.Signature:
    """Returns the signature of a row of the record, where ``=`` after a name marks a default."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    rows = []
    for name in parameters:
        if name.startswith("**"):
            rows.append(inspect.Parameter(name[2:], inspect.Parameter.VAR_KEYWORD))
            continue
        if name.startswith("*"):
            if name != "*":
                rows.append(inspect.Parameter(name[1:], inspect.Parameter.VAR_POSITIONAL))
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        default = None if name.endswith("=") else inspect.Parameter.empty
        rows.append(inspect.Parameter(name.rstrip("="), kind, default=default))
    return inspect.Signature(rows)


def install(monkeypatch: pytest.MonkeyPatch, module: str, name: str, attribute: Any) -> None:
    """Installs a module in which ``from module import name`` finds only this attribute."""
    for end in range(module.count(".") + 1):
        package = ".".join(module.split(".")[: end + 1])
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    setattr(sys.modules[module], name, attribute)
