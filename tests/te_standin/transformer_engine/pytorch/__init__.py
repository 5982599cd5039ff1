"""Stand-in for ``transformer_engine.pytorch``."""

from transformer_engine.pytorch import distributed, fp8, module, ops, optimizers, tensor
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.module import LayerNormLinear, Linear, RMSNorm


class LayerNorm:
    """Not used by LLaMA."""


class GroupedLinear:
    """Not used by dense models; megatron-core derives a class from it."""


class Fp8Padding:
    """Not used by dense models."""


class Fp8Unpadding:
    """Not used by dense models."""


__all__ = [
    "DotProductAttention",
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "fp8_autocast",
    "fp8_model_init",
    "module",
    "ops",
    "optimizers",
    "tensor",
]
