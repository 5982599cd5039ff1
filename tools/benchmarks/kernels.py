"""Forward and backward time of norm, RoPE, SwiGLU, loss passes and attention, by implementation.

Prints a row for each implementation available on this machine: PyTorch's composition, the kernels
of ``csrc/kernels`` if built, liger-kernel, transformer-engine, and the attention libraries. They
are the functions from which a run chooses, see `megatron_chatflow.model.kernel_choice`, and the
libraries' cross-entropies. On a GPU, times come from CUDA events with cold caches. On a CPU the
operators run their references: this tests the benchmark and says nothing about the kernels.
"""

import argparse
import logging
from collections.abc import Callable

import torch

from benchmarks.shapes import SHAPES
from megatron_chatflow.kernels import external
from megatron_chatflow.kernels.attention import gather_facts
from megatron_chatflow.model.kernel_choice import (
    Operation,
    StepSizes,
    attention_operation,
    median_seconds,
    step_operations,
)
from megatron_chatflow.runtime.table import Row

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument(
        "--preset", choices=list(SHAPES), default="7b", help="model widths; default: %(default)s"
    )
    parser.add_argument(
        "--num-tokens", type=int, default=8192, help="tokens per call; default: %(default)s"
    )
    parser.add_argument(
        "--num-rounds", type=int, default=20, help="calls to measure; default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Runs the benchmark, see the module docstring."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[arguments.preset]
    sizes = StepSizes(
        num_tokens=arguments.num_tokens,
        norm_tokens=arguments.num_tokens,
        hidden_size=shape.hidden_size,
        ffn_width=shape.ffn_hidden_size,
        num_heads=shape.num_attention_heads,
        num_groups=shape.num_query_groups,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        vocab_rows=shape.vocab_size,
        dtype=torch.bfloat16,
        device=device,
    )
    facts = gather_facts(device, sizes.dtype, sizes.head_dim, deterministic=False)
    operations = [
        *step_operations(sizes),
        *_library_losses(sizes),
        attention_operation(sizes, facts, sizes.num_tokens, "torch"),
    ]
    rows = (
        _row(operation, name, arguments.num_rounds, device)
        for operation in operations
        for name in operation.implementations
    )
    return [row for row in rows if row is not None]


def _library_losses(sizes: StepSizes) -> list[Operation]:
    """Returns the libraries' cross-entropies, which no run uses, see `kernels.external`."""
    if sizes.device.type != "cuda":
        return []
    (ours,) = (o for o in step_operations(sizes) if o.name == "loss passes")
    wanted: dict[str, tuple[str, Callable[..., torch.Tensor]]] = {
        "liger": ("liger_kernel.ops.cross_entropy", external.liger_cross_entropy),
        "transformer_engine": (
            "transformer_engine.pytorch.cross_entropy",
            external.transformer_engine_cross_entropy,
        ),
    }

    def inputs() -> tuple[torch.Tensor, ...]:
        logits, labels = ours.make_inputs()
        return logits.requires_grad_(), labels

    return [
        Operation(ours.name, (name,), {name: function}, inputs, num_bytes=ours.num_bytes)
        for name, (module, function) in wanted.items()
        if external.can_import(module)
    ]


def _row(operation: Operation, name: str, num_rounds: int, device: torch.device) -> Row | None:
    try:
        seconds = median_seconds(operation, operation.implementations[name], device, num_rounds)
    except Exception as error:
        # A library may raise any exception on a GPU that it does not support.
        logger.warning("%s by %s: skipped: %s", operation.name, name, error)
        return None
    return {
        "operation": operation.name,
        "implementation": name,
        "microseconds": 1e6 * seconds,
        "gigabytes_per_second": operation.num_bytes / seconds / 1e9
        if operation.num_bytes
        else None,
    }
