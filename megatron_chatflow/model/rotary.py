"""Rotary position embedding over packed tokens.

In: queries and keys ``[tokens, heads, head_dim]`` and the position of each token in its own
document. Out: the same, rotated. Su et al., "RoFormer", 2021, equation 34, with LLaMA's layout: the
two halves of a head are the real and imaginary parts. The angles of a micro-batch are computed
once, not once a layer.
"""

from typing import Any

import torch


def inverse_frequencies(head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Angles per position, ``base^(-2i/head_dim)`` for i below head_dim/2: float32[head_dim/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / (base**exponents)


def rotary_table(
    positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every token's angles.

    Args:
        positions: int64[tokens], each token's position in its document.
        head_dim: Size of a head.
        base: The slowest angle's base, 10,000 in LLaMA-2.
        dtype: What the table is rounded to; angles are computed in float32.

    Returns:
        Two ``[tokens, 1, head_dim / 2]`` tensors of ``dtype``.
    """
    frequencies = inverse_frequencies(head_dim, base, positions.device)
    angles = positions.float().unsqueeze(-1) * frequencies
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


class _Rotate(torch.autograd.Function):
    """The rotation, whose backward pass is the rotation by the opposite angle."""

    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotate(heads, cosines, sines, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotate(gradient, cosines, sines, -1.0), None, None


def _rotate(
    heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, direction: float
) -> torch.Tensor:
    real, imaginary = heads.chunk(2, dim=-1)
    rotated = torch.empty_like(heads, memory_format=torch.contiguous_format)
    rotated_real, rotated_imaginary = rotated.chunk(2, dim=-1)
    torch.mul(real, cosines, out=rotated_real)
    rotated_real.addcmul_(imaginary, sines, value=-direction)
    torch.mul(imaginary, cosines, out=rotated_imaginary)
    rotated_imaginary.addcmul_(real, sines, value=direction)
    return rotated


def apply_rotary(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates ``heads`` [tokens, heads, head_dim] by a `rotary_table` of the same dtype."""
    rotated: torch.Tensor = _Rotate.apply(heads, cosines, sines)  # type: ignore[no-untyped-call]
    return rotated
