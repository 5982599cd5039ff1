"""Tests the commands generate and chat, with a small random LLaMA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import run_tool

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.generation.generate import (
    Generator,
    Sampling,
)

ROOT = Path(__file__).parents[2]

GREEDY = Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture
def folder(random_llama: Path) -> Path:
    return random_llama


@pytest.fixture(scope="module")
def generator(random_llama: Path) -> Generator:
    return Generator(random_llama)


def test_generate_from_a_checkpoint_as_from_its_export(
    folder: Path, generator: Generator, tmp_path: Path
) -> None:
    import_huggingface(folder, tmp_path / "run")
    expected = generator.stream(generator.encode("the river"), GREEDY, lambda piece: None)
    flags = ("--temperature", 0, "--max-new-tokens", 12)
    done = run_tool("generate.py", tmp_path / "run", "--prompt", "-", *flags, stdin="the river")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"the river{expected}\n"
    assert "temporary folder" in done.stderr


def test_sigterm_leaves_no_export_behind(folder: Path, tmp_path: Path) -> None:
    import_huggingface(folder, tmp_path / "run")
    (tmp_path / "scratch").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "chat.py"), str(tmp_path / "run")],
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"the river\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    assert list((tmp_path / "scratch").glob("chatflow_export_*"))
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not list((tmp_path / "scratch").iterdir())


def test_chat_answers_every_line(folder: Path) -> None:
    lines = f"the river\n\n/reset\nthe river\n{'long ' * 200}\n/exit\nnever\n"
    done = run_tool("chat.py", folder, "--temperature", 0, "--max-new-tokens", 8, stdin=lines)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split("> /reset\n(started a new conversation)\n")
    second, refused = second.split("> long", 1)
    assert first.removesuffix("> \n") == second
    assert "(the prompt has " in refused and refused.endswith("shorten the prompt)\n> /exit\n")
    assert "never" not in done.stdout


@pytest.mark.parametrize("tool", ["generate.py", "chat.py"])
def test_a_reader_that_leaves_is_no_error(folder: Path, tool: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["--prompt", "-"] if tool == "generate.py" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), str(folder), *flags],
        input=b"the river",
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
