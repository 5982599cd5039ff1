"""What attention must know of a micro-batch: where its documents begin, and the rotary angles.

In: the cumulative document lengths that the loader puts beside the tokens. Out: `PackedTokens`,
which megatron-core hands unchanged to every layer. Every micro-batch is one row of
``micro_batch_size * seq_length`` packed tokens (megatron-core's ``thd`` format), so that samples
with and without document boundaries run through the same code, and nothing ever builds a dense
mask.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_chatflow.model.context import ContextShard, shard_context, spans_of_documents
from megatron_chatflow.model.rotary import Rotary, RotaryTable, rotary_table, table_dtype
from megatron_chatflow.runtime.transfer import to_device


@dataclass
class PackedTokens(PackedSeqParams):  # type: ignore[misc]
    """megatron-core's packed-sequence parameters, with what is computed once a micro-batch.

    Attributes:
        runs: ``(start, num_documents, length)`` of each run of documents of equal length, as
            Python integers, so that no layer waits for the device to read them.
        rotary: Angles of this rank's tokens.
        shard: Which tokens this context-parallel rank holds.
        pieces: Under context parallelism, the parts of documents that they make up; the cumulative
            lengths are then those of the pieces' queries and of the keys that each piece sees.
    """

    runs: tuple[tuple[int, int, int], ...] = ()
    rotary: RotaryTable | None = None
    shard: ContextShard | None = None
    pieces: tuple[tuple[int, int, int], ...] = ()


def equal_length_runs(cu_seqlens: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Groups neighbours of equal length: ``(start, num_documents, length)`` of each group.

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
    """Each token's position in its own document, int64[tokens], from int32[num_documents + 1]."""
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens.diff().long()
    return torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(starts, lengths)


def _cumulative(lengths: list[int]) -> tuple[torch.Tensor, int]:
    """int32[num + 1] of begins and the end, and the greatest length."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(torch.int32), max(lengths)


def pack_tokens(
    cu_seqlens: torch.Tensor,
    shard: ContextShard | None = None,
    *,
    rotary: Rotary,
    dtype: torch.dtype,
    device: torch.device,
) -> PackedTokens:
    """Prepares a micro-batch for attention.

    Args:
        cu_seqlens: int32[num_documents + 1] on the CPU, over the flattened micro-batch.
        shard: Which of its tokens this rank holds; all of them if None.
        rotary: How positions become angles.
        dtype: The model's activations.
        device: Where the model runs.
    """
    boundaries = cu_seqlens.tolist()
    shard = shard or shard_context(boundaries[-1], rank=0, size=1, group=None)
    runs = equal_length_runs(boundaries)
    positions = to_device(shard.take(document_positions(cu_seqlens)), device)
    table = rotary_table(positions, rotary, table_dtype(dtype, device))
    pieces = () if shard.is_whole else spans_of_documents(boundaries, shard)
    if pieces:
        cu_queries, longest_queries = _cumulative([last - first for _, first, last in pieces])
        cu_keys, longest_keys = _cumulative([last - start for start, _, last in pieces])
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
        pieces=pieces,
    )
