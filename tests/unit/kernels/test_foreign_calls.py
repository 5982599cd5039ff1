"""Checks calls into libraries that need a GPU against the signatures of their releases.

`tools/record_signatures.py` creates the record from unpacked sources. A substitute for each
release's function refuses the arguments that the release would refuse and computes what the release
documents. The arguments that the package passes (segments, masks, groups) are therefore checked
too.
"""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_releases import RECORD, install, signature
from megatron.core import optimizer

import record_signatures
from megatron_chatflow.kernels.attention import KERNELS, Segments
from megatron_chatflow.model.attention import PackedCausalAttention
from megatron_chatflow.model.packed import pack_tokens
from megatron_chatflow.model.rotary import Rotary

STANDIN = Path(__file__).parents[2] / "te_standin" / "transformer_engine"


def recorded(file: str, function: str) -> list[Any]:
    """Returns the signature of ``function`` in each release with a path that contains ``file``."""
    rows = [row for row in RECORD if file in row["file"] and row["function"] == function]
    assert rows, f"{file} {function} is not in the record"
    return [pytest.param(signature(row["parameters"]), id=row["version"]) for row in rows]


def causal_segments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float,
    left: int = -1,
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
        if left >= 0:
            seen &= seen.triu(len(k) - len(q) - left)
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
    for settings in (_Settings(), _Windowed()):
        contexts = [
            PackedCausalAttention(settings, 1, None, "self", backend=name)(
                query, key, value, None, packed_seq_params=packed
            )
            for name in (backend, "sdpa")
        ]
        torch.testing.assert_close(*contexts)

    ends = torch.tensor([0, 2, 5]), torch.tensor([0, 6, 12])
    segments = Segments(*(end.to(torch.int32) for end in ends), 3, 6)
    for window in (None, 3):
        context = KERNELS[backend](query[:5], key, value, segments, 0.3, True, window)
        left = -1 if window is None else window - 1
        expected = causal_segments(query[:5], key, value, segments, 0.3, left)
        torch.testing.assert_close(context, expected)


class _Settings:
    deterministic_mode = True
    window_size: tuple[int, int] | None = None


class _Windowed(_Settings):
    window_size = (3, 0)


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
            left, right = given.get("window_size", (-1, 0))
            assert right == 0
            heads = given["q"], given["k"], given["v"]
            context = causal_segments(*heads, Segments(*lengths), scale, left)
            return (context, None) if returns_softmax else context

        install(monkeypatch, module, "flash_attn_varlen_func", function)
        check(backend)


_FLASH_LENGTHS = (("cu", "s_q"), ("cu", "s_k"), ("max", "_q"), ("max", "_k"))


