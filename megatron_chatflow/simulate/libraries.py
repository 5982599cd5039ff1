"""The libraries of the simulated machine: kernels that shapes can stand for.

`install` replaces these names:

- ``kernels.cuda.LIBRARY`` and ``KernelLibrary``: the kernels of ``csrc/kernels`` count as built;
  their operators have shape functions;
- ``model.kernel_choice.choose_fastest``: nothing is measured, and the first implementation that can
  be used is taken;
- ``torch.nn.functional.scaled_dot_product_attention``, whose choice of a kernel asks the CUDA
  runtime: calls the operator of the kernel that torch would take;
- ``runtime.launch.first_gpu_capability``, which asks the driver.

Libraries that are not installed here, such as flash-attn and transformer-engine, are not simulated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional

from megatron_chatflow.kernels import cuda
from megatron_chatflow.model import attention, kernel_choice
from megatron_chatflow.model.kernel_choice import Choice
from megatron_chatflow.runtime import launch
from megatron_chatflow.simulate.device import GpuModel

aten = torch.ops.aten


class SimulatedLibrary:
    """Stands for the compiled library; its operators never launch on tensors without values."""

    def __init__(self, path: Path) -> None:
        pass


def install(gpu: GpuModel) -> None:
    """Replaces the names above where they are defined and where they are bound."""
    scaled_dot_product_attention = _attention_on(gpu)
    replaced: dict[Any, dict[str, Any]] = {
        cuda: {"LIBRARY": Path(__file__), "KernelLibrary": SimulatedLibrary},
        kernel_choice: {"choose_fastest": _choose_first},
        launch: {"first_gpu_capability": lambda: gpu.capability},
        torch.nn.functional: {"scaled_dot_product_attention": scaled_dot_product_attention},
        attention: {"scaled_dot_product_attention": scaled_dot_product_attention},
    }
    for module, names in replaced.items():
        for name, replacement in names.items():
            setattr(module, name, replacement)
    cuda.load_kernels.cache_clear()


def _choose_first(operations: Sequence[Any], *_: Any, **__: Any) -> list[Any]:
    chosen = []
    for operation in operations:
        name = next(name for name in operation.names if name in operation.implementations)
        chosen.append(Choice(name, f"{name}, the first that can be used: nothing is measured"))
    return chosen


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
        if not query.is_cuda or attn_mask is not None or (enable_gqa and not is_half):
            return composed(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        keeps = torch.is_grad_enabled() and query.requires_grad
        has_cudnn = gpu.capability >= (9, 0) and torch._C._get_cudnn_sdp_enabled()
        if is_half and has_cudnn:
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
