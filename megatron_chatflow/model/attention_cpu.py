"""Causal attention in bf16 on the CPU, composed of the library's matrix products and our softmax.

In: queries, keys and values of a packed micro-batch before rotation. Out: what attention sees. Not
an attention kernel: oneDNN's batched products make blocks of scores, of which those above the
diagonal are never formed, and `cpu_kernels` turns each block into probabilities while it lies in
the cache. PyTorch's own flash kernel takes twice as long where processors have no AMX. The
probabilities are kept for the backward pass, `length / 2` numbers a query and head, and so
documents longer than `MAX_LENGTH` are left to PyTorch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_chatflow.native import cpu_kernels

# Longest document; the probabilities of its last query and head are 4 kB.
MAX_LENGTH = 2048
# Queries of a block: fewer leave the products thin, more form many scores above the diagonal.
QUERY_CHUNK = 256
# Scores of a block, 8 MB: more leave the cache between two products, fewer cost more calls.
BLOCK_SCORES = 1 << 22

Runs = tuple[tuple[int, int, int], ...]
Angles = tuple[torch.Tensor, torch.Tensor]


def is_composed(query: torch.Tensor, longest: int) -> bool:
    """Whether a micro-batch whose longest document has ``longest`` tokens is computed here."""
    return cpu_kernels.is_available(query) and longest <= MAX_LENGTH


@dataclass(frozen=True)
class _Block:
    """Some queries of some documents of a run, and the keys up to the last of them."""

    documents: slice
    queries: slice

    def query_heads(self, heads: torch.Tensor, num_groups: int) -> torch.Tensor:
        """``[documents * groups, heads of a group * queries, head_dim]`` of all the run's heads."""
        part = heads[self.documents, :, self.queries]
        return part.reshape(part.shape[0] * num_groups, -1, part.shape[-1])

    def key_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """``[documents * groups, keys, head_dim]``."""
        # Dense before anybody transposes it: a copy of the transposed would be twenty times slower.
        return heads[self.documents, :, : self.queries.stop].flatten(0, 1).contiguous()


