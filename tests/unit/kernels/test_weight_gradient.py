"""Tests the weight gradients that are added to the gradient buffer."""

import pytest
import torch

from megatron_chatflow.kernels.weight_gradient import TorchWeightGradients, fuse_weight_gradients


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("wgrad_gemm_accum_fp32", torch.float32), ("wgrad_gemm_accum_fp16", torch.bfloat16)],
)
def test_it_adds_the_product(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, gradient, buffer = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((7, 5), (7, 3), (3, 5))
    )
    expected = buffer.double() + gradient.double().t() @ x.double()
    getattr(TorchWeightGradients, name)(x, gradient, buffer)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(buffer.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("requested", "reason"),
    [(True, "a product and a sum"), (False, "a product and a sum: --no-gradient-accumulation-")],
)
def test_cpus_keep_product_and_sum(requested: bool, reason: str) -> None:
    fuses, description = fuse_weight_gradients(
        torch.device("cpu"), torch.bfloat16, requested=requested
    )
    assert not fuses
    assert description.startswith(reason)
