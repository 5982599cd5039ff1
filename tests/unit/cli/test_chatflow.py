"""Tests the command ``chatflow`` and the names that the package exports."""

import pkgutil
import runpy
import sys
from pathlib import Path

import pytest

import megatron_chatflow
from megatron_chatflow.cli import COMMANDS, main
from megatron_chatflow.errors import run_main

TOOLS = Path(__file__).parents[3] / "tools"
TOOL_OF = {
    "preprocess": "preprocess_data.py",
    "clean": "clean_corpus.py",
    "merge": "merge_datasets.py",
    "inspect": "inspect_dataset.py",
    "plan": "plan_blend.py",
    "fit-schedule": "fit_schedule.py",
    "plan-layout": "plan_layout.py",
    "extend-vocab": "extend_vocab.py",
    "convert": "convert_checkpoint.py",
    "merge-checkpoints": "merge_checkpoints.py",
    "evaluate": "evaluate.py",
    "generate": "generate.py",
    "chat": "chat.py",
    "report": "plot_run.py",
}


def test_no_module_hides_an_exported_name() -> None:
    """Importing a module binds its name in the package, in place of an export of the same name."""
    modules = {module.name for module in pkgutil.iter_modules(megatron_chatflow.__path__)}
    assert "training" in modules
    assert not modules & set(megatron_chatflow.__all__)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Runs ``chatflow`` with these arguments and returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["chatflow", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_each_command_in_a_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 0
    section = capsys.readouterr().out.split("commands:\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in section.splitlines()] == list(COMMANDS)
    assert set(COMMANDS) == {"pretrain", *TOOL_OF}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("preproces", "did you mean preprocess?"),
        ("extend_vocab", "did you mean extend-vocab?"),
        ("xyz", "see chatflow --help"),
        ("--config", "see chatflow --help"),
    ],
)
def test_an_unknown_command_is_one_line(
    name: str, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, name) == 2
    assert capsys.readouterr().err == f"error: no such command: {name}; {advice}\n"


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"chatflow {megatron_chatflow.__version__}\n"


@pytest.mark.parametrize("name", TOOL_OF)
def test_a_command_has_the_help_of_its_tool(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, name, "--help") == 0
    command_help = capsys.readouterr().out
    tool = TOOL_OF[name]
    monkeypatch.setattr(sys, "argv", [str(TOOLS / tool), "--help"])
    with pytest.raises(SystemExit) as left:
        run_main(runpy.run_path(str(TOOLS / tool), run_name="tool")["main"])
    assert left.value.code == 0
    tool_help = capsys.readouterr().out
    # Line breaks differ because the lengths of the program names differ.
    assert tool_help.startswith(f"usage: {tool} ")
    assert command_help.replace(f"chatflow {name}", tool).split() == tool_help.split()


def test_pretrain_takes_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "pretrain", "--no-such-flag", "1") == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_the_package_exports_its_public_names() -> None:
    from megatron_chatflow.blend.blend import Blend
    from megatron_chatflow.blend.schedule import Schedule
    from megatron_chatflow.config.load import load_config

    assert megatron_chatflow.Blend is Blend
    assert megatron_chatflow.Schedule is Schedule
    assert megatron_chatflow.load_config is load_config
    assert {"Blend", "Schedule", "load_config", "train"} <= set(dir(megatron_chatflow))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = megatron_chatflow.absent
