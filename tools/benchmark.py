#!/usr/bin/env python
"""Measures the throughput of one part of the project, and of installed peers with --peers.

Prints a table, and writes the same rows with machine, versions and commit as JSON to --output.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import sys

from benchmarks.harness import load_benchmark, run_benchmark
from megatron_chatflow.errors import ArgumentParser, run_main

SUBJECTS = {
    "preprocess": "corpus to .bin/.idx: bytes per second, CPU-seconds, memory",
    "blend": "draws of a schedule: time per sample, at the start and while continuing",
    "loader": "samples and global batches per second",
    "checkpoint": "time that a save blocks training, and time until it is on disk",
    "kernels": "attention and the passes of the loss, for every available implementation",
    "stages": "time and memory of a training step by what is trained",
    "train": "tokens per second of a training step, and MFU",
}
EXAMPLES = """examples:
  benchmark.py blend --output blend.json
  benchmark.py train --peers
  benchmark.py loader --help
"""


def main() -> None:
    """Parses the subject and runs its benchmark with the remaining arguments."""
    listing = "\n".join(f"  {name:<12}{summary}" for name, summary in SUBJECTS.items())
    parser = ArgumentParser(
        description=f"{__doc__}\nsubjects:\n{listing}",
        epilog=EXAMPLES,
        usage="%(prog)s SUBJECT [--peers] [--output R.json] ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", choices=list(SUBJECTS), help="what to measure")
    arguments = parser.parse_args(sys.argv[1:2])
    benchmark = load_benchmark(arguments.subject)
    run_benchmark(arguments.subject, benchmark, sys.argv[2:], prog=parser.prog)


if __name__ == "__main__":
    run_main(main)
