"""Model shapes of the training benchmark: widths of LLaMA-2, and models for CPUs."""

from dataclasses import dataclass

import torch

from megatron_chatflow.config import ModelConfig

# The name of our step among the subjects.
OURS = "ours"
# Seed of the tokens, the same for every subject.
SUBJECT_SEED = 0


@dataclass(frozen=True)
class Shape:
    """Shape of the model and of the batch that a benchmark trains.

    Attributes:
        num_layers: Number of transformer layers.
        hidden_size: Hidden size.
        ffn_hidden_size: Width of the feed-forward block.
        num_attention_heads: Number of attention heads.
        num_query_groups: Number of key/value heads.
        seq_length: Tokens per sample.
        micro_batch_size: Samples per step.
        vocab_size: Tokens in the vocabulary.
        recompute: Whether our step keeps only the input of each layer and recomputes the rest.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    seq_length: int
    micro_batch_size: int
    vocab_size: int = 32000
    recompute: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens in a step."""
        return self.seq_length * self.micro_batch_size

    def tokens(self, generator: torch.Generator) -> torch.Tensor:
        """Draws a step's tokens with the last label, int64[micro_batch_size, seq_length + 1]."""
        size = (self.micro_batch_size, self.seq_length + 1)
        return torch.randint(0, self.vocab_size, size, generator=generator)

    def model_config(self) -> ModelConfig:
        """Returns the shape as a run's model configuration."""
        return ModelConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            max_position_embeddings=self.seq_length,
        )


# Widths of LLaMA-2, mostly with fewer layers, a model that one CPU can train, and one that only
# shows that a benchmark works.
SHAPES = {
    "tiny": Shape(1, 64, 176, 4, 4, 64, 2, vocab_size=512),
    "58m": Shape(8, 512, 1376, 8, 8, 1024, 4),
    "7b": Shape(8, 4096, 11008, 32, 32, 4096, 2),
    # The complete model: 18 bytes per parameter are 121 GB.
    "7b-whole": Shape(32, 4096, 11008, 32, 32, 4096, 1, recompute=True),
    "13b": Shape(6, 5120, 13824, 40, 40, 4096, 2),
    "70b": Shape(3, 8192, 28672, 64, 8, 4096, 1),
}
