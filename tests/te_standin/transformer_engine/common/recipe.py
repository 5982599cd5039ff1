"""Stand-ins for the recipes of FP8 and FP4.

Their fields have the names, the order and the defaults of transformer-engine's. Like them they
ignore other arguments, of which megatron-core passes ``override_linear_precision``.
"""

from collections.abc import Callable
from enum import Enum
from typing import Literal, NamedTuple

import torch
from pydantic.dataclasses import dataclass


class Format(Enum):
    """Types of the operands of the forward pass, and of gradients."""

    E2M1 = ("e2m1", "e2m1")  # torch has no such type before 2.8, and the stand-in needs none
    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


class MMParams(NamedTuple):
    """Settings of a product."""

    use_split_accumulator: bool = True


class Recipe:
    columns = 16  # what the columns of an operand must be a multiple of
    has_blocks = False  # whether blocks of 32 values have a scale, not whole operands

    @property
    def kinds(self):
        """Positions in `KINDS` of the types of the forward pass, and of gradients."""
        return 0, int(self.fp8_format is Format.HYBRID)


@dataclass
class DelayedScaling(Recipe):
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] | Callable = "max"
    scaling_factor_compute_algo: Callable | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8CurrentScaling(Recipe):
    use_power_2_scales: bool = False
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = MMParams(False)
    fp8_gemm_dgrad: MMParams = MMParams(True)
    fp8_gemm_wgrad: MMParams = MMParams(True)
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class Float8BlockScaling(Recipe):
    use_f32_scales: bool = False
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_gemm_fprop: MMParams = MMParams(True)
    fp8_gemm_dgrad: MMParams = MMParams(True)
    fp8_gemm_wgrad: MMParams = MMParams(True)
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class MXFP8BlockScaling(Recipe):
    columns = 32
    has_blocks = True

    margin: int = 0
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False


@dataclass
class NVFP4BlockScaling(Recipe):
    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False
    fp4_format: Format = Format.E2M1
    fp8_format: Format = Format.E4M3
    fp8_dpa: bool = False
    fp8_mha: bool = False
