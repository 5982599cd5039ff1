"""The command-line flags that every tool that generates has.

In: a parser, and what it parsed. Out: a `Sampling`, and prompts.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.generation import Sampling

TEMPLATE_HELP = "instead of the model's own: chatflow, llama2, chatml, or a file or folder with one"


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of sampling, and of the export on the way."""
    defaults = Sampling()
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=defaults.max_new_tokens, help="default: %(default)s")
    add("--temperature", type=float, default=defaults.temperature, help="0: the likeliest token")
    add("--top-p", type=float, default=defaults.top_p, help="nucleus; default: %(default)s")
    add("--seed", type=int, default=defaults.seed, help="of the sampling; default: %(default)s")
    add("--stop", action="append", default=[], help="text that ends an answer (repeatable)")
    add("--chat-template", metavar="T", help=TEMPLATE_HELP)
    add("--tokenizer-model", type=Path, metavar="M", help="instead of the model's own")


def read_prompt(text: str) -> str:
    """A prompt as it was given, or from standard input for ``-``.

    Raises:
        UserError: It is not UTF-8.
    """
    raw = sys.stdin.buffer.read() if text == "-" else os.fsencode(text)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt: is not UTF-8 at byte {error.start}; convert it") from None


def read_sampling(args: argparse.Namespace) -> Sampling:
    """The flags as a value."""
    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(args.stop),
    )
