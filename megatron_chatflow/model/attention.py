"""Causal attention inside each document of a packed micro-batch, as megatron-core's core attention.

The kernels are those of `kernels.attention`: a library's variable-length kernel, torch's
`scaled_dot_product_attention`, or on CPUs in bf16 `composed_attention`.
"""

from contextlib import AbstractContextManager
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_chatflow.kernels.attention import (
    KERNELS,
    MAX_LENGTH,
    Segments,
    composed_attention,
    is_composed,
)
from megatron_chatflow.model.packed import PackedTokens, gather_context
from megatron_chatflow.model.rotary import apply_rotary

COMPOSED = (
    "composed of oneDNN matrix products and our softmax; torch's scaled_dot_product_attention for "
    f"documents of more than {MAX_LENGTH:,} tokens"
)
"""Description of attention on CPUs in bf16, whatever the back end."""

# Modes of torch's function, in order. cuDNN has no kernel for some lengths, the math mode has.
_FALLBACKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TORCH_KERNELS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, *_FALLBACKS],
    "flash": _FALLBACKS,
}
_TAKES_ORDER = "set_priority" in signature(sdpa_kernel).parameters


def torch_kernels(backend: str) -> AbstractContextManager[object]:
    """Returns a context in which torch's function uses the first suitable kernel of a mode."""
    # Older versions of torch take no order and use their own, which differs between GPUs.
    order = {"set_priority": True} if _TAKES_ORDER else {}
    return sdpa_kernel(TORCH_KERNELS[backend], **order)


# Queries of a call with a mask: fewer make many calls, more compute scores that no window holds.
WINDOW_CHUNK = 256
# The memory-efficient kernel copies a mask whose rows have another length.
_MASK_ALIGNMENT = 8


