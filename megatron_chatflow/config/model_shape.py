"""Sizes that follow from a model's shape: parameters and FLOPs.

In: the configuration and the vocabulary's size. Out: exact counts of parameters, and the work of a
token for the model-FLOPs utilisation and the dry run. Needs neither torch nor a GPU.
"""

import math

from megatron_chatflow.config.sections import ModelConfig, ParallelConfig


def padded_vocab_size(model: ModelConfig, parallel: ParallelConfig, vocab_size: int) -> int:
    """Rows of the embedding: a multiple that every TP process shares evenly.

    It is the same for every TP size that divides ``make_vocab_size_divisible_by``, so that a
    checkpoint's tensors keep their shapes when a run changes its parallel layout.
    """
    multiple = math.lcm(model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


def num_layer_parameters(model: ModelConfig) -> int:
    """Parameters of one transformer layer: attention, SwiGLU and two norms."""
    hidden = model.hidden_size
    key_value = hidden // model.num_attention_heads * model.num_query_groups
    attention = 2 * hidden * hidden + 2 * hidden * key_value
    return attention + 3 * hidden * model.ffn_hidden_size + 2 * hidden


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model with a vocabulary of ``vocab_size`` rows (padded or not)."""
    num_embeddings = 2 if model.untie_embeddings_and_output_weights else 1
    embeddings = num_embeddings * vocab_size * model.hidden_size
    return model.num_layers * num_layer_parameters(model) + embeddings + model.hidden_size


def flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int) -> int:
    """Floating-point operations of one token's forward and backward pass.

    ``6 N + 12 layers hidden seq_length``: Chowdhery et al. 2022, "PaLM" (arXiv 2204.02311),
    appendix B. Recomputed activations do not count, and attention counts as if it were not causal.
    """
    attention = 12 * model.num_layers * model.hidden_size * seq_length
    return 6 * num_parameters(model, vocab_size) + attention


def causal_share(model: ModelConfig, vocab_size: int, seq_length: int) -> float:
    """The share of `flops_per_token` that remains where causal attention counts half."""
    attention = 12 * model.num_layers * model.hidden_size * seq_length
    return 1 - attention / 2 / flops_per_token(model, vocab_size, seq_length)
