"""Shapes of small models, for tests of conversion."""

from dataclasses import replace

from tiny_run import VOCAB_SIZE

from megatron_chatflow.convert.shape import LlamaShape

SHAPE = LlamaShape(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=9,
    max_position_embeddings=16,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    init_method_std=0.02,
    untie_embeddings_and_output_weights=True,
)
SHAPE_OF_TINY_RUN = replace(
    SHAPE,
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=176,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=128,
    init_method_std=0.1,
)
