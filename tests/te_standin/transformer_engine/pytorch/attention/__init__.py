"""Stand-in for the attention of packed documents."""

import torch

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule


def _probabilities(query, key, scale, left):
    """Returns those of one document; the last query is aligned to the last key.

    A query sees itself and ``left`` keys before it, or all of them if ``left`` is -1.
    """
    scores = torch.einsum("qgnd,kgd->gnqk", query, key).float() * scale
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + key.shape[0] - query.shape[0])
    if left >= 0:
        hidden |= torch.ones_like(hidden).tril(key.shape[0] - query.shape[0] - left - 1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def _documents(cu_queries, cu_keys, queries, keys):
    """Yields each document's rows; those of queries by group, ``[tokens, groups, heads, size]``."""
    by_group = [rows.view(len(rows), keys[0].shape[1], -1, rows.shape[2]) for rows in queries]
    cu_queries, cu_keys = cu_queries.tolist(), cu_keys.tolist()
    for a, b, c, d in zip(cu_queries, cu_queries[1:], cu_keys, cu_keys[1:], strict=False):
        yield *(rows[a:b] for rows in by_group), *(rows[c:d] for rows in keys)


@torch.library.custom_op("te_standin::attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    scale: float,
    left: int,
) -> torch.Tensor:
    context = torch.empty_like(query, memory_format=torch.contiguous_format)
    queries = query.contiguous(), context
    for q, c, k, v in _documents(cu_queries, cu_keys, queries, (key, value)):
        c.copy_(torch.einsum("gnqk,kgd->qgnd", _probabilities(q, k, scale, left).to(v.dtype), v))
    return context


@torch.library.custom_op("te_standin::attention_backward", mutates_args=())
def _attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    scale: float,
    left: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_query, grad_key, grad_value = (
        torch.zeros_like(rows, memory_format=torch.contiguous_format)
        for rows in (query, key, value)
    )
    queries = gradient.contiguous(), query.contiguous(), grad_query
    keys = key, value, grad_key, grad_value
    for g, q, grad_q, k, v, grad_k, grad_v in _documents(cu_queries, cu_keys, queries, keys):
        probabilities, g = _probabilities(q, k, scale, left), g.float()
        products = torch.einsum("qgnd,kgd->gnqk", g, v.float())
        means = (products * probabilities).sum(-1, keepdim=True)
        grad_scores = probabilities * (products - means) * scale
        grad_v += torch.einsum("gnqk,qgnd->kgd", probabilities, g).to(v.dtype)
        grad_k += torch.einsum("gnqk,qgnd->kgd", grad_scores, q.float()).to(k.dtype)
        grad_q.copy_(torch.einsum("gnqk,kgd->qgnd", grad_scores, k.float()))
    return grad_query, grad_key, grad_value


@_attention.register_fake
def _(query, key, value, cu_queries, cu_keys, scale, left):
    return query.new_empty(query.shape)


@_attention_backward.register_fake
def _(gradient, query, key, value, cu_queries, cu_keys, scale, left):
    return tuple(rows.new_empty(rows.shape) for rows in (query, key, value))


def _keep(ctx, inputs, output):
    *tensors, ctx.scale, ctx.left = inputs
    ctx.save_for_backward(*tensors, output)  # transformer-engine's kernels read the output too


def _gradients(ctx, gradient):
    *tensors, _ = ctx.saved_tensors
    gradients = _attention_backward(gradient, *tensors, ctx.scale, ctx.left)
    return *gradients, None, None, None, None


_attention.register_autograd(_gradients, setup_context=_keep)


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
    ):
        super().__init__()
        self.softmax_scale = softmax_scale or kv_channels**-0.5
        assert cp_group is None, "the stand-in does not exchange keys and values"
        self.left, right = (-1, 0) if window_size is None else window_size
        assert right == 0, "a window of a causal mask ends at the query"

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
        fp8_output=False,
    ):
        assert qkv_format == "thd" and attention_mask is None
        assert isinstance(max_seqlen_q, int) and cu_seqlens_q.dtype == torch.int32
        # Masks of the lower right corner are the only ones here. For equal segments they are those
        # of the upper left.
        is_square = cu_seqlens_q is cu_seqlens_kv
        assert attn_mask_type == "padding_causal" + ("" if is_square else "_bottom_right")
        heads = query_layer, key_layer, value_layer
        return _attention(
            *heads, cu_seqlens_q, cu_seqlens_kv, self.softmax_scale, self.left
        ).flatten(1)
