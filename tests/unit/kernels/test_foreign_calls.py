"""Checks calls into libraries that need a GPU against the signatures of their releases.

`tools/record_signatures.py` creates the record from unpacked sources. A substitute for each
release's function refuses the arguments that the release would refuse and computes what the release
documents. The arguments that the package passes (segments, masks, groups) are therefore checked
too.
"""

import inspect
from typing import Any

import pytest
import torch
from foreign_releases import RECORD, install, signature

from megatron_chatflow.kernels import attention as attention_backends
from megatron_chatflow.kernels.attention import KERNELS, Segments
from megatron_chatflow.kernels.external import liger_rms_norm
from megatron_chatflow.kernels.rms_norm import rms_norm_reference
from megatron_chatflow.model.attention import PackedCausalAttention
from megatron_chatflow.model.packed import pack_tokens
from megatron_chatflow.model.rotary import Rotary


def recorded(file: str, function: str) -> list[Any]:
    """Returns the signature of ``function`` in each release with a path that contains ``file``."""
    rows = [row for row in RECORD if file in row["file"] and row["function"] == function]
    assert rows, f"{file} {function} is not in the record"
    return [pytest.param(signature(row["parameters"]), id=row["version"]) for row in rows]


def causal_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """Implements the definition: the last query of a segment attends to all of its keys."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    parts = []
    queries, keys = segments.cu_queries.tolist(), segments.cu_keys.tolist()
    assert max(b - a for a, b in zip(queries, queries[1:], strict=False)) == segments[2]
    assert max(b - a for a, b in zip(keys, keys[1:], strict=False)) == segments[3]
    for i in range(len(queries) - 1):
        q, k = query[queries[i] : queries[i + 1]], key[keys[i] : keys[i + 1]]
        seen = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, value[keys[i] : keys[i + 1]]))
    return torch.cat(parts)


def check(backend: str) -> None:
    """Checks whole documents through the module, then parts of them as in context parallelism."""
    torch.manual_seed(0)
    query, key, value = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    packed = pack_tokens(
        torch.tensor([0, 1, 5, 6, 12], dtype=torch.int32),
        rotary=Rotary(8, 100.0),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    contexts = [
        PackedCausalAttention(_Settings(), 1, None, "self", backend=name)(
            query, key, value, None, packed_seq_params=packed
        )
        for name in (backend, "sdpa")
    ]
    torch.testing.assert_close(*contexts)

    ends = torch.tensor([0, 2, 5]), torch.tensor([0, 6, 12])
    segments = Segments(*(end.to(torch.int32) for end in ends), 3, 6)
    context = KERNELS[backend](query[:5], key, value, segments, 0.3, True)
    torch.testing.assert_close(context, causal_segments(query[:5], key, value, segments, 0.3))


class _Settings:
    deterministic_mode = True


@pytest.mark.parametrize(
    ("backend", "module", "releases"),
    [
        ("flash_attn_2", "flash_attn", "flash_attn/flash_attn_interface.py"),
        ("flash_attn_3", "flash_attn_interface", "hopper/"),
        ("flash_attn_4", "flash_attn.cute", "cute/"),
    ],
)
@pytest.mark.parametrize("returns_softmax", [False, True])
def test_flash_attn(
    backend: str,
    module: str,
    releases: str,
    returns_softmax: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for row in recorded(releases, "flash_attn_varlen_func"):

        def function(*args: Any, _signature: Any = row.values[0], **kwargs: Any) -> Any:
            given = _signature.bind(*args, **kwargs).arguments
            assert given["causal"] is True and given["deterministic"] is True
            lengths = (given[f"{kind}_seqlen{end}"] for kind, end in _FLASH_LENGTHS)
            scale = given.get("softmax_scale") or given["q"].shape[-1] ** -0.5
            context = causal_segments(given["q"], given["k"], given["v"], Segments(*lengths), scale)
            return (context, None) if returns_softmax else context

        install(monkeypatch, module, "flash_attn_varlen_func", function)
        check(backend)


_FLASH_LENGTHS = (("cu", "s_q"), ("cu", "s_k"), ("max", "_q"), ("max", "_k"))


@pytest.mark.parametrize(
    ("construct", "call"),
    [
        pytest.param(first.values[0], second.values[0], id=first.id)
        for first, second in zip(
            recorded("transformer_engine", "DotProductAttention.__init__"),
            recorded("transformer_engine", "DotProductAttention.forward"),
            strict=True,
        )
    ],
)
def test_transformer_engine(
    construct: inspect.Signature, call: inspect.Signature, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DotProductAttention:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.made = construct.bind(*args, **kwargs).arguments

        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            given = call.bind(*args, **kwargs).arguments
            query, key = given["query_layer"], given["key_layer"]
            assert given["qkv_format"] == self.made["qkv_format"] == "thd"
            assert self.made["attention_dropout"] == 0.0
            assert (self.made["num_attention_heads"], self.made["kv_channels"]) == query.shape[1:]
            assert self.made["num_gqa_groups"] == key.shape[1]
            segments = Segments(
                given["cu_seqlens_q"],
                given["cu_seqlens_kv"],
                given["max_seqlen_q"],
                given["max_seqlen_kv"],
            )
            is_square = torch.equal(segments.cu_queries, segments.cu_keys)
            mask = "padding_causal" if is_square else "padding_causal_bottom_right"
            assert given["attn_mask_type"] == mask
            scale = self.made.get("softmax_scale") or query.shape[-1] ** -0.5
            # The library returns the heads concatenated.
            return causal_segments(query, key, given["value_layer"], segments, scale).flatten(1)

    attention_backends._transformer_engine_module.cache_clear()
    install(monkeypatch, "transformer_engine.pytorch", "DotProductAttention", DotProductAttention)
    check("transformer_engine")
    attention_backends._transformer_engine_module.cache_clear()


@pytest.mark.parametrize("release", recorded("liger_kernel", "LigerRMSNormFunction.forward"))
def test_liger_kernel(release: inspect.Signature, monkeypatch: pytest.MonkeyPatch) -> None:
    class LigerRMSNormFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> torch.Tensor:
            given = release.bind(*args).arguments
            assert given["offset"] == 0.0 and given["casting_mode"] == "gemma"
            # In-place, liger-kernel would overwrite a gradient that others may still read.
            assert given["in_place"] is False
            return rms_norm_reference(given["X"], given["W"], given["eps"])[0]

    install(monkeypatch, "liger_kernel.ops.rms_norm", "LigerRMSNormFunction", LigerRMSNormFunction)
    x, weight = torch.randn(3, 8), torch.randn(8)
    expected = torch.nn.functional.rms_norm(x, (8,), weight, 1e-5)
    torch.testing.assert_close(liger_rms_norm(x, weight, 1e-5), expected)
