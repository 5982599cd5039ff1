"""The MLP of local layers: megatron-core's, on CPUs in bf16 with the kernel of `kernels.cpu`.

Shazeer, "GLU Variants Improve Transformer", 2020: ``silu(gate) * up`` of rows ``[..., gate | up]``.
On GPUs torch's compiler fuses megatron-core's SwiGLU.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch.nn.functional import silu

from megatron_chatflow.kernels import cpu as cpu_kernels


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
    """megatron-core's MLP with a fused activation on CPUs.

    Args:
        config: megatron-core's ``TransformerConfig``.
        _: What a layer passes to every MLP, of which a dense one needs nothing.
    """

    def __init__(self, config: Any, **_: Any) -> None:
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, *arguments: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps ``[tokens, batch, hidden]`` to the same shape; megatron-core's arguments."""
        output: tuple[torch.Tensor, torch.Tensor | None]
        if hidden_states.is_cuda:
            output = super().forward(hidden_states, *arguments, **options)
            return output
        rows, _bias = self.linear_fc1(hidden_states)
        if cpu_kernels.is_available(rows):
            activated: torch.Tensor = _FusedSwiGLU.apply(rows)  # type: ignore[no-untyped-call]
        else:
            gate, up = rows.chunk(2, dim=-1)
            activated = silu(gate) * up
        output = self.linear_fc2(activated)
        return output
