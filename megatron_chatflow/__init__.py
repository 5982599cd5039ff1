"""ChatFlow on megatron-core: continued LLaMA-2 training on a blend that follows a schedule."""

__version__ = "0.1.0"
