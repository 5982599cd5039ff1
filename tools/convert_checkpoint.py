"""Converts between Hugging Face folders and training checkpoints, compares and resizes them.

In: a checkpoint of any parallel layout, or a Hugging Face folder. Out: the other. One process, one
tensor in memory at a time.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import logging

from megatron_chatflow.convert.flags import parse_arguments
from megatron_chatflow.convert.vocabulary import Resize
from megatron_chatflow.errors import run_main
from megatron_chatflow.tokenizer import load_tokenizer


def main() -> int:
    """Parses the command line and converts; 1 if `verify` finds a difference."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    return {"export": _export, "import": _import, "resize": _resize, "verify": _verify}[
        args.command
    ](args)


def _export(args: argparse.Namespace) -> int:
    from megatron_chatflow.convert.template import TokenizerChoice
    from megatron_chatflow.convert.to_huggingface import export_checkpoint

    done = export_checkpoint(
        args.checkpoint,
        args.output,
        dtype=args.dtype,
        tokenizer=TokenizerChoice(
            model=args.tokenizer_model,
            chat_template=args.chat_template,
            leave_out=args.no_tokenizer,
            advice="name the run's own with --tokenizer-model, or give --no-tokenizer",
        ),
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
    )
    print(done)
    return 0


def _import(args: argparse.Namespace) -> int:
    from megatron_chatflow.convert.from_huggingface import import_huggingface

    done = import_huggingface(
        args.hf,
        args.output,
        dtype=args.dtype,
        resize=None if args.tokenizer_model is None else _resize_of(args),
        overwrite=args.overwrite,
    )
    print(done)
    return 0


def _resize(args: argparse.Namespace) -> int:
    from megatron_chatflow.convert.resize import resize_checkpoint

    done = resize_checkpoint(
        args.checkpoint,
        args.output,
        _resize_of(args),
        old_tokenizer=args.old_tokenizer_model,
        overwrite=args.overwrite,
    )
    print(done)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_chatflow.convert.verify import TEXTS, compare, describe

    result = compare(args.hf, args.checkpoint, args.text or TEXTS, weights_only=args.weights_only)
    print(describe(result))
    return 0 if result.is_same else 1


def _resize_of(args: argparse.Namespace) -> Resize:
    return Resize(load_tokenizer(args.tokenizer_model), args.embedding_init, args.seed)


if __name__ == "__main__":
    run_main(main)
