"""RMSNorm for local layers: torch's, or on CPUs in bf16 the compiled kernel of `kernels.cpu`.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. Unlike torch's module, this one
marks its weight for megatron-core's sequence parallelism.
"""

from typing import Any

import torch
from torch import nn

from megatron_chatflow.kernels import cpu as cpu_kernels


class _FusedRMSNorm(torch.autograd.Function):
    """The CPU kernel for bf16, which saves one fp32 number per token for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        normalized, scales = cpu_kernels.rms_norm(hidden_states, weight, epsilon)
        ctx.save_for_backward(hidden_states, weight, scales)
        return normalized

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_states, weight, scales = ctx.saved_tensors
        grad_hidden, grad_weight = cpu_kernels.rms_norm_backward(
            gradient.contiguous(), hidden_states, weight, scales
        )
        return grad_hidden, grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, with the mean computed in fp32.

    Args:
        config: megatron-core's ``TransformerConfig``.
        hidden_size: Size of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # megatron-core sums gradients of marked weights over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalizes the last axis."""
        if cpu_kernels.is_available(hidden_states, self.weight):
            fused: torch.Tensor = _FusedRMSNorm.apply(  # type: ignore[no-untyped-call]
                hidden_states.contiguous(), self.weight, self.eps
            )
            return fused
        return nn.functional.rms_norm(
            hidden_states, (hidden_states.shape[-1],), self.weight, self.eps
        )
