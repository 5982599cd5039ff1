"""Next-token cross-entropy from hidden states: chunked, vocabulary-parallel, without padding rows.

Only the logits of one chunk of tokens are held at a time. Their gradients are computed in the same
pass: the loss is a plain sum, whose gradient is known up to the scalar that the backward pass
brings.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch.distributed import ProcessGroup, ReduceOp

from megatron_chatflow.kernels import cpu as cpu_kernels
from megatron_chatflow.kernels.cross_entropy import softmax_gradient_, softmax_statistics

# Logits held at a time, 268 MB in bf16: 4,096 tokens of a vocabulary of 32,000.
CHUNK_LOGITS = 1 << 27
# Rows of a CPU's product with the output layer: oneDNN is 10% slower with twice as many.
CPU_PRODUCT_TOKENS = 2048
# Logits of which a CPU computes exponentials at a time: 1 MB in fp32 stays in its cache.
CPU_BLOCK_LOGITS = 1 << 18


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the output layer that this tensor-parallel rank holds.

    Attributes:
        start: Id of the first row.
        num_rows: Number of rows held, including padding.
        num_valid_tokens: Rows held that stand for a token; padding rows get no probability.
        group: The ranks that hold the other rows; None if this rank holds all.
    """

    start: int
    num_rows: int
    num_valid_tokens: int
    group: ProcessGroup | None


def vocabulary_shard(
    *, rank: int, size: int, padded_vocab_size: int, vocab_size: int, group: ProcessGroup | None
) -> VocabularyShard:
    """Splits ``padded_vocab_size`` rows into ``size`` equal shards and returns the ``rank``-th."""
    num_rows = padded_vocab_size // size
    start = rank * num_rows
    return VocabularyShard(
        start=start,
        num_rows=num_rows,
        num_valid_tokens=min(max(vocab_size - start, 0), num_rows),
        group=group if size > 1 else None,
    )


