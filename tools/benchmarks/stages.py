"""Time and memory of a training step by what is trained, and by how the rest is frozen.

Each row is a model with gradient buffers and an optimizer: everything is trained; only new rows of
the vocabulary are, as `StagedOptimizer` does it, with and without the gradients of frozen tensors;
and the alternative to it, gradient buffers and an optimizer that only have the tensors with such
rows. Buffers and optimizer state are counted after the measured steps.
"""

import argparse
import statistics
from dataclasses import replace

import torch

from benchmarks.shapes import SHAPES
from megatron_chatflow.runtime.launch import finalize, initialize
from megatron_chatflow.runtime.table import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument(
        "--preset", choices=list(SHAPES), default="58m", help="model shape; default: %(default)s"
    )
    parser.add_argument(
        "--seq-length", type=int, default=512, help="tokens of a step; default: %(default)s"
    )
    parser.add_argument(
        "--num-rounds", type=int, default=5, help="steps of each kind; default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Runs the benchmark, see the module docstring."""
    ranks = initialize()
    from benchmarks import stage_steps as steps

    preset = SHAPES[arguments.preset]
    shape = replace(preset, seq_length=arguments.seq_length, micro_batch_size=1)
    rows: list[Row] = []
    for mode in (steps.EVERYTHING, steps.NEW_ROWS, steps.ALL_GRADIENTS, steps.OWN_BUFFERS):
        step = steps.Step(shape, ranks, mode)
        seconds = [step.seconds() for _ in range(arguments.num_rounds + 1)][1:]
        rows.append(
            {
                "trained": mode,
                "seconds" if torch.cuda.is_available() else "cpu_seconds": statistics.median(
                    seconds
                ),
                "gradient_buffer_bytes": step.buffer_bytes(),
                "optimizer_state_bytes": step.state_bytes(),
            }
        )
    finalize()
    return rows
