"""Decoders of the LLaMA kind as a megatron-core GPTModel: layers and loss."""
