"""``chatflow inspect``: describes, checks and compares indexed datasets."""

import random
import sys

from megatron_chatflow.data.remote_dataset import local_prefix
from megatron_chatflow.errors import ArgumentParser, UserError
from megatron_chatflow.preprocess.inspect import Inspection, first_difference
from megatron_chatflow.tokenizer import load_tokenizer

DESCRIPTION = """Describes an indexed dataset and checks all of its offsets and ids.

Prints counts, a histogram of document lengths and decoded samples. Two datasets are also compared.
The exit status is 0 on success, 1 if two datasets differ, and 2 if a dataset is damaged.
"""
EXAMPLES = """examples:
  %(prog)s data/en_text_document
  %(prog)s data/chat_messages_document --tokenizer-model M --num-samples 3
  %(prog)s old_text_document new_text_document
"""


def main() -> int:
    """Runs the command; returns 1 if two datasets differ and 0 otherwise."""
    parser = ArgumentParser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add(
        "prefix",
        nargs="+",
        metavar="PREFIX",
        help="path or URL of a dataset without .bin or .idx; two datasets are compared",
    )
    add(
        "--tokenizer-model",
        metavar="M",
        help="tokenizer for decoding samples; without it, no samples are printed",
    )
    add(
        "--num-samples",
        type=int,
        default=3,
        metavar="K",
        help="number of samples to decode; default: %(default)s",
    )
    add("--seed", type=int, default=0, help="seed for selecting the samples; default: %(default)s")
    add(
        "--color",
        choices=["auto", "always", "never"],
        default="auto",
        help="mark tokens with loss in color; default: %(default)s",
    )
    arguments = parser.parse_args()
    if len(arguments.prefix) > 2:
        raise UserError("too many datasets: give one, or two to compare")

    inspections = [Inspection(local_prefix(prefix)) for prefix in arguments.prefix]
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
            hashes = ", file hashes" if sidecar is not None else ""
            print(f"  checked     every offset, every id{hashes}")
        else:
            print(
                "  checked     every offset, but no ids (they need a sidecar or --tokenizer-model)"
            )
        if tokenizer is not None:
            colored = arguments.color == "always"
            colored = colored or (arguments.color == "auto" and sys.stdout.isatty())
            indices = range(len(inspection.dataset))
            num_samples = min(arguments.num_samples, len(indices))
            for index in sorted(random.Random(arguments.seed).sample(indices, num_samples)):
                print(inspection.sample(index, tokenizer, colored=colored))
    if len(inspections) == 1:
        return 0
    first, second = inspections
    difference = first_difference(first.dataset, second.dataset)
    if difference is None and (first.mask is None) != (second.mask is None):
        difference = "only one has a loss mask"
    if difference is None and first.mask is not None and second.mask is not None:
        difference = first_difference(first.mask, second.mask)
        difference = difference and f"loss mask: {difference}"
    print(f"first difference: {difference}" if difference else "the datasets are equal")
    return 1 if difference else 0
