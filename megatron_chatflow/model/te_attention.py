"""Attention of transformer-engine's layers, for the packed micro-batches of `model.packed`.

Import this module only where transformer-engine is installed. transformer-engine selects the kernel
(cuDNN's or flash-attn's); its choice is logged with ``NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=1``.

megatron-core's own way of passing packed documents is not used. Its rotary embedding without
transformer-engine's fused kernel lets positions continue into the next document if that is the
longest one, it knows none of our rotary scalings, and transformer-engine exchanges keys and values
between context-parallel ranks only if every document is padded to a multiple of twice their number.
"""

from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    fused_apply_rotary_pos_emb,
)
from megatron.core.transformer.enums import AttnMaskType

from megatron_chatflow.model.packed import PackedTokens, gather_context

# Aligns the last query of a span to its last key. transformer-engine has this mask, megatron-core's
# enumeration lacks it; only the name is read.
_BOTTOM_RIGHT = SimpleNamespace(name="padding_causal_bottom_right")


class PackedTEAttention(TEDotProductAttention):  # type: ignore[misc]
    """Rotates queries and keys, gathers keys and values, and calls transformer-engine's attention.

    Args:
        config: megatron-core's ``TransformerConfig``.
        arguments: The other arguments of megatron-core's class.
        options: The same by name.
    """

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        # transformer-engine must not exchange keys and values: `forward` has gathered them.
        whole = copy(config)
        whole.context_parallel_size = 1
        super().__init__(whole, *arguments, **options)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedTokens | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Computes attention; arguments and result are those of `PackedCausalAttention.forward`."""
        packed = packed_seq_params
        assert packed is not None and packed.rotary is not None and packed.shard is not None
        assert attention_mask is None and attention_bias is None
        angles = packed.rotary.angles_of_heads
        query, key = (
            fused_apply_rotary_pos_emb(heads.unsqueeze(1), angles).squeeze(1)
            for heads in (query, key)
        )
        mask: Any = AttnMaskType.padding_causal
        if packed.spans:
            key, value = (
                packed.keys_of_spans(gather_context(rows, packed.shard)) for rows in (key, value)
            )
            mask = _BOTTOM_RIGHT
        context: torch.Tensor = super().forward(
            query, key, value, None, mask, None, packed, **options
        )
        return context
