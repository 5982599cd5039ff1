"""``chatflow chat``: chats with a model in the terminal."""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_chatflow.convert.huggingface_folder import huggingface_folder
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.generation.generate import (
    Conversation,
    Generator,
    add_sampling_arguments,
    sampling_from_args,
)

EXAMPLES = """examples:
  %(prog)s exports/zh
  %(prog)s runs/zh --system "You are a translator." --temperature 0
  printf 'Hello!\\n请介绍一下北京。\\n' | %(prog)s exports/zh

commands: /reset starts a new conversation, /exit or Ctrl-D exits, Ctrl-C stops an answer
"""


def main() -> None:
    """Answers each line from the terminal or standard input until the input ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ArgumentParser("Runs a conversation with a model in the terminal.", EXAMPLES)
    parser.add_argument("model", type=Path, help="Hugging Face folder, run or iter_ folder")
    parser.add_argument("--system", help="system message")
    add_sampling_arguments(parser)
    args = parser.parse_args()
    choice = TokenizerChoice(args.tokenizer_model, args.chat_template)
    sampling = sampling_from_args(args)
    with huggingface_folder(args.model, choice) as folder:
        generator = Generator(folder, args.chat_template_kwargs)
        conversation = Conversation(generator, sampling, args.system)
        for line in _lines():
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                conversation.reset()
                print("(started a new conversation)")
            elif line:
                try:
                    num_forgotten = conversation.answer(line, _show)
                    if num_forgotten:
                        print(
                            f"\n(dropped the first {num_forgotten} turns to fit into the context)",
                            end="",
                        )
                except KeyboardInterrupt:
                    pass  # Ctrl-C stops the answer but not the conversation
                except UserError as error:
                    # For example, the message is too long. The conversation continues.
                    print(f"({error})", end="")
                print(flush=True)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _lines() -> Iterator[str]:
    """Yields lines from the terminal, with editing and history, or from a pipe."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # so that invalid UTF-8 does not raise
    if not sys.stdin.isatty():
        for line in sys.stdin:
            print(f"> {line.strip()}")
            yield line.strip()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (adds editing and history to `input`)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(use /exit or Ctrl-D to exit)")
