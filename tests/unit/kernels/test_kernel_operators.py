"""Tests the kernels' operators on the CPU: schemas, fake kernels, gradients, references."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from megatron_chatflow.kernels import cross_entropy, rms_norm, rope, swiglu

pytestmark = pytest.mark.native


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _table(tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(tokens, 1, half) * 6
    return angles.cos(), angles.sin()


def test_operators_are_whole() -> None:
    """Runs torch's own check of schema, fake kernel, autograd registration and tracing."""
    torch.manual_seed(0)
    opcheck(rms_norm.rms_norm, (_randn(3, 16), _randn(16), 1e-5))
    opcheck(rope.rope, (_randn(3, 2, 16), *_table(3, 8), 1.0))
    opcheck(swiglu.swiglu, (_randn(3, 16),))
    logits, labels = torch.randn(3, 16), torch.tensor([2, -1, 15])
    opcheck(cross_entropy.softmax_statistics, (logits, labels, 16))
    rows = torch.rand(3) + 1
    opcheck(cross_entropy.softmax_gradient_, (logits, labels, rows, rows, rows, 16))


def _gradients(
    output: torch.Tensor, inputs: tuple[torch.Tensor, ...], weights: torch.Tensor
) -> list[torch.Tensor]:
    return list(torch.autograd.grad((output * weights).sum(), inputs))


def test_rms_norm_is_torch_s() -> None:
    torch.manual_seed(0)
    x, weight, factors = _randn(4, 3, 16), _randn(16), torch.randn(16)
    y, _ = rms_norm.rms_norm(x, weight, 1e-5)
    expected = functional.rms_norm(x, (16,), weight, 1e-5)
    torch.testing.assert_close(y, expected)
    # The input is also used after the norm, as in a residual stream.
    actual = _gradients(y + x.sin(), (x, weight), factors)
    for a, b in zip(actual, _gradients(expected + x.sin(), (x, weight), factors), strict=True):
        torch.testing.assert_close(a, b)


def test_swiglu_is_torch_s() -> None:
    torch.manual_seed(0)
    x, factors = _randn(5, 24), torch.randn(5, 12)
    gate, up = x.chunk(2, -1)
    expected = functional.silu(gate) * up
    torch.testing.assert_close(swiglu.swiglu(x), expected)
    torch.testing.assert_close(
        _gradients(swiglu.swiglu(x), (x,), factors), _gradients(expected, (x,), factors)
    )


def test_rope_is_a_complex_product() -> None:
    torch.manual_seed(0)
    heads, factors, (cosines, sines) = _randn(4, 3, 16), torch.randn(4, 3, 16), _table(4, 8)
    turned = torch.complex(heads[..., :8], heads[..., 8:]) * torch.complex(cosines, sines)
    expected = torch.cat((turned.real, turned.imag), -1)
    actual = rope.rope(heads, cosines, sines, 1.0)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        _gradients(actual, (heads,), factors), _gradients(expected, (heads,), factors)
    )


@pytest.mark.parametrize("num_slices", [1, 2, 4])
def test_softmax_of_slices_is_the_whole_softmax(num_slices: int) -> None:
    """Reduces slices of a padded vocabulary as tensor-parallel ranks do."""
    torch.manual_seed(0)
    num_valid_tokens, columns = 50, 64
    logits = torch.randn(7, columns) * 5
    labels = torch.randint(0, num_valid_tokens, (7,))
    whole = logits[:, :num_valid_tokens].clone().requires_grad_()
    losses = functional.cross_entropy(whole, labels, reduction="none")
    scale = torch.rand(7)
    (expected,) = torch.autograd.grad((losses * scale).sum(), whole)

    width = columns // num_slices
    slices = [
        (part.contiguous(), labels - i * width, min(max(num_valid_tokens - i * width, 0), width))
        for i, part in enumerate(logits.split(width, -1))
    ]
    tops, sums, targets = zip(
        *(cross_entropy.softmax_statistics(*each) for each in slices), strict=True
    )
    top = torch.stack(tops).amax(0)
    total = sum(s * (t - top).exp() for s, t in zip(sums, tops, strict=True))
    torch.testing.assert_close(top + total.log() - sum(targets), losses.detach())
    for part, local, pieces in slices:
        cross_entropy.softmax_gradient_(part, local, top, total, scale, pieces)
    gradient = torch.cat([part for part, _, _ in slices], -1)
    torch.testing.assert_close(gradient[:, :num_valid_tokens], expected)
    assert not gradient[:, num_valid_tokens:].any()
