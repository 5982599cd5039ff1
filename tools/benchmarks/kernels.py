"""Forward and backward time of attention, and of the loss's passes, by implementation.

Prints a row for each implementation available on this machine: every attention back end of local
layers, and the two passes over the logits by the kernels of ``csrc/kernels`` if built and by
PyTorch. On a GPU, times come from CUDA events with cold caches. On a CPU the operators run their
references: this tests the benchmark and says nothing about the kernels.
"""

import argparse
import logging
import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

from benchmarks.shapes import SHAPES, Shape
from megatron_chatflow.kernels.attention import BACKENDS, gather_facts, obstacle
from megatron_chatflow.kernels.cuda import load_kernels
from megatron_chatflow.model.attention import PackedCausalAttention
from megatron_chatflow.model.loss import VocabularyShard, chunk_loss
from megatron_chatflow.model.packed import pack_tokens
from megatron_chatflow.model.rotary import Rotary
from megatron_chatflow.runtime.device import call_seconds
from megatron_chatflow.runtime.table import Row

logger = logging.getLogger(__name__)

_LOSS_TOKENS = 2048
_SHORTEST_DOCUMENT = 64


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
    rows = []
    for operation, name, call, num_bytes in (
        *_losses(shape, min(arguments.num_tokens, _LOSS_TOKENS), device),
        *_attentions(shape, arguments.num_tokens, device),
    ):
        try:
            seconds = statistics.median(call_seconds(call, device, arguments.num_rounds))
        except Exception as error:
            # A library may raise any exception on a GPU that it does not support.
            logger.warning("%s by %s: skipped: %s", operation, name, error)
            continue
        row: Row = {
            "operation": operation,
            "implementation": name,
            "microseconds": 1e6 * seconds,
            "gigabytes_per_second": num_bytes / seconds / 1e9 if num_bytes else None,
        }
        rows.append(row)
    return rows


_Operation = tuple[str, str, Callable[[], object], int]
"""Operation, implementation, the call to measure, and the bytes that it has to move or 0."""


def _losses(shape: Shape, num_tokens: int, device: torch.device) -> Iterator[_Operation]:
    rows = VocabularyShard(0, shape.vocab_size, shape.vocab_size, None)
    logits = torch.randn(num_tokens, shape.vocab_size, device=device).bfloat16()
    labels = torch.arange(num_tokens, device=device) * 17 % shape.vocab_size
    is_built = device.type != "cuda" or load_kernels()[0] is not None
    for name in ("ours", "torch") if is_built else ("torch",):

        def call(name: str = name) -> object:
            return chunk_loss(logits, labels, rows, name)

        # Both passes read the logits, the second writes them.
        yield "loss passes", name, call, 3 * logits.nbytes


def _attentions(shape: Shape, num_tokens: int, device: torch.device) -> Iterator[_Operation]:
    head_dim = shape.hidden_size // shape.num_attention_heads
    heads = (shape.num_attention_heads, shape.num_query_groups, shape.num_query_groups)
    query, key, value = (
        torch.randn(num_tokens, num, head_dim, device=device).bfloat16().requires_grad_()
        for num in heads
    )
    packed = pack_tokens(
        torch.tensor(_document_ends(num_tokens), dtype=torch.int32),
        rotary=Rotary(head_dim, 10000.0),
        dtype=torch.bfloat16,
        device=device,
    )
    facts = gather_facts(device, torch.bfloat16, head_dim, deterministic=False)
    gradient = torch.ones(num_tokens, heads[0] * head_dim, device=device).bfloat16()
    for backend in BACKENDS:
        if obstacle(backend, facts) is not None:
            continue
        settings = SimpleNamespace(deterministic_mode=False, window_size=None)
        module = PackedCausalAttention(settings, 1, None, "self", backend=backend)

        def call(module: PackedCausalAttention = module) -> object:
            context = module(query, key, value, None, packed_seq_params=packed)
            return torch.autograd.grad(context, (query, key, value), gradient)

        yield "attention", backend, call, 0


def _document_ends(num_tokens: int) -> list[int]:
    """Returns the ends of documents whose lengths halve, as packed instructions are unequal."""
    ends = [0]
    while num_tokens - ends[-1] >= 2 * _SHORTEST_DOCUMENT:
        ends.append(ends[-1] + (num_tokens - ends[-1]) // 2)
    return [*ends, num_tokens]
