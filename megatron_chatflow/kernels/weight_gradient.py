"""Weight gradients of megatron-core's own linear layers, added to the gradient buffer in place.

A linear layer's weight gradient is a matrix product that is added to the gradients of earlier
micro-batches, which are kept in fp32. megatron-core uses a kernel of Apex for both at once
(``fused_weight_gradient_mlp_cuda``). Where Apex is not installed, `TorchWeightGradients` takes its
place: cuBLAS multiplies bf16 matrices and accumulates into an fp32 matrix, which `torch.addmm`
offers with ``out_dtype``. Otherwise the product is rounded to bf16, written to memory and added by
another kernel.
"""

import importlib
from importlib.util import find_spec

import torch
from megatron.core.tensor_parallel import layers

_APEX = "fused_weight_gradient_mlp_cuda"


class TorchWeightGradients:
    """The functions of Apex's ``fused_weight_gradient_mlp_cuda`` that megatron-core calls.

    All of them add ``grad_output.t() @ total_input`` to ``main_grad``. Shapes: total_input
    ``[tokens, in]``, grad_output ``[tokens, out]``, main_grad ``[out, in]``.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(
        total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        """Accumulates into fp32; inputs in bf16, fp16 or fp32."""
        if total_input.dtype == torch.float32:
            main_grad.addmm_(grad_output.t(), total_input)
            return
        torch.addmm(main_grad, grad_output.t(), total_input, out_dtype=torch.float32, out=main_grad)

    @staticmethod
    def wgrad_gemm_accum_fp16(
        total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        """Accumulates into the dtype of the inputs."""
        main_grad.addmm_(grad_output.t(), total_input)


def fuse_weight_gradients(
    device: torch.device, dtype: torch.dtype, *, requested: bool
) -> tuple[bool, str]:
    """Makes megatron-core's linear layers use a fused weight gradient if there is one.

    It sets the names ``fused_weight_gradient_mlp_cuda`` and
    ``_grad_accum_fusion_available`` of ``megatron.core.tensor_parallel.layers``.

    Args:
        device: The device of this process.
        dtype: The dtype of weights and activations.
        requested: ``--gradient-accumulation-fusion``.

    Returns:
        Whether layers have to be built with ``gradient_accumulation_fusion``, and a description
        for the log.
    """
    if not requested:
        return False, "a product and a sum: --no-gradient-accumulation-fusion"
    if device.type != "cuda":
        return False, "a product and a sum"
    apex = "Apex is not installed"
    if find_spec(_APEX) is not None:
        try:
            layers.fused_weight_gradient_mlp_cuda = importlib.import_module(_APEX)
        except ImportError as error:  # built for another torch or CUDA
            apex = f"Apex cannot be imported: {str(error).splitlines()[0]}"
        else:
            layers._grad_accum_fusion_available = True
            return True, "Apex's kernel, which adds to the gradient buffer"
    reason = _obstacle(device, dtype)
    if reason is not None:
        return False, f"a product and a sum: {apex}, and {reason}"
    layers.fused_weight_gradient_mlp_cuda = TorchWeightGradients
    layers._grad_accum_fusion_available = True
    return True, f"torch's addmm, which adds to the gradient buffer ({apex})"


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Tries a small product, because which dtypes `torch.addmm` mixes depends on its version."""
    rows = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        TorchWeightGradients.wgrad_gemm_accum_fp32(rows, rows, rows.float())
    except (RuntimeError, TypeError) as error:
        return f"torch {torch.__version__} cannot: {str(error).splitlines()[0]}"
    return None
