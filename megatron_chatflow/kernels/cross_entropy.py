"""The two passes over logits of a vocabulary-parallel cross-entropy: reference, operators, kernels.

The first pass computes, for a chunk of logits ``[tokens, columns]`` of one shard of the vocabulary,
each row's maximum, sum of exponentials and label's logit. Once these are reduced over the shards,
the second pass overwrites the logits with their gradient. The operators are
``torch.ops.megatron_chatflow.softmax_statistics`` and ``softmax_gradient_``; on a GPU they run
``csrc/kernels/cross_entropy.cuh``.
"""

from typing import Any

import torch

from megatron_chatflow.kernels.cuda import is_whole_packs, kernels, load_kernels

LOWEST = -1e30
"""The maximum of a shard without valid tokens."""


def supports_softmax(num_columns: int, dtype: torch.dtype) -> bool:
    """Returns whether the kernels support rows of ``num_columns`` logits."""
    return is_whole_packs(num_columns, dtype)


def choose_softmax(num_columns: int, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """Returns the implementation of `model.loss.chunk_loss`, and the reason for the log.

    Args:
        num_columns: Rows of the output layer on this rank.
        dtype: The dtype of logits.
        device: The model's device.
    """
    composed = "composed in torch, chunked and vocabulary-parallel"
    if device.type != "cuda":
        return "torch", composed
    library, description = load_kernels()
    if library is None:
        return "torch", f"{composed}: {description}"
    if not supports_softmax(num_columns, dtype):
        return "torch", f"{composed}: csrc/kernels has none for {num_columns} columns in {dtype}"
    return "ours", f"{description}, chunked and vocabulary-parallel"


def softmax_statistics_reference(
    logits: torch.Tensor, labels: torch.Tensor, num_valid_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes each row's contribution to the softmax.

    Args:
        logits: ``[tokens, columns]``.
        labels: int64[tokens]; in another shard if not in [0, num_valid_tokens).
        num_valid_tokens: Number of columns that stand for tokens; the others are padding.

    Returns:
        float32[tokens] each: maximum, sum of ``exp(logit - maximum)``, and the label's logit, 0 if
        it is in another shard.
    """
    values = logits[:, :num_valid_tokens].float()
    lowest = values.new_full((len(values), 1), LOWEST)
    highest = torch.cat((values, lowest), dim=-1).amax(dim=-1)
    sums = (values - highest.unsqueeze(-1)).exp().sum(dim=-1)
    is_here = (labels >= 0) & (labels < num_valid_tokens)
    place = labels.masked_fill(~is_here, 0).unsqueeze(-1)
    target = logits.gather(-1, place).squeeze(-1).float().masked_fill(~is_here, 0.0)
    return highest, sums, target


def softmax_gradient_reference(
    logits: torch.Tensor,
    labels: torch.Tensor,
    highest: torch.Tensor,
    sums: torch.Tensor,
    scale: torch.Tensor,
    num_valid_tokens: int,
) -> None:
    """Overwrites logits with ``scale * (softmax - onehot(label))``, 0 in the padding.

    Args:
        logits: ``[tokens, columns]``.
        labels: As above.
        highest: float32[tokens], of the whole vocabulary.
        sums: float32[tokens], of the whole vocabulary.
        scale: float32[tokens].
        num_valid_tokens: As above.
    """
    share = (logits.float() - highest.unsqueeze(-1)).exp() / sums.unsqueeze(-1)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    share -= (columns == labels.unsqueeze(-1)).float()
    share *= scale.unsqueeze(-1)
    logits.copy_(share.masked_fill_(columns >= num_valid_tokens, 0.0))


def _check(logits: torch.Tensor, labels: torch.Tensor, *rows: torch.Tensor) -> None:
    if not logits.is_contiguous() or labels.dtype != torch.int64:
        raise ValueError("softmax: logits must be contiguous, and labels int64")
    for row in (labels, *rows):
        if row.shape != logits.shape[:1] or not row.is_contiguous():
            raise ValueError(
                f"softmax: {tuple(row.shape)} values do not fit logits of {tuple(logits.shape)}"
            )
    if any(row.dtype != torch.float32 for row in rows):
        raise ValueError("softmax: highest, sums and scale must be float32")


def softmax_statistics_kernel(
    logits: torch.Tensor, labels: torch.Tensor, num_valid_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The CUDA implementation of `softmax_statistics`."""
    _check(logits, labels)
    shape = labels.shape
    highest = torch.empty(shape, dtype=torch.float32, device=logits.device)
    sums, target = torch.empty_like(highest), torch.empty_like(highest)
    if len(logits):
        kernels().launch(
            "softmax_statistics",
            logits.dtype,
            *(logits, labels, highest, sums, target, *logits.shape, num_valid_tokens),
        )
    return highest, sums, target


def softmax_gradient_kernel(
    logits: torch.Tensor,
    labels: torch.Tensor,
    highest: torch.Tensor,
    sums: torch.Tensor,
    scale: torch.Tensor,
    num_valid_tokens: int,
) -> None:
    """The CUDA implementation of `softmax_gradient_`."""
    _check(logits, labels, highest, sums, scale)
    if len(logits):
        kernels().launch(
            "softmax_gradient",
            logits.dtype,
            *(logits, labels, highest, sums, scale, *logits.shape, num_valid_tokens),
        )


def _statistics_shapes(
    logits: torch.Tensor, labels: torch.Tensor, num_valid_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    row = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    return row, torch.empty_like(row), torch.empty_like(row)


# Defined by their schemas, because `torch.library.custom_op` costs the host more for each call than
# an `autograd.Function`.
_LIBRARY: Any = torch.library.Library("megatron_chatflow", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "softmax_statistics(Tensor logits, Tensor labels, int num_valid_tokens) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "softmax_gradient_(Tensor(a!) logits, Tensor labels, Tensor highest, Tensor sums, "
    "Tensor scale, int num_valid_tokens) -> ()"
)
for _key, _statistics, _gradient in (
    ("CPU", softmax_statistics_reference, softmax_gradient_reference),
    ("CUDA", softmax_statistics_kernel, softmax_gradient_kernel),
    ("Meta", _statistics_shapes, lambda *_: None),
):
    _LIBRARY.impl("softmax_statistics", _statistics, _key)
    _LIBRARY.impl("softmax_gradient_", _gradient, _key)

softmax_statistics = torch.ops.megatron_chatflow.softmax_statistics.default
"""The operator of `softmax_statistics_reference`."""
softmax_gradient_ = torch.ops.megatron_chatflow.softmax_gradient_.default
"""The operator of `softmax_gradient_reference`."""
