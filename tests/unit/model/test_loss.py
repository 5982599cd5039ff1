"""Compares the chunked vocabulary-parallel loss with torch's cross-entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_chatflow.model import loss
from megatron_chatflow.model.loss import (
    VocabularyShard,
    linear_cross_entropy,
    source_sums,
    vocabulary_shard,
)


def _reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    pieces: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (hidden @ weight.t())[:, :pieces].float()
    losses = cross_entropy(logits, labels, reduction="none")
    return (losses * mask).sum(), losses


@pytest.mark.parametrize("chunk_tokens", [7, 16, 64, 4096])
def test_loss_and_gradients_equal_torch(monkeypatch: pytest.MonkeyPatch, chunk_tokens: int) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk_tokens * 128)
    torch.manual_seed(0)
    hidden = torch.randn(64, 24, requires_grad=True)
    weight = torch.randn(128, 24, requires_grad=True)
    labels = torch.randint(0, 100, (64,))
    mask = (torch.rand(64) > 0.4).float()
    rows = VocabularyShard(start=0, num_rows=128, num_valid_tokens=100, group=None)

    total, losses = linear_cross_entropy(
        hidden, weight, labels, mask, rows, sequence_parallel=False
    )
    (total * 0.5).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected, expected_losses = _reference(hidden, weight, labels, mask, pieces=100)
    (expected * 0.5).backward()

    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(grads[0], hidden.grad)
    torch.testing.assert_close(grads[1], weight.grad)


def test_validation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(8, 16)
    weight = torch.randn(32, 16, requires_grad=True)
    rows = VocabularyShard(start=0, num_rows=32, num_valid_tokens=32, group=None)
    arguments = (hidden, weight, torch.arange(8), torch.ones(8), rows)
    expected, expected_losses = linear_cross_entropy(*arguments, sequence_parallel=False)

    def refuse(*_: object) -> None:
        raise AssertionError("computes a gradient")

    monkeypatch.setattr(loss, "_chunk_gradients", refuse)
    with torch.no_grad():
        total, losses = linear_cross_entropy(*arguments, sequence_parallel=False)
    assert total == expected and torch.equal(losses, expected_losses)
    with pytest.raises(AssertionError, match="computes a gradient"):
        linear_cross_entropy(*arguments, sequence_parallel=False)


def test_padding_rows_get_no_gradient_and_no_probability() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(8, 16)
    weight = torch.randn(32, 16)
    weight[20:] = 50.0  # would get nearly all probability if it were not masked
    weight.requires_grad_()
    rows = VocabularyShard(start=0, num_rows=32, num_valid_tokens=20, group=None)
    total, _ = linear_cross_entropy(
        hidden, weight, torch.arange(8), torch.ones(8), rows, sequence_parallel=False
    )
    total.backward()
    assert weight.grad is not None
    assert torch.isfinite(total)
    assert torch.count_nonzero(weight.grad[20:]) == 0
    assert torch.count_nonzero(weight.grad[:20]) > 0


def test_masked_tokens_have_no_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(16, 8)
    mask = torch.tensor([1.0, 0, 1, 0, 0, 1])
    rows = VocabularyShard(start=0, num_rows=16, num_valid_tokens=16, group=None)
    total, _ = linear_cross_entropy(
        hidden, weight, torch.arange(6), mask, rows, sequence_parallel=False
    )
    total.backward()
    assert hidden.grad is not None
    assert (hidden.grad.abs().sum(dim=-1) > 0).tolist() == [True, False, True, False, False, True]


def test_bfloat16_stays_within_its_rounding() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 32)
    weight = torch.randn(96, 32)
    labels = torch.randint(0, 96, (64,))
    rows = VocabularyShard(start=0, num_rows=96, num_valid_tokens=96, group=None)
    total, _ = linear_cross_entropy(
        hidden.bfloat16(), weight.bfloat16(), labels, torch.ones(64), rows, sequence_parallel=False
    )
    expected, _ = _reference(
        hidden.bfloat16().float(), weight.bfloat16().float(), labels, torch.ones(64), pieces=96
    )
    # Logits are rounded to 8 bits of mantissa, so each loss has an error of about 2^-8 of |logit|
    # <= 20.
    assert abs(total - expected) / 64 < 20 * 2**-8


def test_gradient_of_a_sure_token_is_not_rounding() -> None:
    """In bfloat16 a probability of 0.9999 rounds to 1. Its gradient must not round to 0."""
    hidden = torch.zeros(1, 16, dtype=torch.bfloat16)
    hidden[0, 0] = 1.0
    hidden.requires_grad_()
    weight = torch.zeros(64, 16, dtype=torch.bfloat16)
    weight[5, 0] = 13.25
    rows = VocabularyShard(start=0, num_rows=64, num_valid_tokens=64, group=None)
    total, _ = linear_cross_entropy(
        hidden, weight, torch.tensor([5]), torch.ones(1), rows, sequence_parallel=False
    )
    total.backward()
    expected = hidden.detach().float().requires_grad_()
    cross_entropy(expected @ weight.float().t(), torch.tensor([5])).backward()
    assert hidden.grad is not None and expected.grad is not None
    assert expected.grad[0, 0].abs() < 2e-3
    torch.testing.assert_close(hidden.grad.float(), expected.grad, rtol=0.01, atol=0)


def test_a_rank_that_holds_only_padding_has_no_pieces() -> None:
    slices = [
        vocabulary_shard(rank=rank, size=4, padded_vocab_size=512, vocab_size=300, group=None)
        for rank in range(4)
    ]
    assert [s.num_valid_tokens for s in slices] == [128, 128, 44, 0]
    assert [s.start for s in slices] == [0, 128, 256, 384]


def test_source_sums_count_loss_tokens_and_bytes_of_each_source() -> None:
    sums = source_sums(
        losses=torch.tensor([1.0, 2.0, 4.0, 8.0]),
        loss_mask=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        label_bytes=torch.tensor([3, 5, 7, 2]),
        source=torch.tensor([0, 0, 2, 2]),
        num_sources=3,
    )
    assert sums.tolist() == [[1.0, 1.0, 3.0], [0.0, 0.0, 0.0], [12.0, 2.0, 9.0]]


def test_the_kernels_passes_give_the_same_chunk() -> None:
    """Runs the GPU's passes with the operators' references, including padding and other labels."""
    torch.manual_seed(0)
    rows = loss.VocabularyShard(start=10, num_rows=24, num_valid_tokens=21, group=None)
    logits, labels = torch.randn(40, 24) * 5, torch.randint(10, 31, (40,))
    composed = loss.chunk_loss(logits.clone(), labels, rows, "torch")
    kernels = loss.chunk_loss(logits.clone(), labels, rows, "ours")
    torch.testing.assert_close(kernels.losses, composed.losses)
    torch.testing.assert_close(
        kernels.differences * kernels.scale.unsqueeze(-1),
        composed.differences * composed.scale.unsqueeze(-1),
    )
