"""SwiGLU as megatron-core's MLP calls it, by a fused kernel where there is one.

In: ``[..., gate | linear]``. Out: ``silu(gate) * linear``. Shazeer, "GLU Variants Improve
Transformer", 2020.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.mlp import MLP
from torch.nn.functional import silu

from megatron_chatflow.model.foreign_kernels import liger_swiglu, transformer_engine_swiglu
from megatron_chatflow.native import cpu_kernels
from megatron_chatflow.native.swiglu import swiglu


def _by_megatron(rows: torch.Tensor) -> torch.Tensor:
    """Its own formula, fused by torch's compiler."""
    activated: torch.Tensor = bias_swiglu_impl(rows, None)
    return activated


def _composed(rows: torch.Tensor) -> torch.Tensor:
    gate, linear = rows.chunk(2, dim=-1)
    return silu(gate) * linear


Activation = Callable[[torch.Tensor], torch.Tensor]
"""Of ``[..., gate | linear]``; half as wide."""

ACTIVATIONS: dict[str, Callable[[], Activation]] = {
    "ours": lambda: swiglu,
    "liger": lambda: liger_swiglu,
    "transformer_engine": transformer_engine_swiglu,
    "megatron": lambda: _by_megatron,
    "torch": lambda: _composed,
}
"""Makes SwiGLU, by implementation."""


class _FusedSwiGLU(torch.autograd.Function):
    """The CPU's bf16 kernel; its backward pass computes the sigmoid anew from what came in."""

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

    def take(self, implementation: str) -> None:
        """Activates by another implementation from now on; a CPU takes its own in bf16."""
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
