"""Tests that a CUDA run never imports the module that replaces CUDA on CPUs."""

import re


def test_only_the_launcher_names_it() -> None:
    from pathlib import Path

    import megatron_chatflow

    package = Path(megatron_chatflow.__file__).parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\bruntime(\.| import )cpu\b", path.read_text(encoding="utf-8"))
    }
    assert users == {"runtime/launch.py"}
