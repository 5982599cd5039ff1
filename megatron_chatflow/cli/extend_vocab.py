"""``chatflow extend-vocab``: adds pieces for a language to a tokenizer."""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_chatflow.config import ModelConfig
from megatron_chatflow.config.huggingface import model_of_huggingface
from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.files import check_new_folder, new_folder, write_atomically
from megatron_chatflow.preprocess.texts import read_texts
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.advice import (
    DEFAULT_START_GAP,
    Fertility,
    advice_lines,
    advice_report,
    cost_of_extension,
)
from megatron_chatflow.tokenizer.extend import (
    ADDITIONS,
    PIECE_KINDS,
    SCRIPTS,
    Choice,
    choose_pieces,
    extend_tokenizer,
    growth_lines,
    listed_pieces,
    whole_pieces,
)
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding

DESCRIPTION = """Adds the pieces of a language to a model's tokenizer.

Chooses the pieces from a corpus of the language, or takes them from a list. Writes a folder with
the extended tokenizer, to be used in preprocessing, in the import of a checkpoint
(--tokenizer-model) and by transformers.
"""
EXAMPLES = """examples:
  %(prog)s --tokenizer-model tokenizer.model --corpus 'zh/*.jsonl.zst' \\
      --num-new 8076 --output-dir tokenizers/zh
  %(prog)s --tokenizer-model tokenizer.model --corpus zh.txt \\
      --num-new 20000 --method pieces --output-dir tokenizers/zh-bpe
"""
MARK = "tokenizer_config.json"
_SEQ_LENGTH = 2048  # tokens of a sample, for the cost of attention
HELD_OUT_EVERY = 20  # Without --held-out, every 20th document is kept for the comparison.


def main() -> None:
    """Extends the tokenizer and prints how many fewer tokens held-out text needs."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parse()
    if args.num_new < 1:
        raise UserError(f"--num-new: must be at least 1, not {args.num_new}")
    if (args.corpus is None) == (args.list is None):
        raise UserError("give either --corpus or --list")
    check_new_folder(args.output_dir, overwrite=args.overwrite, mark=MARK)
    if not (math.isfinite(args.start_gap) and args.start_gap >= 0):
        raise UserError(f"--start-gap: must be a number of at least 0, not {args.start_gap}")
    tokenizer = load_tokenizer(args.tokenizer_model)
    model = _model(args, tokenizer)
    held_out = {Path(name).name: list(islice(_texts(args, [name]), 500)) for name in args.held_out}
    if args.list is not None:
        encoding = canonical_encoding(args.encoding)
        pieces = listed_pieces(tokenizer, args.list, args.num_new, encoding)
    else:
        every = 0 if held_out else HELD_OUT_EVERY
        texts = (t for k, t in enumerate(_texts(args, args.corpus)) if not every or (k + 1) % every)
        choice = Choice(args.num_new, args.method, args.script, args.min_count)
        pieces = choose_pieces(tokenizer, texts, choice)
        if every:
            kept = (t for k, t in enumerate(_texts(args, args.corpus)) if (k + 1) % every == 0)
            held_out["corpus, held out"] = list(islice(kept, 500))
    if args.add_as == "merges" and tokenizer.tokenizer_type == "HuggingFaceTokenizer":
        pieces = whole_pieces(tokenizer, pieces)
    with new_folder(
        args.output_dir, overwrite=args.overwrite, mark=MARK, num_bytes=10**8
    ) as folder:
        extended = extend_tokenizer(tokenizer, pieces, folder, args.add_as)
    for line in growth_lines(tokenizer, extended, pieces, held_out):
        print(line)
    fertility = {
        n: Fertility.of(tokenizer, extended, texts) for n, texts in held_out.items() if texts
    }
    costs = {}
    if model is not None:
        costs = {
            name: cost_of_extension(model, _SEQ_LENGTH, tokenizer, extended, found, args.start_gap)
            for name, found in fertility.items()
        }
    for line in advice_lines(fertility, costs):
        print(line)
    if args.report is not None:
        content = json.dumps(advice_report(fertility, costs), indent=2, ensure_ascii=False)
        write_atomically(args.report, content + "\n")
    print(f"wrote {args.output_dir}")


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("--tokenizer-model", type=Path, required=True, help="SentencePiece model or tokenizer.json")
    add(
        "--corpus", nargs="+", metavar="F", help="text in the new language: files, folders or globs"
    )
    add(
        "--list",
        type=Path,
        metavar="F",
        help="text file with the pieces to add, one per line, as an alternative to --corpus",
    )
    add(
        "--held-out",
        nargs="+",
        default=[],
        metavar="F",
        help="files on which the number of tokens is compared; default: every 20th document of "
        "--corpus",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="JSON keys of the text; default: text",
    )
    add(
        "--encoding",
        default="utf-8",
        metavar="E",
        help="encoding of the text, such as gb18030; default: %(default)s",
    )
    add("--num-new", type=int, default=8076, help="number of pieces to add; default: %(default)s")
    add(
        "--output-dir",
        type=Path,
        required=True,
        help="folder of the extended tokenizer, which is created",
    )
    add(
        "--method",
        choices=PIECE_KINDS,
        default="characters",
        help="add only characters, or also pieces trained on the corpus; default: %(default)s",
    )
    add(
        "--add-as",
        choices=ADDITIONS,
        default="added-tokens",
        help="how a tokenizer.json is extended: added tokens, or merges; default: %(default)s",
    )
    add(
        "--script",
        choices=SCRIPTS,
        default="han",
        help="script of the characters to add; default: %(default)s",
    )
    add(
        "--min-count",
        type=int,
        default=2,
        help="minimum number of occurrences of a character in the corpus; default: %(default)s",
    )
    add(
        "--model",
        type=Path,
        metavar="DIR",
        help="Hugging Face model folder, for the cost of a character and the break-even point; "
        "default: the folder of the tokenizer, if it has a config.json",
    )
    add(
        "--start-gap",
        type=float,
        default=DEFAULT_START_GAP,
        metavar="G",
        help="how much the loss in the new language rises at first, in bits per byte, for the "
        "break-even point; default: %(default)s",
    )
    add("--report", type=Path, metavar="F", help="JSON file to write these numbers to")
    add("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args()


def _model(args: argparse.Namespace, tokenizer: Tokenizer) -> ModelConfig | None:
    """Reads the shape of the model; None if none is given and none is beside the tokenizer."""
    if args.model is not None:
        return ModelConfig(**model_of_huggingface(args.model))
    try:
        return ModelConfig(**model_of_huggingface(tokenizer.model_path.parent))
    except UserError:  # no config.json, or that of another architecture
        return None


def _texts(args: argparse.Namespace, inputs: list[str]) -> Iterator[str]:
    return read_texts(inputs, json_keys=args.json_keys, encoding=args.encoding)
