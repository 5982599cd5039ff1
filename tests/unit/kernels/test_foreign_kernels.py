"""Checks calls into liger-kernel and transformer-engine against their signatures.

As in `test_foreign_calls`, a substitute for each release's function refuses the arguments that the
release would refuse and computes what the release documents.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_releases import RECORD, install, signature
from torch.nn import functional

from megatron_chatflow.kernels import external
from megatron_chatflow.kernels.rope import rope_reference
from megatron_chatflow.model.rotary import Rotary, RotaryTable, apply_rotary, rotary_table


def releases(file: str, *functions: str) -> list[Any]:
    """Returns signatures by release. Of several functions, the first that a release has is used."""
    found = {
        row["version"]: signature(row["parameters"])
        for function in reversed(functions)
        for row in RECORD
        if row["file"] == file and row["function"] == function
    }
    assert found
    return [pytest.param(release, id=version) for version, release in sorted(found.items())]


def bound(
    release: inspect.Signature, compute: Callable[[dict[str, Any]], Any]
) -> Callable[..., Any]:
    return lambda *args, **kwargs: compute(release.bind(*args, **kwargs).arguments)


def turned(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates ``[..., tokens, heads, head_dim]`` with full-width tables, as transformers does."""
    half = heads.shape[-1] // 2
    swapped = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
    return heads * cosines + swapped * sines


@pytest.fixture
def table() -> RotaryTable:
    return rotary_table(torch.arange(5) * 100, Rotary(8, 10000.0), torch.float32)


