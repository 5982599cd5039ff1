"""Tests that every flag named in a message is a flag of the command that prints the message."""

import argparse
import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.config.megatron_flags import TABLE, Mapped
from megatron_chatflow.errors import run_main

ROOT = Path(__file__).parents[3]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
PRETRAIN = "megatron_chatflow.pretrain"
OF_OTHERS = {"--nproc-per-node", "--editable"}  # flags of torchrun and of pip
BENCHMARKS = ("preprocess", "blend", "loader", "checkpoint", "kernels", "train")

# Modules that more commands import than call, and the commands that print their messages.
PRINTED_BY = {
    "benchmarks.corpora": {"benchmarks.preprocess"},
    "blend.controllers": {PRETRAIN},
    "checkpoint.state": {PRETRAIN},
    "config.flags": {PRETRAIN, "tools.plan_blend", "tools.plan_layout"},
    "config.load": {PRETRAIN},
    "config.megatron_flags": {PRETRAIN},
    "config.validation": {PRETRAIN, "tools.plan_blend"},
    "convert.distill": {"tools.convert_checkpoint"},
    "convert.template": {"tools.convert_checkpoint", "tools.generate", "tools.chat"},
    "convert.verify": {"tools.convert_checkpoint"},
    "examples.corpus.pins": {"tools.fetch_demo_corpus"},
    "files": {"tools.convert_checkpoint", "tools.extend_vocab"},
    "generation.generate": {"tools.generate", "tools.chat"},
    "preprocess.arrow": {"tools.preprocess_data"},
    "preprocess.chats": {"tools.preprocess_data"},
    "preprocess.comma_separated": {"tools.preprocess_data"},
    "preprocess.dedup": {"tools.preprocess_data"},
    "preprocess.dropped": {"tools.preprocess_data", "tools.merge_datasets"},
    "preprocess.inspect": {"tools.inspect_dataset"},
    "preprocess.job": {"tools.preprocess_data"},
    "preprocess.languages": {"tools.preprocess_data"},
    "preprocess.merge": {"tools.merge_datasets"},
    "preprocess.parse": {"tools.preprocess_data"},
    "preprocess.readers": {"tools.preprocess_data"},
    "preprocess.settings": {"tools.preprocess_data"},
    "preprocess.staged_upload": {"tools.preprocess_data", "tools.merge_datasets"},
    "preprocess.tab_separated": {"tools.preprocess_data"},
    "preprocess.tmx": {"tools.preprocess_data"},
    "report.data": {PRETRAIN},  # also plot_run, about the folder that a run's flag names
    "runtime.launch": {PRETRAIN},
    "tokenizer.text_encoding": {"tools.preprocess_data"},
    "training.guard": {PRETRAIN},
    "training.callbacks.profiler": {PRETRAIN},
    "training.loop": {PRETRAIN},
    "training.stages": {PRETRAIN},
}
# Flags of another command to which the message refers.
OF_ANOTHER_STEP = {
    ("blend.controllers", "--from-run"),
    ("blend.fit", "--eval-interval"),
    ("checkpoint.remote", "--load"),
    ("checkpoint.remote", "--save"),
    ("config.fields", "--save-remote"),
    ("convert.distributed", "--ema-decay"),
    ("generation.generate", "--prompt"),
    ("preprocess.merge", "--append-bos"),
    ("preprocess.merge", "--dedup"),
    ("preprocess.merge", "--shard"),
    ("training.inputs", "--append-bos"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__").replace("tools.benchmarks", "benchmarks")


PATHS = {
    name_of(path): path
    for path in (
        *ROOT.glob("megatron_chatflow/**/*.py"),
        *ROOT.glob("examples/corpus/*.py"),
        *ROOT.glob("tools/**/*.py"),
    )
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in PATHS.items()}


@cache
def imported(name: str) -> frozenset[str]:
    """Returns the imports of a module, including those inside functions."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    # The package itself imports its public names on first use only.
    return frozenset((found & PATHS.keys()) - {"megatron_chatflow"})


def reached(name: str) -> set[str]:
    """Returns the transitive imports of a module."""
    found: set[str] = set()
    queue = [name]
    while queue:
        if (module := queue.pop()) not in found:
            found.add(module)
            queue += imported(module)
    return found


def messages(name: str) -> Iterator[tuple[int, str]]:
    """Returns line and text of every message and advice of a module."""
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called.startswith("logger.") or called in ("UserError", "LocalError", "TokenizerChoice"):
            words = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            yield node.lineno, " ".join(word for word in words if isinstance(word, str))


class _ParsedError(BaseException):
    """Raised instead of parsing, with the flags that the parser knows."""


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= _flags(command)
    return found


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Returns the flags of each command, from the parsers that the commands build."""
    from benchmarks.harness import load_benchmark

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise _ParsedError(_flags(parser))

    found: dict[str, set[str]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tool"])
        for subject in BENCHMARKS:
            parser = argparse.ArgumentParser()
            benchmark = load_benchmark(subject)
            benchmark.add_arguments(parser)
            found[str(benchmark.__name__)] = _flags(parser) | {"--peers", "--output"}
        for method in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, method, stop)
        for name, path in PATHS.items():
            if name == PRETRAIN or name.startswith("tools."):
                spec = importlib.util.spec_from_file_location(path.stem, path)
                assert spec is not None and spec.loader is not None
                tool = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(tool)
                with pytest.raises(_ParsedError) as parsed:
                    tool.main()
                found[name] = parsed.value.args[0]
    # It also accepts the names that Megatron-LM uses.
    found[PRETRAIN] |= {
        name for name, entries in TABLE.items() if any(isinstance(e, Mapped) for e in entries)
    }
    for tool in ("tools.plan_blend", "tools.plan_layout"):
        found[tool] |= found[PRETRAIN]  # they pass the rest to the run's parser
    return found


def test_commands_have_their_flags(flags: dict[str, set[str]]) -> None:
    assert len(flags) > 20
    assert "--no-tokenizer" in flags["tools.convert_checkpoint"] - flags["tools.generate"]
    assert {"--tokenizer-model", "--baseline-tokenizer-model"} <= flags["tools.evaluate"]
    assert {"--load-hf", "--no-sequence-parallel"} <= flags[PRETRAIN]


def test_messages_name_flags_that_the_command_has(flags: dict[str, set[str]]) -> None:
    # The comparison of architectures trains with settings of its own, which no user can mistake.
    callers = {
        command: reached(command) for command in flags.keys() - {"tools.check_architectures"}
    }
    wrong, num_named = [], 0
    for module in PATHS:
        short = module.removeprefix("megatron_chatflow.")
        importing = {command for command, modules in callers.items() if module in modules}
        commands = PRINTED_BY.get(short, importing)
        for line, text in messages(module):
            for flag in set(FLAG.findall(text)) - OF_OTHERS:
                num_named += 1
                if (short, flag) in OF_ANOTHER_STEP:
                    assert any(flag in known for known in flags.values())
                    continue
                lacking = sorted(c for c in commands if flag not in flags[c])
                if lacking or not commands:
                    wrong.append(f"{module}:{line} {flag} is none of {', '.join(lacking)}")
    assert num_named > 100
    assert not wrong, "\n".join(wrong)


def test_excepted_modules_are_there() -> None:
    modules = {module.removeprefix("megatron_chatflow.") for module in PATHS}
    assert set(PRINTED_BY) | {module for module, _ in OF_ANOTHER_STEP} <= modules


def error_line(
    path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Returns a tool's standard error, which must be one line."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    with pytest.raises(SystemExit) as left:
        run_main(tool.main)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("path", sorted(ROOT.glob("tools/*.py")), ids=lambda path: path.stem)
def test_a_wrong_flag_is_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_line(path, ["--no-such-flag"], monkeypatch, capsys).startswith("error: ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--format", "csv"], "argument --format: invalid choice: 'csv' (choose from 'text', "),
        (["--workers", "many"], "argument --workers: invalid int value: 'many'; see --help"),
        (["--shard", "1"], "argument --shard: invalid value: '1'; see --help"),
        (["--pair-keys", "en"], "argument --pair-keys: expected 2 arguments; see --help"),
        ([], "the following arguments are required: --input, --output-prefix, --tokenizer-model"),
    ],
)
def test_a_wrong_value_is_one_line(
    wrong: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = ROOT / "tools" / "preprocess_data.py"
    assert error_line(path, wrong, monkeypatch, capsys).startswith(f"error: {message}")
