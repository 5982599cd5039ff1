"""Compares every CPU kernel with its reference, at sizes that fill the vector lanes and others."""

from collections.abc import Iterator

import pytest
import torch

from megatron_chatflow.kernels import cpu as kernels
from megatron_chatflow.kernels import cpu_reference as reference

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(
        not kernels.is_available(), reason="csrc/kernels/cpu is not built: make build"
    ),
]

# bf16 keeps 8 bits: one rounding is at most 2^-9 of the value.
ROUNDING = 2**-8
SIZES = (7, 16, 40, 512, 1000)


@pytest.fixture(autouse=True, params=kernels.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs every test with each instruction set that this processor supports."""
    kernels.use_instruction_set(request.param)
    yield
    kernels.use_instruction_set(kernels.instruction_sets()[0])


def bf16(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def assert_near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = ROUNDING) -> None:
    theirs = theirs.detach().float()
    torch.testing.assert_close(
        ours.float(), theirs, rtol=tolerance, atol=tolerance * 0.01 * float(theirs.abs().max())
    )


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_and_its_gradients(size: int) -> None:
    rows, weight, gradient = bf16(33, size), 1 + bf16(size, scale=0.3), bf16(33, size, scale=2)
    ours, scales = kernels.rms_norm(rows, weight, 1e-5)
    inputs = [tensor.float().requires_grad_() for tensor in (rows, weight)]
    theirs = reference.rms_norm(*inputs, 1e-5)
    assert_near(ours, theirs)
    grad_rows, grad_weight = torch.autograd.grad(theirs, inputs, gradient.float())
    our_rows, our_weight = kernels.rms_norm_backward(gradient, rows, weight, scales)
    assert_near(our_rows, grad_rows)
    assert_near(our_weight, grad_weight, 1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_swiglu_and_its_gradient(size: int) -> None:
    rows, gradient = bf16(33, 2 * size, scale=5), bf16(33, size)
    wide = rows.float().requires_grad_()
    theirs = reference.swiglu(wide)
    assert_near(kernels.swiglu(rows), theirs)
    (grad_rows,) = torch.autograd.grad(theirs, wide, gradient.float())
    assert_near(kernels.swiglu_backward(gradient, rows), grad_rows)


@pytest.mark.parametrize("value", [-1e4, -100.0, -88.5, -87.0, 0.0, 87.0, 100.0, 1e4])
def test_swiglu_far_from_zero(value: float) -> None:
    rows = torch.tensor([[value, 3.0]]).bfloat16()
    # Where the sigmoid is 0 in fp32, values up to 1e-30 are accepted.
    theirs = reference.swiglu(rows)
    torch.testing.assert_close(kernels.swiglu(rows).float(), theirs, rtol=ROUNDING, atol=1e-30)
    gradient = kernels.swiglu_backward(torch.ones(1, 1).bfloat16(), rows)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_padding", [0, 3])
def test_exponentials_of_logits(size: int, num_padding: int) -> None:
    logits = bf16(33, size + num_padding, scale=9)
    powers, highest, sums = reference.exponentiate(logits, size)
    our_highest, our_sums = kernels.exponentiate(logits, size)
    assert_near(logits, powers)
    assert torch.equal(our_highest, highest)
    assert_near(our_sums, sums, 1e-5)


def test_a_slice_of_padding_alone_has_no_exponentials() -> None:
    logits = bf16(4, 24)
    highest, sums = kernels.exponentiate(logits, 0)
    assert torch.isfinite(highest).all()
    assert not sums.any() and not logits.any()


def test_what_is_not_a_number_stays_visible() -> None:
    rows = bf16(4, 64)
    rows[1, 5] = float("nan")
    rows[2, 63] = float("inf")
    normalised, _ = kernels.rms_norm(rows, torch.ones(64).bfloat16(), 1e-5)
    assert normalised.isnan().any(dim=-1).tolist() == [False, True, True, False]
    assert kernels.swiglu(rows).isnan().any(dim=-1).tolist() == [False, True, False, False]
    logits = rows.clone()
    _, sums = kernels.exponentiate(logits, 64)
    assert sums[1].isnan() and sums[0].isfinite()
    scores = rows.clone().view(1, 4, 64)
    probabilities = kernels.causal_softmax(scores, 60, 1.0)[0]
    assert probabilities[1].isnan().any() and probabilities[0].isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_causal_softmax_and_its_gradient(size: int) -> None:
    scores, gradient = bf16(3, 5, size + 9, scale=9), bf16(3, 5, size + 9)
    theirs = reference.causal_softmax(scores, 4, 0.3)
    ours = kernels.causal_softmax(scores.clone(), 4, 0.3)
    assert_near(ours, theirs)
    assert not ours[:, 0, 5:].any() and not ours[:, 4, 9:].any()
    # The kernel's gradient is that of the rounded probabilities.
    wide, products = ours.float(), ours.float() * gradient.float()
    expected = wide * (gradient.float() - products.sum(dim=-1, keepdim=True)) * 0.3
    assert_near(kernels.causal_softmax_backward(ours, gradient.clone(), 4, 0.3), expected)


@pytest.mark.parametrize("head_dim", [6, 24, 64, 128])
def test_rotation_into_another_layout_and_back(head_dim: int) -> None:
    packed = bf16(10, 3, 3 * head_dim)
    heads = packed[..., head_dim : 2 * head_dim].unflatten(0, (2, 5))
    angles = torch.randn(2, 10, head_dim // 2)
    cosines, sines = angles[0].contiguous(), angles[1].contiguous()
    moved = torch.empty(2, 3, 5, head_dim, dtype=torch.bfloat16).transpose(1, 2)
    kernels.rotate(heads, moved, (cosines, sines))
    assert_near(moved, reference.rotate(heads, cosines, sines))
    kernels.rotate(heads, moved, (cosines, sines), -1.0)
    assert_near(moved, reference.rotate(heads, cosines, sines, -1.0))
    assert torch.equal(kernels.rotate(heads, moved, None), heads)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    rows, weight, gradient = bf16(1000, 512), bf16(512), bf16(1000, 512, scale=3)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            _, scales = kernels.rms_norm(rows, weight, 1e-5)
            results.append(kernels.rms_norm_backward(gradient, rows, weight, scales))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_tensors_that_a_kernel_cannot_read_are_refused() -> None:
    with pytest.raises(ValueError, match="not bf16"):
        kernels.swiglu(torch.zeros(4, 8))
    with pytest.raises(ValueError, match="gaps"):
        kernels.swiglu(bf16(4, 16)[:, ::2])
    with pytest.raises(ValueError, match="rms_norm"):
        kernels.rms_norm(bf16(4, 16), bf16(8), 1e-5)
    with pytest.raises(ValueError, match="last key"):
        kernels.causal_softmax(bf16(1, 4, 8), 5, 1.0)
    with pytest.raises(ValueError, match="too many keys"):
        kernels.causal_softmax(bf16(1, 1, 5000), 0, 1.0)
    with pytest.raises(ValueError, match="none named"):
        kernels.use_instruction_set("MMX")
