"""``chatflow convert``: exports, imports, resizes and verifies checkpoints.

Each command runs in one process and holds one tensor in memory at a time, except for
``--embedding-init distill`` and the logits of ``verify``. Training checkpoints may have any
parallel layout.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from megatron_chatflow.config.fields import parse_num_bytes
from megatron_chatflow.convert.shape import DTYPES
from megatron_chatflow.convert.vocabulary import EMBEDDING_INITS, Resize
from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.preprocess.texts import read_texts
from megatron_chatflow.tokenizer import load_tokenizer

EXAMPLES = """examples:
  %(prog)s export --checkpoint runs/zh --output exports/zh
  %(prog)s import --hf Llama-2-7b-hf --output checkpoints/llama2-7b
  %(prog)s import --hf Llama-2-7b-hf --output checkpoints/llama2-7b-zh \\
      --tokenizer-model tokenizers/zh --embedding-init distill --distill-text zh.jsonl
  %(prog)s verify --hf exports/zh --checkpoint runs/zh
"""


def main() -> int:
    """Runs the command; returns 1 if ``verify`` finds a difference and 0 otherwise."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parse_arguments()
    commands = {"export": _export, "import": _import, "resize": _resize, "verify": _verify}
    return commands[args.command](args)


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        "Converts between Hugging Face folders and training checkpoints.", EXAMPLES
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    _add_checkpoint(export)
    export.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default="5GB",
        help="maximum size of a file, such as 500MB or 2GiB (default: %(default)s)",
    )
    export.add_argument(
        "--tokenizer-model", type=Path, help="where the run's tokenizer is now, if it was moved"
    )
    export.add_argument(
        "--chat-template",
        help=("chat template of the export: a built-in one, a Jinja file or a model folder"),
    )
    export.add_argument(
        "--weights",
        choices=("last", "ema"),
        default="last",
        help="the weights after the last update, or their moving average of --ema-decay "
        "(default: %(default)s)",
    )
    export.add_argument(
        "--no-tokenizer", action="store_true", help="export the model without a tokenizer"
    )
    import_ = commands.add_parser("import", help="write a Hugging Face folder as a checkpoint")
    _add_huggingface(import_)
    import_.add_argument(
        "--tokenizer-model",
        type=Path,
        help="extended tokenizer; the embeddings are resized to its vocabulary",
    )
    resize = commands.add_parser("resize", help="extend the vocabulary of a checkpoint")
    _add_checkpoint(resize)
    resize.add_argument(
        "--tokenizer-model",
        type=Path,
        required=True,
        help="extended tokenizer; its first tokens must be those of the run's tokenizer",
    )
    resize.add_argument(
        "--old-tokenizer-model", type=Path, help="where the run's tokenizer is now, if it was moved"
    )
    for command in (import_, resize):
        command.add_argument(
            "--embedding-init",
            choices=EMBEDDING_INITS,
            default="mean-of-pieces",
            help="initialization of the rows of new tokens (default: %(default)s)",
        )
        command.add_argument(
            "--seed",
            type=int,
            default=1234,
            help="seed of random rows, and of the text for distill (default: %(default)s)",
        )
        command.add_argument(
            "--distill-text",
            nargs="+",
            metavar="F",
            help="with --embedding-init distill: text in the new language, as files, folders or "
            "globs; it needs the whole model in memory",
        )
        command.add_argument(
            "--json-keys",
            nargs="+",
            default=["text"],
            metavar="KEY",
            help="JSON keys of this text (default: text)",
        )
        command.add_argument(
            "--encoding",
            default="utf-8",
            metavar="E",
            help="encoding of this text, such as gb18030 (default: %(default)s)",
        )
        command.add_argument(
            "--distill-tokens",
            type=int,
            metavar="N",
            help="maximum number of tokens of this text that are used (default: 100000)",
        )
    for command in (export, import_):
        command.add_argument(
            "--dtype",
            choices=DTYPES,
            help="dtype of the weights (default: as stored); exporting a bf16 run in another "
            "dtype uses the optimizer's fp32 master weights",
        )
    for command in (export, import_, resize):
        command.add_argument("--output", type=Path, required=True, help="folder to create")
        command.add_argument("--overwrite", action="store_true", help="replace an existing output")
    verify = commands.add_parser("verify", help="compare weights and logits")
    _add_huggingface(verify)
    _add_checkpoint(verify)
    verify.add_argument(
        "--text", action="append", help="text to compare the logits on (repeatable)"
    )
    verify.add_argument("--weights-only", action="store_true", help="do not compare logits")
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


def _export(args: argparse.Namespace) -> int:
    from megatron_chatflow.convert.template import TokenizerChoice
    from megatron_chatflow.convert.to_huggingface import export_checkpoint

    done = export_checkpoint(
        args.checkpoint,
        args.output,
        dtype=args.dtype,
        average=args.weights == "ema",
        tokenizer=TokenizerChoice(
            model=args.tokenizer_model,
            chat_template=args.chat_template,
            leave_out=args.no_tokenizer,
            advice="give the run's tokenizer with --tokenizer-model, or use --no-tokenizer",
        ),
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
    )
    print(done)
    return 0


def _import(args: argparse.Namespace) -> int:
    from megatron_chatflow.convert.from_huggingface import import_huggingface

    is_distilled = args.embedding_init == "distill" or args.distill_text or args.distill_tokens
    if args.tokenizer_model is None and is_distilled:
        raise UserError(
            "--embedding-init distill: needs an extended tokenizer; give it with --tokenizer-model"
        )
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
    is_distilled = args.embedding_init == "distill"
    if is_distilled != (args.distill_text is not None) or (
        args.distill_tokens and not is_distilled
    ):
        raise UserError(
            "--embedding-init distill and --distill-text: give both or neither, with text in the "
            "new language"
        )
    if args.distill_tokens is not None and args.distill_tokens < 100:
        raise UserError(f"--distill-tokens: must be at least 100, not {args.distill_tokens}")
    resize = Resize(load_tokenizer(args.tokenizer_model), args.embedding_init, args.seed)
    if not is_distilled:
        return resize
    num_tokens = args.distill_tokens or resize.distill_tokens
    texts = read_texts(args.distill_text, json_keys=args.json_keys, encoding=args.encoding)
    return replace(resize, distill_text=texts, distill_tokens=num_tokens)
