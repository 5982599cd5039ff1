"""The engine that draws one segment of a blend: C++ where it is built, else the reference.

In: a `WeightTable`, the segment's first sample, its quotas and counts there. Out: an `Engine`.
`csrc/data/blend.cpp` and `megatron_chatflow.native.blend_reference` draw the same sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.blend_reference import ReferenceEngine
from megatron_chatflow.native.extension import extension
from megatron_chatflow.native.quota_reference import GRID, GRID_BITS, Quota, WeightTable


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
    if extension is None:
        return ReferenceEngine(table, begin, base, counts)
    return native_engine(table, begin, base, counts)


def native_engine(
    table: WeightTable,
    begin: int,
    base: Sequence[int],
    counts: Sequence[int],
    num_leaf_bits: int = -1,
) -> Engine:
    """The engine in C++; see `make_engine`.

    Args:
        table: The weights.
        begin: The segment's first sample.
        base: Quotas at ``begin``.
        counts: Draws of each source before ``begin``.
        num_leaf_bits: Another leaf size than the sequence's own, to test with.
    """
    assert extension is not None
    arguments = (*_arguments(table, begin, base), np.array(counts, np.int64), num_leaf_bits)
    return cast(Engine, extension.BlendEngine(*arguments))


def window_ends(table: WeightTable, begin: int, base: Sequence[int]) -> list[int]:
    """The first sample at which each source's quota reaches its next whole number.

    Args:
        table: The weights.
        begin: The sample from which they govern.
        base: Quotas at ``begin``.

    Returns:
        A sample for each source, `megatron_chatflow.native.quota_reference.NEVER` if there is none.
    """
    if extension is not None:
        ends: list[int] = extension.window_ends(*_arguments(table, begin, base)).tolist()
        return ends
    quota = Quota(table, begin, base)
    return [
        quota.first_at_least(k, ((value >> GRID_BITS) + 1) << GRID_BITS)
        for k, value in enumerate(base)
    ]


def _arguments(table: WeightTable, begin: int, base: Sequence[int]) -> tuple[Any, ...]:
    """A table and quotas as the extension takes them."""
    return (
        table.origin,
        table.samples_per_iteration,
        np.array(table.levels, np.int64),
        np.array(table.pieces, np.int64),
        begin,
        np.array([value >> GRID_BITS for value in base], np.int64),
        np.array([value & (GRID - 1) for value in base], np.int64),
    )
