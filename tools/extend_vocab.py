"""Adds a language's pieces to a LLaMA tokenizer.

In: a tokenizer and a corpus of the language. Out: a folder with the extended tokenizer, for
`preprocess_data.py`, for `convert_checkpoint.py import --tokenizer-model`, and for transformers.
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

from megatron_chatflow.checkpoint.convert_folder import new_folder
from megatron_chatflow.corpus.inputs import find_inputs
from megatron_chatflow.corpus.parse import CorpusSettings, parse_chunk
from megatron_chatflow.corpus.readers import CorpusReader
from megatron_chatflow.errors import UserError, run_main
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import (
    PIECE_KINDS,
    SCRIPTS,
    Choice,
    choose_pieces,
    extend_tokenizer,
    tokens_per_character,
)

EXAMPLES = """examples:
  python tools/extend_vocab.py --tokenizer-model tokenizer.model --corpus 'zh/*.jsonl.zst' \\
      --num-new 8076 --output-dir tokenizers/zh
  python tools/extend_vocab.py --tokenizer-model tokenizer.model --corpus zh.txt \\
      --num-new 20000 --pieces bpe --output-dir tokenizers/zh-bpe
"""


def main() -> None:
    """Parses the command line, extends, and says what it gains."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parse()
    if args.num_new < 1:
        raise UserError(f"--num-new: {args.num_new} is below 1; ask for some")
    tokenizer = load_tokenizer(args.tokenizer_model)
    choice = Choice(args.num_new, args.pieces, args.script, args.min_count)
    pieces = choose_pieces(tokenizer, _texts(args), choice)
    with new_folder(
        args.output_dir, overwrite=args.overwrite, mark="tokenizer_config.json", num_bytes=10**8
    ) as folder:
        extended = extend_tokenizer(tokenizer, pieces, folder)
    sample = [text for text, _ in zip(_texts(args), range(500), strict=False)]
    before, after = (tokens_per_character(t, sample) for t in (tokenizer, extended))
    print(f"added {len(pieces)} pieces: {tokenizer.vocab_size} -> {extended.vocab_size}")
    print(f"tokens a character, first {len(sample)} documents: {before:.3f} -> {after:.3f}")
    print(f"wrote {args.output_dir}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Adds a language's pieces to a tokenizer; the old pieces keep their ids.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokenizer-model", type=Path, required=True, help="SentencePiece model, tokenizer.json")
    add("--corpus", nargs="+", required=True, metavar="F", help="files, folders or globs")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="of the text in JSON")
    add("--num-new", type=int, required=True, help="pieces to add")
    add("--output-dir", type=Path, required=True, help="the new folder")
    add("--pieces", choices=PIECE_KINDS, default="characters", help="default: %(default)s")
    add("--script", choices=SCRIPTS, default="han", help="characters to take; default: %(default)s")
    add("--min-count", type=int, default=2, help="leave rarer characters out; default: %(default)s")
    add("--overwrite", action="store_true", help="replace an earlier output")
    return parser.parse_args()


def _texts(args: argparse.Namespace) -> Iterator[str]:
    """The corpus, document by document; lines that are no documents are passed over."""
    settings = CorpusSettings(json_keys=tuple(args.json_keys))
    reader = CorpusReader(find_inputs(args.corpus), "line", settings.columns)
    for chunk in reader.chunks():
        for documents in parse_chunk(chunk, settings).documents.values():
            yield from (document for document in documents if isinstance(document, str))


if __name__ == "__main__":
    run_main(main)
