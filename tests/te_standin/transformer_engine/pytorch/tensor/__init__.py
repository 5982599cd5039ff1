"""Stand-ins for FP8 tensors: values in FP8 that look like a tensor of another dtype."""

import torch
from torch.utils._pytree import tree_map

from transformer_engine.pytorch.tensor.operands import (
    Operand,
    dequantize,
    largest_of,
    quantize_at_once,
    quantize_blocks,
)


class QuantizedTensor(torch.Tensor):
    """Any operator but a copy sees the values in the dtype that the tensor seems to have.

    Attributes:
        parts: Names of the tensors that it consists of.
    """

    parts = ()

    @staticmethod
    def __new__(cls, dtype, *tensors):
        self = torch.Tensor._make_wrapper_subclass(
            cls, tensors[0].shape, dtype=dtype, device=tensors[0].device
        )
        for name, tensor in zip(cls.parts, tensors, strict=True):
            setattr(self, name, tensor)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].dtype, *(getattr(args[0], name) for name in cls.parts))
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].quantize_(args[1].dequantize() if isinstance(args[1], cls) else args[1])
            return args[0]
        args, kwargs = tree_map(
            lambda one: one.dequantize() if isinstance(one, cls) else one, (args, kwargs or {})
        )
        assert not func._schema.is_mutable, f"{func} would change a copy"
        return func(*args, **kwargs)

    def __tensor_flatten__(self):
        return list(self.parts), None

    def dequantize(self, *, dtype=None):
        return dequantize(*self.rows, dtype or self.dtype)

    @property
    def rows(self):
        """The copy that forward passes read."""
        raise NotImplementedError

    @property
    def columns(self):
        """The copy with which gradients of the input are computed."""
        raise NotImplementedError

    def quantize_(self, tensor):
        """Replaces the values of both copies."""
        raise NotImplementedError


class Float8Tensor(QuantizedTensor):
    """Values with one scale. Gathering them does not change the transposed copy."""

    parts = ("_data", "_transposed", "_scale")  # uint8 twice, and float32[1]

    @property
    def rows(self):
        return Operand(self._data, self._scale, 0)

    @property
    def columns(self):
        return Operand(self._transposed, self._scale, 0)

    def quantize_(self, tensor, *, noop_flag=None):
        assert noop_flag is None
        values = tensor.to(self.dtype).contiguous()
        found = quantize_at_once(values, largest_of(values), 0)
        for name, tensor in zip(self.parts, found, strict=True):
            getattr(self, name).copy_(tensor)

    def transpose_again(self):
        self._transposed.copy_(self._data)

    def quantize_range(self, values, begin, largest):
        """Replaces consecutive values, and the scale by that for the largest of all values."""
        data, _, scale = quantize_at_once(values.to(self.dtype), largest.view(1), 0)
        self._scale.copy_(scale)
        self._data.view(-1)[begin : begin + values.numel()].copy_(data)


def quantized(values, recipe):
    """Returns the tensor that a recipe makes of a weight."""
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor

    if recipe.has_blocks:
        return MXFP8Tensor(values.dtype, *quantize_blocks(values, 0))
    return Float8Tensor(values.dtype, *quantize_at_once(values, largest_of(values), 0))
