#!/usr/bin/env python
"""Measures throughput, beside peers where they are installed.

In: what to measure, and its arguments. Out: a table, and with --output the same as JSON with
machine, versions and commit.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import sys

from megatron_chatflow.errors import ArgumentParser, run_main
from megatron_chatflow.evaluation.benchmark import has_benchmark, load_benchmark, run_benchmark

SUBJECTS = {
    "preprocess": "corpus to .bin/.idx: bytes a second, CPU-seconds, memory",
    "blend": "draws of a schedule: time a sample, cold and going on",
    "loader": "samples and global batches a second",
    "checkpoint": "how long training waits for a save, and how long until it is on the disk",
    "kernels": "norm, RoPE, SwiGLU, loss and attention, each by every implementation that is here",
    "train": "tokens a second of a training step, and its share of the hardware's peak",
}
EXAMPLES = """examples:
  benchmark.py blend --output blend.json
  benchmark.py train --peers
  benchmark.py loader --help
"""


def main() -> None:
    """Parses the subject, and hands the other arguments to its benchmark."""
    subjects = {name: summary for name, summary in SUBJECTS.items() if has_benchmark(name)}
    listing = "\n".join(f"  {name:<12}{summary}" for name, summary in subjects.items())
    parser = ArgumentParser(
        description=f"{__doc__}\nsubjects:\n{listing}",
        epilog=EXAMPLES,
        usage="%(prog)s SUBJECT [--peers] [--output R.json] ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subject", choices=list(subjects), help="what to measure")
    arguments = parser.parse_args(sys.argv[1:2])
    benchmark = load_benchmark(arguments.subject)
    run_benchmark(arguments.subject, benchmark, sys.argv[2:], prog=parser.prog)


if __name__ == "__main__":
    run_main(main)
