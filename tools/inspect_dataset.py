#!/usr/bin/env python
"""Shows what is inside an indexed dataset, and checks every offset and id of it.

In: the prefix of a dataset, or of two to compare. Out: counts, a histogram of lengths, decoded
samples; exit status 0 if all is well, 1 if two datasets differ, 2 if one is damaged.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import random
import sys

from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.preprocess.inspect import Inspection, first_difference
from megatron_chatflow.tokenizer import load_tokenizer

EXAMPLES = """examples:
  inspect_dataset.py data/en_text_document
  inspect_dataset.py data/chat_messages_document --tokenizer-model M --num-samples 3
  inspect_dataset.py old_text_document new_text_document
"""


def main() -> int:
    """Inspects; returns the exit status."""
    parser = ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prefix", nargs="+", metavar="PREFIX", help="without .bin or .idx; a second to compare")
    add("--tokenizer-model", metavar="M", help="to decode samples")
    add("--num-samples", type=int, default=3, metavar="K", help="how many to decode")
    add("--seed", type=int, default=0, help="which samples")
    add("--color", choices=["auto", "always", "never"], default="auto")
    arguments = parser.parse_args()
    if len(arguments.prefix) > 2:
        raise UserError("too many datasets: name one, or two to compare")

    inspections = [Inspection(prefix) for prefix in arguments.prefix]
    tokenizer = load_tokenizer(arguments.tokenizer_model) if arguments.tokenizer_model else None
    for inspection in inspections:
        print(inspection.describe())
        sidecar = inspection.sidecar
        vocab_size = tokenizer.vocab_size if tokenizer else None
        if sidecar is not None:
            vocab_size = vocab_size or sidecar["tokenizer"]["vocab_size"]
        if tokenizer is not None:
            inspection.check_tokenizer(tokenizer)
        if vocab_size is not None:
            inspection.check_ids(vocab_size)
            inspection.check_hashes()
            hashes = ", the files' hashes" if sidecar is not None else ""
            print(f"  checked     every offset, every id{hashes}")
        else:
            print("  checked     every offset; ids not, without a sidecar or --tokenizer-model")
        if tokenizer is not None:
            coloured = arguments.color == "always"
            coloured = coloured or (arguments.color == "auto" and sys.stdout.isatty())
            indices = range(len(inspection.dataset))
            num_samples = min(arguments.num_samples, len(indices))
            for index in sorted(random.Random(arguments.seed).sample(indices, num_samples)):
                print(inspection.sample(index, tokenizer, coloured=coloured))
    if len(inspections) == 1:
        return 0
    first, second = inspections
    difference = first_difference(first.dataset, second.dataset)
    if difference is None and (first.mask is None) != (second.mask is None):
        difference = "only one has a loss mask"
    if difference is None and first.mask is not None and second.mask is not None:
        difference = first_difference(first.mask, second.mask)
        difference = difference and f"loss mask: {difference}"
    print(f"first difference: {difference}" if difference else "the two are equal")
    return 1 if difference else 0


if __name__ == "__main__":
    run_main(main)
