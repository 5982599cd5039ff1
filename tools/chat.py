"""Talks to a model in the terminal.

In: a training checkpoint or a Hugging Face folder, and what is typed. Out: answers, as they come.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_chatflow.convert.huggingface_folder import huggingface_folder
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.generation.chat import Conversation
from megatron_chatflow.generation.generate import (
    Generator,
    add_sampling_arguments,
    sampling_from_args,
)

EXAMPLES = """examples:
  python tools/chat.py exports/zh
  python tools/chat.py runs/zh --system "You are a translator." --temperature 0
  printf 'Hello!\\n请介绍一下北京。\\n' | python tools/chat.py exports/zh

while it runs: /reset begins anew, /exit or Ctrl-D leaves, Ctrl-C cuts an answer short
"""


def main() -> None:
    """Parses the command line and answers until there is nothing more to read."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ArgumentParser(
        description="Talk to a model in the terminal.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder, run or iter_ folder")
    parser.add_argument("--system", help="system text")
    add_sampling_arguments(parser)
    args = parser.parse_args()
    choice = TokenizerChoice(args.tokenizer_model, args.chat_template)
    sampling = sampling_from_args(args)
    with huggingface_folder(args.model, choice) as folder:
        conversation = Conversation(Generator(folder), sampling, args.system)
        for line in _lines():
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                conversation.reset()
                print("(a new conversation)")
            elif line:
                try:
                    num_forgotten = conversation.answer(line, _show)
                    if num_forgotten:
                        print(f"\n(the first {num_forgotten} turns no longer fit)", end="")
                except KeyboardInterrupt:
                    pass  # ends the answer alone
                except UserError as error:
                    print(f"({error})", end="")  # too long: something else can be said
                print(flush=True)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _lines() -> Iterator[str]:
    """What is typed, with editing and history on a terminal; lines of a file otherwise."""
    sys.stdin.reconfigure(errors="replace")  # a wrong byte must not end a conversation
    if not sys.stdin.isatty():
        for line in sys.stdin:
            print(f"> {line.strip()}")
            yield line.strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` editing and history)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")


if __name__ == "__main__":
    run_main(main)
