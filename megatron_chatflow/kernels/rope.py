"""Rotary position embedding: reference, operator with gradient, and CUDA kernel.

Su et al., "RoFormer", 2021, equation 34; the two halves of a head are the real and imaginary parts.
Inputs are ``[tokens, heads, head_dim]`` in bf16 or fp32, and each token's cosines and sines,
``[tokens, 1, head_dim / 2]``, of the same dtype. The operator is
``torch.ops.megatron_chatflow.rope``; on a GPU it runs ``csrc/kernels/rope.cuh``.
"""

from typing import Any

import torch

from megatron_chatflow.kernels.cuda import is_whole_packs, kernels


def supports_rope_width(head_dim: int, dtype: torch.dtype) -> bool:
    """Returns whether the kernel supports heads of ``head_dim`` elements."""
    return head_dim % 2 == 0 and is_whole_packs(head_dim // 2, dtype)


def supports_rope(heads: torch.Tensor) -> bool:
    """Returns whether the kernel supports the memory layout of these heads."""
    token_stride, head_stride, stride = heads.stride()
    return (
        stride == 1
        and heads.data_ptr() % 16 == 0
        and supports_rope_width(heads.shape[-1], heads.dtype)
        and token_stride * heads.element_size() % 16 == 0
        and head_stride * heads.element_size() % 16 == 0
    )


def rope_reference(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: float
) -> torch.Tensor:
    """Rotates every pair by its angle (direction 1) or back (-1) in fp32, rounding once."""
    real, imaginary = heads.float().chunk(2, dim=-1)
    c, s = cosines.float(), sines.float() * direction
    turned = torch.cat((real * c - imaginary * s, imaginary * c + real * s), dim=-1)
    return turned.to(heads.dtype)


@torch.library.custom_op("megatron_chatflow::rope", mutates_args=())
def rope(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: float
) -> torch.Tensor:
    """The operator of `rope_reference`; its gradient rotates back."""
    return rope_reference(heads, cosines, sines, direction)


@rope.register_kernel("cuda")
def rope_kernel(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: float
) -> torch.Tensor:
    """The CUDA implementation of `rope`."""
    num_tokens, num_heads, head_dim = heads.shape
    for table in (cosines, sines):
        if table.numel() * 2 != num_tokens * head_dim or table.dtype != heads.dtype:
            raise ValueError(
                f"rope: a table of {tuple(table.shape)} in {table.dtype} does not fit heads of "
                f"{tuple(heads.shape)} in {heads.dtype}"
            )
    if not supports_rope(heads):
        heads = heads.contiguous()
    turned = torch.empty((num_tokens, num_heads, head_dim), dtype=heads.dtype, device=heads.device)
    if turned.numel():
        kernels().launch(
            "rope",
            heads.dtype,
            *(heads, cosines.contiguous(), sines.contiguous(), turned),
            *(num_tokens, num_heads, head_dim, heads.stride(0), heads.stride(1), direction),
        )
    return turned


@rope.register_fake
def _(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: float
) -> torch.Tensor:
    return heads.new_empty(heads.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cosines, sines, ctx.direction = inputs
    ctx.save_for_backward(cosines, sines)


def _gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    cosines, sines = ctx.saved_tensors
    return rope(gradient, cosines, sines, -ctx.direction), None, None, None


rope.register_autograd(_gradient, setup_context=_keep)