def _exponentiate(logits: torch.Tensor, num_valid_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces logits with ``exp(logits - row maximum)``, computed in fp32.

    Args:
        logits: ``[tokens, rows]``, changed.
        num_valid_tokens: Entries of a row that stand for a piece; the others become 0.

    Returns:
        Each row's maximum and its sum of exponentials, float32[tokens].
    """
    if cpu_kernels.is_available(logits):
        return cpu_kernels.exponentiate(logits, num_valid_tokens)
    logits[:, num_valid_tokens:] = float("-inf")
    num_tokens, num_rows = logits.shape
    highest = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(highest)
    size = num_tokens if logits.is_cuda else max(1, CPU_BLOCK_LOGITS // num_rows)
    scratch = torch.empty(size, num_rows, dtype=torch.float32, device=logits.device)
    for begin in range(0, num_tokens, size):
        block = logits[begin : begin + size]
        values = scratch[: len(block)].copy_(block)
        # A rank with only padding has no maximum; any finite value will do.
        top = values.amax(dim=-1).clamp_(min=-1e30)
        values.sub_(top.unsqueeze(-1)).exp_()
        highest[begin : begin + size] = top
        sums[begin : begin + size] = values.sum(dim=-1)
        block.copy_(values)
    return highest, sums


@dataclass(frozen=True)
class ChunkLoss:
    """A chunk's loss, and the gradient of its sum with respect to the logits as a product.

    Attributes:
        losses: float32[tokens].
        differences: ``[tokens, rows]``; row t times ``scale[t]`` is softmax - onehot.
        scale: float32[tokens].
    """

    losses: torch.Tensor
    differences: torch.Tensor
    scale: torch.Tensor


def _chunk_loss_by_kernels(
    logits: torch.Tensor, labels: torch.Tensor, rows: VocabularyShard
) -> ChunkLoss:
    """Computes `chunk_loss` in two passes over the logits."""
    local = labels - rows.start
    highest, sums, target = softmax_statistics(logits, local, rows.num_valid_tokens)
    overall = highest
    if rows.group is not None:
        overall = highest.clone()
        dist.all_reduce(overall, op=ReduceOp.MAX, group=rows.group)
        both = torch.stack((sums * (highest - overall).exp(), target))
        dist.all_reduce(both, group=rows.group)
        sums, target = both.unbind()
    scale = torch.ones_like(sums)
    softmax_gradient_(logits, local, overall, sums.contiguous(), scale, rows.num_valid_tokens)
    return ChunkLoss(overall + sums.log() - target, logits, scale)


def chunk_loss(
    logits: torch.Tensor, labels: torch.Tensor, rows: VocabularyShard, implementation: str
) -> ChunkLoss:
    """Computes the cross-entropy of one chunk.

    Args:
        logits: ``[tokens, rows.num_rows]``, overwritten.
        labels: int64[tokens], ids in the whole vocabulary.
        rows: The shard of the vocabulary that the logits belong to.
        implementation: ``ours`` for the kernels of ``csrc/kernels``, or ``torch``.
    """
    if implementation == "ours":
        return _chunk_loss_by_kernels(logits, labels, rows)
    local = labels - rows.start
    is_here = (local >= 0) & (local < rows.num_valid_tokens)
    local = local.masked_fill(~is_here, 0)
    tokens = torch.arange(len(logits), device=logits.device)
    target = logits[tokens, local].float()
    highest, sums = _exponentiate(logits, rows.num_valid_tokens)
    rescale = torch.ones_like(highest)
    overall, known_target = highest, target.masked_fill(~is_here, 0.0)
    if rows.group is not None:
        overall = highest.clone()
        dist.all_reduce(overall, op=ReduceOp.MAX, group=rows.group)
        # Never 0: logits 69 below the maximum have no weight, but a label among them still has.
        rescale = (highest - overall).exp().clamp_(min=1e-30)
        both = torch.stack((sums * rescale, known_target))
        dist.all_reduce(both, group=rows.group)
        sums, known_target = both.unbind()
    # The label's entry is exp - sum in fp32, rounded once: if the probability is close to 1, the
    # difference of two rounded numbers would be mostly rounding error.
    difference = ((target - highest).exp() - sums / rescale).to(logits.dtype)
    logits[tokens, local] = torch.where(is_here, difference, logits[tokens, local])
    return ChunkLoss(overall + sums.log() - known_target, logits, rescale / sums)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of masked token losses, with both gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        rows: VocabularyShard,
        implementation: str,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight: torch.Tensor | None = None
        chunk_tokens = max(1, CHUNK_LOGITS // len(weight))
        for begin in range(0, len(hidden), chunk_tokens):
            tokens = slice(begin, begin + chunk_tokens)
            logits = hidden[tokens] @ weight.t()
            chunk = chunk_loss(logits, labels[tokens], rows, implementation)
            losses[tokens] = chunk.losses
            if grad_hidden is None:
                continue
            grad_hidden[tokens], part = _chunk_gradients(
                chunk, hidden[tokens], weight, loss_mask[tokens]
            )
            if part is not None:
                # Chunks are summed in fp32, as micro-batches are in the main gradient.
                grad_weight = part if grad_weight is None else grad_weight.float().add_(part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * loss_mask).sum(), losses

    @staticmethod
    def backward(
        ctx: Any, grad_sum: torch.Tensor, _grad_losses: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if not grad_sum.is_cuda and float(grad_sum) == 1.0:
            # megatron-core calls it with 1. The host can read the value and skip the products.
            if grad_weight is not None:
                grad_weight = grad_weight.to(grad_hidden.dtype)
        else:
            grad_hidden = grad_hidden * grad_sum.to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight = (grad_weight * grad_sum).to(grad_hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunk_gradients(
    chunk: ChunkLoss, hidden: torch.Tensor, weight: torch.Tensor, loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the gradients of the masked sum with respect to hidden states and weight.

    A frozen weight has none.

    The scale, one factor per token, is applied to the smaller operand of each product, so that the
    logits are not read again.
    """
    scale = (chunk.scale * loss_mask).unsqueeze(-1)
    if chunk.differences.is_cuda:
        grad_hidden = chunk.differences @ weight
    elif chunk.differences.dtype != torch.bfloat16:
        grad_hidden = torch.cat(
            [part @ weight for part in torch.split(chunk.differences, CPU_PRODUCT_TOKENS)]
        )
    else:
        # For this long sum, oneDNN takes an eighth less time with transposed operands.
        grad_hidden = (weight.t() @ chunk.differences.t()).t()
    grad_hidden = grad_hidden * scale
    grad_weight = None
    if weight.requires_grad:
        grad_weight = chunk.differences.t() @ (hidden * scale).to(hidden.dtype)
    return grad_hidden.to(hidden.dtype), grad_weight


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    rows: VocabularyShard,
    *,
    sequence_parallel: bool,
    implementation: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the cross-entropy of ``hidden @ weight.T`` without holding all logits.

    Args:
        hidden: ``[tokens, hidden]``; under sequence parallelism only this rank's tokens.
        weight: ``[rows.num_rows, hidden]``, this rank's shard of the output layer.
        labels: int64[tokens], ids of the next tokens.
        loss_mask: float32[tokens], the factor of each token's loss in the sum.
        rows: The shard of the vocabulary that ``weight`` holds.
        sequence_parallel: Whether the tokens are split over the tensor-parallel group.
        implementation: As in `chunk_loss`.

    Returns:
        The masked sum of losses, a float32 scalar to differentiate, and float32[tokens] of
        unmasked losses.
    """
    if rows.group is not None:
        if sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    # The function computes its gradient in the forward pass, which must not happen in validation.
    # `ctx.needs_input_grad` is true there as well, because the weight requires a gradient.
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, losses = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, loss_mask, rows, implementation, needs_gradient
    )
    return total, losses


def source_sums(
    losses: torch.Tensor,
    loss_mask: torch.Tensor,
    label_bytes: torch.Tensor,
    source: torch.Tensor,
    num_sources: int,
) -> torch.Tensor:
    """Sums loss, loss tokens, and UTF-8 bytes of those tokens by source.

    Args:
        losses: float32[tokens].
        loss_mask: float32[tokens].
        label_bytes: int64[tokens], UTF-8 bytes of each label's text.
        source: int64[tokens], index of each token's source.
        num_sources: Number of sources.

    Returns:
        float64[num_sources, 3].
    """
    columns = torch.stack((losses * loss_mask, loss_mask, label_bytes * loss_mask), dim=-1)
    sums = torch.zeros(num_sources, 3, dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, source, columns.double())
