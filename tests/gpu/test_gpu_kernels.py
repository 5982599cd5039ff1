"""Compares the compiled kernels and their operators on a GPU with fp32, at LLaMA-2's widths."""

import pytest
import torch
from kernel_checks import (
    DTYPES,
    assert_rounded,
    check_rms_norm,
    check_rope,
    check_softmax,
    check_swiglu,
)
from torch.library import opcheck

from megatron_chatflow.kernels import cuda as cuda_kernels
from megatron_chatflow.kernels import rms_norm, rope, swiglu
from megatron_chatflow.model.loss import VocabularyShard, linear_cross_entropy


@pytest.fixture(autouse=True)
def _built() -> None:
    library, reason = cuda_kernels.load_kernels()
    if library is None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 8), (4096, 4096), (1000, 5120), (333, 8192)])
def test_rms_norm(device: torch.device, size: tuple[int, int], dtype: torch.dtype) -> None:
    check_rms_norm(*size, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 16), (4096, 32, 128), (777, 8, 128)])
def test_rope(device: torch.device, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_rope(*size, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 8), (2048, 11008), (777, 13824)])
def test_swiglu(device: torch.device, size: tuple[int, int], dtype: torch.dtype) -> None:
    check_swiglu(*size, dtype, device)


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
    x = torch.randn(4, 64, device=device, requires_grad=True)
    weight = torch.randn(64, device=device, requires_grad=True)
    opcheck(rms_norm.rms_norm, (x, weight, 1e-5))
    opcheck(swiglu.swiglu, (x,))
    angles = torch.rand(4, 1, 8, device=device)
    heads = torch.randn(4, 3, 16, device=device, requires_grad=True)
    opcheck(rope.rope, (heads, angles.cos(), angles.sin(), 1.0))


def test_the_same_input_gives_the_same_bits(device: torch.device) -> None:
    x = torch.randn(3000, 4096, device=device, dtype=torch.bfloat16)
    weight = torch.randn(4096, device=device, dtype=torch.bfloat16)
    _, rstd = rms_norm.rms_norm_kernel(x, weight, 1e-5)
    first, second = (rms_norm.rms_norm_backward_kernel(x, x, weight, rstd)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_kernels_run_on_the_current_stream(device: torch.device) -> None:
    x = torch.randn(4096, 22016, device=device)
    expected = swiglu.swiglu_reference(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.empty_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        y = swiglu.swiglu_kernel(late)
    stream.synchronize()
    assert_rounded(y, expected)
