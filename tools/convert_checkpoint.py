"""Converts between Hugging Face folders and training checkpoints, and compares the two.

In: a checkpoint of any parallel layout, or a Hugging Face folder. Out: the other. One process, one
tensor in memory at a time.
"""

import argparse
import logging
from pathlib import Path

from megatron_chatflow.checkpoint.convert_export import (
    MAX_SHARD_BYTES,
    Converted,
    export_checkpoint,
)
from megatron_chatflow.checkpoint.convert_import import import_huggingface
from megatron_chatflow.checkpoint.convert_shape import DTYPES
from megatron_chatflow.checkpoint.convert_template import TokenizerChoice
from megatron_chatflow.config import parse_count
from megatron_chatflow.errors import run_main

EXAMPLES = """examples:
  python tools/convert_checkpoint.py export --checkpoint runs/zh --output exports/zh
  python tools/convert_checkpoint.py import --hf Llama-2-7b-hf --output checkpoints/llama2-7b
  python tools/convert_checkpoint.py verify --hf exports/zh --checkpoint runs/zh
"""


def main() -> int:
    """Parses the command line and converts; 1 if `verify` finds a difference."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parser().parse_args()
    if args.command == "export":
        choice = TokenizerChoice(args.tokenizer_model, args.chat_template, args.no_tokenizer)
        done = export_checkpoint(
            args.checkpoint,
            args.output,
            dtype=args.dtype,
            tokenizer=choice,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
        )
        _report(done)
        return 0
    if args.command == "import":
        _report(
            import_huggingface(args.hf, args.output, dtype=args.dtype, overwrite=args.overwrite)
        )
        return 0
    from megatron_chatflow.checkpoint.convert_verify import TEXTS, compare, describe

    result = compare(args.hf, args.checkpoint, args.text or TEXTS, weights_only=args.weights_only)
    print(describe(result))
    return 0 if result.is_same else 1


def _report(done: Converted) -> None:
    print(
        f"wrote {done.folder}: {done.num_tensors} tensors, {done.num_parameters:,} parameters, "
        f"{done.num_bytes / 1e6:,.1f} MB"
    )


def _num_bytes(text: str) -> int:
    return int(text) if text.isdecimal() else parse_count(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="checkpoint to Hugging Face folder")
    export.add_argument("--checkpoint", type=Path, required=True, help="run or iter_ folder")
    export.add_argument(
        "--max-shard-size", type=_num_bytes, default=MAX_SHARD_BYTES, help="bytes (5B)"
    )
    export.add_argument("--tokenizer-model", type=Path, help="where the run's tokenizer lies now")
    export.add_argument("--chat-template", help="chatflow, llama2, chatml, or a Jinja file")
    export.add_argument("--no-tokenizer", action="store_true", help="export the model alone")
    import_ = commands.add_parser("import", help="Hugging Face folder to checkpoint")
    import_.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    for command in (export, import_):
        command.add_argument("--output", type=Path, required=True, help="the new folder")
        command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as stored)")
        command.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    verify = commands.add_parser("verify", help="compare weights and logits")
    verify.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    verify.add_argument("--checkpoint", type=Path, required=True, help="run or iter_ folder")
    verify.add_argument("--text", action="append", help="compare logits on this (repeatable)")
    verify.add_argument("--weights-only", action="store_true", help="leave the logits out")
    return parser


if __name__ == "__main__":
    run_main(main)
