"""Compares the compiled kernels with their references, on any device.

A GPU runs the real kernels. A CPU runs the same sources under `csrc/kernels/tests/emulation.h`. The
references compute in fp32 from the kernel's inputs, so a kernel's output may differ from them by at
most one more rounding.
"""

import torch

from megatron_chatflow.kernels import cross_entropy, rms_norm, rope, swiglu

DTYPES = (torch.bfloat16, torch.float32)


def randn(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(device)


def assert_rounded(
    actual: torch.Tensor, expected: torch.Tensor, slack: float = 2.0, floor: float = 1.0
) -> None:
    """Asserts that ``actual`` equals ``expected`` up to ``slack`` roundings of its own dtype.

    ``expected`` was computed in fp32.

    Below the magnitude ``floor`` errors count as absolute, because sums cancel. Single products do
    not.
    """
    assert actual.shape == expected.shape
    unit = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float32:
        slack *= 16  # The reference sums in another order, also in fp32.
    torch.testing.assert_close(
        actual.float(), expected, rtol=slack * unit, atol=slack * unit * floor
    )


def check_rms_norm(num_rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x, grad_y = (randn(num_rows, hidden, dtype=dtype, device=device) for _ in range(2))
    weight = 1 + randn(hidden, dtype=dtype, device=device) / 4
    y, rstd = rms_norm.rms_norm_kernel(x, weight, 1e-5)
    expected, expected_rstd = rms_norm.rms_norm_reference(x.float(), weight.float(), 1e-5)
    assert_rounded(y, expected)
    assert_rounded(rstd, expected_rstd)

    gradients = rms_norm.rms_norm_backward_kernel(grad_y, x, weight, rstd)
    expected_gradients = rms_norm.rms_norm_backward_reference(
        grad_y.float(), x.float(), weight.float(), expected_rstd
    )
    assert_rounded(gradients[0], expected_gradients[0])
    assert_rounded(gradients[1], expected_gradients[1], floor=num_rows**0.5)


def check_rope(
    num_tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    # Use the layout of megatron-core's queries: a slice of each token's joint projection.
    joint = randn(num_tokens, num_heads + 2, head_dim, dtype=dtype, device=device)
    heads = joint[:, 1:-1]
    angles = torch.rand(num_tokens, 1, head_dim // 2) * 6
    cosines, sines = angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
    for direction in (1.0, -1.0):
        turned = rope.rope_kernel(heads, cosines, sines, direction)
        assert turned.is_contiguous()
        expected = rope.rope_reference(heads.float(), cosines.float(), sines.float(), direction)
        assert_rounded(turned, expected, slack=1.0)
    # Heads that are not aligned to packs are copied first.
    odd = randn(num_tokens, num_heads, head_dim + 8, dtype=dtype, device=device)[..., 1:-7]
    assert not rope.supports_rope(odd)
    expected = rope.rope_reference(odd.float(), cosines.float(), sines.float(), 1.0)
    assert_rounded(rope.rope_kernel(odd, cosines, sines, 1.0), expected, slack=1.0)


def check_swiglu(num_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    x = randn(num_rows, 2 * width, dtype=dtype, device=device) * 4
    grad_y = randn(num_rows, width, dtype=dtype, device=device)
    assert_rounded(swiglu.swiglu_kernel(x), swiglu.swiglu_reference(x.float()), slack=1.0)
    assert_rounded(
        swiglu.swiglu_backward_kernel(grad_y, x),
        swiglu.swiglu_backward_reference(grad_y.float(), x.float()),
        slack=1.0,
    )


def check_softmax(
    num_rows: int, num_columns: int, num_valid_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Checks the softmax kernels with labels outside of the slice and some logits far apart."""
    torch.manual_seed(0)
    logits = randn(num_rows, num_columns, dtype=dtype, device=device) * 20
    labels = torch.randint(-2, num_valid_tokens + 2, (num_rows,), device=device)
    scale = torch.rand(num_rows, device=device)
    statistics = cross_entropy.softmax_statistics_kernel(logits, labels, num_valid_tokens)
    expected = cross_entropy.softmax_statistics_reference(logits.float(), labels, num_valid_tokens)
    assert torch.equal(statistics[0], expected[0])
    assert torch.equal(statistics[2], expected[2])
    assert_rounded(statistics[1], expected[1])

    # As if other slices had higher logits and more of them.
    highest, sums = expected[0].clamp(min=-50.0) + 1, expected[1] + 1
    gradient, expected_gradient = logits.clone(), logits.float()
    arguments = (labels, highest, sums, scale, num_valid_tokens)
    cross_entropy.softmax_gradient_kernel(gradient, *arguments)
    cross_entropy.softmax_gradient_reference(expected_gradient, *arguments)
    assert not gradient[:, num_valid_tokens:].any()
    assert_rounded(gradient, expected_gradient, slack=1.0)
