"""Compares the composed CPU attention with PyTorch's own in fp32, including gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_chatflow.kernels import attention as attention_cpu
from megatron_chatflow.kernels import cpu as cpu_kernels
from megatron_chatflow.kernels.attention import composed_attention
from megatron_chatflow.model.packed import document_positions, equal_length_runs
from megatron_chatflow.model.rotary import Rotary, RotaryTable, apply_rotary, rotary_table

pytestmark = pytest.mark.skipif(
    not cpu_kernels.is_available(), reason="csrc/kernels/cpu is not built: make build"
)


def in_fp32(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: RotaryTable,
    boundaries: list[int],
    window: int,
) -> torch.Tensor:
    """Computes attention separately for each document, with a mask of all pairs of tokens."""
    query, key = apply_rotary(query, key, table)
    parts = []
    for begin, end in zip(boundaries, boundaries[1:], strict=False):
        heads = [tensor[begin:end].transpose(0, 1) for tensor in (query, key, value)]
        seen = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        seen &= ~seen.tril(-window)
        parts.append(
            scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(0, 1)
        )
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("boundaries", "num_heads", "num_groups", "head_dim"),
    [
        ([0, 512, 1024], 4, 4, 64),
        ([0, 300, 600, 607, 1000], 8, 2, 64),
        ([0, 40, 41, 100], 4, 1, 24),
        ([0, 17, 34, 51, 68], 2, 2, 8),
    ],
)
@pytest.mark.parametrize("window", [None, 1, 100, 128, 300])
def test_equals_fp32_within_bf16(
    boundaries: list[int],
    num_heads: int,
    num_groups: int,
    head_dim: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Small blocks, so that there are several blocks of queries and of documents.
    monkeypatch.setattr(attention_cpu, "QUERY_CHUNK", 128)
    monkeypatch.setattr(attention_cpu, "BLOCK_SCORES", 2000)
    torch.manual_seed(1)
    num_tokens = boundaries[-1]
    positions = document_positions(torch.tensor(boundaries))
    table = rotary_table(positions, Rotary(head_dim, 10000.0), torch.float32)
    packed = torch.randn(num_tokens, num_heads + 2 * num_groups, head_dim).bfloat16()
    inputs = [
        tensor.requires_grad_()
        for tensor in packed.split([num_heads, num_groups, num_groups], dim=1)
    ]
    gradient = torch.randn(num_tokens, num_heads, head_dim).bfloat16()
    angles = table.cosines.squeeze(1), table.sines.squeeze(1)
    ours = composed_attention(*inputs, angles, equal_length_runs(boundaries), None, window)
    our_gradients = torch.autograd.grad(ours, inputs, gradient)
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    theirs = in_fp32(*wide, table, boundaries, window or num_tokens)
    their_gradients = torch.autograd.grad(theirs, wide, gradient.float())
    for index, (own, other) in enumerate(
        zip((ours, *our_gradients), (theirs, *their_gradients), strict=True)
    ):
        assert own.shape == other.shape
        # The weight of a single key is 1, whatever the query and the key are.
        if window == 1 and index in (1, 2):
            assert float(own.float().norm()) < 1e-3
        else:
            assert float((own.float() - other).norm() / other.norm()) < 0.01


def test_long_documents_are_left_to_pytorch() -> None:
    query = torch.zeros(1, 1, 8, dtype=torch.bfloat16)
    assert attention_cpu.is_composed(query, attention_cpu.MAX_LENGTH)
    assert not attention_cpu.is_composed(query, attention_cpu.MAX_LENGTH + 1)
    assert not attention_cpu.is_composed(query.float(), 8)
    longest = attention_cpu.MAX_LENGTH - attention_cpu.QUERY_CHUNK + 1
    assert attention_cpu.is_composed(query, 1 << 20, longest)
    assert not attention_cpu.is_composed(query, 1 << 20, longest + 1)


@pytest.mark.parametrize("num_tokens", [1024, 4096])
def test_the_scores_grow_with_the_window(num_tokens: int) -> None:
    """Probabilities for each query are those of the window and of its block's other queries."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    query = torch.zeros(num_tokens, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    angles = torch.ones(num_tokens, 4), torch.zeros(num_tokens, 4)
    runs = ((0, 1, num_tokens),)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        composed_attention(query, query, query, angles, runs, None, 64)
    assert kept <= num_tokens * (64 + attention_cpu.QUERY_CHUNK + 3 * 8)
