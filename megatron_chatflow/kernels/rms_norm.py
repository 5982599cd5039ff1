"""RMSNorm: reference, operators with gradients, CUDA kernels, and the module for layer specs.

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. Inputs are ``[..., hidden]`` in
bf16 or fp32; everything between a load and a store is fp32. The operator is
``torch.ops.megatron_chatflow.rms_norm``. It runs ``csrc/kernels/rms_norm.cuh`` on a GPU and the
reference elsewhere. `RMSNorm` chooses among it, the kernels of other libraries and, on CPUs in
bf16, the compiled kernel of `kernels.cpu`. Unlike torch's module, it marks its weight for
megatron-core's sequence parallelism.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_chatflow.kernels import cpu as cpu_kernels
from megatron_chatflow.kernels.cuda import is_whole_packs, kernels
from megatron_chatflow.kernels.external import liger_rms_norm, transformer_engine_rms_norm

MAX_ROW_BYTES = 2048 * 16
"""Longest row of the kernels: ``kMaxNormPacks`` packs."""

_BLOCKS_PER_MULTIPROCESSOR = 2


def supports_rms_norm(hidden: int, dtype: torch.dtype) -> bool:
    """Returns whether the kernels support rows of ``hidden`` elements."""
    return is_whole_packs(hidden, dtype) and hidden * dtype.itemsize <= MAX_ROW_BYTES


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes ``x / sqrt(mean(x^2) + epsilon) * weight``.

    Returns:
        The norm in x's dtype, and float32[...] of ``1 / sqrt(mean(x^2) + epsilon)``.
    """
    values = x.float()
    rstd = torch.rsqrt(values.square().mean(-1) + epsilon)
    return (values * rstd.unsqueeze(-1) * weight.float()).to(x.dtype), rstd


def rms_norm_backward_reference(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients with respect to x and weight."""
    unit = x.float() * rstd.unsqueeze(-1)
    gradient = grad_y.float() * weight.float()
    grad_x = rstd.unsqueeze(-1) * (gradient - unit * (gradient * unit).mean(-1, keepdim=True))
    grad_weight = (grad_y.float() * unit).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@torch.library.custom_op("megatron_chatflow::rms_norm", mutates_args=())
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of `rms_norm_reference`, with its gradient."""
    return rms_norm_reference(x, weight, epsilon)


@torch.library.custom_op("megatron_chatflow::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of `rms_norm_backward_reference`."""
    return rms_norm_backward_reference(grad_y, x, weight, rstd)


@rms_norm.register_kernel("cuda")
def rms_norm_kernel(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CUDA implementation of `rms_norm`."""
    _check_weight(x, weight)
    x = x.contiguous()
    y = torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rstd.numel():
        # The kernel could add a residual first, and write the sum; both are left out.
        kernels().launch(
            "rms_norm_forward",
            x.dtype,
            *(x, None, weight.contiguous(), y, x, rstd, rstd.numel(), x.shape[-1], epsilon),
        )
    return y, rstd


def _check_weight(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"rms_norm: the weight is {tuple(weight.shape)} of {weight.dtype}, rows have "
            f"{x.shape[-1]} elements of {x.dtype}"
        )


@functools.cache
def _num_blocks(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return (
        _BLOCKS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    )


@rms_norm_backward.register_kernel("cuda")
def rms_norm_backward_kernel(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CUDA implementation of `rms_norm_backward`."""
    _check_weight(x, weight)
    num_rows, hidden = rstd.numel(), x.shape[-1]
    if not num_rows:
        return torch.empty_like(x), torch.zeros_like(weight)
    grad_y, x = grad_y.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    grad_weight = torch.empty_like(weight)
    num_partials = min(_num_blocks(x.device), num_rows)
    partials = torch.empty(num_partials, hidden, dtype=torch.float32, device=x.device)
    kernels().launch(
        "rms_norm_backward",
        x.dtype,
        *(grad_y, None, x, weight.contiguous(), rstd.contiguous(), grad_x, partials),
        *(grad_weight, num_rows, hidden, num_partials),
    )
    return grad_x, grad_weight


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@rms_norm_backward.register_fake
def _(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_gradient(ctx: Any, grad_y: torch.Tensor, _rstd: Any) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    return (*rms_norm_backward(grad_y, x, weight, rstd), None)


rms_norm.register_autograd(_rms_norm_gradient, setup_context=_keep)


Norm = Callable[[torch.Tensor, nn.Parameter], torch.Tensor]
"""Normalizes ``[..., hidden]`` with a weight ``[hidden]``."""


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
"""Functions that create a norm for an epsilon, by implementation."""


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
        implementation: One of `NORMS`; ignored on CPUs in bf16.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float = 1e-5, implementation: str = "torch"
    ) -> None:
        super().__init__()
        self.eps = eps
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # megatron-core sums gradients of marked weights over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._normalize = NORMS[implementation](eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalizes the last axis."""
        if cpu_kernels.is_available(hidden_states, self.weight):
            fused: torch.Tensor = _FusedRMSNorm.apply(  # type: ignore[no-untyped-call]
                hidden_states.contiguous(), self.weight, self.eps
            )
            return fused
        return self._normalize(hidden_states, self.weight)
