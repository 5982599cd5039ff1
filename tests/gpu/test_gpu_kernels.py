"""Compares the compiled kernels and their operators on a GPU with fp32, at LLaMA-2's widths."""

import pytest
import torch
from kernel_checks import DTYPES, check_softmax
from torch.library import opcheck

from megatron_chatflow.kernels import cross_entropy
from megatron_chatflow.kernels import cuda as cuda_kernels
from megatron_chatflow.model.loss import VocabularyShard, linear_cross_entropy


@pytest.fixture(autouse=True)
def _built() -> None:
    library, reason = cuda_kernels.load_kernels()
    if library is None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2048, 32000, 32000), (100, 40192, 40076), (64, 128, 0)])
def test_softmax(device: torch.device, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_softmax(*size, dtype, device)


@pytest.mark.parametrize("implementation", ["ours", "torch"])
def test_linear_cross_entropy(device: torch.device, implementation: str) -> None:
    """Compares loss and gradients with several chunks and a padded vocabulary."""
    torch.manual_seed(0)
    num_tokens, width, pieces, num_rows = 5000, 512, 32003, 32128
    hidden = torch.randn(num_tokens, width, device=device).bfloat16()
    weight = (torch.randn(num_rows, width, device=device) / width**0.5).bfloat16()
    labels = torch.randint(0, pieces, (num_tokens,), device=device)
    mask = (torch.rand(num_tokens, device=device) > 0.3).float()
    exact = [tensor.float().requires_grad_() for tensor in (hidden, weight)]
    logits = (exact[0] @ exact[1].t())[:, :pieces]
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (expected * mask).sum().backward()

    given = [tensor.requires_grad_() for tensor in (hidden, weight)]
    rows = VocabularyShard(start=0, num_rows=num_rows, num_valid_tokens=pieces, group=None)
    total, losses = linear_cross_entropy(
        given[0],
        given[1],
        labels,
        mask,
        rows,
        sequence_parallel=False,
        implementation=implementation,
    )
    total.backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=2e-3, atol=2e-2)
    assert float(total.detach()) == pytest.approx(float((expected * mask).sum()), rel=1e-3)
    for tensor, wanted in zip(given, exact, strict=True):
        assert tensor.grad is not None and wanted.grad is not None
        distance = (tensor.grad.float() - wanted.grad).norm()
        assert float(distance / wanted.grad.norm()) < 0.02
    rows_gradient = given[1].grad
    assert rows_gradient is not None and not rows_gradient[pieces:].any()


def test_operators_are_whole(device: torch.device) -> None:
    logits = torch.randn(4, 64, device=device)
    labels = torch.tensor([2, -1, 15, 63], device=device)
    opcheck(cross_entropy.softmax_statistics, (logits, labels, 60))
    rows = torch.rand(4, device=device) + 1
    opcheck(cross_entropy.softmax_gradient_, (logits, labels, rows, rows, rows, 60))


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    logits = torch.randn(3000, 32000, device=device, dtype=torch.bfloat16)
    labels = torch.arange(3000, device=device)
    first, second = (
        cross_entropy.softmax_statistics_kernel(logits, labels, 32000)[1] for _ in range(2)
    )
    assert torch.equal(first, second)


def test_kernels_run_on_the_current_stream(device: torch.device) -> None:
    logits = torch.randn(4096, 22016, device=device)
    labels = torch.arange(4096, device=device)
    expected = cross_entropy.softmax_statistics_reference(logits, labels, 22016)[0]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.empty_like(logits)
        torch.cuda._sleep(10_000_000)
        late.copy_(logits)
        highest, _, _ = cross_entropy.softmax_statistics_kernel(late, labels, 22016)
    stream.synchronize()
    assert torch.equal(highest, expected)
