"""Compares packed causal attention and rotary positions with a dense reference."""

import math

import pytest
import torch

from megatron_chatflow.kernels.attention import Segments
from megatron_chatflow.model import attention
from megatron_chatflow.model.attention import PackedCausalAttention
from megatron_chatflow.model.packed import (
    document_positions,
    document_spans,
    equal_length_runs,
    pack_tokens,
    shard_context,
)
from megatron_chatflow.model.rotary import Rotary, rotary_table
from megatron_chatflow.runtime.ranks import Ranks

WHOLE = shard_context(12, rank=0, size=1, group=None)


class _Settings:
    use_cpu_initialization = True
    params_dtype = torch.float32
    deterministic_mode = False
    window_size: tuple[int, int] | None = None


def _dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: list[int],
    window: int | None = None,
) -> torch.Tensor:
    """Computes a masked softmax over all tokens.

    A token attends to earlier ones of its document, at most ``window`` with itself.
    """
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    document = torch.bucketize(torch.arange(num_tokens), torch.tensor(cu_seqlens[1:]), right=True)
    seen = (document[:, None] == document[None]) & torch.ones(num_tokens, num_tokens).tril().bool()
    if window is not None:
        positions = torch.arange(num_tokens)
        seen &= positions[:, None] - positions < window
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(head_dim)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def _rotate_by_complex_numbers(
    heads: torch.Tensor, positions: torch.Tensor, base: float
) -> torch.Tensor:
    half = heads.shape[-1] // 2
    frequencies = base ** (-torch.arange(half) / half)
    turn = torch.polar(torch.ones(len(positions), half), positions[:, None] * frequencies)
    turned = torch.complex(heads[..., :half], heads[..., half:]) * turn[:, None]
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("cu_seqlens", [[0, 12], [0, 4, 8, 12], [0, 1, 5, 6, 12]])
@pytest.mark.parametrize("num_groups", [4, 2, 1])
def test_attention_equals_the_dense_reference(
    single_rank: Ranks, cu_seqlens: list[int], num_groups: int
) -> None:
    torch.manual_seed(0)
    query = torch.randn(12, 4, 8, requires_grad=True)
    key = torch.randn(12, num_groups, 8, requires_grad=True)
    value = torch.randn(12, num_groups, 8, requires_grad=True)
    boundaries = torch.tensor(cu_seqlens, dtype=torch.int32)
    packed = pack_tokens(
        boundaries,
        WHOLE,
        rotary=Rotary(8, 100.0),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    attention = PackedCausalAttention(_Settings(), 1, None, "self")
    context = attention(query, key, value, None, packed_seq_params=packed)
    context.square().sum().backward()
    gradients = [tensor.grad for tensor in (query, key, value)]
    for tensor in (query, key, value):
        tensor.grad = None

    positions = document_positions(boundaries)
    expected = _dense_attention(
        _rotate_by_complex_numbers(query, positions, 100.0),
        _rotate_by_complex_numbers(key, positions, 100.0),
        value,
        cu_seqlens,
    )
    expected.square().sum().backward()
    torch.testing.assert_close(context, expected)
    for gradient, tensor in zip(gradients, (query, key, value), strict=True):
        torch.testing.assert_close(gradient, tensor.grad)


@pytest.mark.parametrize("length", [7, 8, 9, 16, 25])  # around, twice and thrice the window of 8
@pytest.mark.parametrize("chunk", [4, 256])
def test_a_sliding_window_equals_the_dense_reference(
    single_rank: Ranks, length: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WINDOW_CHUNK", chunk)
    cu_seqlens = [0, length, 2 * length, 2 * length + 3]
    torch.manual_seed(0)
    tensors = [torch.randn(cu_seqlens[-1], n, 8, requires_grad=True) for n in (4, 2, 2)]
    packed = pack_tokens(
        torch.tensor(cu_seqlens, dtype=torch.int32),
        rotary=Rotary(8, 1.0),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    packed.rotary = rotary_table(torch.zeros(cu_seqlens[-1]), Rotary(8, 1.0), torch.float32)
    module = PackedCausalAttention(_Windowed(), 1, None, "self")
    with torch.inference_mode():  # a mask that is made here is used again by the backward pass
        module(*tensors, None, packed_seq_params=packed)
    context = module(*tensors, None, packed_seq_params=packed)
    expected = _dense_attention(*tensors, cu_seqlens, 8)
    torch.testing.assert_close(context, expected)
    ours, theirs = (torch.autograd.grad(x.square().sum(), tensors) for x in (context, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["sdpa", "library"])
def test_a_sliding_window_over_context_parallel_ranks(
    single_rank: Ranks, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process holds what the ranks would gather."""
    monkeypatch.setattr(attention, "gather_context", lambda rows, shard: rows)
    monkeypatch.setattr(attention, "apply_rotary", lambda query, key, *_: (query, key))
    monkeypatch.setitem(attention.KERNELS, "library", _windowed_segments)
    cu_seqlens = [0, 3, 21, 22, 48]
    torch.manual_seed(0)
    tensors = [torch.randn(48, n, 8) for n in (4, 2, 2)]
    expected = _dense_attention(*tensors, cu_seqlens, 8)
    for rank in range(3):
        shard = shard_context(48, rank=rank, size=3, group=object())
        packed = pack_tokens(
            torch.tensor(cu_seqlens, dtype=torch.int32),
            shard,
            rotary=Rotary(8, 1.0),
            dtype=torch.float32,
            device=torch.device("cpu"),
            window=8,
        )
        assert packed.max_seqlen_kv <= packed.max_seqlen_q + 7
        module = PackedCausalAttention(_Windowed(), 1, None, "self", backend=backend)
        query = shard.select(tensors[0])
        context = module(query, *tensors[1:], None, packed_seq_params=packed)
        torch.testing.assert_close(context, shard.select(expected))


class _Windowed(_Settings):
    window_size = (7, 0)


def _windowed_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    deterministic: bool,
    window: int | None,
) -> torch.Tensor:
    """Computes each segment with the last query aligned to the last key."""
    parts = []
    for a, b, c, d in zip(*(cu.tolist()[k:] for cu in segments[:2] for k in (0, 1)), strict=False):
        # Queries that the segment lacks stand before the others.
        q = torch.cat((query.new_zeros(d - c - (b - a), *query.shape[1:]), query[a:b]))
        context = _dense_attention(q, key[c:d], value[c:d], [0, d - c], window)
        parts.append(context[a - b :].view(b - a, *query.shape[1:]))
    return torch.cat(parts)


def test_context_shards_partition_the_tokens_evenly() -> None:
    tokens = torch.arange(24)
    for size in (2, 3):
        shards = [shard_context(24, rank=r, size=size, group=object()) for r in range(size)]
        parts = [shard.select(tokens) for shard in shards]
        assert sorted(torch.cat(parts).tolist()) == list(range(24))
        # The causal work of a rank is the sum of its positions, which is equal on all ranks.
        assert len({int(part.sum()) for part in parts}) == 1


def test_pieces_name_the_document_that_they_lie_in() -> None:
    shard = shard_context(16, rank=0, size=2, group=object())
    assert shard.token_ranges == ((0, 4), (12, 16))
    assert document_spans([0, 3, 13, 16], shard) == (
        (0, 0, 3),
        (3, 3, 4),
        (3, 12, 13),
        (13, 13, 16),
    )


def test_positions_restart_in_each_document() -> None:
    positions = document_positions(torch.tensor([0, 3, 4, 4, 6], dtype=torch.int32))
    assert positions.tolist() == [0, 1, 2, 0, 0, 1]


def test_runs_group_neighbours_of_equal_length_and_skip_empty_documents() -> None:
    assert equal_length_runs([0, 2, 4, 4, 7, 8, 9]) == ((0, 2, 2), (4, 1, 3), (7, 2, 1))
    assert equal_length_runs([0, 5]) == ((0, 1, 5),)


@pytest.mark.parametrize("boundaries", [[0, 64], [0, 10, 64]])
@pytest.mark.parametrize("num_groups", [4, 2])
def test_the_product_of_queries_keys_and_values_is_not_kept(
    single_rank: Ranks, boundaries: list[int], num_groups: int
) -> None:
    """Views of it would keep all of it in memory until the backward pass."""
    num_tokens, num_heads, head_dim = 64, 4, 16
    per_group = num_heads // num_groups + 2
    product = torch.randn(num_tokens, num_groups, per_group * head_dim, requires_grad=True)
    projected = product * 1.0
    widths = [(per_group - 2) * head_dim, head_dim, head_dim]
    query, key, value = (
        part.reshape(num_tokens, -1, head_dim) for part in projected.split(widths, dim=-1)
    )
    packed = pack_tokens(
        torch.tensor(boundaries, dtype=torch.int32),
        rotary=Rotary(head_dim, 100.0),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    kept: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention = PackedCausalAttention(_Settings(), 1, None, "self")
        context = attention(query, key, value, None, packed_seq_params=packed)
    assert kept and projected.untyped_storage().data_ptr() not in kept
    context.sum().backward()
    assert product.grad is not None and product.grad.any()
