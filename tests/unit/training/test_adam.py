"""Compares our optimizer with torch's, and the gradient norm with that of one long vector."""

import torch

from megatron_chatflow.training.optimizer import FusedAdamW, _l2_norm


def test_equals_torch_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (7,), (1,)]
    values = [torch.randn(size, generator=generator) for size in sizes]
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    pairs = [
        (own, [value.clone() for value in values])
        for own in (FusedAdamW, lambda *a, **k: torch.optim.AdamW(*a, **k, fused=True))
    ]
    optimizers = [make(params, **settings) for make, params in pairs]
    for _ in range(4):
        gradients = [torch.randn(size, generator=generator) for size in sizes]
        for optimizer, (_, params) in zip(optimizers, pairs, strict=True):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient.clone()
            optimizer.step()
    for own, other, first in zip(pairs[0][1], pairs[1][1], values, strict=True):
        assert torch.equal(own, other)
        assert not torch.equal(own, first)
    assert optimizers[0].param_groups[0]["step"] == 4


def test_the_norm_of_all_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator) for size in ((40, 30), (7,), (1,))]
    norm, per_tensor = _l2_norm(2048, None, [tensors], False)
    assert norm.shape == (1,)
    assert per_tensor is None
    whole = torch.cat([tensor.double().flatten() for tensor in tensors]).norm()
    assert torch.allclose(norm.double(), whole, rtol=1e-6)
