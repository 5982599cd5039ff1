"""RMSNorm as megatron-core's layer spec expects a norm.

In: hidden states ``[tokens, batch, hidden]``. Out: the same shape and dtype. Zhang and Sennrich,
"Root Mean Square Layer Normalization", 2019. torch's own module does not carry the marks by which
megatron-core finds the weights whose gradients sequence parallelism leaves in parts.

RMSNorm with and without a residual: reference, operators, CUDA kernels.

In: ``[..., hidden]`` in bf16 or fp32. Out: the same shape and dtype. Zhang and Sennrich, "Root Mean
Square Layer Normalization", 2019. Everything between a load and a store is fp32. The operators
are ``torch.ops.megatron_chatflow.rms_norm`` and ``add_rms_norm``; on a GPU they run
``csrc/kernels/rms_norm.cuh``, elsewhere the reference.
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
    """Whether the kernels take rows of ``hidden`` elements."""
    return is_whole_packs(hidden, dtype) and hidden * dtype.itemsize <= MAX_ROW_BYTES


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x^2) + epsilon) * weight``, the formula written out.

    Returns:
        The norm in x's dtype, and float32[...] of ``1 / sqrt(mean(x^2) + epsilon)``.
    """
    values = x.float()
    rstd = torch.rsqrt(values.square().mean(-1) + epsilon)
    return (values * rstd.unsqueeze(-1) * weight.float()).to(x.dtype), rstd


def rms_norm_backward_reference(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients by x and weight; ``grad_sum`` is what reached x past the norm."""
    unit = x.float() * rstd.unsqueeze(-1)
    gradient = grad_y.float() * weight.float()
    grad_x = rstd.unsqueeze(-1) * (gradient - unit * (gradient * unit).mean(-1, keepdim=True))
    if grad_sum is not None:
        grad_x += grad_sum
    grad_weight = (grad_y.float() * unit).flatten(0, -2).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@torch.library.custom_op("megatron_chatflow::rms_norm", mutates_args=())
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of `rms_norm_reference`, with its gradient."""
    return rms_norm_reference(x, weight, epsilon)


@torch.library.custom_op("megatron_chatflow::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norm of ``x + residual``, that sum, and the factor; the sum is rounded before."""
    total = x + residual
    y, rstd = rms_norm_reference(total, weight, epsilon)
    return y, total, rstd


@torch.library.custom_op("megatron_chatflow::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of `rms_norm_backward_reference`."""
    return rms_norm_backward_reference(grad_y, grad_sum, x, weight, rstd)


@rms_norm.register_kernel("cuda")
def rms_norm_kernel(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` by the compiled kernel."""
    y, _, rstd = _forward(x, None, weight, epsilon)
    return y, rstd


@add_rms_norm.register_kernel("cuda")
def add_rms_norm_kernel(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_rms_norm` by the compiled kernel."""
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: the residual is {tuple(residual.shape)} of {residual.dtype}, the input "
            f"{tuple(x.shape)} of {x.dtype}"
        )
    return _forward(x, residual.contiguous(), weight, epsilon)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_weight(x, weight)
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if rstd.numel():
        kernels().launch(
            "rms_norm_forward",
            x.dtype,
            *(x, residual, weight.contiguous(), y, total, rstd, rstd.numel(), x.shape[-1], epsilon),
        )
    return y, total, rstd


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
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm_backward` by the compiled kernels."""
    _check_weight(x, weight)
    num_rows, hidden = rstd.numel(), x.shape[-1]
    if not num_rows:
        return torch.empty_like(x), torch.zeros_like(weight)
    grad_y, x = grad_y.contiguous(), x.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    grad_x = torch.empty_like(x)
    grad_weight = torch.empty_like(weight)
    num_partials = min(_num_blocks(x.device), num_rows)
    partials = torch.empty(num_partials, hidden, dtype=torch.float32, device=x.device)
    kernels().launch(
        "rms_norm_backward",
        x.dtype,
        *(grad_y, grad_sum, x, weight.contiguous(), rstd.contiguous(), grad_x, partials),
        *(grad_weight, num_rows, hidden, num_partials),
    )
    return grad_x, grad_weight


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@add_rms_norm.register_fake
def _(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


@rms_norm_backward.register_fake
def _(
    grad_y: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *_, weight, _epsilon = inputs
    *_, rstd = output
    # What was normalised: the input, or the sum, which is the operator's second result.
    normalised = inputs[0] if len(output) == 2 else output[1]
    ctx.save_for_backward(normalised, weight, rstd)
    ctx.mark_non_differentiable(rstd)


def _rms_norm_gradient(ctx: Any, grad_y: torch.Tensor, _rstd: Any) -> tuple[Any, ...]:
    x, weight, rstd = ctx.saved_tensors
    return (*rms_norm_backward(grad_y, None, x, weight, rstd), None)


def _add_rms_norm_gradient(
    ctx: Any, grad_y: torch.Tensor, grad_sum: torch.Tensor, _rstd: Any
) -> tuple[Any, ...]:
    total, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = rms_norm_backward(grad_y, grad_sum, total, weight, rstd)
    return grad_x, grad_x, grad_weight, None


rms_norm.register_autograd(_rms_norm_gradient, setup_context=_keep)
add_rms_norm.register_autograd(_add_rms_norm_gradient, setup_context=_keep)


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
