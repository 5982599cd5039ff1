"""LLaMA as a megatron-core GPTModel: layer spec, attention, rotary embedding, norm and loss."""
