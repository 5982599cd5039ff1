"""The ``chatflow`` command line.

Each command has a module, which is imported only when the command is run. ``tools/*.py`` run the
same functions from a checkout. Commands parse ``sys.argv`` and raise ``UserError`` for invalid
input; `main` prints it as one line and exits with status 2.

This is the top layer of the package: it may import every other layer, and no other layer may import
it.
"""

import difflib
import importlib
import sys
from functools import partial

from megatron_chatflow import __version__
from megatron_chatflow.errors import UserError, exit_on_interrupt, run_main

COMMANDS = {
    "pretrain": ("megatron_chatflow.pretrain", "train on a blend that follows a schedule"),
    "preprocess": ("megatron_chatflow.cli.preprocess", "tokenize a corpus into indexed datasets"),
    "clean": ("megatron_chatflow.cli.clean", "filter, deduplicate and describe a corpus"),
    "merge": ("megatron_chatflow.cli.merge", "merge indexed datasets into one"),
    "inspect": ("megatron_chatflow.cli.inspect", "describe, check and compare indexed datasets"),
    "plan": ("megatron_chatflow.cli.plan", "show the mixture that a schedule will draw"),
    "fit-schedule": ("megatron_chatflow.cli.fit_schedule", "propose a schedule from short runs"),
    "plan-layout": ("megatron_chatflow.cli.plan_layout", "rank layouts by their predicted speed"),
    "extend-vocab": ("megatron_chatflow.cli.extend_vocab", "add a language to a tokenizer"),
    "convert": ("megatron_chatflow.cli.convert", "export, import, resize or verify checkpoints"),
    "merge-checkpoints": ("megatron_chatflow.cli.merge_checkpoints", "merge models into one"),
    "evaluate": ("megatron_chatflow.cli.evaluate", "evaluate a model on text and questions"),
    "generate": ("megatron_chatflow.cli.generate", "continue or answer prompts"),
    "chat": ("megatron_chatflow.cli.chat", "chat with a model in the terminal"),
    "report": ("megatron_chatflow.cli.report", "write a run as one HTML page"),
}
"""Module and summary of each command. The module defines ``main()``."""


_HELP = """usage: chatflow COMMAND [arguments]

Adapt a language model to a new language: continued training on a blend that follows a schedule.

commands:
{commands}

chatflow COMMAND --help describes a command. Several processes train with
  torchrun --nproc-per-node N --no-python chatflow pretrain --config run.yaml"""


def main() -> None:
    """Runs the command named by the first argument. This is the entry point of ``chatflow``."""
    exit_on_interrupt()  # before the imports, which may take seconds
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        run_main(partial(_run_without_command, name))
    # argparse uses the first argument as the program name in help and error messages.
    sys.argv = [f"chatflow {name}", *sys.argv[2:]]
    run_main(importlib.import_module(COMMANDS[name][0]).main)


def _run_without_command(argument: str) -> None:
    if argument in ("-h", "--help"):
        lines = (f"  {name:<19}{summary}" for name, (_, summary) in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)))
    elif argument == "--version":
        print(f"chatflow {__version__}")
    else:
        close = difflib.get_close_matches(argument, COMMANDS, n=1)
        advice = f"did you mean {close[0]}?" if close else "see chatflow --help"
        raise UserError(f"no such command: {argument}; {advice}")
