"""``chatflow merge-checkpoints``: merges the weights of several models into one."""

import logging
from pathlib import Path

from megatron_chatflow.errors import ArgumentParser

DESCRIPTION = """Merges the weights of models of the same shape into a Hugging Face folder.

Models are Hugging Face folders, runs or their checkpoints, in any combination. The tokenizer and
the other small files are those of the first model.
"""
EXAMPLES = """examples:
  %(prog)s --models runs/zh/iter_0001800 runs/zh/iter_0002000 --output exports/mean
  %(prog)s --method slerp --models exports/zh exports/chat --weights 0.7 0.3 --output exports/both
  %(prog)s --method task_vectors --base Llama-2-7b-hf --models exports/zh exports/math \\
      --weights 1 0.5 --output exports/sum
"""


def main() -> None:
    """Merges the models and prints what was written."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ArgumentParser(DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("--models", type=Path, nargs="+", required=True, metavar="MODEL", help="models to merge")
    add(
        "--method",
        choices=("mean", "slerp", "task_vectors"),
        default="mean",
        help="weighted mean; spherical interpolation of two models; or weighted differences from "
        "--base that are added to it (default: %(default)s)",
    )
    add(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="weight of each model (default: equal ones, or 1 each for task_vectors)",
    )
    add("--base", type=Path, help="base model of task_vectors")
    add("--dtype", choices=("fp32", "bf16", "fp16"), help="dtype (default: the first model's)")
    add("--output", type=Path, required=True, help="folder to create")
    add("--overwrite", action="store_true", help="replace an existing output")
    arguments = parser.parse_args()

    from megatron_chatflow.convert.merge import merge_models  # imports torch

    done = merge_models(
        arguments.models,
        arguments.output,
        method=arguments.method,
        weights=arguments.weights,
        base=arguments.base,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
    )
    print(done)
