"""``chatflow preprocess``: turns text, sentence pairs or chats into Megatron's indexed datasets."""

import argparse
import logging
import time

from megatron_chatflow.errors import ArgumentParser
from megatron_chatflow.preprocess import parse_shard, preprocess, settings_of_options
from megatron_chatflow.preprocess.dropped import DEFAULT_MAX_SHARE
from megatron_chatflow.preprocess.pairs import SCRIPTS
from megatron_chatflow.preprocess.readers import MAX_EXPANSION, MAX_RECORD_BYTES
from megatron_chatflow.preprocess.templates import TEMPLATES
from megatron_chatflow.tokenizer import TOKENIZER_TYPES

DESCRIPTION = """Tokenizes a corpus into Megatron's indexed datasets.

Reads text, sentence pairs or chats from .jsonl, .json, .parquet, .txt and .tsv files; all but
.parquet may be compressed (.gz, .zst). Writes <prefix>_<key>_document.{bin,idx,json}, and for pairs
and chats a loss mask beside them.
"""
EXAMPLES = """examples:
  %(prog)s --input 'en/*.zst' --output-prefix data/en --tokenizer-model M --append-eod
  %(prog)s --format pairs --pair-template translate --input zh_en.tsv ...
  %(prog)s --format chat --template chatflow --input alpaca.json ...
  zcat big.jsonl.gz | %(prog)s --input - ...
  # one task of a job array; merge the outputs with merge_datasets.py (chatflow merge) afterwards
  %(prog)s --shard $SLURM_ARRAY_TASK_ID/64 --input corpus/ --output-prefix out/en ...
"""


def main() -> None:
    """Runs the job and prints counts and throughput for each dataset."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    begin = time.perf_counter()
    settings = settings_of_options(vars(_parse_arguments()))
    for key, content in preprocess(settings).items():
        seconds = time.perf_counter() - begin
        num_bytes = content["num_text_bytes"]
        print(
            f"{key}: {content['num_documents']} documents, {content['num_tokens']} tokens "
            f"({content['num_loss_tokens']} with loss), {num_bytes / 1e6:.1f} MB of text, "
            f"{num_bytes / 1e6 / seconds:.1f} MB/s, dropped {content['dropped'] or 0}, "
            f"repaired {content['repaired'] or 0}"
        )


def _parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        dest="inputs",
        metavar="F",
        help="files, folders, globs, or - for lines on standard input",
    )
    add("--output-prefix", required=True, metavar="P", help="prefix of the output files' paths")
    add("--format", choices=["text", "pairs", "chat"], default="text", help="default: %(default)s")
    add("--json-keys", nargs="+", metavar="KEY", help="default: text; for chats: messages")
    add("--tokenizer-type", choices=[*TOKENIZER_TYPES, "auto"], default="auto")
    add(
        "--tokenizer-model",
        required=True,
        metavar="M",
        help="SentencePiece model, tokenizer.json, or a folder with one",
    )
    add("--append-bos", action="store_true", help="begin every document with the BOS token")
    add("--append-eod", action="store_true", help="end every document with the EOD token")
    add("--workers", type=int, dest="num_workers", metavar="N", help="default: all cores")
    add(
        "--max-bad-lines",
        type=int,
        default=100,
        metavar="N",
        help="fail if more lines than this are invalid; default: %(default)s",
    )
    add(
        "--max-dropped-share",
        type=float,
        default=DEFAULT_MAX_SHARE,
        metavar="S",
        help="fail if a larger share of all records is dropped, for any reason; "
        "default: %(default)s",
    )
    add(
        "--invalid-utf8",
        choices=["drop", "replace"],
        default="drop",
        help="what to do with lines that are not UTF-8; .txt files always replace",
    )
    add(
        "--encoding",
        default="utf-8",
        metavar="E",
        help="encoding of txt, tsv and JSON, such as gb18030, big5 or utf-16; default: %(default)s",
    )
    add(
        "--txt-documents",
        choices=["file", "line"],
        default="file",
        help="whether a .txt file or each of its lines is a document; default: %(default)s",
    )
    add(
        "--max-record-bytes",
        type=int,
        default=MAX_RECORD_BYTES,
        metavar="N",
        help="maximum size of a line, row or text file; larger ones count as bad lines; "
        "default: %(default)s",
    )
    add(
        "--max-expansion",
        type=float,
        default=MAX_EXPANSION,
        metavar="X",
        help="refuse a compressed file that expands to more than X times its size; 0: no limit; "
        "default: %(default)s",
    )
    add(
        "--partitions",
        type=int,
        default=1,
        dest="num_partitions",
        metavar="N",
        help="process the inputs in N parts and merge them; a restarted job keeps finished parts",
    )
    add(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="process only part I of N (counting from 0), for job arrays",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        help="process the parts on this Ray cluster; auto: the cluster of this machine",
    )
    add("--dedup", action="store_true", help="drop exact repetitions of earlier documents")
    add("--overwrite", action="store_true", help="replace existing outputs")
    chats = parser.add_argument_group("chats and translation instructions")
    add = chats.add_argument
    add("--template", choices=list(TEMPLATES), default="chatflow", help="default: %(default)s")
    add(
        "--chat-template",
        metavar="PATH",
        help="Jinja file, model folder or tokenizer_config.json to use instead of --template",
    )
    add(
        "--loss",
        choices=["response", "all"],
        default="response",
        help="which tokens have loss; default: %(default)s",
    )
    add("--max-tokens", type=int, metavar="N", help="maximum length of a document")
    add(
        "--over-long",
        choices=["truncate", "drop"],
        default="truncate",
        help="whether longer documents are cut between turns or dropped; default: %(default)s",
    )
    pairs = parser.add_argument_group("pairs: en<TAB>zh lines, or JSON with a key for each side")
    add = pairs.add_argument
    add(
        "--pair-keys",
        nargs=2,
        default=["en", "zh"],
        metavar=("A", "B"),
        help="JSON keys of the two sides; default: en zh",
    )
    add(
        "--pair-columns",
        nargs=2,
        metavar=("A", "B"),
        help="columns of a tsv file with more than two: numbers from 1, or names of its header",
    )
    add(
        "--pair-languages",
        nargs=2,
        default=["English", "Chinese"],
        metavar=("A", "B"),
        help="names of the languages in instructions; default: English Chinese",
    )
    add(
        "--pair-scripts",
        nargs=2,
        choices=["any", *SCRIPTS],
        default=["any", "any"],
        help="drop pairs whose sides are not mostly in these scripts",
    )
    add("--pair-template", default="plain", help="plain, translate, or a YAML file of templates")
    add(
        "--pair-level",
        choices=["sentence", "document"],
        default="sentence",
        help="whether lists of sentences become one pair per sentence or one per document",
    )
    add(
        "--pair-direction",
        choices=["both", "forward", "backward", "hash"],
        default="hash",
        help="hash: a hash of the pair chooses one direction; default: %(default)s",
    )
    add(
        "--pair-max-length-ratio",
        type=float,
        default=9.0,
        metavar="R",
        help="drop pairs whose sides differ more in bytes; 0: no limit; default: %(default)s",
    )
    return parser.parse_args()
