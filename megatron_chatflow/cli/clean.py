"""``chatflow clean``: filters, decontaminates and deduplicates corpora, and reports on them."""

import argparse
import logging
import os
from pathlib import Path

from megatron_chatflow.errors import ArgumentParser
from megatron_chatflow.preprocess.cleaning.decontaminate import MIN_WORDS
from megatron_chatflow.preprocess.cleaning.job import (
    FILTERS,
    CleanSettings,
    MinHashSettings,
    clean,
)
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.report.corpus import describe, write_corpus_report
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding

DESCRIPTION = """Cleans text corpora with datatrove, and reports on corpora.

run reads text in every format that preprocessing reads and writes a folder of .jsonl.zst files, one
for each input file, which preprocessing reads. report writes one HTML page: languages, lengths,
duplicates, fertility, and examples of what each filter would drop. Nothing is downloaded.
"""
EXAMPLES = """examples:
  %(prog)s run --input zh/ --output clean/zh --languages zh --filters gopher-quality --minhash
  %(prog)s run --input zh/ --output clean/zh --decontaminate ceval.jsonl --removed removed/zh
  %(prog)s report --input clean/zh --output zh.html --tokenizer-model data/tokenizer.model
"""


def main() -> None:
    """Runs the command that the first argument names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = _parse_arguments()
    corpus = CorpusSettings(
        json_keys=(args.json_key,),
        txt_documents=args.txt_documents,
        encoding=canonical_encoding(args.encoding),
    )
    if args.command == "report":
        statistics = write_corpus_report(
            args.inputs,
            Path(args.output),
            corpus,
            tokenizer_model=args.tokenizer_model,
            num_sampled=args.sample,
            title=args.title,
        )
        print(*describe(statistics), f"wrote {args.output}", sep="\n")
        return
    minhash = MinHashSettings(args.minhash_ngram, args.minhash_buckets, args.minhash_hashes)
    settings = CleanSettings(
        inputs=tuple(args.inputs),
        output=args.output,
        corpus=corpus,
        chinese=args.chinese,
        max_repeated_punctuation=args.max_repeated_punctuation,
        remove_boilerplate=args.remove_boilerplate,
        languages=tuple(args.languages),
        language_threshold=args.language_threshold,
        filters=tuple(args.filters),
        decontaminate=tuple(args.decontaminate),
        decontaminate_ngram=args.decontaminate_ngram,
        decontaminate_match=tuple(args.decontaminate_match),
        minhash=minhash if args.minhash else None,
        removed=args.removed,
        num_workers=args.num_workers or len(os.sched_getaffinity(0)),
        max_bad_lines=args.max_bad_lines,
        overwrite=args.overwrite,
        ray=args.ray,
        slurm_partition=args.slurm_partition,
        slurm_time=args.slurm_time,
    )
    counts = clean(settings)
    if counts is None:
        print(f"submitted; the last job gives {args.output} its name")
    else:
        print("\n".join(counts.describe()))


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(DESCRIPTION, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="clean a corpus")
    report = commands.add_parser("report", help="describe a corpus as one HTML page")
    for command, output in ((run, "folder to write"), (report, "HTML file to write")):
        add = command.add_argument
        add(
            "--input",
            nargs="+",
            required=True,
            dest="inputs",
            metavar="F",
            help="files, folders or globs to read",
        )
        add("--output", required=True, metavar="PATH", help=output)
        add(
            "--json-key",
            default="text",
            metavar="KEY",
            help="JSON key or parquet column of the text; default: %(default)s",
        )
        add(
            "--encoding",
            default="utf-8",
            metavar="E",
            help="encoding of txt and JSON files; default: %(default)s",
        )
        add(
            "--txt-documents",
            choices=["file", "line"],
            default="line",
            help="whether a document is a whole .txt file or one of its lines; default: "
            "%(default)s",
        )
    _add_report_arguments(report)
    _add_run_arguments(run)
    return parser.parse_args()


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--title", default="", help="title of the page; default: the inputs")
    add("--tokenizer-model", metavar="M", help="tokenizer for the fertility; default: none")
    add(
        "--sample",
        type=int,
        default=5000,
        metavar="N",
        help="number of documents, selected by a hash of their texts, for languages, "
        "near-duplicates, fertility and filters; default: %(default)s",
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--removed",
        metavar="FOLDER",
        help="also write what each filter dropped, with the reason, as FOLDER/FILTER/*.jsonl.zst, "
        "and lines of boilerplate",
    )
    add("--overwrite", action="store_true", help="replace existing outputs")
    add(
        "--max-bad-lines",
        type=int,
        default=100,
        metavar="N",
        help="maximum number of records that are not documents before the job fails; default: "
        "%(default)s",
    )
    add(
        "--workers",
        type=int,
        dest="num_workers",
        metavar="N",
        help="number of worker processes; one works on one file; default: number of cores",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        help="run on this Ray cluster; auto: the cluster of this machine",
    )
    add("--slurm-partition", metavar="P", help="submit the stages to this Slurm partition")
    add(
        "--slurm-time",
        default="24:00:00",
        metavar="T",
        help="time limit of a Slurm task; default: %(default)s",
    )
    changes = parser.add_argument_group("changes, in this order, before the filters")
    add = changes.add_argument
    add(
        "--chinese",
        choices=["simplified", "traditional"],
        help="convert Chinese text to this script (pip install opencc)",
    )
    add(
        "--max-repeated-punctuation",
        type=int,
        metavar="N",
        help="shorten longer runs of one punctuation mark to N marks",
    )
    add(
        "--remove-boilerplate",
        action="store_true",
        help="remove short lines of navigation, notices and advertisements, in Chinese and English",
    )
    filters = parser.add_argument_group("filters, in this order")
    add = filters.add_argument
    add(
        "--languages",
        nargs="+",
        default=[],
        metavar="CODE",
        help="keep documents in these languages, such as en zh (pip install py3langid)",
    )
    add(
        "--language-threshold",
        type=float,
        default=0.65,
        metavar="P",
        help="minimum probability of the language; default: %(default)s",
    )
    add(
        "--filters",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"quality filters of datatrove, with limits of their own for Chinese: "
        f"{' '.join(FILTERS)}",
    )
    add(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="F",
        help="drop documents that contain texts of these evaluation files",
    )
    add(
        "--decontaminate-match",
        nargs="+",
        choices=["ngram", "exact"],
        default=["ngram", "exact"],
        help="find runs of words of an evaluation text, whole texts of at least "
        f"{MIN_WORDS} words, or both; default: ngram exact",
    )
    add(
        "--decontaminate-ngram",
        type=int,
        default=13,
        metavar="N",
        help="words, or characters in Chinese, of an n-gram; default: %(default)s",
    )
    minhash = parser.add_argument_group("fuzzy deduplication, after the filters")
    add = minhash.add_argument
    add("--minhash", action="store_true", help="keep one document of each group of near-duplicates")
    defaults = MinHashSettings()
    add(
        "--minhash-ngram",
        type=int,
        default=defaults.num_words,
        metavar="N",
        help="words, or characters in Chinese, of an n-gram; default: %(default)s",
    )
    add(
        "--minhash-buckets",
        type=int,
        default=defaults.num_buckets,
        metavar="N",
        help="number of buckets; default: %(default)s",
    )
    add(
        "--minhash-hashes",
        type=int,
        default=defaults.num_hashes,
        metavar="N",
        help="hashes in a bucket; default: %(default)s",
    )
