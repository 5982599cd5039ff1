"""RMSNorm as megatron-core's layer spec expects a norm.

In: hidden states ``[tokens, batch, hidden]``. Out: the same shape and dtype. Zhang and Sennrich,
"Root Mean Square Layer Normalization", 2019. torch's own module does not carry the marks by which
megatron-core finds the weights whose gradients sequence parallelism leaves in parts.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from megatron_chatflow.native import cpu_kernels
from megatron_chatflow.native.cuda_kernels import load_kernels
from megatron_chatflow.native.rms_norm import rms_norm, takes_rms_norm


def choose_norm(device: torch.device, hidden_size: int, dtype: torch.dtype) -> tuple[str, str]:
    """Which implementation normalises, ``cpu``, ``ours``, ``liger`` or ``torch``, and why."""
    if device.type != "cuda":
        description = cpu_kernels.description() if dtype == torch.bfloat16 else None
        return ("cpu", description) if description else ("torch", "torch's rms_norm: no GPU")
    library, reason = load_kernels()
    if library is not None:
        if takes_rms_norm(hidden_size, dtype):
            return "ours", f"ours, {reason}"
        reason = f"csrc/kernels has none for rows of {hidden_size} in {dtype}"
    if find_spec("liger_kernel") is not None:
        return "liger", f"liger-kernel's: {reason}"
    return "torch", f"torch's rms_norm: {reason}; liger-kernel is not installed"


def liger_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """liger-kernel's, with the input left alone, because the residual still needs it."""
    function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    # Offset of the weight, which products are fp32, and whether the gradient may overwrite.
    normalised: torch.Tensor = function.apply(x, weight, epsilon, 0.0, "gemma", False)
    return normalised


class _FusedRMSNorm(torch.autograd.Function):
    """The CPU's bf16 kernel; keeps one fp32 number a token for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        normalised, scales = cpu_kernels.rms_norm(hidden_states, weight, epsilon)
        ctx.save_for_backward(hidden_states, weight, scales)
        return normalised

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_states, weight, scales = ctx.saved_tensors
        grad_hidden, grad_weight = cpu_kernels.rms_norm_backward(
            gradient.contiguous(), hidden_states, weight, scales
        )
        return grad_hidden, grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, the mean taken in fp32."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        """Makes the weight, ones of ``config.params_dtype``.

        Args:
            config: megatron-core's ``TransformerConfig``.
            hidden_size: Size of the last axis.
            eps: Added to the mean square.
        """
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # megatron-core adds up, over the tensor-parallel group, gradients of weights so marked.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.implementation, _ = choose_norm(self.weight.device, hidden_size, config.params_dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        if cpu_kernels.is_available(hidden_states, self.weight):
            fused: torch.Tensor = _FusedRMSNorm.apply(  # type: ignore[no-untyped-call]
                hidden_states.contiguous(), self.weight, self.eps
            )
            return fused
        if self.implementation == "ours":
            normalised: torch.Tensor = rms_norm(hidden_states, self.weight, self.eps)[0]
            return normalised
        if self.implementation == "liger":
            return liger_rms_norm(hidden_states, self.weight, self.eps)
        return nn.functional.rms_norm(
            hidden_states, (hidden_states.shape[-1],), self.weight, self.eps
        )