# A micro-batch needs at most four: under context parallelism, both chunks of a rank may begin less
# than a window behind the begin of a document.
@lru_cache(maxsize=4)
def _window_mask(
    num_queries: int, num_before: int, window: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Returns the additive mask of a window, ``dtype`` ``[num_queries, num_before + num_queries]``.

    All layers and micro-batches share it. torch would convert a boolean mask in every call, and
    store the result for the backward pass.

    Args:
        num_queries: Number of queries.
        num_before: Number of keys before the first query's own.
        window: Tokens of the window.
        dtype: The dtype of queries.
        device: Their device.
    """
    num_keys = num_before + num_queries
    with torch.inference_mode(False), torch.no_grad():
        width = -(-num_keys // _MASK_ALIGNMENT) * _MASK_ALIGNMENT
        positions = torch.arange(num_before, num_keys, device=device).unsqueeze(1)
        distance = positions - torch.arange(width, device=device)
        mask = torch.zeros(num_queries, width, dtype=dtype, device=device)
        mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
        return mask[:, :num_keys]


def _torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    window: int | None = None,
) -> torch.Tensor:
    """Computes torch's causal attention of ``[documents, heads, length, head_dim]``.

    torch's kernels have no window. They are called with a mask for the queries of a chunk and the
    keys that these see, so that the number of scores grows with the window. There may then be fewer
    queries than keys, the last of which are aligned.
    """
    is_grouped = query.shape[1] != key.shape[1]
    if window is None or key.shape[2] <= window and query.shape[2] == key.shape[2]:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped
        )
    if is_grouped and query.is_cuda:
        # On GPUs, only the kernels for equal numbers of heads take masks and store no scores.
        group = query.shape[1] // key.shape[1]
        key, value = (rows.repeat_interleave(group, dim=1) for rows in (key, value))
    num_queries, offset = query.shape[2], key.shape[2] - query.shape[2]
    chunk = max(WINDOW_CHUNK, window)
    parts = []
    for begin in range(0, num_queries, chunk):
        end = min(begin + chunk, num_queries)
        keys = slice(max(0, offset + begin - window + 1), offset + end)
        before = offset + begin - keys.start
        is_causal = before == 0 and end - begin <= window
        mask = None
        if not is_causal:
            mask = _window_mask(chunk, before, window, query.dtype, query.device)
            mask = mask[: end - begin, : before + end - begin]
        parts.append(
            scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, keys],
                value[:, :, keys],
                attn_mask=mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class PackedCausalAttention(nn.Module):
    """megatron-core's ``core_attention`` for packed documents, including the rotary embedding.

    Args:
        config: megatron-core's ``TransformerConfig``.
        layer_number: Not used.
        attn_mask_type: Not used: the mask is causal in each document.
        attention_type: Not used: there is only self-attention.
        softmax_scale: Factor on the scores; ``head_dim ** -0.5`` if None.
        backend: One of `kernels.attention.BACKENDS`.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        backend: str = "sdpa",
        **_: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.backend = backend
        self.is_deterministic = bool(config.deterministic_mode)
        self.window = None if config.window_size is None else config.window_size[0] + 1

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedTokens | None = None,
    ) -> torch.Tensor:
        """Computes attention.

        Args:
            query: ``[tokens, query_heads, head_dim]``.
            key: ``[tokens, groups, head_dim]``.
            value: ``[tokens, groups, head_dim]``.
            attention_mask: Must be None.
            attn_mask_type: Not used.
            attention_bias: Must be None.
            packed_seq_params: The micro-batch's documents.

        Returns:
            ``[tokens, query_heads * head_dim]``.
        """
        packed = packed_seq_params
        assert packed is not None and packed.rotary is not None
        assert attention_mask is None and attention_bias is None
        is_whole = packed.shard is None or packed.shard.is_whole
        if is_whole and is_composed(query, packed.max_seqlen_q, self.window):
            angles = packed.rotary.cosines.squeeze(1), packed.rotary.sines.squeeze(1)
            return composed_attention(
                query, key, value, angles, packed.runs, self.softmax_scale, self.window
            ).flatten(1)
        query, key = apply_rotary(query, key, packed.rotary)
        if is_whole:
            # Values are a view of the joint projection. Saving the view for the backward pass would
            # keep the whole projection in memory beside the rotated queries and keys.
            value = value.contiguous()
        else:
            assert packed.shard is not None
            key = gather_context(key, packed.shard)
            value = gather_context(value, packed.shard)
        if self.backend in KERNELS:
            context = self._segments(query, key, value, packed)
        elif self.backend in TORCH_KERNELS:
            with torch_kernels(self.backend):
                context = self._torch(query, key, value, packed)
        else:
            context = self._torch(query, key, value, packed)
        return context.flatten(1)

    def _segments(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedTokens
    ) -> torch.Tensor:
        """Calls a library's variable-length kernel once."""
        if packed.spans:
            key, value = packed.keys_of_spans(key), packed.keys_of_spans(value)
        segments = Segments(
            packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv
        )
        return KERNELS[self.backend](
            query, key, value, segments, self.softmax_scale, self.is_deterministic, self.window
        )

    def _torch(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedTokens
    ) -> torch.Tensor:
        if packed.spans:
            return self._spans(query, key, value, packed)
        return self._runs(query, key, value, packed)

    def _spans(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedTokens
    ) -> torch.Tensor:
        """Attends from the queries of this context-parallel rank to the keys of all ranks.

        A span that begins inside its document has fewer queries than keys. torch's causal kernels
        align both at their begin, so unused queries fill the gap: more work, but no mask. A sliding
        window needs a mask anyway.
        """
        parts = []
        begin = 0
        for start, first, last in packed.spans:
            q = query[begin : begin + last - first]
            begin += last - first
            if self.window is None:
                q = torch.cat((q.new_zeros(first - start, *q.shape[1:]), q))
            # [length, heads, head_dim] -> [1, heads, length, head_dim]
            q, k, v = (
                tensor.transpose(0, 1).unsqueeze(0)
                for tensor in (q, key[start:last], value[start:last])
            )
            context = _torch_attention(q, k, v, self.softmax_scale, self.window)
            parts.append(context[0, :, first - last :].transpose(0, 1))
        return torch.cat(parts)

    def _runs(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedTokens
    ) -> torch.Tensor:
        """Calls torch's function once for each run of documents of equal length."""
        parts = []
        for start, num_documents, length in packed.runs:
            rows = slice(start, start + num_documents * length)
            # [documents * length, heads, head_dim] -> [documents, heads, length, head_dim]
            q, k, v = (
                tensor[rows].view(num_documents, length, *tensor.shape[1:]).transpose(1, 2)
                for tensor in (query, key, value)
            )
            context = _torch_attention(q, k, v, self.softmax_scale, self.window)
            parts.append(context.transpose(1, 2).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
