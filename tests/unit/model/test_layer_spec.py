"""Tests which implementation of the layers a run uses."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_chatflow.config import ParallelConfig, TrainConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels.attention import Facts
from megatron_chatflow.model.layer_spec import (
    check_layers,
    choose_layers,
    start_user_buffers,
)


def chosen(
    impl: str,
    *,
    capability: Any = (9, 0),
    installed: Any = "2.9",
    backend: Any = "auto",
    has_flash: bool = False,
    **facts: Any,
) -> tuple[str, str]:
    values = {"dtype": torch.bfloat16, "head_dim": 128, "import_error": lambda name: None, **facts}
    libraries = {"transformer_engine": installed} if installed else {}
    here = Facts(
        capability=capability,
        deterministic=False,
        installed={**libraries, **({"flash_attn_2": "2.7"} if has_flash else {})},
        has_cudnn=False,
        **values,
    )
    train: Any = TrainConfig(
        train_iters=1,
        micro_batch_size=1,
        global_batch_size=1,
        transformer_impl=impl,
        attention_backend=backend,
    )
    layers = choose_layers(train, here)
    return layers.implementation, layers.descriptions["layers"]


@pytest.mark.parametrize("backend", ["auto", "transformer_engine", "cudnn"])
def test_transformer_engine_is_used_where_it_works(backend: str) -> None:
    assert chosen("auto", backend=backend) == (
        "transformer_engine",
        "transformer-engine 2.9, through megatron-core",
    )


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"installed": None}, "transformer-engine is not installed"),
        ({"installed": "1.13"}, "transformer-engine 1.13 is older than 2.0"),
        ({"capability": None}, "there is no GPU"),
        ({"capability": (7, 0)}, "it has no kernel for sm_70"),
        ({"dtype": torch.float32}, "it has no torch.float32 kernel"),
        ({"head_dim": 512}, "it has no kernel for heads of 512"),
        ({"import_error": lambda name: "OSError: libcudnn"}, "OSError: libcudnn"),
        ({"backend": "sdpa"}, "--attention-backend sdpa is a part of local layers"),
        ({"backend": "flash"}, "--attention-backend flash needs flash-attn in them, which is not"),
    ],
)
def test_local_layers_are_used_elsewhere_and_the_log_says_why(facts: Any, reason: str) -> None:
    name, description = chosen("auto", **facts)
    assert name == "local" and reason in description


def test_a_request_is_followed_wherever_the_library_can_be_imported() -> None:
    assert chosen("local")[0] == "local"
    assert chosen("transformer_engine", capability=None, dtype=torch.float32)[0] == (
        "transformer_engine"
    )


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"installed": None}, "train.transformer_impl: .* is not installed; change that, or"),
        ({"import_error": lambda name: "OSError: x"}, r"cannot be imported \(OSError: x\)"),
        ({"backend": "flash_attn_2"}, "--attention-backend flash_attn_2 is a part of local layers"),
    ],
)
def test_a_request_that_cannot_be_followed_is_refused(facts: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen("transformer_engine", **facts)


@pytest.mark.parametrize(
    ("facts", "has_window"),
    [
        ({"cudnn_version": 90600}, True),
        ({"cudnn_version": 91002}, True),
        ({"cudnn_version": None}, True),
        ({"cudnn_version": 90501}, False),
        ({"cudnn_version": 91000}, False),
        ({"cudnn_version": 91002, "capability": (8, 0)}, False),
        ({"cudnn_version": 90501, "has_flash": True}, True),
    ],
)
def test_a_window_needs_a_kernel_in_transformer_engine(facts: Any, has_window: bool) -> None:
    name, description = chosen("auto", window=4096, **facts)
    assert (name == "transformer_engine") == has_window
    assert chosen("auto", **facts)[0] == "transformer_engine"
    if not has_window:
        assert "its sliding window for packed documents needs flash-attn, or cuDNN" in description
        with pytest.raises(UserError, match="needs flash-attn, or cuDNN 9.6"):
            chosen("transformer_engine", window=4096, **facts)


OFFLOADING = {"fine_grained_activation_offloading": True, "offload_modules": ("core_attn",)}


GRAPHS = {"cuda_graph_impl": "transformer_engine"}


def checked(
    layers: str = "transformer_engine",
    *,
    capability: Any = (9, 0),
    installed: str = "2.9",
    overlap: bool = False,
    use_nccl_ub: bool = False,
    window: int | None = None,
    **settings: Any,
) -> None:
    here = Facts(
        capability=capability,
        dtype=torch.bfloat16,
        head_dim=128,
        deterministic=False,
        installed={"transformer_engine": installed},
        has_cudnn=False,
        import_error=lambda name: None,
        window=window,
        cudnn_version=90501,
    )
    sizes: Any = {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1}
    parallel = ParallelConfig(
        sequence_parallel=overlap, tp_comm_overlap=overlap, use_nccl_ub=use_nccl_ub
    )
    check_layers(TrainConfig(**sizes, **settings), parallel, here, layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "local", "fp8_format": "e4m3"}, "fp8_format: needs the layers of transformer-"),
        (
            {"layers": "local", "fp8_format": "e4m3", "window": 4096},
            "fp8_format: needs the layers of transformer-engine, and its sliding window for packed",
        ),
        (
            {"layers": "local", "cuda_graph_impl": "transformer_engine"},
            "train.cuda_graph_impl: needs the layers of transformer-engine, and",
        ),
        (
            {"capability": None, "cuda_graph_impl": "transformer_engine"},
            "train.cuda_graph_impl: needs a GPU, and this run is on CPUs; remove the setting",
        ),
        (
            {"capability": None, **OFFLOADING},
            "train.fine_grained_activation_offloading: needs a GPU, and this run is on CPUs",
        ),
        ({"layers": "local", **OFFLOADING}, "offloading: needs the layers of transformer-engine"),
        ({"installed": "2.10", **OFFLOADING}, "set the environment variable NVTE_CPU_OFFLOAD_V1=1"),
        ({"capability": None, "use_nccl_ub": True}, "parallel.use_nccl_ub: needs a GPU, and this"),
        ({"layers": "local", "overlap": True}, "parallel.tp_comm_overlap: needs the layers of tra"),
        (
            {"capability": (8, 0), "fp8_format": "hybrid"},
            "tensorwise needs a GPU of compute capability 8.9, and this one has 8.0",
        ),
        (
            {"installed": "2.11", "fp8_format": "hybrid", "fp8_param_gather": True, **GRAPHS},
            "fp8_param_gather: needs transformer-engine 2.12 with train.cuda_graph_impl, and 2.11",
        ),
        (
            {
                **{"installed": "2.1", "capability": (10, 0), "fp8_param_gather": True},
                **{"fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
            },
            "fp8_param_gather: needs transformer-engine 2.2, and 2.1 is installed",
        ),
        (
            {
                **{"installed": "2.3", "capability": (10, 0), "overlap": True},
                **{"fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
            },
            "parallel.tp_comm_overlap: with train.fp8_recipe mxfp8 it needs transformer-engine 2.4",
        ),
        (
            {
                **{"installed": "2.6", "overlap": True, "fp8_format": "hybrid"},
                "first_last_layers_bf16": True,
            },
            "tp_comm_overlap: with train.first_last_layers_bf16 it needs transformer-engine 2.7",
        ),
        ({"fp8_format": "hybrid", "fp8_recipe": "mxfp8"}, "mxfp8 needs a GPU .* 10.0, and this"),
        ({"fp4_format": "e2m1"}, "train.fp4_format: nvfp4 needs a GPU of compute capability 10.0"),
        (
            {"installed": "2.2", "fp8_format": "hybrid", "fp8_recipe": "blockwise"},
            "blockwise needs transformer-engine 2.3, and 2.2 is installed",
        ),
    ],
)
def test_a_precision_that_this_machine_lacks_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        checked(**arguments)


def test_a_precision_that_this_machine_has_is_accepted() -> None:
    checked("local")
    checked(fp8_format="hybrid", fp8_recipe="blockwise")
    checked(fp8_format="hybrid", fp8_recipe="mxfp8", capability=(10, 0))
    checked(fp8_format="hybrid", fp8_param_gather=True)
    checked(fp8_format="hybrid", fp8_param_gather=True, installed="2.12", **GRAPHS)
    checked(fp8_format="hybrid", capability=None)  # a stand-in on CPUs
    checked(**OFFLOADING)
    checked(overlap=True, fp8_format="hybrid", installed="2.6")
    checked(overlap=True, fp8_format="hybrid", first_last_layers_bf16=True)


def test_user_buffers_that_cannot_be_set_up_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize_ub(**_: Any) -> None:
        raise RuntimeError("CUDA device does not support multicast;\n set UB_SKIPMC=1")

    base = SimpleNamespace(initialize_ub=initialize_ub, destroy_ub=lambda: None)
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    module = SimpleNamespace(base=base)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module", module)
    config: Any = SimpleNamespace(
        fp8=None,
        hidden_size=64,
        params_dtype=torch.bfloat16,
        tensor_model_parallel_size=2,
        tp_comm_bootstrap_backend="nccl",
    )
    with pytest.raises(UserError, match="user buffers: CUDA device .* set UB_SKIPMC=1; set what"):
        start_user_buffers(config, 128)


@pytest.mark.parametrize(
    ("impl", "facts"),
    [("local", {}), ("auto", {"installed": None}), ("auto", {"capability": None})],
)
def test_its_attention_is_refused_without_its_layers(impl: str, facts: Any) -> None:
    with pytest.raises(UserError, match="attention_backend: transformer_engine cannot be used"):
        chosen(impl, backend="transformer_engine", **facts)