def _blocks(num_documents: int, num_heads: int, length: int) -> Iterator[_Block]:
    """Blocks of a run; of each document the last queries first, which see every key."""
    chunk = min(QUERY_CHUNK, length)
    together = max(1, BLOCK_SCORES // (num_heads * chunk * length))
    for first in range(0, num_documents, together):
        documents = slice(first, min(first + together, num_documents))
        for end in range(length, 0, -chunk):
            yield _Block(documents, slice(max(0, end - chunk), end))


def _largest_block(num_documents: int, num_heads: int, length: int) -> int:
    """Scores of a run's largest block, its first."""
    first = next(_blocks(num_documents, num_heads, length))
    documents = range(num_documents)[first.documents]
    return len(documents) * num_heads * len(range(length)[first.queries]) * length


def _move(tokens: torch.Tensor, run: tuple[int, int, int], angles: Angles | None) -> torch.Tensor:
    """A run's tokens ``[tokens, heads, head_dim]`` as ``[documents, heads, length, head_dim]``."""
    start, num_documents, length = run
    rows = slice(start, start + num_documents * length)
    heads = tokens[rows].view(num_documents, length, *tokens.shape[1:])
    moved = tokens.new_empty(num_documents, tokens.shape[1], length, tokens.shape[2])
    if angles is not None:
        angles = angles[0][rows], angles[1][rows]
    cpu_kernels.rotate(heads, moved.transpose(1, 2), angles)
    return moved


def _move_back(
    moved: torch.Tensor, tokens: torch.Tensor, run: tuple[int, int, int], angles: Angles | None
) -> None:
    """The opposite of `_move`, into ``tokens``."""
    start, num_documents, length = run
    rows = slice(start, start + num_documents * length)
    if angles is not None:
        angles = angles[0][rows], angles[1][rows]
    heads = tokens[rows].view(num_documents, length, *tokens.shape[1:])
    cpu_kernels.rotate(moved.transpose(1, 2), heads, angles, -1.0)


class _ComposedAttention(torch.autograd.Function):
    """Rotation and attention of all runs, with the gradients of queries, keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        angles: Angles,
        runs: Runs,
        scale: float,
    ) -> torch.Tensor:
        ctx.angles, ctx.runs, ctx.scale = angles, runs, scale
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        saved: list[torch.Tensor] = []
        for run in runs:
            q, k, v = _move(query, run, angles), _move(key, run, angles), _move(value, run, None)
            mixed = torch.empty_like(q)
            saved += (q, k, v)
            for block in _blocks(run[1], q.shape[1], run[2]):
                scores = torch.bmm(
                    block.query_heads(q, k.shape[1]), block.key_heads(k).transpose(1, 2)
                )
                probabilities = _softmax(scores, block, scale)
                part = torch.bmm(probabilities, block.key_heads(v))
                target = mixed[block.documents, :, block.queries]
                target.copy_(part.view(target.shape))
                saved.append(probabilities)
            _move_back(mixed, context, run, None)
        ctx.save_for_backward(*saved)
        return context

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        saved = iter(ctx.saved_tensors)
        num_tokens, num_heads, head_dim = gradient.shape
        gradients: tuple[torch.Tensor, ...] = ()
        for run in ctx.runs:
            q, k, v = next(saved), next(saved), next(saved)
            if not gradients:
                gradients = tuple(
                    gradient.new_empty(num_tokens, heads, head_dim)
                    for heads in (num_heads, k.shape[1], k.shape[1])
                )
            parts = _run_gradients(_move(gradient, run, None), q, k, v, saved, ctx.scale)
            for part, whole, angles in zip(
                parts, gradients, (ctx.angles, ctx.angles, None), strict=True
            ):
                _move_back(part, whole, run, angles)
        return (*gradients, None, None, None)  # type: ignore[return-value]


def _softmax(scores: torch.Tensor, block: _Block, scale: float) -> torch.Tensor:
    """Probabilities of a block's scores, in place; a group's heads are rows of one matrix."""
    num_queries = block.queries.stop - block.queries.start
    rows = scores.view(-1, num_queries, scores.shape[-1])
    return cpu_kernels.causal_softmax(rows, block.queries.start, scale).view(scores.shape)


def _softmax_backward(
    probabilities: torch.Tensor, gradient: torch.Tensor, block: _Block, scale: float
) -> torch.Tensor:
    shape = (-1, block.queries.stop - block.queries.start, gradient.shape[-1])
    cpu_kernels.causal_softmax_backward(
        probabilities.view(shape), gradient.view(shape), block.queries.start, scale
    )
    return gradient


def _run_gradients(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: Iterator[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a run's rotated queries and keys and of its values.

    Args:
        gradient: ``[documents, heads, length, head_dim]``, of the output.
        q: The same shape.
        k: ``[documents, groups, length, head_dim]``.
        v: The same shape.
        saved: Every block's probabilities, in the order of `_blocks`.
        scale: Factor on the scores.
    """
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    num_groups, length = k.shape[1], k.shape[2]
    scratch = q.new_empty(_largest_block(len(q), q.shape[1], length))
    # Blocks of queries add up in fp32. A document's first block has every key.
    grad_k = grad_v = torch.empty(0)
    for block in _blocks(len(q), q.shape[1], length):
        probabilities = next(saved)
        scores = scratch[: probabilities.numel()].view(probabilities.shape)
        queries = block.query_heads(q, num_groups)
        outputs = block.query_heads(gradient, num_groups)
        torch.bmm(outputs, block.key_heads(v).transpose(1, 2), out=scores)
        _softmax_backward(probabilities, scores, block, scale)
        target = gradients[0][block.documents, :, block.queries]
        target.copy_(torch.bmm(scores, block.key_heads(k)).view(target.shape))
        part_k = torch.bmm(scores.transpose(1, 2), queries)
        part_v = torch.bmm(probabilities.transpose(1, 2), outputs)
        if block.queries.stop == length:
            grad_k, grad_v = part_k.float(), part_v.float()
        else:
            grad_k[:, : block.queries.stop] += part_k
            grad_v[:, : block.queries.stop] += part_v
        if block.queries.start == 0:
            for whole, sums in zip(gradients[1:], (grad_k, grad_v), strict=True):
                target = whole[block.documents]
                target.copy_(sums.view(target.shape))
    return gradients


def composed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: Angles,
    runs: Runs,
    scale: float | None,
) -> torch.Tensor:
    """Rotates queries and keys and attends inside each document.

    Args:
        query: bf16 ``[tokens, heads, head_dim]``; each head dense, any other strides.
        key: bf16 ``[tokens, groups, head_dim]``.
        value: The same shape.
        angles: Cosines and sines, float32[tokens, head_dim / 2].
        runs: ``(start, num_documents, length)`` of documents of equal length.
        scale: Factor on the scores; ``head_dim ** -0.5`` if None.

    Returns:
        ``[tokens, heads, head_dim]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    context: torch.Tensor = _ComposedAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, angles, runs, scale
    )
    return context
