"""Stand-in for FP8 tensors with one scale: E4M3 values that look like a tensor of another dtype."""

import torch
from torch.utils._pytree import tree_map

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class QuantizedTensor(torch.Tensor):
    """Any operator but a copy sees the values in the dtype that the tensor seems to have.

    The gradient of the input is computed with a transposed copy of the values, which has the same
    scale, and which gathering the values does not change.
    """

    @staticmethod
    def __new__(cls, data, scale, dtype, requires_grad=False, transposed=None):
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, dtype=dtype, device=data.device, requires_grad=requires_grad
        )
        self._data, self._scale = data, scale  # uint8, and float32[1]
        self._transposed = transposed  # uint8, in the order of the values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            one = args[0]
            return cls(one._data, one._scale, one.dtype, transposed=one._transposed)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].quantize_(args[1].dequantize() if isinstance(args[1], cls) else args[1])
            return args[0]
        args, kwargs = tree_map(
            lambda one: one.dequantize() if isinstance(one, cls) else one, (args, kwargs or {})
        )
        assert not func._schema.is_mutable, f"{func} would change a copy"
        return func(*args, **kwargs)

    def dequantize(self, *, transposed=False):
        stored = self._transposed if transposed else self._data
        return (stored.view(torch.float8_e4m3fn).float() / self._scale).to(self.dtype)

    def quantize_(self, values):
        self.quantize_range(values.reshape(-1), 0, values.abs().max())
        self.transpose_again()

    def transpose_again(self):
        self._transposed = self._data.clone()

    def quantize_range(self, values, begin, largest):
        """Replaces consecutive values, and the scale by that for the largest of all values."""
        self._scale.copy_(LARGEST / largest.float().clamp(min=1e-12))
        part = self._data.view(-1)[begin : begin + values.numel()]
        exact = values.to(self.dtype).float() * self._scale
        part.copy_(exact.to(torch.float8_e4m3fn).view(torch.uint8))


class Float8Tensor(QuantizedTensor): ...


def quantized(values):
    data = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    result = Float8Tensor(data, torch.ones(1, device=values.device), values.dtype)
    result.quantize_(values)
    return result
