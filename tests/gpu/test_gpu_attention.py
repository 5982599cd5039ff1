"""Compares every installed attention backend with fp32, forward and backward."""

from typing import cast

import pytest
import torch
from torch.distributed import ProcessGroup

from megatron_chatflow.kernels.attention import BACKENDS, gather_facts, obstacle
from megatron_chatflow.model import attention
from megatron_chatflow.model.attention import PackedCausalAttention
from megatron_chatflow.model.packed import ContextShard, pack_tokens, shard_context
from megatron_chatflow.model.rotary import Rotary, apply_rotary, rotary_table


class _Settings:
    deterministic_mode = False
    window_size: tuple[int, int] | None = None


def settings(window: int | None) -> _Settings:
    chosen = _Settings()
    chosen.window_size = None if window is None else (window - 1, 0)
    return chosen


def attend(
    backend: str, tensors: list[torch.Tensor], boundaries: list[int], window: int | None
) -> list[torch.Tensor]:
    """Returns the context and its gradients with respect to queries, keys and values."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    packed = pack_tokens(
        torch.tensor(boundaries, dtype=torch.int32),
        rotary=Rotary(tensors[0].shape[-1], 10000.0),
        dtype=tensors[0].dtype,
        device=tensors[0].device,
    )
    attention = PackedCausalAttention(settings(window), 1, None, "self", backend=backend)
    context = attention(*tensors, None, packed_seq_params=packed)
    context.backward(torch.linspace(-1, 1, context.numel()).view(context.shape).to(context))
    return [context.detach(), *(tensor.grad for tensor in tensors)]


def skip_without(backend: str, device: torch.device) -> None:
    reason = obstacle(backend, gather_facts(device, torch.bfloat16, 128, deterministic=False))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_groups", [8, 2])
@pytest.mark.parametrize("boundaries", [[0, 1024], [0, 1, 300, 301, 812, 1024]])
@pytest.mark.parametrize("window", [None, 300])
def test_equals_fp32(
    device: torch.device,
    backend: str,
    num_groups: int,
    boundaries: list[int],
    window: int | None,
) -> None:
    skip_without(backend, device)
    torch.manual_seed(0)
    tensors = [
        torch.randn(1024, heads, 128, device=device).bfloat16()
        for heads in (8, num_groups, num_groups)
    ]
    expected = attend("sdpa", [tensor.float() for tensor in tensors], boundaries, window)
    for actual, wanted in zip(attend(backend, tensors, boundaries, window), expected, strict=True):
        assert float((actual.float() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("length", [255, 256, 257, 512, 769])
def test_a_window_hides_what_lies_before_it(device: torch.device, length: int) -> None:
    """Compares torch's attention, the reference of the other tests, with a mask of all pairs."""
    torch.manual_seed(0)
    tensors = [torch.randn(length, heads, 64, device=device) for heads in (4, 2, 2)]
    positions = torch.arange(length, device=device)
    table = rotary_table(positions, Rotary(64, 10000.0), torch.float32)
    found = attend("sdpa", tensors, [0, length], 256)[0]
    rotated = apply_rotary(tensors[0], tensors[1], table)
    query, key, value = (rows.transpose(0, 1) for rows in (*rotated, tensors[2]))
    key, value = (rows.repeat_interleave(2, dim=0) for rows in (key, value))
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen & ~seen.tril(-256)
    )
    wanted = expected.transpose(0, 1).flatten(1)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def attend_as_rank(
    backend: str,
    tensors: list[torch.Tensor],
    shard: ContextShard,
    boundaries: list[int],
    window: int | None,
) -> list[torch.Tensor]:
    """Returns the context of one context-parallel rank and its gradients by all inputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    packed = pack_tokens(
        torch.tensor(boundaries, dtype=torch.int32),
        shard,
        rotary=Rotary(tensors[0].shape[-1], 10000.0),
        dtype=tensors[0].dtype,
        device=tensors[0].device,
        window=window,
    )
    module = PackedCausalAttention(settings(window), 1, None, "self", backend=backend)
    context = module(shard.select(tensors[0]), *tensors[1:], None, packed_seq_params=packed)
    context.backward(torch.linspace(-1, 1, context.numel()).view(context.shape).to(context))
    return [context.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("window", [None, 150])
def test_fewer_queries_than_keys_equal_fp32(
    device: torch.device,
    backend: str,
    rank: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under context parallelism the last query of a span attends to the last of its keys."""
    skip_without(backend, device)
    # One process holds what the ranks would gather. Rotary embedding is disabled.
    monkeypatch.setattr(attention, "gather_context", lambda tensor, shard: tensor)
    monkeypatch.setattr(attention, "apply_rotary", lambda query, key, *_: (query, key))
    torch.manual_seed(0)
    tensors = [torch.randn(1024, heads, 128, device=device).bfloat16() for heads in (8, 2, 2)]
    boundaries = [0, 100, 700, 701, 1024]
    shard = shard_context(1024, rank=rank, size=2, group=cast(ProcessGroup, object()))
    wide = [tensor.float() for tensor in tensors]
    expected = attend_as_rank("sdpa", wide, shard, boundaries, window)
    actual = attend_as_rank(backend, tensors, shard, boundaries, window)
    for ours, wanted in zip(actual, expected, strict=True):
        assert float((ours.float() - wanted).norm() / wanted.norm()) < 0.02
