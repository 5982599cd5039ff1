"""Compares the fused weight gradient of local layers with a product in fp64."""

import torch

from megatron_chatflow.kernels.weight_gradient import TorchWeightGradients, fuse_weight_gradients


def test_micro_batches_add_up_in_fp32(device: torch.device) -> None:
    fuses, description = fuse_weight_gradients(device, torch.bfloat16, requested=True)
    assert fuses, description
    generator = torch.Generator(device).manual_seed(1)
    buffer = torch.zeros(256, 512, device=device)
    expected = buffer.double()
    for _ in range(8):
        x, gradient = (
            torch.randn(1024, size, generator=generator, device=device).bfloat16()
            for size in (512, 256)
        )
        TorchWeightGradients.wgrad_gemm_accum_fp32(x, gradient, buffer)
        expected += gradient.double().t() @ x.double()
    # Sums of bf16 products would be off by 1e-3.
    assert float((buffer - expected).norm() / expected.norm()) < 1e-6
