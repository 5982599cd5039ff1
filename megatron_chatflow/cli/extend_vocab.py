"""``chatflow extend-vocab``: adds pieces for a language to a tokenizer."""

import argparse
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.files import check_new_folder, new_folder
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import (
    ADDITIONS,
    PIECE_KINDS,
    SCRIPTS,
    Choice,
    choose_pieces,
    extend_tokenizer,
    growth_lines,
    listed_pieces,
)
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding

logger = logging.getLogger(__name__)

DESCRIPTION = """Adds the pieces of a language to a LLaMA tokenizer.

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
    tokenizer = load_tokenizer(args.tokenizer_model)
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
    with new_folder(
        args.output_dir, overwrite=args.overwrite, mark=MARK, num_bytes=10**8
    ) as folder:
        extended = extend_tokenizer(tokenizer, pieces, folder, args.add_as)
    for line in growth_lines(tokenizer, extended, pieces, held_out):
        print(line)
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
    add("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args()


def _texts(args: argparse.Namespace, inputs: list[str]) -> Iterator[str]:
    """Yields the documents of the corpus. Lines that are not documents are counted and skipped.

    More skipped lines than documents are an error.
    """
    settings = CorpusSettings(
        json_keys=tuple(args.json_keys),
        txt_documents="line",
        encoding=canonical_encoding(args.encoding),
    )
    reader = CorpusReader(find_inputs(inputs), settings)
    num_documents = num_bad = 0
    first_bad: str | None = None
    for chunk in reader.chunks():
        parsed = parse_chunk(chunk, settings)
        num_bad += parsed.num_bad
        first_bad = first_bad or parsed.first_bad
        for documents in parsed.documents.values():
            texts = [document for document in documents if isinstance(document, str)]
            num_documents += len(texts)
            yield from texts
    if not num_bad:
        return
    found = (
        f"{num_bad} lines are not documents and {num_documents} are; the first bad line is "
        f"{first_bad}"
    )
    if num_bad > num_documents:
        raise UserError(f"{' '.join(inputs)}: {found} (see --encoding and --json-keys)")
    logger.warning("%s: %s", " ".join(inputs), found)
