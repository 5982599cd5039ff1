"""Forward and backward time of norm, RoPE, SwiGLU, loss passes and attention, by implementation.

In: a LLaMA width. Out: a row for each implementation that this machine has: torch's composition,
`csrc/kernels` where built, liger-kernel, transformer-engine and each attention library where
installed. A GPU's own clock times them, with nothing of theirs in its cache. On a CPU the operators
run their references: that tries the benchmark, and says nothing about the kernels.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

from megatron_chatflow.evaluation.report_table import Row
from megatron_chatflow.model import attention_backends
from megatron_chatflow.model.attention_backends import KERNELS, Segments, gather_facts, obstacle
from megatron_chatflow.model.norm import liger_rms_norm
from megatron_chatflow.native.cuda_kernels import load_kernels
from megatron_chatflow.native.rms_norm import rms_norm
from megatron_chatflow.native.rope import rope, rope_reference
from megatron_chatflow.native.softmax import (
    softmax_gradient_,
    softmax_gradient_reference,
    softmax_statistics,
    softmax_statistics_reference,
)
from megatron_chatflow.native.swiglu import swiglu
from megatron_chatflow.runtime.timing import call_seconds
from megatron_chatflow.train import benchmark_foreign as foreign
from megatron_chatflow.train.benchmark_shape import SHAPES

Case = tuple[str, str, Callable[..., Any], tuple[torch.Tensor, ...], int]
"""Operation, implementation, function, inputs, bytes that have to move (0 if that says little)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be chosen."""
    parser.add_argument("--preset", choices=list(SHAPES), default="7b", help="widths to measure")
    parser.add_argument("--num-tokens", type=int, default=8192, help="rows of each operation")
    parser.add_argument("--num-rounds", type=int, default=20, help="measured calls")


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measures; see the module."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shape = SHAPES[arguments.preset]
    tokens: int = arguments.num_tokens
    cases = [*_norm(shape.hidden_size, tokens, device), *_swiglu(shape, tokens, device)]
    cases += [*_rope(shape, tokens, device), *_softmax(shape.vocab_size, tokens, device)]
    cases += _attention(shape, tokens, device)
    return [_row(case, arguments.num_rounds, device) for case in cases]


def _has_ours(device: torch.device) -> bool:
    return device.type != "cuda" or load_kernels()[0] is not None


def _has(module: str, device: torch.device) -> bool:
    """Whether a library's kernels can be measured; they are a GPU's."""
    return device.type == "cuda" and foreign.can_import(module)


def _randn(*size: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*size, device=device, dtype=torch.bfloat16).requires_grad_()


def _norm(hidden: int, tokens: int, device: torch.device) -> Iterator[Case]:
    inputs = _randn(tokens, hidden, device=device), _randn(hidden, device=device)
    # Forward reads x and writes y; backward reads x and its gradient and writes one.
    size = 5 * 2 * tokens * hidden
    yield "norm", "torch", lambda x, w: functional.rms_norm(x, (hidden,), w, 1e-5), inputs, size
    if _has_ours(device):
        yield "norm", "ours", lambda x, w: rms_norm(x, w, 1e-5)[0], inputs, size
    if _has("liger_kernel.ops.rms_norm", device):
        yield "norm", "liger", lambda x, w: liger_rms_norm(x, w, 1e-5), inputs, size
    if _has("transformer_engine.pytorch", device):
        module = foreign.transformer_engine_rms_norm(hidden, torch.bfloat16)
        its_own = inputs[0], module.weight
        yield "norm", "transformer_engine", lambda x, w: module(x), its_own, size


def _swiglu(shape: Any, tokens: int, device: torch.device) -> Iterator[Case]:
    inputs = (_randn(tokens, 2 * shape.ffn_hidden_size, device=device),)
    size = 8 * 2 * tokens * shape.ffn_hidden_size

    def composed(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up

    yield "SwiGLU", "torch", composed, inputs, size
    if _has_ours(device):
        yield "SwiGLU", "ours", swiglu, inputs, size
    if _has("liger_kernel.ops.swiglu", device):
        halves = tuple(_randn(tokens, shape.ffn_hidden_size, device=device) for _ in range(2))
        yield "SwiGLU", "liger", foreign.liger_swiglu, halves, size
    if _has("transformer_engine.pytorch.ops", device):
        yield "SwiGLU", "transformer_engine", foreign.transformer_engine_swiglu(), inputs, size


def _rope(shape: Any, tokens: int, device: torch.device) -> Iterator[Case]:
    head_dim = shape.hidden_size // shape.num_attention_heads
    angles = torch.rand(tokens, 1, head_dim // 2, device=device)
    tables = angles.cos().bfloat16(), angles.sin().bfloat16()
    inputs = (_randn(tokens, shape.num_attention_heads, head_dim, device=device),)
    size = 4 * 2 * tokens * shape.hidden_size
    yield "RoPE", "torch", lambda x: rope_reference(x, *tables, 1.0), inputs, size
    if _has_ours(device):
        yield "RoPE", "ours", lambda x: rope(x, *tables, 1.0), inputs, size
    if _has("liger_kernel.ops.rope", device):
        key = _randn(tokens, 1, head_dim, device=device)
        yield "RoPE", "liger", lambda x: foreign.liger_rope(x, key, *tables), inputs, size
    if _has("transformer_engine.pytorch.attention.rope", device):
        function = foreign.transformer_engine_rope
        yield "RoPE", "transformer_engine", lambda x: function(x, angles), inputs, size


def _softmax(vocab_size: int, tokens: int, device: torch.device) -> Iterator[Case]:
    logits = torch.randn(min(tokens, 2048), vocab_size, device=device, dtype=torch.bfloat16)
    labels = torch.randint(0, vocab_size, logits.shape[:1], device=device)

    def passes(statistics_of: Any, gradient_of: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def both(values: torch.Tensor) -> torch.Tensor:
            top, sums, target = statistics_of(values, labels, vocab_size)
            gradient_of(values, labels, top, sums, torch.ones_like(sums), vocab_size)
            return top + sums.log() - target  # type: ignore[no-any-return]

        return both

    size = 3 * logits.nbytes
    composed = passes(softmax_statistics_reference, softmax_gradient_reference)
    yield "loss passes", "torch", composed, (logits,), size
    if _has_ours(device):
        yield "loss passes", "ours", passes(softmax_statistics, softmax_gradient_), (logits,), size
    logits = logits.clone().requires_grad_()
    for name, module, function in (
        ("liger", "liger_kernel.ops.cross_entropy", foreign.liger_cross_entropy),
        (
            "transformer_engine",
            "transformer_engine.pytorch.cross_entropy",
            foreign.transformer_engine_cross_entropy,
        ),
    ):
        if _has(module, device):
            loss = functools.partial(function, labels=labels)
            yield "loss passes", name, loss, (logits,), size


def _attention(shape: Any, tokens: int, device: torch.device) -> Iterator[Case]:
    head_dim = shape.hidden_size // shape.num_attention_heads
    heads = (shape.num_attention_heads, shape.num_query_groups, shape.num_query_groups)
    inputs = tuple(_randn(tokens, number, head_dim, device=device) for number in heads)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    segments = Segments(ends, ends, tokens, tokens)
    facts = gather_facts(device, torch.bfloat16, head_dim, deterministic=False)

    def by_torch(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors)
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )

    yield "attention", "torch", by_torch, inputs, 0
    for name in attention_backends.BACKENDS:
        if name in KERNELS and obstacle(name, facts) is None:
            kernel = KERNELS[name]
            yield (
                "attention",
                name,
                lambda *t, kernel=kernel: kernel(*t, segments, None, False),
                inputs,
                0,
            )


def _row(case: Case, num_rounds: int, device: torch.device) -> Row:
    operation, implementation, function, inputs, size = case
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradient = torch.ones_like(function(*inputs)) if wanted else None

    def forward_and_backward() -> None:
        output = function(*inputs)
        if wanted:
            torch.autograd.grad(output, wanted, gradient)

    median = statistics.median(call_seconds(forward_and_backward, device, num_rounds))
    return {
        "operation": operation,
        "implementation": implementation,
        "microseconds": 1e6 * median,
        "gigabytes_per_second": size / median / 1e9 if size else None,
    }
