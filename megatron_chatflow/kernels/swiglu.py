"""SwiGLU: reference, operators with gradients, CUDA kernels, and megatron-core's MLP with them.

Shazeer, "GLU Variants Improve Transformer", 2020: ``silu(gate) * up`` of rows ``[..., gate | up]``
in bf16 or fp32, computed in fp32 and rounded once. The operator is
``torch.ops.megatron_chatflow.swiglu``; on a GPU it runs ``csrc/kernels/swiglu.cuh``.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.mlp import MLP
from torch.nn.functional import silu

from megatron_chatflow.kernels import cpu as cpu_kernels
from megatron_chatflow.kernels.cuda import is_whole_packs, kernels
from megatron_chatflow.kernels.external import liger_swiglu, transformer_engine_swiglu


def supports_swiglu(width: int, dtype: torch.dtype) -> bool:
    """Returns whether the kernels support gates of ``width`` elements."""
    return is_whole_packs(width, dtype)


def swiglu_reference(x: torch.Tensor) -> torch.Tensor:
    """Computes ``silu(gate) * up``."""
    gate, up = x.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def swiglu_backward_reference(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns the gradient with respect to x."""
    gate, up = x.float().chunk(2, dim=-1)
    gradient = grad_y.float()
    sigmoid = torch.sigmoid(gate)
    grad_gate = gradient * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((grad_gate, gradient * gate * sigmoid), dim=-1).to(x.dtype)


@torch.library.custom_op("megatron_chatflow::swiglu", mutates_args=())
def swiglu(x: torch.Tensor) -> torch.Tensor:
    """The operator of `swiglu_reference`, with its gradient."""
    return swiglu_reference(x)


@torch.library.custom_op("megatron_chatflow::swiglu_backward", mutates_args=())
def swiglu_backward(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The operator of `swiglu_backward_reference`."""
    return swiglu_backward_reference(grad_y, x)


@swiglu.register_kernel("cuda")
def swiglu_kernel(x: torch.Tensor) -> torch.Tensor:
    """The CUDA implementation of `swiglu`."""
    width = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if y.numel():
        kernels().launch("swiglu_forward", x.dtype, x.contiguous(), y, y.numel() // width, width)
    return y


@swiglu_backward.register_kernel("cuda")
def swiglu_backward_kernel(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The CUDA implementation of `swiglu_backward`."""
    width = x.shape[-1] // 2
    if grad_y.shape != (*x.shape[:-1], width) or grad_y.dtype != x.dtype:
        raise ValueError(
            f"swiglu_backward: a gradient of {tuple(grad_y.shape)} in {grad_y.dtype} does not fit "
            f"an input of {tuple(x.shape)} in {x.dtype}"
        )
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad_x.numel():
        kernels().launch(
            "swiglu_backward",
            x.dtype,
            *(grad_y.contiguous(), x.contiguous(), grad_x, grad_y.numel() // width, width),
        )
    return grad_x


@swiglu.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@swiglu_backward.register_fake
def _(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad_y: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    grad_x: torch.Tensor = swiglu_backward(grad_y, x)
    return grad_x


swiglu.register_autograd(_gradient, setup_context=_keep)


def _by_megatron(rows: torch.Tensor) -> torch.Tensor:
    """megatron-core's function, fused by torch's compiler."""
    activated: torch.Tensor = bias_swiglu_impl(rows, None)
    return activated


def _composed(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return silu(gate) * up


Activation = Callable[[torch.Tensor], torch.Tensor]
"""Maps ``[..., gate | up]`` to rows of half the width."""

ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "ours": lambda: swiglu,
    "liger": lambda: liger_swiglu,
    "transformer_engine": transformer_engine_swiglu,
    "megatron": lambda: _by_megatron,
    "torch": lambda: _composed,
}
"""Functions that create SwiGLU, by implementation."""


class _FusedSwiGLU(torch.autograd.Function):
    """The CPU kernel for bf16; its backward pass recomputes the sigmoid from the input."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return cpu_kernels.swiglu(rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (rows,) = ctx.saved_tensors
        return cpu_kernels.swiglu_backward(gradient.contiguous(), rows)


class SwiGLUMLP(MLP):  # type: ignore[misc]
    """megatron-core's MLP with one of `ACTIVATIONS`."""

    _activate: Activation = staticmethod(_composed)

    def set_activation(self, implementation: str) -> None:
        """Sets the implementation; CPUs in bf16 always use their own kernel."""
        self._activate = ACTIVATIONS[implementation]()

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **keys: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps ``[tokens, batch, hidden]`` to the same shape; megatron-core's arguments."""
        output: tuple[torch.Tensor, torch.Tensor | None]
        if per_token_scale is not None:
            output = super().forward(hidden_states, per_token_scale, **keys)
            return output
        rows, _ = self.linear_fc1(hidden_states)
        if cpu_kernels.is_available(hidden_states):
            activated: torch.Tensor = _FusedSwiGLU.apply(rows)  # type: ignore[no-untyped-call]
        else:
            activated = self._activate(rows)
        output = self.linear_fc2(activated)
        return output