@pytest.mark.parametrize(
    "release", releases("liger_kernel/ops/rope.py", "LigerRopeFunction.forward")
)
def test_liger_rope(
    release: inspect.Signature, table: RotaryTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(given: dict[str, Any]) -> Any:
        assert given["q"].shape == (1, 3, 5, 8) and given["k"].shape == (1, 1, 5, 8)
        assert given["cos"].shape == given["sin"].shape == (1, 5, 8)
        cosines, sines = given["cos"].unsqueeze(1), given["sin"].unsqueeze(1)
        rotated = []
        for heads in (given["q"], given["k"]):
            # The library writes in place to a layout that is contiguous in tokens, heads and
            # head_dim.
            memory = heads.transpose(1, 2).contiguous()
            memory.copy_(turned(heads, cosines, sines).transpose(1, 2))
            rotated.append(memory.transpose(1, 2))
        return tuple(rotated)

    function = SimpleNamespace(apply=bound(release, compute))
    install(monkeypatch, "liger_kernel.ops.rope", "LigerRopeFunction", function)
    query, key = torch.randn(5, 3, 8), torch.randn(5, 2, 8)[:, 1:]
    before = query.clone(), key.clone()
    rotated = apply_rotary(query, key, table, "liger")
    for found, heads in zip(rotated, before, strict=True):
        torch.testing.assert_close(found, rope_reference(heads, table.cosines, table.sines, 1.0))
    # Recomputation uses the same tensors again.
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


@pytest.mark.parametrize(
    "release", releases("transformer_engine/pytorch/attention/rope.py", "apply_rotary_pos_emb")
)
def test_transformer_engine_rope(
    release: inspect.Signature, table: RotaryTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(given: dict[str, Any]) -> torch.Tensor:
        assert given["tensor_format"] == "sbhd" and given["fused"] is True
        freqs = given["freqs"]
        assert given["t"].shape[:2] == (5, 1) and given["t"].shape[3] == 8
        assert freqs.shape == (5, 1, 1, 8) and freqs.dtype == torch.float32
        return turned(given["t"], freqs.cos(), freqs.sin())

    module = "transformer_engine.pytorch.attention.rope"
    install(monkeypatch, module, "apply_rotary_pos_emb", bound(release, compute))
    query, key = torch.randn(5, 3, 8), torch.randn(5, 1, 8)
    rotated = apply_rotary(query, key, table, "transformer_engine")
    for found, heads in zip(rotated, (query, key), strict=True):
        torch.testing.assert_close(found, rope_reference(heads, table.cosines, table.sines, 1.0))


@pytest.mark.parametrize(
    "release", releases("liger_kernel/ops/swiglu.py", "LigerSiLUMulFunction.forward")
)
def test_liger_swiglu(release: inspect.Signature, monkeypatch: pytest.MonkeyPatch) -> None:
    function = SimpleNamespace(
        apply=bound(release, lambda given: functional.silu(given["a"]) * given["b"])
    )
    install(monkeypatch, "liger_kernel.ops.swiglu", "LigerSiLUMulFunction", function)
    rows = torch.randn(3, 16)
    gate, linear = rows.chunk(2, dim=-1)
    torch.testing.assert_close(external.liger_swiglu(rows), functional.silu(gate) * linear)


@pytest.mark.parametrize(
    "release", releases("liger_kernel/ops/swiglu.py", "LigerFusedGateUpSiLUMulFunction.forward")
)
def test_liger_swiglu_on_whole_rows(
    release: inspect.Signature, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(given: dict[str, Any]) -> torch.Tensor:
        gate, linear = given["y"].chunk(2, dim=-1)
        return functional.silu(gate) * linear

    function = SimpleNamespace(apply=bound(release, compute))
    install(monkeypatch, "liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction", function)
    rows = torch.randn(3, 16)
    gate, linear = rows.chunk(2, dim=-1)
    torch.testing.assert_close(external.liger_swiglu(rows), functional.silu(gate) * linear)


@pytest.mark.parametrize(
    "release",
    releases("transformer_engine/pytorch/ops/basic/swiglu.py", "SwiGLU.__init__")
    + releases(
        "transformer_engine/pytorch/ops/basic/activation.py", "_ActivationOperation.__init__"
    ),
)
def test_transformer_engine_swiglu(
    release: inspect.Signature, monkeypatch: pytest.MonkeyPatch
) -> None:
    def composed(rows: torch.Tensor) -> torch.Tensor:
        gate, linear = rows.chunk(2, -1)
        return functional.silu(gate) * linear

    made = bound(release, lambda given: composed)
    install(monkeypatch, "transformer_engine.pytorch.ops", "SwiGLU", made)
    rows = torch.randn(3, 16)
    torch.testing.assert_close(external.transformer_engine_swiglu()(rows), composed(rows))


@pytest.mark.parametrize(
    "release", releases("transformer_engine/pytorch/module/rmsnorm.py", "RMSNorm.__init__")
)
def test_transformer_engine_rms_norm(
    release: inspect.Signature, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(given: dict[str, Any]) -> torch.nn.Module:
        return torch.nn.RMSNorm(
            given["normalized_shape"], given["eps"], dtype=given["params_dtype"]
        )

    install(monkeypatch, "transformer_engine.pytorch", "RMSNorm", bound(release, compute))
    weights = [torch.nn.Parameter(torch.rand(8, dtype=torch.bfloat16)) for _ in range(2)]
    normalise = external.transformer_engine_rms_norm(1e-3)
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    for weight in weights:
        expected = functional.rms_norm(x, (8,), weight, 1e-3)
        torch.testing.assert_close(normalise(x, weight), expected)
        # The weight belongs to the run, and its gradient must arrive there.
        normalise(x, weight).sum().backward()
        assert weight.grad is not None


@pytest.mark.parametrize(
    "release", releases("liger_kernel/ops/cross_entropy.py", "LigerCrossEntropyFunction.forward")
)
def test_liger_cross_entropy(release: inspect.Signature, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(given: dict[str, Any]) -> Any:
        assert given["weight"] is None and given["ignore_index"] == -100
        assert given["lse_square_scale"] == given["label_smoothing"] == 0.0
        reduction = given["reduction"]
        return functional.cross_entropy(given["_input"], given["target"], reduction=reduction), None

    function = SimpleNamespace(apply=bound(release, compute))
    install(monkeypatch, "liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction", function)
    logits, labels = torch.randn(4, 9), torch.tensor([1, 0, 8, 3])
    expected = functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(external.liger_cross_entropy(logits, labels), expected)


@pytest.mark.parametrize(
    "release",
    releases(
        "transformer_engine/pytorch/cross_entropy.py",
        "parallel_cross_entropy",
        "CrossEntropyFunction.forward",  # the older releases' implementation of that function
    ),
)
def test_transformer_engine_cross_entropy(
    release: inspect.Signature, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(given: dict[str, Any]) -> torch.Tensor:
        values = given.get("inp", given.get("_input"))
        assert values.shape == (1, 4, 9) and given["target"].shape == (1, 4)
        assert given["label_smoothing"] == 0.0 and given["reduce_loss"] is False
        assert given["dist_process_group"] is None and given["ignore_idx"] == -100
        return functional.cross_entropy(values[0], given["target"][0], reduction="none")[None]

    module = "transformer_engine.pytorch.cross_entropy"
    install(monkeypatch, module, "parallel_cross_entropy", bound(release, compute))
    logits, labels = torch.randn(4, 9), torch.tensor([1, 0, 8, 3])
    expected = functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(external.transformer_engine_cross_entropy(logits, labels), expected)


def test_a_library_that_is_not_whole_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_a_library.py").write_text("raise RuntimeError('no driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not external.can_import("half_a_library")
    assert not external.can_import("no_such_library_at_all")
    assert external.can_import("json")
