"""Bindings of the compiled CPU kernels of `csrc/kernels/cpu`, fused for bf16.

Tensors are contiguous bf16 on the CPU. Results are computed in fp32 and rounded once; sums that a
backward pass needs are fp32. Results do not depend on the number of threads. Where `is_available`
returns False, callers use PyTorch's operations.
"""

import importlib
import logging
from types import ModuleType

import torch


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("megatron_chatflow.kernels._cpu")
    except ImportError as error:
        logging.getLogger(__name__).debug("csrc/kernels/cpu is not built: %s", error)
        return None


extension = _load()

# Largest number of keys in a row of `causal_softmax`.
MAX_KEYS: int = extension.MAX_KEYS if extension is not None else 0


def is_available(*tensors: torch.Tensor) -> bool:
    """Returns whether the kernels are built and all ``tensors`` are bf16 on the CPU."""
    return extension is not None and all(
        tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors
    )


def description() -> str | None:
    """Describes the kernels of a bf16 run on a CPU for the log; None if they are not built."""
    if extension is None:
        return None
    return f"ours, fused bf16 kernel for the CPU, {extension.instruction_set()}"


def instruction_sets() -> list[str]:
    """Returns the instruction sets that this processor supports, the default one first."""
    return [] if extension is None else list(extension.instruction_sets())


def use_instruction_set(name: str) -> None:
    """Runs every kernel with another instruction set, for tests.

    Raises:
        ValueError: This processor does not support it.
    """
    assert extension is not None
    extension.use_instruction_set(name)


def _kernels(*tensors: torch.Tensor) -> ModuleType:
    """Checks the tensors, which the compiled module does not, and returns the module."""
    assert extension is not None
    for tensor in tensors:
        if tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu":
            raise ValueError(
                f"CPU kernels: a tensor is {tensor.dtype} on {tensor.device}, not bf16"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"CPU kernels: a tensor of strides {tensor.stride()} has gaps")
    return extension