# What megatron-core and this package call, by the stand-in's files. Its own helpers, the classes
# that megatron-core only derives from and the compiled `multi_tensor_*` are not compared.
STANDIN_FUNCTIONS = {
    "common/recipe.py": [
        "DelayedScaling",
        "Float8CurrentScaling",
        "Float8BlockScaling",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
    ],
    "pytorch/attention/__init__.py": [
        "DotProductAttention.__init__",
        "DotProductAttention.forward",
    ],
    "pytorch/attention/rope.py": ["apply_rotary_pos_emb"],
    "pytorch/cpu_offload.py": ["get_cpu_offload_context"],
    "pytorch/distributed.py": [
        "activation_recompute_forward",
        "checkpoint",
        "get_all_rng_states",
        "is_fp8_activation_recompute_enabled",
    ],
    "pytorch/fp8.py": [
        "FP8GlobalStateManager.is_fp8_enabled",
        "FP8GlobalStateManager.reset",
        "fp8_autocast",
        "fp8_model_init",
    ],
    "pytorch/graph.py": [
        "make_graphed_callables",
        "restore_fp8_tensors",
        "save_fp8_tensors",
        "set_capture_end",
        "set_capture_start",
    ],
    "pytorch/module/__init__.py": [
        "LayerNormLinear.__init__",
        "LayerNormLinear.forward",
        "Linear.__init__",
        "Linear.forward",
        "RMSNorm.__init__",
        "RMSNorm.forward",
    ],
    "pytorch/module/base.py": [
        "TransformerEngineBaseModule.get_extra_state",
        "TransformerEngineBaseModule.set_extra_state",
        "destroy_ub",
        "get_dummy_wgrad",
        "initialize_ub",
    ],
    "pytorch/optimizers.py": [
        "FusedAdam.__init__",
        "FusedAdam.get_unscaled_state",
        "FusedAdam.initialize_state",
        "FusedAdam.set_scaled_state",
        "FusedAdam.step",
        "MultiTensorApply.__call__",
    ],
    "pytorch/tensor/__init__.py": [
        "Float8Tensor.quantize_",
        "QuantizedTensor.dequantize",
        "QuantizedTensor.quantize_",
    ],
    "pytorch/tensor/mxfp8_tensor.py": ["MXFP8Tensor.quantize_"],
    "pytorch/tensor/utils.py": [
        "cast_master_weights_to_fp8",
        "post_all_gather_processing",
        "replace_raw_data",
    ],
    "pytorch/utils.py": ["make_weak_ref"],
}
INHERITED = {"RMSNorm.forward": "BasicOperation.forward"}
# megatron-core gives `save_fp8_tensors` the recipe by position.
RENAMED = {("save_fp8_tensors", "fp8_recipe"): "recipe"}


@pytest.mark.parametrize(
    ("file", "function"),
    [(file, function) for file, names in STANDIN_FUNCTIONS.items() for function in names],
)
def test_the_stand_in_has_transformer_engine_s_parameters(file: str, function: str) -> None:
    """Compares with the release that the stand-in stands for, one before it, and two after it."""
    tree = ast.parse((STANDIN / file).read_text(encoding="utf-8"))
    found = record_signatures.find(tree, function)
    assert found is not None
    ours = record_signatures.parameters_of(found)
    releases = {
        row["version"]: row["parameters"]
        for row in RECORD
        if "transformer_engine" in row["file"]
        and row["function"] == INHERITED.get(function, function)
    }
    assert ours == releases["2.12.0" if file == "pytorch/tensor/utils.py" else "2.9.0"]

    def names_in(version: str) -> list[str]:
        names = [name.rstrip("=") for name in releases[version]]
        return [RENAMED.get((function, name), name) for name in names]

    names = [name.rstrip("=") for name in ours]
    if function != "post_all_gather_processing":  # later than 2.8
        assert [name for name in names if name in names_in("2.8.0")] == names_in("2.8.0")
    for version in ("2.12.0", "2.20.2"):
        assert [name for name in names_in(version) if name in names] == names


@pytest.mark.parametrize("release", recorded("apex/", "FusedAdam.__init__"))
@pytest.mark.parametrize("decoupled", [False, True])
def test_megatron_core_gives_apex_s_adam_arguments_that_it_has(
    release: inspect.Signature, decoupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apex's kernels are compiled; only what its optimizer is constructed with can be compared."""

    class ArgumentsFitError(Exception): ...

    def construct(*args: Any, **kwargs: Any) -> None:
        given = release.bind(*args, **kwargs).arguments
        assert given["adam_w_mode"] is decoupled and given["params"] == [group]
        raise ArgumentsFitError

    monkeypatch.setattr(optimizer, "Adam", construct)
    monkeypatch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    config = optimizer.OptimizerConfig(optimizer="adam", lr=0.1, weight_decay=0.01)
    config.decoupled_weight_decay = decoupled
    group = {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.1, "weight_decay": 0.01}
    with pytest.raises(ArgumentsFitError):
        optimizer._get_megatron_optimizer_based_on_param_groups(
            config, model_chunks=[], param_groups=[group]
        )
