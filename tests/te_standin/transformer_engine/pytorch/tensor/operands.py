"""Matrices in FP8 and their products.

What transformer-engine computes in one kernel is one operator, so that a simulated GPU counts one.

A matrix is stored twice, because a product reads its factors along the axis that it sums over: by
rows in the forward pass, and by columns for gradients. With one scale for all values, the second
copy is the transposed first one; here, copies by columns are in the order of rows as well.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.flop_counter import register_flop_formula

KINDS = (torch.float8_e4m3fn, torch.float8_e5m2)
BLOCK = 32  # consecutive values with a scale of their own in MXFP8


class Operand(NamedTuple):
    """One copy of a matrix.

    Attributes:
        data: uint8[rows, columns], the values.
        scale: float32[1], by which all values were multiplied; or uint8, with exponents of the
            factors of blocks, 127 for 1: [rows, columns / 32], or [rows / 32, columns] for a copy
            by columns.
        kind: Position of the values' type in `KINDS`.
    """

    data: torch.Tensor
    scale: torch.Tensor
    kind: int

    @property
    def has_blocks(self):
        return self.scale.dtype == torch.uint8

    def transposed(self):
        return self._replace(data=self.data.clone())

    def gathered(self, group):
        return self._replace(
            data=gather(self.data, group),
            scale=gather(self.scale, group) if self.has_blocks else self.scale,
        )


def gather(rows, group):
    whole = rows.new_empty(rows.shape[0] * group.size(), *rows.shape[1:])
    dist.all_gather_into_tensor(whole, rows.contiguous(), group=group)
    return whole


def dequantize(data, scale, kind, dtype):
    values = data.view(KINDS[kind]).float()
    if scale.dtype != torch.uint8:
        return (values / scale).to(dtype)
    factors = torch.exp2(scale.float() - 127)
    axis = 1 if factors.shape[0] == data.shape[0] else 0
    return (values * factors.repeat_interleave(BLOCK, axis)).to(dtype)


def _in_blocks(x, kind, axis):
    largest = x.abs().amax(axis, keepdim=True) / torch.finfo(KINDS[kind]).max
    mantissa, exponent = torch.frexp(largest)
    exponent = torch.where(mantissa > 0.5, exponent, exponent - 1).clamp(-127, 127)
    data = (x * torch.exp2(-exponent.float())).to(KINDS[kind]).view(torch.uint8)
    return data, (exponent + 127).to(torch.uint8).squeeze(axis)


@torch.library.custom_op("te_standin::quantize_blocks", mutates_args=())
def quantize_blocks(
    x: torch.Tensor, kind: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns values and exponents of the copy by rows, and those of the copy by columns."""
    values, (rows, columns) = x.float(), x.shape
    data, exponents = _in_blocks(values.view(rows, columns // BLOCK, BLOCK), kind, 2)
    data_2, exponents_2 = _in_blocks(values.view(rows // BLOCK, BLOCK, columns), kind, 1)
    return data.view(rows, columns), exponents, data_2.view(rows, columns), exponents_2


@torch.library.custom_op("te_standin::quantize", mutates_args=())
def quantize_at_once(
    x: torch.Tensor, largest: torch.Tensor, kind: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the copy by rows, that by columns, and their scale."""
    scale = torch.finfo(KINDS[kind]).max / largest.clamp(min=1e-12)
    data = (x.float() * scale).to(KINDS[kind]).view(torch.uint8)
    return data, data.clone(), scale


@torch.library.custom_op("te_standin::largest", mutates_args=())
def largest_of(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax().float().view(1)


def quantize(x, recipe, kind, group=None):
    """Returns both copies of a matrix; those of a ``group``'s ranks share a scale if they have one.

    transformer-engine takes the scales of the delayed recipe from earlier iterations, and those of
    the blockwise recipe from blocks. Here they are computed as with the tensorwise recipe.
    """
    x = x.contiguous()
    if recipe.has_blocks:
        rows, row_scale, columns, column_scale = quantize_blocks(x, kind)
        return Operand(rows, row_scale, kind), Operand(columns, column_scale, kind)
    largest = largest_of(x)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    rows, columns, scale = quantize_at_once(x, largest, kind)
    return Operand(rows, scale, kind), Operand(columns, scale, kind)


@torch.library.custom_op("te_standin::product", mutates_args=())
def _product(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_kind: int,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_kind: int,
    layout: str,
) -> torch.Tensor:
    a = dequantize(a, a_scale, a_kind, torch.bfloat16)
    b = dequantize(b, b_scale, b_kind, torch.bfloat16)
    return (a.t() if layout[0] == "t" else a) @ (b.t() if layout[1] == "t" else b)


@torch.library.custom_op("te_standin::accumulate_product", mutates_args=("total",))
def _accumulate_product(
    total: torch.Tensor,
    a: torch.Tensor,
    a_scale: torch.Tensor,
    a_kind: int,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_kind: int,
) -> None:
    total.add_(_product(a, a_scale, a_kind, b, b_scale, b_kind, "tn"))


def product(a, b, layout):
    """Returns a product in bf16; a letter of ``layout`` says whether a factor is transposed."""
    return _product(*a, *b, layout)


def accumulate_product(total, a, b):
    """Adds the product of a transposed matrix and another to ``total``."""
    _accumulate_product(total, *a, *b)


@quantize_blocks.register_fake
def _(x, kind):
    rows, columns = x.shape
    shapes = (rows, columns), (rows, columns // BLOCK), (rows, columns), (rows // BLOCK, columns)
    return tuple(x.new_empty(shape, dtype=torch.uint8) for shape in shapes)


@quantize_at_once.register_fake
def _(x, largest, kind):
    data, copy = (torch.empty_like(x, dtype=torch.uint8) for _ in range(2))
    return data, copy, torch.empty_like(largest)


@largest_of.register_fake
def _(x):
    return x.new_empty(1, dtype=torch.float32)


@_product.register_fake
def _(a, a_scale, a_kind, b, b_scale, b_kind, layout):
    shape = a.shape[layout[0] == "t"], b.shape[layout[1] == "n"]
    return a.new_empty(shape, dtype=torch.bfloat16)


@_accumulate_product.register_fake
def _(total, a, a_scale, a_kind, b, b_scale, b_kind):
    return None


@register_flop_formula(torch.ops.te_standin.product)
def _(a, a_scale, a_kind, b, b_scale, b_kind, layout, *_, **__):
    return 2 * a[0] * a[1] * b[layout[1] == "n"]


@register_flop_formula(torch.ops.te_standin.accumulate_product)
def _(total, a, a_scale, a_kind, b, *_, **__):
    return 2 * a[0] * a[1] * b[1]
