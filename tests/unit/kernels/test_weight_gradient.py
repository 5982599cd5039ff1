"""Tests the weight gradients that are added to the gradient buffer."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import layers

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


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("is_apex = True", "Apex's kernel, which adds"),
        ("raise ImportError('undefined symbol: x')", "Apex cannot be imported: undefined symbol"),
        (None, "Apex is not installed"),
    ],
)
def test_the_kernel_of_apex_is_used_where_it_can_be_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str | None, reason: str
) -> None:
    name = "fused_weight_gradient_mlp_cuda"
    for each in (name, "_grad_accum_fusion_available"):
        monkeypatch.setattr(layers, each, None, raising=False)
    monkeypatch.setattr("megatron_chatflow.kernels.weight_gradient._obstacle", lambda *_: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    importlib.invalidate_caches()
    fuses, description = fuse_weight_gradients(torch.device("cuda"), torch.bfloat16, requested=True)
    sys.modules.pop(name, None)
    assert fuses and layers._grad_accum_fusion_available
    assert reason in description
    is_apex = getattr(layers.fused_weight_gradient_mlp_cuda, "is_apex", False)
    assert is_apex == (source == "is_apex = True")
    assert is_apex or layers.fused_weight_gradient_mlp_cuda is TorchWeightGradients
