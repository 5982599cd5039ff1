"""RMSNorm as megatron-core's layer spec expects a norm.

In: hidden states ``[tokens, batch, hidden]``. Out: the same shape and dtype. Zhang and Sennrich,
"Root Mean Square Layer Normalization", 2019. torch's own module does not carry the marks by which
megatron-core finds the weights whose gradients sequence parallelism leaves in parts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_chatflow.model.foreign_kernels import liger_rms_norm, transformer_engine_rms_norm
from megatron_chatflow.native import cpu_kernels
from megatron_chatflow.native.rms_norm import rms_norm

Norm = Callable[[torch.Tensor, nn.Parameter], torch.Tensor]
"""Of ``[..., hidden]`` and a weight ``[hidden]``; the same shape and dtype."""


def _by_ours(epsilon: float) -> Norm:
    return lambda x, weight: rms_norm(x, weight, epsilon)[0]


def _by_liger(epsilon: float) -> Norm:
    return lambda x, weight: liger_rms_norm(x, weight, epsilon)


def _composed(epsilon: float) -> Norm:
    return lambda x, weight: nn.functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


NORMS: dict[str, Callable[[float], Norm]] = {
    "ours": _by_ours,
    "liger": _by_liger,
    "transformer_engine": transformer_engine_rms_norm,
    "torch": _composed,
}
"""Makes a norm of an epsilon, by implementation."""


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

    def __init__(
        self, config: Any, hidden_size: int, eps: float = 1e-5, implementation: str = "torch"
    ) -> None:
        """Makes the weight, ones of ``config.params_dtype``.

        Args:
            config: megatron-core's ``TransformerConfig``.
            hidden_size: Size of the last axis.
            eps: Added to the mean square.
            implementation: One of `NORMS`; a CPU takes its own in bf16.
        """
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # megatron-core adds up, over the tensor-parallel group, gradients of weights so marked.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._normalise = NORMS[implementation](eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        if cpu_kernels.is_available(hidden_states, self.weight):
            fused: torch.Tensor = _FusedRMSNorm.apply(  # type: ignore[no-untyped-call]
                hidden_states.contiguous(), self.weight, self.eps
            )
            return fused
        return self._normalise(hidden_states, self.weight)
