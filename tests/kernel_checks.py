"""Compares the compiled kernels with their references, on any device.

A GPU runs the real kernels. A CPU runs the same sources under `csrc/kernels/tests/emulation.h`. The
references compute in fp32 from the kernel's inputs, so a kernel's output may differ from them by at
most one more rounding.
"""

import torch

from megatron_chatflow.kernels import cross_entropy

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
