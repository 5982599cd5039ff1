"""Tests which torch the simulation accepts, and how its compiled library is kept."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from simulator import EXAMPLES, ROOT

from megatron_chatflow.errors import UserError
from megatron_chatflow.simulate import shim

# A compiler that writes its file in two parts, the second when two of its processes have begun.
COMPILER = """#!/bin/bash
while [[ $1 != -o ]]; do shift; done
printf 'complete ' > "$2"
touch "{folder}/begun.$$"
for _ in {{1..500}}; do
    (( $(ls "{folder}"/begun.* | wc -l) < 2 )) || break
    sleep 0.02
done
printf 'library' >> "$2"
"""


@pytest.mark.parametrize("version", ["2.6.0+cu124", "2.13.0+cpu", "2.14.1", "2.13.0a0+gitabcdef0"])
def test_a_torch_that_is_known(version: str) -> None:
    shim.check_torch(version)


@pytest.mark.parametrize("version", ["2.5.1+cu124", "2.15.0", "3.0.0", "1.13.1"])
def test_a_torch_that_is_not_known(version: str) -> None:
    with pytest.raises(UserError) as caught:
        shim.check_torch(version)
    assert f"torch {version} is installed, and the simulation needs torch 2.6 to 2.14" in str(
        caught.value
    )


def test_the_command_refuses_a_torch_that_is_not_known(tmp_path: Path) -> None:
    script = tmp_path / "pretrain.py"
    script.write_text(
        "import runpy, torch\n"
        "torch.__version__ = '2.99.0'\n"
        "runpy.run_module('megatron_chatflow.pretrain', run_name='__main__', alter_sys=True)\n"
    )
    flags = ["--config", EXAMPLES / "7b.yaml", "--dry-run", "--simulate", "--world-size", "8"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --simulate: torch 2.99.0 is installed, and the simulation needs")
    assert "Traceback" not in done.stderr


def test_builds_of_torch_do_not_share_a_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shim, "_compile", lambda target: None)
    paths = {shim.library_path()}
    for name, value in {"cuda": "99.9", "git_version": "0" * 40}.items():
        with monkeypatch.context() as changed:
            changed.setattr(torch.version, name, value)
            paths.add(shim.library_path())
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    paths.add(shim.library_path())
    assert len(paths) == 4
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_two_first_uses_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("CXX", str(compiler))
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: shim.library_path(), range(2))
    assert first == second
    assert first.read_text() == "complete library"
    assert list(first.parent.iterdir()) == [first]
    assert len(list(tmp_path.glob("begun.*"))) == 2
