#!/usr/bin/env python
"""Merges indexed datasets into one, with their loss masks and sidecars.

In: prefixes, or folders with `*_document.idx`. Out: one dataset, complete or not at all.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse

from megatron_chatflow.errors import ArgumentParser, run_main
from megatron_chatflow.preprocess.merge import PartitionPolicy, find_datasets, merge_datasets

EXAMPLES = """examples:
  merge_datasets.py --input shards/ --output-prefix data/en_text_document
  merge_datasets.py --input a_text_document b_text_document --output-prefix ab_text_document
"""


def main() -> None:
    """Merges and says how much."""
    parser = ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="or folders")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    parser.add_argument("--allow-missing", action="store_true", help="parts of a job array")
    parser.add_argument("--max-bad-lines", type=int, metavar="N", help="in all parts together")
    parser.add_argument(
        "--max-dropped-share", type=float, metavar="S", help="in all parts together"
    )
    arguments = parser.parse_args()
    prefixes = find_datasets(arguments.input)
    policy = PartitionPolicy(
        arguments.allow_missing, arguments.max_bad_lines, arguments.max_dropped_share
    )
    num_documents = merge_datasets(
        prefixes, arguments.output_prefix, overwrite=arguments.overwrite, policy=policy
    )
    print(f"{arguments.output_prefix}: {num_documents} documents of {len(prefixes)} datasets")


if __name__ == "__main__":
    run_main(main)
