"""The command line of `tools/convert_checkpoint.py`.

In: arguments. Out: them parsed.
"""

import argparse
from pathlib import Path

from megatron_chatflow.config.fields import parse_num_bytes
from megatron_chatflow.convert.shape import DTYPES
from megatron_chatflow.convert.vocabulary import EMBEDDING_INITS
from megatron_chatflow.errors import ArgumentParser, UserError

EXAMPLES = """examples:
  python tools/convert_checkpoint.py export --checkpoint runs/zh --output exports/zh
  python tools/convert_checkpoint.py import --hf Llama-2-7b-hf --output checkpoints/llama2-7b
  python tools/convert_checkpoint.py import --hf Llama-2-7b-hf --output checkpoints/llama2-7b-zh \\
      --tokenizer-model tokenizers/zh --embedding-init mean-of-pieces
  python tools/convert_checkpoint.py verify --hf exports/zh --checkpoint runs/zh
"""


def parse_arguments() -> argparse.Namespace:
    """The command line: a subcommand and its flags."""
    parser = ArgumentParser(
        description="Converts between Hugging Face folders and training checkpoints.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="checkpoint to Hugging Face folder")
    _add_checkpoint(export)
    export.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="the most bytes of a file, such as 500MB or 2GiB (default: %(default)s)",
    )
    export.add_argument("--tokenizer-model", type=Path, help="where the run's tokenizer lies now")
    export.add_argument(
        "--chat-template", help="chatflow, llama2, chatml, a Jinja file, or a model's folder"
    )
    export.add_argument("--no-tokenizer", action="store_true", help="export the model alone")
    import_ = commands.add_parser("import", help="Hugging Face folder to checkpoint")
    _add_huggingface(import_)
    import_.add_argument("--tokenizer-model", type=Path, help="a larger vocabulary for the model")
    resize = commands.add_parser("resize", help="checkpoint to one with a larger vocabulary")
    _add_checkpoint(resize)
    resize.add_argument(
        "--tokenizer-model", type=Path, required=True, help="goes on from the run's tokenizer"
    )
    resize.add_argument("--old-tokenizer-model", type=Path, help="where the run's lies now")
    for command in (import_, resize):
        command.add_argument(
            "--embedding-init",
            choices=EMBEDDING_INITS,
            default="mean-of-pieces",
            help="how rows of new pieces begin (default: %(default)s)",
        )
        command.add_argument("--seed", type=int, default=1234, help="of random rows")
    for command in (export, import_):
        command.add_argument(
            "--dtype",
            choices=DTYPES,
            help="of the weights (default: as stored); an export of bf16 weights in another one "
            "takes the optimizer's fp32 master weights",
        )
    for command in (export, import_, resize):
        command.add_argument("--output", type=Path, required=True, help="the new folder")
        command.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    verify = commands.add_parser("verify", help="compare weights and logits")
    _add_huggingface(verify)
    _add_checkpoint(verify)
    verify.add_argument("--text", action="append", help="compare logits on this (repeatable)")
    verify.add_argument("--weights-only", action="store_true", help="leave the logits out")
    args = parser.parse_args()
    if args.command == "export":
        try:
            args.max_shard_size = parse_num_bytes(args.max_shard_size)
        except UserError as error:
            raise UserError(f"--max-shard-size: {error}") from None
    return args


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="run or iter_ folder")


def _add_huggingface(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
