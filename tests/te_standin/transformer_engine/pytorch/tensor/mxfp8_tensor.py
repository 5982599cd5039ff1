"""Stand-in for FP8 tensors in which 32 consecutive values have a scale."""

from transformer_engine.pytorch.tensor import QuantizedTensor
from transformer_engine.pytorch.tensor.operands import Operand, quantize_blocks


class MXFP8Tensor(QuantizedTensor):
    """Copies by rows and by columns differ, so that one cannot be computed from the other."""

    parts = (
        "_rowwise_data",
        "_rowwise_scale_inv",
        "_columnwise_data",
        "_columnwise_scale_inv",
    )

    @property
    def rows(self):
        return Operand(self._rowwise_data, self._rowwise_scale_inv, 0)

    @property
    def columns(self):
        return Operand(self._columnwise_data, self._columnwise_scale_inv, 0)

    def quantize_(self, tensor, *, noop_flag=None):
        assert noop_flag is None
        found = quantize_blocks(tensor.to(self.dtype).contiguous(), 0)
        for name, tensor in zip(self.parts, found, strict=True):
            getattr(self, name).copy_(tensor)
