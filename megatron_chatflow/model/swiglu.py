"""SwiGLU as megatron-core's MLP calls it, by a fused kernel where there is one.

In: ``[..., gate | linear]``. Out: ``silu(gate) * linear``. Shazeer, "GLU Variants Improve
Transformer", 2020.
"""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP

from megatron_chatflow.native import cpu_kernels
from megatron_chatflow.native.cuda_kernels import load_kernels
from megatron_chatflow.native.swiglu import swiglu, takes_swiglu


def choose_swiglu(device: torch.device, width: int, dtype: torch.dtype) -> tuple[str, str]:
    """Which implementation activates, ``cpu``, ``ours``, ``megatron`` or ``torch``, and why.

    liger-kernel's is none of them: it takes gate and up part as two tensors, which would first be
    copied apart.
    """
    if device.type != "cuda":
        description = cpu_kernels.description() if dtype == torch.bfloat16 else None
        return (
            ("cpu", description) if description else ("torch", "megatron-core's, unfused: no GPU")
        )
    library, reason = load_kernels()
    if library is None:
        return "megatron", f"megatron-core's, fused by torch's compiler: {reason}"
    if not takes_swiglu(width, dtype):
        return "megatron", (
            f"megatron-core's, fused by torch's compiler: csrc/kernels has none for {width} in "
            f"{dtype}"
        )
    return "ours", f"ours, {reason}"


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
    """megatron-core's MLP, whose activation is one kernel where we have one."""

    def forward(
        self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **keys: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps ``[tokens, batch, hidden]`` to the same shape; megatron-core's arguments."""
        is_on_cpu = cpu_kernels.is_available(hidden_states)
        if per_token_scale is not None or not (is_on_cpu or self._has_kernel(hidden_states)):
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states, per_token_scale, **keys
            )
            return output
        rows, _ = self.linear_fc1(hidden_states)
        if is_on_cpu:
            activated: torch.Tensor = _FusedSwiGLU.apply(rows)  # type: ignore[no-untyped-call]
        else:
            activated = swiglu(rows)
        output = self.linear_fc2(activated)
        return output

    def _has_kernel(self, hidden_states: torch.Tensor) -> bool:
        width = self.linear_fc1.output_size_per_partition // 2
        chosen, _ = choose_swiglu(hidden_states.device, width, hidden_states.dtype)
        return chosen == "ours"
