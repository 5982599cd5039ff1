"""Norm, RoPE, SwiGLU and cross-entropy of liger-kernel and transformer-engine, for the benchmark.

In: tensors in our layout. Out: what their own functions make of them, in our layout. Several of
them overwrite what they are given, so inputs are for timing alone.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

IGNORED_LABEL = -100


def can_import(module: str) -> bool:
    """Whether a library is there and whole."""
    try:
        import_module(module)
    except Exception:  # a library may raise anything while it is imported
        return False
    return True


def transformer_engine_rms_norm(hidden: int, dtype: torch.dtype) -> Any:
    """Its module, with a ``weight`` of its own on the GPU."""
    rms_norm = import_module("transformer_engine.pytorch").RMSNorm
    return rms_norm(hidden, eps=1e-5, params_dtype=dtype)


def transformer_engine_swiglu() -> Callable[[torch.Tensor], torch.Tensor]:
    """Its operation on ``[tokens, gate | linear]``."""
    operation: Callable[[torch.Tensor], torch.Tensor] = import_module(
        "transformer_engine.pytorch.ops"
    ).SwiGLU()
    return operation


def liger_swiglu(gate: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """Its function on two tensors."""
    function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    activated: torch.Tensor = function.apply(gate, linear)
    return activated


def transformer_engine_rope(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Its fused function on one document.

    Args:
        heads: ``[tokens, heads, head_dim]``.
        angles: float32[tokens, 1, head_dim / 2].
    """
    rotate = import_module("transformer_engine.pytorch.attention.rope").apply_rotary_pos_emb
    both_halves = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    ends = torch.tensor([0, len(heads)], dtype=torch.int32, device=heads.device)
    rotated: torch.Tensor = rotate(
        heads, both_halves, tensor_format="thd", fused=True, cu_seqlens=ends
    )
    return rotated


def liger_rope(
    heads: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> torch.Tensor:
    """Its function on queries; keys have to come along.

    Args:
        heads: ``[tokens, heads, head_dim]``.
        key: ``[tokens, groups, head_dim]``.
        cosines: ``[tokens, 1, head_dim / 2]``.
        sines: The same.
    """
    function = import_module("liger_kernel.ops.rope").LigerRopeFunction
    tables = (torch.cat((half, half), dim=-1).transpose(0, 1) for half in (cosines, sines))
    # [tokens, heads, head_dim] -> [1, heads, tokens, head_dim]
    query, key = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (heads, key))
    rotated: torch.Tensor = function.apply(query, key, *tables)[0]
    return rotated.squeeze(0).transpose(0, 1)


def transformer_engine_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Its function; float32[tokens]."""
    module = import_module("transformer_engine.pytorch.cross_entropy")
    # No smoothing, no reduction, no group: releases before 2.12 take arguments by place alone.
    losses: torch.Tensor = module.parallel_cross_entropy(
        logits.unsqueeze(0), labels.unsqueeze(0), 0.0, False, None, IGNORED_LABEL
    )
    return losses.squeeze(0)


def liger_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Its function, the sum: a gradient of 1 spares it a pass."""
    function = import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    # No weights, neither penalty on large logits nor smoothing.
    total: torch.Tensor = function.apply(logits, labels, None, IGNORED_LABEL, 0.0, 0.0, "sum")[0]
    return total
