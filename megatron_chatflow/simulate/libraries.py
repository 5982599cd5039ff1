"""The libraries of the simulated machine: kernels that shapes can stand for.

`install` replaces these names:

- ``kernels.cuda.LIBRARY`` and ``KernelLibrary``: the kernels of ``csrc/kernels`` count as built;
  their operators have shape functions;
- ``torch.nn.functional.scaled_dot_product_attention``, whose choice of a kernel asks the CUDA
  runtime: calls the operator of the kernel that torch would take;
- ``torch.nn.functional.rms_norm``, which torch without CUDA composes, and ``swiglu`` and
  ``swiglu_back`` of ``megatron.core.fusions.fused_bias_swiglu``, which torch's compiler fuses:
  call an operator for the kernel that runs on a GPU;
- ``init``, ``create_nccl_mem_pool`` and ``nccl_mem`` of ``megatron.core.nccl_allocator``, which
  compile a library against NCCL: registered buffers count as ordinary memory;
- ``runtime.launch.first_gpu_capability``, which asks the driver;
- ``torch.cuda.nvtx.range_push`` and ``range_pop``: do nothing;
- ``isinstance`` of ``megatron.core.pipeline_parallel.fine_grained_activation_offload``, which
  refuses to offload tensors without values: there, they count as ordinary ones.

Libraries that are not installed here, such as flash-attn and transformer-engine, are not simulated.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional
from megatron.core import nccl_allocator
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.pipeline_parallel import fine_grained_activation_offload
from torch._subclasses.fake_tensor import FakeTensor

from megatron_chatflow.kernels import cuda
from megatron_chatflow.model import attention
from megatron_chatflow.runtime import launch
from megatron_chatflow.simulate.device import GpuModel

aten = torch.ops.aten


@torch.library.custom_op("chatflow_simulated::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("nothing is computed")


@torch.library.custom_op("chatflow_simulated::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError("nothing is computed")


@torch.library.custom_op("chatflow_simulated::swiglu", mutates_args=())
def _swiglu(rows: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("nothing is computed")


@torch.library.custom_op("chatflow_simulated::swiglu_back", mutates_args=())
def _swiglu_back(gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("nothing is computed")


@_rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@_swiglu.register_fake
def _(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:-1], rows.shape[-1] // 2))


@_swiglu_back.register_fake
def _(gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_gradient(ctx: Any, gradient: torch.Tensor, _rstd: Any) -> tuple[Any, ...]:
    return (*_rms_norm_backward(gradient, *ctx.saved_tensors), None)


_rms_norm.register_autograd(_rms_norm_gradient, setup_context=_keep)


class SimulatedLibrary:
    """Stands for the compiled library; its operators never launch on tensors without values."""

    def __init__(self, path: Path) -> None:
        pass


def install(gpu: GpuModel) -> None:
    """Replaces the names above where they are defined and where they are bound."""
    scaled_dot_product_attention = _attention_on(gpu)
    replaced: dict[Any, dict[str, Any]] = {
        cuda: {"LIBRARY": Path(__file__), "KernelLibrary": SimulatedLibrary},
        launch: {"first_gpu_capability": lambda: gpu.capability},
        torch.nn.functional: {
            "scaled_dot_product_attention": scaled_dot_product_attention,
            "rms_norm": _norm_on_gpu(),
        },
        fused_bias_swiglu: {"swiglu": _swiglu, "swiglu_back": _swiglu_back},
        nccl_allocator: {
            "init": lambda: None,
            "create_nccl_mem_pool": lambda symmetric=None: None,
            "nccl_mem": lambda pool, **options: nullcontext(),
        },
        torch.cuda.nvtx: {"range_push": lambda _: 0, "range_pop": lambda: 0},
        fine_grained_activation_offload: {"isinstance": _is_instance},
        attention: {"scaled_dot_product_attention": scaled_dot_product_attention},
    }
    for module, names in replaced.items():
        for name, replacement in names.items():
            setattr(module, name, replacement)
    cuda.load_kernels.cache_clear()


def _is_instance(value: object, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, FakeTensor)


def _norm_on_gpu() -> Any:
    composed = torch.nn.functional.rms_norm

    def rms_norm(
        x: torch.Tensor, shape: list[int], weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        if not x.is_cuda:
            return composed(x, shape, weight, epsilon)
        normalized: torch.Tensor = _rms_norm(x, weight, epsilon)[0]
        return normalized

    return rms_norm


def _attention_on(gpu: GpuModel) -> Any:
    composed = torch.nn.functional.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        if not query.is_cuda:
            return composed(query, key, value, attn_mask, dropout_p, is_causal, **options)
        keeps = torch.is_grad_enabled() and query.requires_grad
        has_cudnn = gpu.capability >= (9, 0) and torch._C._get_cudnn_sdp_enabled()
        if attn_mask is not None and not enable_gqa and is_half:
            mask = attn_mask.expand(*query.shape[:3], key.shape[2])
            result = aten._scaled_dot_product_efficient_attention(
                query, key, value, mask, keeps, dropout_p, is_causal, scale=scale
            )
        elif attn_mask is not None or (enable_gqa and not is_half):
            result = aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, **options
            )
        elif is_half and has_cudnn:
            result = aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, keeps, dropout_p, is_causal, False, scale=scale
            )
        elif is_half:
            result = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )
        else:
            result = aten._scaled_dot_product_efficient_attention(
                query, key, value, None, keeps, dropout_p, is_causal, scale=scale
            )
        context: torch.Tensor = result[0]
        return context

    return scaled_dot_product_attention
