"""The engine that draws one segment of a blend.

In: a `WeightTable`, the segment's first sample, its quotas and counts there. Out: an `Engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.blend_reference import ReferenceEngine
from megatron_chatflow.native.quota_reference import WeightTable


class Engine(Protocol):
    """Draws of one segment; see `megatron_chatflow.native.blend_reference.ReferenceEngine`."""

    def take(self, begin: int, end: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Sources (int16) and their sample indices (int64) of the samples ``[begin, end)``."""

    def counts(self, sample: int) -> npt.NDArray[np.int64]:
        """Draws of each source before ``sample``, int64[num_sources]."""

    def find(self, source: int, index: int) -> int:
        """The sample that is the source's ``index``-th, or -1 where there is none."""


def make_engine(
    table: WeightTable, begin: int, base: Sequence[int], counts: Sequence[int]
) -> Engine:
    """Builds the engine of a segment.

    Args:
        table: The weights.
        begin: The segment's first sample.
        base: Quotas at ``begin``, in units of 2**-32 samples, offsets included.
        counts: Draws of each source before ``begin``; each ``base`` rounded down or up.
    """
    return ReferenceEngine(table, begin, base, counts)
