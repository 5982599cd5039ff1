#!/usr/bin/env python
"""Turns a corpus into Megatron's indexed datasets.

In: text, sentence pairs or chats (jsonl, parquet, txt, tsv; plain, .gz or .zst). Out:
`<prefix>_<key>_document.{bin,idx,json}`, and a loss mask beside them for pairs and chats.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import logging
import time

from megatron_chatflow.errors import ArgumentParser, run_main
from megatron_chatflow.preprocess import parse_shard, preprocess, settings_of_options
from megatron_chatflow.preprocess.dropped import DEFAULT_MAX_SHARE
from megatron_chatflow.preprocess.pairs import SCRIPTS
from megatron_chatflow.preprocess.readers import MAX_RECORD_BYTES
from megatron_chatflow.preprocess.templates import TEMPLATES
from megatron_chatflow.tokenizer import TOKENIZER_TYPES

EXAMPLES = """examples:
  preprocess_data.py --input 'en/*.zst' --output-prefix data/en --tokenizer-model M --append-eod
  preprocess_data.py --format pairs --pair-template translate --input zh_en.tsv ...
  preprocess_data.py --format chat --template chatflow --input alpaca.json ...
  zcat big.jsonl.gz | preprocess_data.py --input - ...
  # a job array, and then merge_datasets.py --input out/ --output-prefix data/en_text_document
  preprocess_data.py --shard $SLURM_ARRAY_TASK_ID/64 --input corpus/ --output-prefix out/en ...
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    add = parser.add_argument
    add(
        "--input", nargs="+", required=True, dest="inputs", metavar="F", help="or folders, globs, -"
    )
    add("--output-prefix", required=True, metavar="P", help="path that outputs' names begin with")
    add("--format", choices=["text", "pairs", "chat"], default="text")
    add("--json-keys", nargs="+", metavar="KEY", help="default: text; of chats: messages")
    add("--tokenizer-type", choices=[*TOKENIZER_TYPES, "auto"], default="auto")
    add("--tokenizer-model", required=True, metavar="M", help="file, or folder with one")
    add("--append-bos", action="store_true", help="begin every document with the BOS token")
    add("--append-eod", action="store_true", help="end every document with the EOD token")
    add("--workers", type=int, dest="num_workers", metavar="N", help="default: all cores")
    add("--max-bad-lines", type=int, default=100, metavar="N", help="dropped before it is an error")
    add(
        "--max-dropped-share",
        type=float,
        default=DEFAULT_MAX_SHARE,
        metavar="S",
        help="of all records, for all reasons, before it is an error; default: %(default)s",
    )
    add(
        "--invalid-utf8", choices=["drop", "replace"], default="drop", help="of lines; txt: replace"
    )
    add(
        "--encoding",
        default="utf-8",
        metavar="E",
        help="of txt, tsv and JSON: gb18030, big5, utf-16 ...; default: %(default)s",
    )
    add("--txt-documents", choices=["file", "line"], default="file", help="what is one, in .txt")
    add(
        "--max-record-bytes",
        type=int,
        default=MAX_RECORD_BYTES,
        metavar="N",
        help="largest line, row or text file; larger ones are bad lines; default: %(default)s",
    )
    add("--partitions", type=int, default=1, dest="num_partitions", help="merged; resumes by part")
    add("--shard", type=parse_shard, metavar="I/N", help="make the I-th of N parts alone, I from 0")
    add("--ray", metavar="ADDRESS", help="make the parts on this Ray cluster; auto: the one here")
    add("--dedup", action="store_true", help="drop documents that have been there before")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    chats = parser.add_argument_group("chats and translation instructions")
    add = chats.add_argument
    add("--template", choices=list(TEMPLATES), default="chatflow")
    add(
        "--chat-template",
        metavar="PATH",
        help="or a Jinja file, model's folder or its tokenizer_config.json",
    )
    add("--loss", choices=["response", "all"], default="response", help="tokens with loss")
    add("--max-tokens", type=int, metavar="N", help="longest document")
    add("--over-long", choices=["truncate", "drop"], default="truncate", help="cut between turns")
    pairs = parser.add_argument_group("pairs: en<TAB>zh lines, or JSON with a key for each side")
    add = pairs.add_argument
    add("--pair-keys", nargs=2, default=["en", "zh"])
    add(
        "--pair-columns",
        nargs=2,
        metavar=("A", "B"),
        help="of tsv with more than two: numbers from 1, or names in the header",
    )
    add("--pair-languages", nargs=2, default=["English", "Chinese"])
    add("--pair-scripts", nargs=2, choices=["any", *SCRIPTS], default=["any", "any"])
    add("--pair-template", default="plain", help="plain, translate, or a YAML file")
    add("--pair-level", choices=["sentence", "document"], default="sentence", help="of lists")
    add("--pair-direction", choices=["both", "forward", "backward", "hash"], default="hash")
    add("--pair-max-length-ratio", type=float, default=9.0, help="of the sides' bytes; 0: no limit")
    return parser.parse_args()


def main() -> None:
    """Runs the job and says what came of it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begin = time.perf_counter()
    settings = settings_of_options(vars(parse_arguments()))
    for key, content in preprocess(settings).items():
        seconds = time.perf_counter() - begin
        num_bytes = content["num_text_bytes"]
        print(
            f"{key}: {content['num_documents']} documents, {content['num_tokens']} tokens "
            f"({content['num_loss_tokens']} with loss), {num_bytes / 1e6:.1f} MB of text, "
            f"{num_bytes / 1e6 / seconds:.1f} MB/s, dropped {content['dropped'] or 0}, "
            f"repaired {content['repaired'] or 0}"
        )


if __name__ == "__main__":
    run_main(main)
