"""Tests the kernels' operators on the CPU: schemas, fake kernels, gradients, references."""

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

from megatron_chatflow.kernels import cross_entropy
from megatron_chatflow.model.rotary import RotaryTable, apply_rotary

pytestmark = pytest.mark.native


def test_operators_are_whole() -> None:
    """Runs torch's own check of schema, fake kernel, autograd registration and tracing."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 16), torch.tensor([2, -1, 15])
    opcheck(cross_entropy.softmax_statistics, (logits, labels, 16))
    rows = torch.rand(3) + 1
    opcheck(cross_entropy.softmax_gradient_, (logits, labels, rows, rows, rows, 16))


def _gradients(
    output: torch.Tensor, inputs: tuple[torch.Tensor, ...], weights: torch.Tensor
) -> list[torch.Tensor]:
    return list(torch.autograd.grad((output * weights).sum(), inputs))


def test_rope_is_a_complex_product() -> None:
    torch.manual_seed(0)
    heads, factors = torch.randn(4, 3, 16, requires_grad=True), torch.randn(4, 3, 16)
    angles = torch.rand(4, 1, 8) * 6
    cosines, sines = angles.cos(), angles.sin()
    turned = torch.complex(heads[..., :8], heads[..., 8:]) * torch.complex(cosines, sines)
    expected = torch.cat((turned.real, turned.imag), -1)
    actual, _ = apply_rotary(heads, heads, RotaryTable(angles, cosines, sines))
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
