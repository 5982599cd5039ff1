"""Adapters for norm, RoPE, SwiGLU and cross-entropy of liger-kernel and transformer-engine.

All take and return tensors in this package's layout. liger-kernel's RoPE and both cross-entropies
may overwrite their inputs. The cross-entropies are only benchmarked: liger-kernel's rounds each
token's loss to the logits' dtype and makes the host wait for a sum, which rules out losses per
source and a step without synchronization; transformer-engine's does not support padding rows and
holds an fp32 gradient beside the logits.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

IGNORED_LABEL = -100


def can_import(module: str) -> bool:
    """Returns whether a module can be imported."""
    try:
        import_module(module)
    except Exception:  # a library may raise anything while it is imported
        return False
    return True


def transformer_engine_rms_norm(
    epsilon: float,
) -> Callable[[torch.Tensor, nn.Parameter], torch.Tensor]:
    """Returns transformer-engine's norm, which uses the weight it is called with."""
    rms_norm = import_module("transformer_engine.pytorch").RMSNorm
    module: Any = None

    def normalise(x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
        nonlocal module
        if module is None:
            module = rms_norm(len(weight), eps=epsilon, params_dtype=weight.dtype)
        if module.weight is not weight:
            module.weight = weight
        normalised: torch.Tensor = module(x)
        return normalised

    # A function, because the weight of a nested module would be saved twice.
    return normalise


def liger_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Calls liger-kernel's norm without overwriting the input, which the residual needs."""
    function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    # Offset of the weight, which products are fp32, and whether the gradient may overwrite.
    normalised: torch.Tensor = function.apply(x, weight, epsilon, 0.0, "gemma", False)
    return normalised


def transformer_engine_swiglu() -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns transformer-engine's SwiGLU of ``[tokens, gate | up]``."""
    operation = import_module("transformer_engine.pytorch.ops").SwiGLU()
    # A function, because a nested module would appear in the model's state.
    return lambda rows: operation(rows)


def liger_swiglu(rows: torch.Tensor) -> torch.Tensor:
    """Calls liger-kernel's SwiGLU of ``[tokens, gate | up]``; before 0.8 it takes two tensors."""
    module = import_module("liger_kernel.ops.swiglu")
    whole = getattr(module, "LigerFusedGateUpSiLUMulFunction", None)
    activated: torch.Tensor = (
        module.LigerSiLUMulFunction.apply(*rows.chunk(2, dim=-1))
        if whole is None
        else whole.apply(rows)
    )
    return activated


def transformer_engine_rope(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Calls transformer-engine's fused rotation with the angles of each token.

    Args:
        heads: ``[tokens, heads, head_dim]``.
        angles: float32[tokens, 1, 1, head_dim], those of both halves.
    """
    rotate = import_module("transformer_engine.pytorch.attention.rope").apply_rotary_pos_emb
    rotated: torch.Tensor = rotate(heads.unsqueeze(1), angles, tensor_format="sbhd", fused=True)
    return rotated.squeeze(1)


def liger_rope(
    query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls liger-kernel's rotation on copies, because it overwrites contiguous inputs.

    Args:
        query: ``[tokens, heads, head_dim]``.
        key: ``[tokens, groups, head_dim]``.
        cosines: ``[1, tokens, head_dim]``, those of both halves.
        sines: The same.
    """
    function = import_module("liger_kernel.ops.rope").LigerRopeFunction
    # Selective recomputation computes attention again from the same tensors.
    own = (heads.clone() if heads.is_contiguous() else heads for heads in (query, key))
    # [tokens, heads, head_dim] -> [1, heads, tokens, head_dim]
    heads = (tensor.transpose(0, 1).unsqueeze(0) for tensor in own)
    rotated_query, rotated_key = function.apply(*heads, cosines, sines)
    return rotated_query.squeeze(0).transpose(0, 1), rotated_key.squeeze(0).transpose(0, 1)


def transformer_engine_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Calls transformer-engine's cross-entropy; returns float32[tokens]."""
    module = import_module("transformer_engine.pytorch.cross_entropy")
    # No smoothing, no reduction, no group; releases before 2.12 only take positional arguments.
    losses: torch.Tensor = module.parallel_cross_entropy(
        logits.unsqueeze(0), labels.unsqueeze(0), 0.0, False, None, IGNORED_LABEL
    )
    return losses.squeeze(0)


def liger_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Calls liger-kernel's cross-entropy, reduced to a sum: a gradient of 1 saves a pass."""
    function = import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    # No weights, neither penalty on large logits nor smoothing.
    total: torch.Tensor = function.apply(logits, labels, None, IGNORED_LABEL, 0.0, 0.0, "sum")[0]
    return total
