"""``chatflow preprocess``: turns text, sentence pairs or chats into Megatron's indexed datasets."""

import argparse
import logging
import time

from megatron_chatflow.errors import ArgumentParser
from megatron_chatflow.preprocess import parse_shard, preprocess, settings_of_options
from megatron_chatflow.preprocess.chats import CHAT_KEY_NAMES, parse_chat_key
from megatron_chatflow.preprocess.dropped import DEFAULT_MAX_SHARE
from megatron_chatflow.preprocess.pair_filters import SCRIPTS
from megatron_chatflow.preprocess.settings import MAX_EXPANSION, MAX_RECORD_BYTES
from megatron_chatflow.preprocess.templates import JINJA_TEMPLATES
from megatron_chatflow.tokenizer import TOKENIZER_TYPES

DESCRIPTION = """Tokenizes a corpus into Megatron's indexed datasets.

Reads text, sentence pairs or chats from .jsonl, .json, .csv, .txt, .tsv, .parquet and .arrow files,
and pairs also from .tmx files and from two files that are aligned by line. All but .parquet and
.arrow may be compressed (.gz, .zst, .xz, .bz2, .lz4) or in .zip archives. Writes
<prefix>_<key>_document.{bin,idx,json}, and for pairs and chats also a loss mask.
"""
EXAMPLES = """examples:
  %(prog)s --input 'en/*.zst' --output-prefix data/en --tokenizer-model M --append-eod
  %(prog)s --format pairs --pair-template translate --input zh_en.tsv ...
  %(prog)s --format pairs --input corpus.en corpus.zh ...
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
    parser = ArgumentParser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        dest="inputs",
        metavar="F",
        help="files, folders or globs to read, as paths or URLs (s3://, gs://, hf://, https://); "
        "- reads lines from standard input",
    )
    add(
        "--output-prefix",
        required=True,
        metavar="P",
        help="prefix of the output files, a path or a URL (s3://, gs://, hf://)",
    )
    add(
        "--format",
        choices=["text", "pairs", "chat"],
        default="text",
        help="kind of the input; default: %(default)s",
    )
    add(
        "--json-keys",
        nargs="+",
        metavar="KEY",
        help="JSON keys or columns to read; doc.text is the key text of the object doc; default: "
        "text, or messages for chats",
    )
    add(
        "--tokenizer-type",
        choices=[*TOKENIZER_TYPES, "auto"],
        default="auto",
        help="type of the tokenizer; auto detects it from the files; default: %(default)s",
    )
    add(
        "--tokenizer-model",
        required=True,
        metavar="M",
        help="path of a SentencePiece model, a tokenizer.json, or a folder that contains one",
    )
    add("--append-bos", action="store_true", help="begin every document with the BOS token")
    add("--append-eod", action="store_true", help="end every document with the EOD token")
    add(
        "--workers",
        type=int,
        dest="num_workers",
        metavar="N",
        help="number of worker processes; default: number of cores",
    )
    add(
        "--max-bad-lines",
        type=int,
        default=100,
        metavar="N",
        help="maximum number of invalid lines before the job fails; default: %(default)s",
    )
    add(
        "--max-dropped-share",
        type=float,
        default=DEFAULT_MAX_SHARE,
        metavar="S",
        help="maximum share of records that may be dropped for any reason, from 0 to 1; "
        "default: %(default)s",
    )
    add(
        "--invalid-utf8",
        choices=["drop", "replace"],
        default="drop",
        help="drop invalid UTF-8 lines or replace the invalid bytes, as always in .txt files; "
        "default: %(default)s",
    )
    add(
        "--encoding",
        default="utf-8",
        metavar="E",
        help="encoding of all files but parquet and Arrow, such as gb18030, big5 or utf-16; "
        "default: %(default)s",
    )
    add(
        "--txt-documents",
        choices=["file", "line"],
        default="file",
        help="whether a document is a whole .txt file or one of its lines; default: %(default)s",
    )
    add(
        "--max-record-bytes",
        type=int,
        default=MAX_RECORD_BYTES,
        metavar="N",
        help="maximum size of a line, row or text file in bytes; larger ones count as bad "
        "lines; default: %(default)s",
    )
    add(
        "--max-expansion",
        type=float,
        default=MAX_EXPANSION,
        metavar="X",
        help="maximum ratio of the decompressed to the compressed size of a file; 0: no limit; "
        "default: %(default)s",
    )
    add(
        "--partitions",
        type=int,
        default=1,
        dest="num_partitions",
        metavar="N",
        help="split the inputs into N partitions and merge the results; a restarted job skips "
        "finished partitions; default: %(default)s",
    )
    add(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="process only partition I of N (counted from 0), for job arrays",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        help="process the partitions on this Ray cluster; auto: the cluster of this machine",
    )
    add("--dedup", action="store_true", help="drop exact duplicates of earlier documents")
    add("--overwrite", action="store_true", help="replace existing outputs")
    chats = parser.add_argument_group("chats and translation instructions")
    add = chats.add_argument
    add(
        "--template",
        choices=list(JINJA_TEMPLATES),
        default="chatflow",
        help="built-in chat template; default: %(default)s",
    )
    add(
        "--chat-template",
        metavar="PATH",
        help="Jinja file, model folder or tokenizer_config.json with a chat template, instead "
        "of --template",
    )
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        help="variables of the template, such as '{\"enable_thinking\": false}'",
    )
    add(
        "--loss",
        choices=["response", "all"],
        default="response",
        help="tokens with loss: responses only, or all; default: %(default)s",
    )
    add(
        "--train-on",
        nargs="+",
        dest="chat_train_on",
        default=["all"],
        metavar="WHAT",
        help="which messages of chats are responses, with --loss response: all answers, the last "
        "answer, or the messages of these roles (such as assistant tool); default: all",
    )
    add(
        "--chat-keys",
        nargs="+",
        type=parse_chat_key,
        default=[],
        dest="chat_keys",
        metavar="NAME=KEY",
        help="JSON keys of chats that are not the usual ones, such as prompt=question "
        f"answer=reply; names: {' '.join(CHAT_KEY_NAMES)}",
    )
    add(
        "--consecutive-turns",
        choices=["drop", "merge"],
        default="drop",
        dest="chat_consecutive",
        help="drop chats with consecutive turns of one role, or merge the turns; default: "
        "%(default)s",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="maximum length of a document in tokens; default: no limit",
    )
    add(
        "--over-long",
        choices=["truncate", "drop"],
        default="truncate",
        help="truncate documents longer than --max-tokens between turns, or drop them; default: "
        "%(default)s",
    )
    pairs = parser.add_argument_group(
        "pairs: en<TAB>zh lines, records with a key for each side, aligned files, or TMX"
    )
    add = pairs.add_argument
    add(
        "--pair-keys",
        nargs=2,
        default=["en", "zh"],
        metavar=("A", "B"),
        help="JSON keys of the two sides, and their languages in TMX files and in the names of "
        "aligned files; default: en zh",
    )
    add(
        "--pair-columns",
        nargs=2,
        metavar=("A", "B"),
        help="the two columns of a tsv, csv or ||| file with more columns: numbers from 1, or "
        "names in the header",
    )
    add(
        "--pair-languages",
        nargs=2,
        default=["English", "Chinese"],
        metavar=("A", "B"),
        help="language names for instructions; codes such as en zh are also the languages of TMX "
        "and aligned files; default: English Chinese",
    )
    add(
        "--pair-scripts",
        nargs=2,
        choices=["any", *SCRIPTS],
        default=["any", "any"],
        help="drop pairs whose sides are not mostly in these scripts; default: any any",
    )
    add(
        "--pair-template",
        default="plain",
        help="plain, translate, or a YAML file of templates; default: %(default)s",
    )
    add(
        "--pair-level",
        choices=["sentence", "document"],
        default="sentence",
        help="make one pair per sentence or one per document from lists of sentences; default: "
        "%(default)s",
    )
    add(
        "--pair-direction",
        choices=["both", "forward", "backward", "hash"],
        default="hash",
        help="translation direction; both writes two documents, and hash selects one direction "
        "by a hash of the pair; default: %(default)s",
    )
    add(
        "--pair-max-length-ratio",
        type=float,
        default=9.0,
        metavar="R",
        help="drop pairs whose lengths in bytes have a larger ratio; 0: no limit; default: "
        "%(default)s",
    )
    add(
        "--pair-numbers",
        choices=["any", "same"],
        default="any",
        help="same: drop pairs whose sides do not have the same numbers of two or more digits; "
        "default: %(default)s",
    )
    add(
        "--pair-max-punctuation-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="drop pairs with a larger share of punctuation on a side, from 0 to 1; 0: no limit; "
        "default: %(default)s",
    )
    add(
        "--pair-identify-languages",
        action="store_true",
        help="drop pairs with a side that is identified as another language (needs py3langid)",
    )
    add(
        "--pair-dedup",
        choices=["none", "either"],
        default="none",
        help="either: drop pairs of which an earlier pair has the first or the second side, which "
        "includes what --dedup drops; default: %(default)s",
    )
    add(
        "--pair-min-score",
        type=float,
        metavar="S",
        help="drop pairs with a smaller score",
    )
    add(
        "--pair-score",
        default="score",
        metavar="NAME",
        help="where the score is: a JSON key, a column (number or name) or the type of a TMX prop; "
        "default: %(default)s",
    )
    return parser.parse_args()
