"""Which implementation of attention, norm, RoPE, SwiGLU and loss passes a run takes.

In: the run's configuration and device. Out: `Kernels`. On a GPU they are measured at the run's own
sizes, unless the run has to be the same to the last bit or asks for some; on a CPU, whose kernels
are all ours, there is nothing to choose.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_chatflow.config import TrainConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.model.attention import describe_backend
from megatron_chatflow.model.attention_backends import choose, gather_facts
from megatron_chatflow.model.kernel_choice import Choice, choose_fastest
from megatron_chatflow.model.kernel_operations import (
    StepSizes,
    attention_operation,
    ours_obstacle,
    step_operations,
)
from megatron_chatflow.native import cpu_kernels
from megatron_chatflow.native.cuda_kernels import load_kernels

logger = logging.getLogger(__name__)

_COMPOSED = {
    "norm": "torch's rms_norm",
    "RoPE": "composed in torch, angles once a micro-batch",
    "SwiGLU": "composed in torch",
    "loss passes": "composed in torch, chunked and vocabulary-parallel",
}


@dataclass(frozen=True)
class Kernels:
    """Names of implementations.

    Attributes:
        attention: One of `attention_backends.BACKENDS`.
        norm: One of `norm.NORMS`.
        rope: An ``implementation`` of `apply_rotary`.
        swiglu: One of `swiglu.ACTIVATIONS`.
        loss: An ``implementation`` of `chunk_loss`.
        descriptions: Which each is and why, by operation, for the log.
    """

    attention: str
    norm: str
    rope: str
    swiglu: str
    loss: str
    descriptions: Mapping[str, str]


def choose_kernels(
    sizes: StepSizes, train: TrainConfig, *, sequence_length: int, context_parallel_size: int
) -> Kernels:
    """Chooses for a run; on GPUs all ranks call it together.

    Args:
        sizes: Of one micro-batch on one rank.
        train: What is asked for.
        sequence_length: Tokens of a sample.
        context_parallel_size: Ranks that share one.

    Raises:
        UserError: What is asked for cannot be used.
    """
    facts = gather_facts(
        sizes.device, sizes.dtype, sizes.head_dim, deterministic=train.deterministic_mode
    )
    # A mistake is said before anything is measured.
    backend, reason = choose(facts, train.attention_backend)
    attention = Choice(backend, describe_backend(reason, sizes.device, sizes.dtype))
    if sizes.device.type != "cuda":
        return _kernels(attention, {name: _on_a_cpu(sizes, name) for name in _COMPOSED})
    _refuse_what_is_not_built(train)
    begin = time.perf_counter()
    if train.fused_kernels == "measured" and not train.deterministic_mode:
        operations = step_operations(sizes)
        choices = choose_fastest(operations, sizes.device)
        fused = {o.name: choice for o, choice in zip(operations, choices, strict=True)}
    else:
        fused = {name: _as_asked(sizes, train, name) for name in _COMPOSED}
    # Ranks that share a sample attend to more keys than they have queries, which is not measured.
    is_free = train.attention_backend == "auto" and not train.deterministic_mode
    # In fp32 there is torch's alone, which may need memory for the scores of all pairs of tokens.
    if is_free and context_parallel_size == 1 and sizes.dtype != torch.float32:
        operation = attention_operation(sizes, facts, sequence_length, fused["RoPE"].name)
        (attention,) = choose_fastest([operation], sizes.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(sizes.device)
    logger.info("kernels chosen in %.1f s", time.perf_counter() - begin)
    return _kernels(attention, fused)


def _kernels(attention: Choice, fused: Mapping[str, Choice]) -> Kernels:
    norm, rope = fused["norm"], fused["RoPE"]
    swiglu, loss = fused["SwiGLU"], fused["loss passes"]
    descriptions = {
        "attention": attention.description,
        "norm": norm.description,
        "rotary embedding": rope.description,
        "SwiGLU": swiglu.description,
        "cross-entropy": loss.description,
    }
    return Kernels(attention.name, norm.name, rope.name, swiglu.name, loss.name, descriptions)


def _on_a_cpu(sizes: StepSizes, operation: str) -> Choice:
    """Its own kernels, which the composition takes in bf16."""
    composed = _COMPOSED[operation]
    if operation == "loss passes":
        return Choice("torch", composed)
    fused = cpu_kernels.description() if sizes.dtype == torch.bfloat16 else None
    return Choice("torch", fused or f"{composed}: no GPU")


def _refuse_what_is_not_built(train: TrainConfig) -> None:
    library, reason = load_kernels()
    if train.fused_kernels == "ours" and library is None:
        raise UserError(
            f"train.fused_kernels: ours cannot be used: {reason}; build them, or leave the choice "
            "to measured"
        )


def _as_asked(sizes: StepSizes, train: TrainConfig, operation: str) -> Choice:
    """Without a measurement, which may come out otherwise after a restart."""
    composed = _COMPOSED[operation]
    if train.fused_kernels == "torch":
        return Choice("torch", f"{composed}: --fused-kernels torch")
    obstacle = ours_obstacle(sizes, operation)
    if obstacle is not None:
        return Choice("torch", f"{composed}: {obstacle}")
    why = "--fused-kernels ours" if train.fused_kernels == "ours" else "--deterministic-mode"
    return Choice("ours", f"ours, {load_kernels()[1]}: {why}")