def exponentiate(logits: torch.Tensor, num_valid_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns logits into ``exp(logit - row's highest)`` in place; padding becomes 0.

    Args:
        logits: ``[tokens, rows]``, overwritten.
        num_valid_tokens: Number of columns that stand for tokens; the others are padding.

    Returns:
        Each row's highest logit, and the sum of its exponentials before they are rounded:
        float32[tokens].
    """
    num_tokens, num_rows = logits.shape
    highest = torch.empty(num_tokens, dtype=torch.float32)
    sums = torch.empty(num_tokens, dtype=torch.float32)
    _kernels(logits).exponentiate(
        logits.data_ptr(),
        highest.data_ptr(),
        sums.data_ptr(),
        num_tokens,
        num_rows,
        num_valid_tokens,
        torch.get_num_threads(),
    )
    return highest, sums


def rms_norm(
    rows: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over the last axis.

    Args:
        rows: ``[..., size]``.
        weight: ``[size]``.
        epsilon: Added to the mean square.

    Returns:
        The normalised rows, and their scales, float32[...], for `rms_norm_backward`.
    """
    if weight.shape != rows.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} for rows {tuple(rows.shape)}")
    output = torch.empty_like(rows)
    scales = torch.empty(rows.shape[:-1], dtype=torch.float32)
    _kernels(rows, weight).rms_norm(
        rows.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        scales.data_ptr(),
        scales.numel(),
        len(weight),
        epsilon,
        torch.get_num_threads(),
    )
    return output, scales


def rms_norm_backward(
    gradient: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of `rms_norm`: of rows in bf16, of the weight in float32[size]."""
    if gradient.shape != rows.shape or scales.shape != rows.shape[:-1]:
        raise ValueError(f"rms_norm: gradient {tuple(gradient.shape)} of {tuple(rows.shape)}")
    grad_rows = torch.empty_like(rows)
    grad_weight = torch.empty(len(weight), dtype=torch.float32)
    _kernels(gradient, rows, weight).rms_norm_backward(
        gradient.data_ptr(),
        rows.data_ptr(),
        weight.data_ptr(),
        scales.data_ptr(),
        grad_rows.data_ptr(),
        grad_weight.data_ptr(),
        scales.numel(),
        len(weight),
        torch.get_num_threads(),
    )
    return grad_rows, grad_weight


def swiglu(rows: torch.Tensor) -> torch.Tensor:
    """Computes ``silu(gate) * up`` of rows ``[..., gate | up]``."""
    size = rows.shape[-1] // 2
    output = rows.new_empty((*rows.shape[:-1], size))
    _kernels(rows).swiglu(
        rows.data_ptr(),
        output.data_ptr(),
        rows.numel() // (2 * size),
        size,
        torch.get_num_threads(),
    )
    return output


def swiglu_backward(gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of `swiglu` with respect to its rows."""
    size = rows.shape[-1] // 2
    if gradient.shape != (*rows.shape[:-1], size):
        raise ValueError(f"swiglu: gradient {tuple(gradient.shape)} of {tuple(rows.shape)}")
    grad_rows = torch.empty_like(rows)
    _kernels(gradient, rows).swiglu_backward(
        gradient.data_ptr(),
        rows.data_ptr(),
        grad_rows.data_ptr(),
        rows.numel() // (2 * size),
        size,
        torch.get_num_threads(),
    )
    return grad_rows


def rotate(
    heads: torch.Tensor,
    output: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    direction: float = 1.0,
) -> torch.Tensor:
    """Rotates every token's heads and writes them to ``output``.

    Args:
        heads: ``[documents, length, heads, head_dim]``; any strides, the last one 1.
        output: The same shape; any strides, the last one 1. Overwritten.
        angles: Cosines and sines, float32[documents * length, head_dim / 2]; None copies the heads
            without rotation.
        direction: 1, or -1 for the opposite angle.

    Returns:
        ``output``.
    """
    num_documents, length, num_heads, head_dim = heads.shape
    kernels = _kernels()
    for tensor in (heads, output):
        if tensor.dtype != torch.bfloat16 or tensor.stride(-1) != 1 or tensor.shape != heads.shape:
            raise ValueError("rotate: heads and output are bf16 of one shape, dense in a head")
    shape = (num_documents * length, head_dim // 2)
    for angle in angles or ():
        if angle.dtype != torch.float32 or angle.shape != shape or not angle.is_contiguous():
            raise ValueError(f"rotate: angles {tuple(angle.shape)} are not float32{list(shape)}")
    cosines, sines = (angle.data_ptr() for angle in angles) if angles else (0, 0)
    kernels.rotate(
        heads.data_ptr(),
        heads.stride()[:3],
        output.data_ptr(),
        output.stride()[:3],
        cosines,
        sines,
        direction,
        num_documents * length,
        length,
        num_heads,
        head_dim,
        torch.get_num_threads(),
    )
    return output


def causal_softmax(scores: torch.Tensor, first_query: int, scale: float) -> torch.Tensor:
    """Softmax of ``scores * scale`` in place, where query q sees keys 0 to ``first_query + q``.

    Args:
        scores: ``[heads, queries, keys]``, at most `MAX_KEYS` keys.
        first_query: Position of the first query among the keys.
        scale: Factor on the scores.

    Returns:
        ``scores``, now probabilities; 0 for keys that a query does not see.
    """
    num_heads, num_queries, num_keys = scores.shape
    _kernels(scores).causal_softmax(
        scores.data_ptr(),
        num_heads * num_queries,
        num_keys,
        num_queries,
        first_query,
        scale,
        torch.get_num_threads(),
    )
    return scores


def causal_softmax_backward(
    probabilities: torch.Tensor, gradient: torch.Tensor, first_query: int, scale: float
) -> torch.Tensor:
    """Turns the gradient of probabilities into that of scores, in place; see `causal_softmax`."""
    if gradient.shape != probabilities.shape:
        raise ValueError(
            f"causal_softmax: gradient {tuple(gradient.shape)} of {tuple(probabilities.shape)}"
        )
    num_heads, num_queries, num_keys = probabilities.shape
    _kernels(probabilities, gradient).causal_softmax_backward(
        probabilities.data_ptr(),
        gradient.data_ptr(),
        num_heads * num_queries,
        num_keys,
        num_queries,
        first_query,
        scale,
        torch.get_num_threads(),
    )
    return gradient
