"""Context parallelism by gathered keys and values: each rank attends with its part of the queries.

In: a micro-batch's tokens, cut over the context-parallel group. Out: every rank's own tokens, and
keys and values of all. Rank r of n holds chunks r and 2n-1-r of 2n equal chunks, so that causal
attention costs each rank the same (Brandon et al., "Striped Attention", 2023, use the same idea
with stripes). Gathering suits grouped-query attention, whose keys and values are small, and needs
nothing of the backend but all-gather and reduce-scatter.

transformer-engine's kernels serve here as attention on the gathered tensors. Its own exchange of
keys and values is not used: on packed documents its ring wants every document padded to a multiple
of 2n tokens, which would change the batches, and its all-gather refuses packed documents.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ContextShard:
    """This rank's tokens of a micro-batch.

    Attributes:
        spans: ``(begin, end)`` of its chunks in the whole micro-batch, ascending.
        num_tokens: Of the whole micro-batch.
        group: The context-parallel ranks, or None if this one holds all tokens.
    """

    spans: tuple[tuple[int, int], ...]
    num_tokens: int
    group: ProcessGroup | None

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds every token."""
        return self.group is None

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor whose first axis is the micro-batch's tokens."""
        if self.is_whole:
            return tokens
        return torch.cat([tokens[begin:end] for begin, end in self.spans])


def shard_context(
    num_tokens: int, *, rank: int, size: int, group: ProcessGroup | None
) -> ContextShard:
    """Which tokens rank ``rank`` of ``size`` holds.

    Args:
        num_tokens: Of the micro-batch, a multiple of ``2 * size``.
        rank: Context-parallel rank.
        size: Context-parallel size.
        group: The ranks; not used for a size of 1.
    """
    if size == 1:
        return ContextShard(((0, num_tokens),), num_tokens, None)
    chunk = num_tokens // (2 * size)
    numbers = (rank, 2 * size - 1 - rank)
    return ContextShard(tuple((n * chunk, (n + 1) * chunk) for n in numbers), num_tokens, group)


def _in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole micro-batch from every rank's two chunks."""
    first = [part[: len(part) // 2] for part in parts]
    last = [part[len(part) // 2 :] for part in parts]
    return torch.cat([*first, *reversed(last)])


class _Gather(torch.autograd.Function):
    """All ranks' rows in order; the gradient goes back to each row's rank, summed over all."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(group.size())]
        dist.all_gather(parts, rows, group=group)
        return _in_order(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = ctx.group.size()
        chunks = gradient.chunk(2 * size)
        parts = [torch.cat((chunks[r], chunks[2 * size - 1 - r])) for r in range(size)]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter_tensor(own, torch.cat(parts), group=ctx.group)
        return own, None


def gather_context(rows: torch.Tensor, shard: ContextShard) -> torch.Tensor:
    """Keys or values of the whole micro-batch from this rank's, ``[tokens, groups, head_dim]``."""
    if shard.group is None:
        return rows
    whole: torch.Tensor = _Gather.apply(rows, shard.group)  # type: ignore[no-untyped-call]
    return whole


def spans_of_documents(
    cu_seqlens: list[int], shard: ContextShard
) -> tuple[tuple[int, int, int], ...]:
    """The pieces of documents that this rank's queries make up.

    Returns:
        For each piece ``(document's first token, piece's first token, one after its last)``, in the
        order of this rank's tokens; queries of the piece see keys from the first of these to
        themselves.
    """
    pieces = []
    for begin, end in shard.spans:
        for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                pieces.append((start, first, last))
    return tuple(pieces)
