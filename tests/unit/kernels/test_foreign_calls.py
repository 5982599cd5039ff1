"""Checks calls into libraries that need a GPU against the signatures of their releases.

`tools/record_signatures.py` creates the record from unpacked sources. A substitute for each
release's function refuses the arguments that the release would refuse and computes what the release
documents. The arguments that the package passes (segments, masks, groups) are therefore checked
too.
"""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_releases import RECORD, install, signature

import record_signatures
from megatron_chatflow.kernels.attention import KERNELS, Segments
from megatron_chatflow.model.attention import PackedCausalAttention
from megatron_chatflow.model.packed import pack_tokens
from megatron_chatflow.model.rotary import Rotary

STANDIN = Path(__file__).parents[2] / "te_standin" / "transformer_engine" / "pytorch"


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
    ("file", "function"),
    [
        ("attention/__init__.py", "DotProductAttention.__init__"),
        ("attention/__init__.py", "DotProductAttention.forward"),
        ("attention/rope.py", "apply_rotary_pos_emb"),
        ("module/__init__.py", "RMSNorm.__init__"),
        ("module/__init__.py", "Linear.__init__"),
        ("module/__init__.py", "Linear.forward"),
        ("module/__init__.py", "LayerNormLinear.__init__"),
        ("module/__init__.py", "LayerNormLinear.forward"),
        ("module/base.py", "initialize_ub"),
        ("module/base.py", "destroy_ub"),
        ("graph.py", "make_graphed_callables"),
        ("optimizers.py", "FusedAdam.__init__"),
        ("optimizers.py", "FusedAdam.initialize_state"),
        ("optimizers.py", "FusedAdam.get_unscaled_state"),
        ("optimizers.py", "FusedAdam.set_scaled_state"),
        ("optimizers.py", "FusedAdam.step"),
    ],
)
def test_the_stand_in_has_transformer_engine_s_parameters(file: str, function: str) -> None:
    """Compares with a release before and two after the stand-in's version, in their order."""
    tree = ast.parse((STANDIN / file).read_text(encoding="utf-8"))
    found = record_signatures.find(tree, function)
    assert found is not None
    ours = [name.rstrip("=") for name in record_signatures.parameters_of(found)]
    releases = {
        row["version"]: [name.rstrip("=") for name in row["parameters"]]
        for row in RECORD
        if "transformer_engine" in row["file"] and row["function"] == function
    }
    older, *newer = (
        next(theirs for version, theirs in releases.items() if version.startswith(wanted))
        for wanted in ("2.8", "2.12", "2.20")
    )
    assert [name for name in ours if name in older] == older
    for theirs in newer:
        assert [name for name in theirs if name in ours] == ours
