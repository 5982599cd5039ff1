"""SwiGLU as megatron-core's MLP calls it, by a fused kernel where there is one.

In: ``[..., gate | linear]``. Out: ``silu(gate) * linear``. Shazeer, "GLU Variants Improve
Transformer", 2020.
"""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from megatron_chatflow.native import cpu_kernels


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
    """megatron-core's MLP, whose activation is one kernel on a CPU in bf16."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **keys: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps ``[tokens, batch, hidden]`` to the same shape; megatron-core's arguments."""
        if per_token_scale is not None or not cpu_kernels.is_available(hidden_states):
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, per_token_scale, **keys
            )
            return output
        rows, _ = self.linear_fc1(hidden_states)
        activated: torch.Tensor = _FusedSwiGLU.apply(rows)  # type: ignore[no-untyped-call]
        output = self.linear_fc2(activated)
        return output
