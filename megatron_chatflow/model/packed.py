"""Packed micro-batches: document boundaries, rotary angles, and context parallelism.

Every micro-batch is one row of ``micro_batch_size * seq_length`` packed tokens (megatron-core's
``thd`` format). Samples with and without document boundaries therefore run the same code, and no
dense mask is built. `pack_tokens` turns the cumulative document lengths of the loader into
`PackedTokens`, which megatron-core passes unchanged to every layer.

Under context parallelism each rank holds some queries and gathers the keys and values of all ranks.
Rank r of n holds chunks r and 2n-1-r of 2n equal chunks, so that causal attention costs the same on
each rank (Brandon et al., "Striped Attention", 2023, use the same idea with stripes). Gathering
suits grouped-query attention, whose keys and values are small, and only needs all-gather and
reduce-scatter. transformer-engine's kernels are used on the gathered tensors, but not its exchange
of keys and values: on packed documents its ring requires every document to be padded to a multiple
of 2n tokens, which would change the batches, and its all-gather does not support packed documents.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed import ProcessGroup

from megatron_chatflow.model.rotary import Rotary, RotaryTable, rotary_table, table_dtype
from megatron_chatflow.runtime.device import to_device


@dataclass(frozen=True)
class ContextShard:
    """The tokens of a micro-batch that this rank holds.

    Attributes:
        token_ranges: ``(begin, end)`` of its chunks in the whole micro-batch, ascending.
        num_tokens: Number of tokens of the whole micro-batch.
        group: The context-parallel group; None if this rank holds all tokens.
    """

    token_ranges: tuple[tuple[int, int], ...]
    num_tokens: int
    group: ProcessGroup | None

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds every token."""
        return self.group is None

    def select(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns this rank's rows of a tensor whose first axis is the micro-batch's tokens."""
        if self.is_whole:
            return tokens
        return torch.cat([tokens[begin:end] for begin, end in self.token_ranges])


def shard_context(
    num_tokens: int, *, rank: int, size: int, group: ProcessGroup | None
) -> ContextShard:
    """Returns the tokens that a context-parallel rank holds.

    Args:
        num_tokens: Number of tokens of the micro-batch, a multiple of ``2 * size``.
        rank: The context-parallel rank.
        size: The context-parallel size.
        group: The context-parallel group; not used for a size of 1.
    """
    if size == 1:
        return ContextShard(((0, num_tokens),), num_tokens, None)
    chunk = num_tokens // (2 * size)
    numbers = (rank, 2 * size - 1 - rank)
    return ContextShard(tuple((n * chunk, (n + 1) * chunk) for n in numbers), num_tokens, group)


def _in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """Returns the whole micro-batch from the two chunks of every rank."""
    first = [part[: len(part) // 2] for part in parts]
    last = [part[len(part) // 2 :] for part in parts]
    return torch.cat([*first, *reversed(last)])


class _Gather(torch.autograd.Function):
    """Gathers the rows of all ranks; the backward pass sums and scatters the gradient."""

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
    """Gathers keys or values of the whole micro-batch, ``[tokens, groups, head_dim]``."""
    if shard.group is None:
        return rows
    whole: torch.Tensor = _Gather.apply(rows, shard.group)  # type: ignore[no-untyped-call]
    return whole


def document_spans(
    cu_seqlens: list[int], shard: ContextShard, window: int | None = None
) -> tuple[tuple[int, int, int], ...]:
    """Returns the spans of documents that this rank's queries belong to.

    Returns:
        ``(first key, span's first token, one after its last)`` for each span, in the order of this
        rank's tokens. The first key is the document's first token or, with a sliding window of
        ``window`` tokens, the first one that the span's first token sees.
    """
    spans = []
    for begin, end in shard.token_ranges:
        for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False):
            first, last = max(start, begin), min(stop, end)
            if first < last:
                seen = start if window is None else max(start, first - window + 1)
                spans.append((seen, first, last))
    return tuple(spans)


@dataclass
class PackedTokens(PackedSeqParams):  # type: ignore[misc]
    """megatron-core's packed-sequence parameters, with values computed once per micro-batch.

    Attributes:
        runs: ``(start, num_documents, length)`` of each run of documents of equal length, as
            Python integers, so that no layer waits for the device to read them.
        rotary: The angles of this rank's tokens.
        shard: The tokens that this context-parallel rank holds.
        spans: Under context parallelism, the spans of documents that this rank's queries belong to;
            the cumulative lengths are then those of the spans' queries and of the keys they see.
    """

    runs: tuple[tuple[int, int, int], ...] = ()
    rotary: RotaryTable | None = None
    shard: ContextShard | None = None
    spans: tuple[tuple[int, int, int], ...] = ()

    def keys_of_spans(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the keys or values that each span attends to, ``[tokens, groups, head_dim]``.

        Two spans of one document both need its first keys, so rows are copied for each span.

        Args:
            rows: Those of the whole micro-batch.
        """
        return torch.cat([rows[start:last] for start, _, last in self.spans])


def equal_length_runs(cu_seqlens: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Groups adjacent documents of equal length into ``(start, num_documents, length)``.

    >>> equal_length_runs([0, 4, 8, 10])
    ((0, 2, 4), (8, 1, 2))
    """
    documents = [
        (start, end - start) for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)
    ]
    runs = []
    for length, group in groupby((d for d in documents if d[1] > 0), key=lambda d: d[1]):
        starts = [start for start, _ in group]
        runs.append((starts[0], len(starts), length))
    return tuple(runs)


def document_positions(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Returns each token's position in its document, int64[tokens]."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    return torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(starts, lengths)


def _cumulative(lengths: list[int]) -> tuple[torch.Tensor, int]:
    """Returns cumulative lengths, int32[num + 1], and the greatest length."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(torch.int32), max(lengths)


def pack_tokens(
    cu_seqlens: torch.Tensor,
    shard: ContextShard | None = None,
    *,
    rotary: Rotary,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> PackedTokens:
    """Prepares a micro-batch for attention.

    Args:
        cu_seqlens: int32[num_documents + 1] on the CPU, over the flattened micro-batch.
        shard: The tokens that this rank holds; all of them if None.
        rotary: The rotary embedding's settings.
        dtype: The dtype of activations.
        device: The model's device.
        window: Number of tokens that a token sees, itself included; None for all before it. Spans
            leave out the keys before it, and attention itself hides them from later queries.
    """
    boundaries = cu_seqlens.tolist()
    shard = shard or shard_context(boundaries[-1], rank=0, size=1, group=None)
    runs = equal_length_runs(boundaries)
    positions = to_device(shard.select(document_positions(cu_seqlens)), device)
    table = rotary_table(positions, rotary, table_dtype(dtype, device))
    spans = () if shard.is_whole else document_spans(boundaries, shard, window)
    if spans:
        cu_queries, longest_queries = _cumulative([last - first for _, first, last in spans])
        cu_keys, longest_keys = _cumulative([last - start for start, _, last in spans])
        cu_queries, cu_keys = to_device(cu_queries, device), to_device(cu_keys, device)
    else:
        cu_queries = cu_keys = to_device(cu_seqlens, device)
        longest_queries = longest_keys = max(length for _, _, length in runs)
    return PackedTokens(
        qkv_format="thd",
        cu_seqlens_q=cu_queries,
        cu_seqlens_kv=cu_keys,
        max_seqlen_q=longest_queries,
        max_seqlen_kv=longest_keys,
        runs=runs,
        rotary=table,
        shard=shard,
        spans=spans,
    )
