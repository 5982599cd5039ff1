"""Sizes that follow from a model's shape and its parallel layout.

The functions compute the numbers of parameters, FLOPs per token, padded attention heads and model
chunks per pipeline stage. The results are exact, and torch is not needed. Chunks are used by the
interleaved pipeline schedule (Narayanan et al. 2021, arXiv 2104.04473, section 2.2): stage s of p
holds the chunks s, s + p, s + 2p, ... of consecutive layers, which divides the pipeline bubble by
the number of chunks per stage.
"""

import math
from dataclasses import dataclass

from megatron_chatflow.config.sections import ModelConfig, ParallelConfig
from megatron_chatflow.errors import UserError

_LAYERS = "parallel.num_layers_per_virtual_pipeline_stage"
_CHUNKS = "parallel.num_virtual_stages_per_pipeline_rank"


def num_model_chunks(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Returns the number of model chunks per pipeline stage; 1 means no interleaving."""
    layers = parallel.num_layers_per_virtual_pipeline_stage
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    if layers is None and chunks is None:
        return 1
    if layers is not None and chunks is not None:
        raise UserError(f"{_LAYERS} and {_CHUNKS}: both are set; remove one of them")
    path, given = (_CHUNKS, chunks) if layers is None else (_LAYERS, layers)
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        raise UserError(
            f"{path}: needs parallel.pipeline_model_parallel_size above 1; set that, or remove "
            "this one"
        )
    assert given is not None
    in_stage = model.num_layers // stages
    if in_stage % given:
        raise UserError(
            f"{path}: {given} does not divide the {in_stage} layers of a pipeline stage; use a "
            "divisor of that"
        )
    return given if layers is None else in_stage // given


def padded_vocab_size(model: ModelConfig, parallel: ParallelConfig, vocab_size: int) -> int:
    """Returns the number of embedding rows, padded to divide evenly over the TP ranks.

    The result is the same for every TP size that divides ``make_vocab_size_divisible_by``, so the
    tensors of a checkpoint keep their shapes when a run changes its parallel layout.
    """
    multiple = math.lcm(model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class HeadCounts:
    """Numbers and size of attention heads."""

    heads: int  # number of query heads
    groups: int  # number of key/value heads
    head_dim: int  # size of a head

    @property
    def query_size(self) -> int:
        """Size of the queries of one token."""
        return self.heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Size of the keys of one token, which equals the size of its values."""
        return self.groups * self.head_dim

    @property
    def projected_size(self) -> int:
        """Size of the queries, keys and values of one token."""
        return self.query_size + 2 * self.key_value_size


def head_counts(model: ModelConfig, parallel: ParallelConfig | None = None) -> HeadCounts:
    """Returns the model's attention heads, including padding heads if ``parallel`` is given.

    If ``parallel.pad_attention_heads`` is set, whole groups are appended until the number of groups
    is divisible by the tensor-parallel size. Weights and biases of padding heads are 0 and remain
    0: their values are 0, so they do not contribute to the output, and their columns in the output
    projection are 0, so they receive no gradient. Norms of queries and keys map 0 to 0.
    """
    groups = model.num_query_groups
    if parallel is not None and parallel.pad_attention_heads:
        tensor = parallel.tensor_model_parallel_size
        groups = -(-groups // tensor) * tensor
    return HeadCounts(
        groups * (model.num_attention_heads // model.num_query_groups), groups, model.head_dim
    )


def unpadded_sizes(model: ModelConfig, parallel: ParallelConfig) -> dict[str, tuple[int, int]]:
    """Returns the unpadded sizes of the tensors that head padding enlarges.

    Returns:
        The padded axis, counted from the last one as -1, and the unpadded length along it, by the
        suffix of the tensor's name in megatron-core. Empty if no heads are padded.
    """
    own = head_counts(model)
    if own == head_counts(model, parallel):
        return {}
    return {
        "self_attention.linear_qkv.weight": (-2, own.projected_size),
        "self_attention.linear_qkv.bias": (-1, own.projected_size),
        "self_attention.linear_proj.weight": (-1, own.query_size),
    }


def num_layer_parameters(model: ModelConfig, parallel: ParallelConfig | None = None) -> int:
    """Returns the number of parameters of one transformer layer: attention, SwiGLU and norms.

    If ``parallel`` is given, the parameters of padding heads are included.
    """
    hidden = model.hidden_size
    counts = head_counts(model, parallel)
    attention = hidden * (counts.projected_size + counts.query_size)
    attention += counts.projected_size if model.add_qkv_bias else 0
    attention += 2 * counts.head_dim if model.qk_layernorm else 0
    return attention + 3 * hidden * model.ffn_hidden_size + 2 * hidden


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Returns the number of parameters of the whole model.

    ``vocab_size`` is the number of embedding rows, with or without padding.
    """
    num_embeddings = 2 if model.untie_embeddings_and_output_weights else 1
    embeddings = num_embeddings * vocab_size * model.hidden_size
    return model.num_layers * num_layer_parameters(model) + embeddings + model.hidden_size


def flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int) -> int:
    """Returns the number of floating-point operations per token of forward and backward passes.

    The formula is ``6 N + 12 layers heads head_dim seq_length``, where N is the number of
    parameters. Source: Chowdhery et al. 2022, "PaLM" (arXiv 2204.02311), appendix B. Recomputation
    is not counted, and attention is counted as if it were not causal: every token sees the whole
    sample, or as many tokens as a shorter sliding window has. N includes the input embedding
    although its lookup is not a matrix product, so the result is too high for a small model with a
    large vocabulary.
    """
    return 6 * num_parameters(model, vocab_size) + _attention_flops(model, seq_length)


def _attention_flops(model: ModelConfig, seq_length: int) -> int:
    """Returns the FLOPs per token of attention scores and contexts, not causal."""
    num_seen = seq_length if model.window is None else min(seq_length, model.window)
    return 12 * model.num_layers * head_counts(model).query_size * num_seen


def causal_share(model: ModelConfig, vocab_size: int, seq_length: int) -> float:
    """Returns the fraction of `flops_per_token` that remains if attention is counted as causal.

    Without a sliding window, causal attention counts half. With one, only the first tokens of a
    sample see less than the window.
    """
    num_seen = seq_length if model.window is None else min(seq_length, model.window)
    hidden = _attention_flops(model, seq_length) * num_seen / (2 * seq_length)
    return 1 - hidden / flops_per_token(model, vocab_size, seq_length)
