"""Stand-ins for the recipes of FP8 and FP4."""

from enum import Enum

import torch


class Format(Enum):
    """Types of the operands of the forward pass, and of gradients."""

    E4M3 = (torch.float8_e4m3fn, torch.float8_e4m3fn)
    HYBRID = (torch.float8_e4m3fn, torch.float8_e5m2)


class Recipe:
    columns = 16  # what the columns of an operand must be a multiple of
    has_blocks = False  # whether blocks of 32 values have a scale, not whole operands

    def __init__(self, fp8_format=Format.HYBRID, **settings) -> None:
        self.fp8_format = fp8_format
        vars(self).update(settings)

    @property
    def kinds(self):
        """Positions in `KINDS` of the types of the forward pass, and of gradients."""
        return 0, int(self.fp8_format is Format.HYBRID)


class DelayedScaling(Recipe): ...


class Float8CurrentScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class MXFP8BlockScaling(Recipe):
    columns = 32
    has_blocks = True


class NVFP4BlockScaling(Recipe): ...
