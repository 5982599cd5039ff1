"""``chatflow merge``: merges indexed datasets with their loss masks and sidecars."""

from megatron_chatflow.data.remote_dataset import local_prefixes
from megatron_chatflow.errors import ArgumentParser
from megatron_chatflow.files import is_url
from megatron_chatflow.preprocess.merge import PartitionPolicy, find_datasets, merge_datasets
from megatron_chatflow.preprocess.output import dataset_paths
from megatron_chatflow.preprocess.staged_upload import StagedUpload
from megatron_chatflow.remote import parse_location

DESCRIPTION = """Merges indexed datasets into one, with their loss masks and sidecars.

The output appears under its final name only when it is complete.
"""
EXAMPLES = """examples:
  %(prog)s --input shards/ --output-prefix data/en_text_document
  %(prog)s --input a_text_document b_text_document --output-prefix ab_text_document
"""


def main() -> None:
    """Merges the datasets and prints the number of documents."""
    parser = ArgumentParser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="PREFIX",
        help="dataset prefixes, or folders with *_document.idx files; paths or URLs",
    )
    add(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="prefix of the merged dataset, a path or URL",
    )
    add("--overwrite", action="store_true", help="replace an existing output")
    add(
        "--allow-missing",
        action="store_true",
        help="merge the partitions of a job even if some are missing",
    )
    add(
        "--max-bad-lines",
        type=int,
        metavar="N",
        help="maximum number of bad lines in all partitions together; default: the limit of the "
        "preprocessing job",
    )
    add(
        "--max-dropped-share",
        type=float,
        metavar="S",
        help="maximum share of dropped records in all partitions together, from 0 to 1; "
        "default: the limit of the preprocessing job",
    )
    arguments = parser.parse_args()
    prefixes = find_datasets(local_prefixes(arguments.input))
    output_prefix = parse_location(arguments.output_prefix)
    policy = PartitionPolicy(
        arguments.allow_missing, arguments.max_bad_lines, arguments.max_dropped_share
    )
    if is_url(output_prefix):
        with StagedUpload(output_prefix) as staged:
            staged.begin([staged.prefix], overwrite=arguments.overwrite)
            num_documents = merge_datasets(prefixes, staged.prefix, overwrite=True, policy=policy)
            staged.publish([dataset_paths(staged.prefix)], overwrite=arguments.overwrite)
    else:
        num_documents = merge_datasets(
            prefixes, output_prefix, overwrite=arguments.overwrite, policy=policy
        )
    print(f"{arguments.output_prefix}: {num_documents} documents of {len(prefixes)} datasets")
