"""Sizes that follow from a model's shape and its parallel layout.

Parameters, FLOPs per token, padded attention heads and the number of model chunks per pipeline
stage, all exact and without torch. Chunks belong to the interleaved pipeline schedule (Narayanan
et al. 2021, arXiv 2104.04473, section 2.2): stage s of p holds the chunks s, s + p, s + 2p, ... of
consecutive layers, which divides the pipeline's bubble by the number of chunks.
"""

import math
from dataclasses import dataclass

from megatron_chatflow.config.sections import ModelConfig, ParallelConfig
from megatron_chatflow.errors import UserError

_LAYERS = "parallel.num_layers_per_virtual_pipeline_stage"
_CHUNKS = "parallel.num_virtual_stages_per_pipeline_rank"


def num_model_chunks(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Chunks of layers that each pipeline stage holds; 1 is the schedule without interleaving.

    Raises:
        UserError: The layers cannot be cut so.
    """
    layers = parallel.num_layers_per_virtual_pipeline_stage
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    if layers is None and chunks is None:
        return 1
    if layers is not None and chunks is not None:
        raise UserError(f"{_LAYERS} and {_CHUNKS}: both are set; leave one of them out")
    path, given = (_CHUNKS, chunks) if layers is None else (_LAYERS, layers)
    stages = parallel.pipeline_model_parallel_size
    if stages == 1:
        raise UserError(
            f"{path}: needs parallel.pipeline_model_parallel_size above 1; set that, or leave it "
            "out"
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
    """Rows of the embedding: a multiple that every TP process shares evenly.

    It is the same for every TP size that divides ``make_vocab_size_divisible_by``, so that a
    checkpoint's tensors keep their shapes when a run changes its parallel layout.
    """
    multiple = math.lcm(model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class HeadCounts:
    """Attention heads as the processes hold them, padding included.

    Attributes:
        heads: Query heads.
        groups: Key/value heads.
        head_dim: Size of a head.
    """

    heads: int
    groups: int
    head_dim: int

    @property
    def query_size(self) -> int:
        """Size of all queries of a token."""
        return self.heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Size of all keys of a token, which is that of its values."""
        return self.groups * self.head_dim

    @property
    def projected_size(self) -> int:
        """Size of a token's queries, keys and values."""
        return self.query_size + 2 * self.key_value_size


def head_counts(model: ModelConfig, parallel: ParallelConfig | None = None) -> HeadCounts:
    """The model's own heads; with ``parallel``, those that it is padded to there.

    Padding adds whole groups behind the model's own until tensor parallelism divides them. Their
    weights are zeros, and stay zeros: their values are 0, so they add nothing, and their output's
    columns are 0, so no gradient reaches them.
    """
    groups = model.num_query_groups
    if parallel is not None and parallel.pad_attention_heads:
        tensor = parallel.tensor_model_parallel_size
        groups = -(-groups // tensor) * tensor
    return HeadCounts(
        groups * (model.num_attention_heads // model.num_query_groups), groups, model.head_dim
    )


def unpadded_sizes(model: ModelConfig, parallel: ParallelConfig) -> dict[str, tuple[int, int]]:
    """What of padded matrices is the model's own.

    Returns:
        By the end of a matrix's name in megatron-core: the axis that is padded, and the model's own
        length along it. Empty where no heads are padded.
    """
    own = head_counts(model)
    if own == head_counts(model, parallel):
        return {}
    return {
        "self_attention.linear_qkv.weight": (0, own.projected_size),
        "self_attention.linear_proj.weight": (1, own.query_size),
    }


def num_layer_parameters(model: ModelConfig, parallel: ParallelConfig | None = None) -> int:
    """Parameters of one transformer layer: attention, SwiGLU and two norms.

    With ``parallel``, those of padded attention heads are counted.
    """
    hidden = model.hidden_size
    counts = head_counts(model, parallel)
    attention = hidden * (counts.projected_size + counts.query_size)
    return attention + 3 * hidden * model.ffn_hidden_size + 2 * hidden


def num_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the whole model with a vocabulary of ``vocab_size`` rows (padded or not)."""
    num_embeddings = 2 if model.untie_embeddings_and_output_weights else 1
    embeddings = num_embeddings * vocab_size * model.hidden_size
    return model.num_layers * num_layer_parameters(model) + embeddings + model.hidden_size


def flops_per_token(model: ModelConfig, vocab_size: int, seq_length: int) -> int:
    """Floating-point operations of one token's forward and backward pass.

    ``6 N + 12 layers heads head_dim seq_length``: Chowdhery et al. 2022, "PaLM" (arXiv 2204.02311),
    appendix B. Recomputed activations do not count, and attention counts as if it were not causal.
    N holds the input embedding, whose lookup is no product: of a small model with a large
    vocabulary this counts more than is done.
    """
    attention = 12 * model.num_layers * head_counts(model).query_size * seq_length
    return 6 * num_parameters(model, vocab_size) + attention


def causal_share(model: ModelConfig, vocab_size: int, seq_length: int) -> float:
    """The share of `flops_per_token` that remains where causal attention counts half."""
    attention = 12 * model.num_layers * head_counts(model).query_size * seq_length
    return 1 - attention / 2 / flops_per_token(model, vocab_size, seq_length)
