"""Next-token loss straight from hidden states: chunked, vocabulary-parallel, padding rows excluded.

In: hidden states of a packed micro-batch, the output layer's slice of the vocabulary, labels and
loss mask. Out: the summed loss, to differentiate, and each token's loss. The fp32 logits of one
chunk of tokens are all that is ever held: gradients are taken in the same pass, since the loss is
a plain sum and its gradient is known up to the scalar that backward brings.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch.distributed import ProcessGroup, ReduceOp

# Tokens whose fp32 logits are held at a time: 2,048 of a 32,000-piece vocabulary are 262 MB.
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class VocabularySlice:
    """The rows of the output layer that this tensor-parallel rank holds.

    Attributes:
        start: Id of the first row.
        num_rows: Rows held, padding included.
        num_pieces: Rows held that stand for a piece; the others are padding and get no probability.
        group: Ranks that hold the other rows, or None if this one holds all.
    """

    start: int
    num_rows: int
    num_pieces: int
    group: ProcessGroup | None


def vocabulary_slice(
    *, rank: int, size: int, padded_vocab_size: int, vocab_size: int, group: ProcessGroup | None
) -> VocabularySlice:
    """Cuts ``padded_vocab_size`` rows into ``size`` equal slices and returns the ``rank``-th."""
    num_rows = padded_vocab_size // size
    start = rank * num_rows
    return VocabularySlice(
        start=start,
        num_rows=num_rows,
        num_pieces=min(max(vocab_size - start, 0), num_rows),
        group=group if size > 1 else None,
    )


def _chunk_loss(
    logits: torch.Tensor, labels: torch.Tensor, rows: VocabularySlice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of one chunk; turns ``logits`` (fp32, [tokens, rows]) into exp(logits - max) in place.

    Returns:
        Each token's loss, its sum of exponentials over the whole vocabulary, its label's row here
        (0 where another rank holds it), and whether this rank holds it.
    """
    logits[:, rows.num_pieces :] = float("-inf")
    highest = logits.amax(dim=-1) if rows.num_pieces else logits.new_full((len(logits),), -1e30)
    if rows.group is not None:
        dist.all_reduce(highest, op=ReduceOp.MAX, group=rows.group)
    logits.sub_(highest.unsqueeze(-1))
    local = labels - rows.start
    is_here = (local >= 0) & (local < rows.num_pieces)
    local = local.clamp(0, rows.num_rows - 1).masked_fill(~is_here, 0)
    target = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~is_here, 0.0)
    exponentials = logits.exp_()
    sums = torch.stack((exponentials.sum(dim=-1), target))
    if rows.group is not None:
        dist.all_reduce(sums, group=rows.group)
    return sums[0].log() - sums[1], sums[0], local, is_here


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of masked token losses, with both gradients taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        rows: VocabularySlice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight: torch.Tensor | None = None
        for begin in range(0, len(hidden), CHUNK_TOKENS):
            chunk = slice(begin, begin + CHUNK_TOKENS)
            logits = (hidden[chunk] @ weight.t()).float()
            losses[chunk], sums, local, is_here = _chunk_loss(logits, labels[chunk], rows)
            if grad_hidden is None:
                continue
            # softmax - onehot, by the mask: the gradient of the masked sum by the logits.
            mask = loss_mask[chunk]
            logits.mul_((mask / sums).unsqueeze(-1))
            logits.scatter_add_(-1, local.unsqueeze(-1), -(mask * is_here).unsqueeze(-1))
            grad_logits = logits.to(hidden.dtype)
            torch.matmul(grad_logits, weight, out=grad_hidden[chunk])
            part = grad_logits.t() @ hidden[chunk]
            if len(hidden) <= CHUNK_TOKENS:
                grad_weight = part
            else:
                # Chunks add up in fp32, as micro-batches do in the main gradient.
                grad_weight = part.float() if grad_weight is None else grad_weight.add_(part)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses * loss_mask).sum(), losses

    @staticmethod
    def backward(
        ctx: Any, grad_sum: torch.Tensor, _grad_losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_sum.to(grad_hidden.dtype),
            (grad_weight * grad_sum).to(grad_hidden.dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    rows: VocabularySlice,
    *,
    sequence_parallel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of ``hidden @ weight.T`` against ``labels``, never holding all logits.

    Args:
        hidden: ``[tokens, hidden]``, or this rank's part of the tokens under sequence parallelism.
        weight: ``[rows.num_rows, hidden]``, this rank's slice of the output layer.
        labels: int64[tokens], ids of the next tokens.
        loss_mask: float32[tokens], 1 where the token counts.
        rows: Which rows of the vocabulary ``weight`` holds.
        sequence_parallel: Whether the tokens are split over the tensor-parallel group.

    Returns:
        The masked sum of losses, a float32 scalar to differentiate, and float32[tokens] of
        unmasked losses.
    """
    if rows.group is not None:
        if sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    total, losses = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, loss_mask, rows
    )
    return total, losses


def source_sums(
    losses: torch.Tensor,
    loss_mask: torch.Tensor,
    label_bytes: torch.Tensor,
    source: torch.Tensor,
    num_sources: int,
) -> torch.Tensor:
    """Per source: summed loss, loss tokens, and UTF-8 bytes that those tokens stand for.

    Args:
        losses: float32[tokens].
        loss_mask: float32[tokens].
        label_bytes: int64[tokens], bytes of text that each label stands for.
        source: int64[tokens], number of each token's source.
        num_sources: Rows of the result.

    Returns:
        float64[num_sources, 3].
    """
    columns = torch.stack((losses * loss_mask, loss_mask, label_bytes * loss_mask), dim=-1)
    sums = torch.zeros(num_sources, 3, dtype=torch.float64, device=losses.device)
    return sums.index_add_(0, source, columns.double())
