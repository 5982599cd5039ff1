"""Compares every installed attention backend with fp32, forward and backward."""

from typing import cast

import pytest
import torch
from torch.distributed import ProcessGroup

from megatron_chatflow.kernels.attention import BACKENDS, gather_facts, obstacle
from megatron_chatflow.model import attention
from megatron_chatflow.model.attention import PackedCausalAttention
from megatron_chatflow.model.packed import ContextShard, pack_tokens, shard_context
from megatron_chatflow.model.rotary import Rotary


class _Settings:
    deterministic_mode = False


def attend(backend: str, tensors: list[torch.Tensor], boundaries: list[int]) -> list[torch.Tensor]:
    """Returns the context and its gradients with respect to queries, keys and values."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    packed = pack_tokens(
        torch.tensor(boundaries, dtype=torch.int32),
        rotary=Rotary(tensors[0].shape[-1], 10000.0),
        dtype=tensors[0].dtype,
        device=tensors[0].device,
    )
    attention = PackedCausalAttention(_Settings(), 1, None, "self", backend=backend)
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
def test_equals_fp32(
    device: torch.device, backend: str, num_groups: int, boundaries: list[int]
) -> None:
    skip_without(backend, device)
    torch.manual_seed(0)
    tensors = [
        torch.randn(1024, heads, 128, device=device).bfloat16()
        for heads in (8, num_groups, num_groups)
    ]
    expected = attend("sdpa", [tensor.float() for tensor in tensors], boundaries)
    for actual, wanted in zip(attend(backend, tensors, boundaries), expected, strict=True):
        assert float((actual.float() - wanted).norm() / wanted.norm()) < 0.02


def attend_as_rank(
    backend: str, tensors: list[torch.Tensor], shard: ContextShard, boundaries: list[int]
) -> list[torch.Tensor]:
    """Returns the context of one context-parallel rank and its gradients by all inputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    packed = pack_tokens(
        torch.tensor(boundaries, dtype=torch.int32),
        shard,
        rotary=Rotary(tensors[0].shape[-1], 10000.0),
        dtype=tensors[0].dtype,
        device=tensors[0].device,
    )
    module = PackedCausalAttention(_Settings(), 1, None, "self", backend=backend)
    context = module(shard.select(tensors[0]), *tensors[1:], None, packed_seq_params=packed)
    context.backward(torch.linspace(-1, 1, context.numel()).view(context.shape).to(context))
    return [context.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_fewer_queries_than_keys_equal_fp32(
    device: torch.device, backend: str, rank: int, monkeypatch: pytest.MonkeyPatch
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
    expected = attend_as_rank("sdpa", [tensor.float() for tensor in tensors], shard, boundaries)
    actual = attend_as_rank(backend, tensors, shard, boundaries)
    for ours, wanted in zip(actual, expected, strict=True):
        assert float((ours.float() - wanted).norm() / wanted.norm()) < 0.02
