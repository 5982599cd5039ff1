"""Sizes that follow from a model's shape: parameters, FLOPs, and memory of a process.

In: the configuration and the vocabulary's size. Out: exact counts of parameters, and estimates of
work and memory for the model-FLOPs utilisation and the dry run. Needs neither torch nor a GPU.
"""

import math
from dataclasses import dataclass

from megatron_chatflow.config.run_config import RunConfig
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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the process that needs most: the first stage of the pipeline, or the only one.

    Attributes:
        weights: Parameters in the precision that computes.
        gradients: Gradient buffers (fp32).
        optimizer: Adam's moments, and the fp32 master weights under bf16.
        activations: What the forward passes keep for the backward ones, logits included.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum, in bytes; the allocator and the libraries need some more."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(config: RunConfig, vocab_size: int, world_size: int) -> MemoryEstimate:
    """Memory of the fullest process, as an estimate within some ten per cent for large models.

    Args:
        config: The run.
        vocab_size: The tokenizer's vocabulary, before padding.
        world_size: Number of processes; a multiple of the model-parallel size.
    """
    model, parallel = config.model, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    vocab = padded_vocab_size(model, parallel, vocab_size)
    num_tables = 1 if stages > 1 or not model.untie_embeddings_and_output_weights else 2
    parameters = model.num_layers // stages * num_layer_parameters(model) // tensor
    parameters += num_tables * vocab * model.hidden_size // tensor
    data_parallel = world_size // config.model_parallel_size
    # The distributed optimizer cuts its state over the context-parallel processes as well.
    shards = (
        data_parallel * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    )
    return MemoryEstimate(
        weights=parameters * (2 if config.train.bf16 else 4),
        gradients=parameters * 4,
        optimizer=parameters * (12 if config.train.bf16 else 8) // shards,
        activations=_activation_bytes(config, vocab),
    )


def _activation_bytes(config: RunConfig, vocab: int) -> int:
    """Kept activations, with attention that never writes its scores.

    The terms follow Korthikanti et al. 2022 (arXiv 2205.05198), section 4, with SwiGLU and grouped
    queries in place of their feed-forward block and heads, and without dropout.
    """
    model, parallel, train = config.model, config.parallel, config.train
    tensor = parallel.tensor_model_parallel_size
    value_bytes = 2 if train.bf16 else 4
    tokens = config.data.seq_length // parallel.context_parallel_size * train.micro_batch_size
    key_value = model.hidden_size // model.num_attention_heads * model.num_query_groups
    whole = 4 * model.hidden_size // (tensor if parallel.sequence_parallel else 1)
    shared = 2 * model.hidden_size + 2 * key_value + 3 * model.ffn_hidden_size
    per_layer = tokens * value_bytes * (whole + shared // tensor)
    num_layers = model.num_layers // parallel.pipeline_model_parallel_size
    # One-forward-one-backward: the first stage holds as many micro-batches as there are stages.
    in_flight = parallel.pipeline_model_parallel_size
    kept = per_layer * num_layers * in_flight
    if train.recompute_granularity == "full":
        chunk = train.recompute_num_layers or 1
        inputs = tokens * value_bytes * (whole // 4)
        if train.recompute_method == "uniform":
            kept = inputs * -(-num_layers // chunk) * in_flight + per_layer * chunk
        else:
            ordinary = per_layer * (num_layers - chunk)
            kept = (inputs * chunk + ordinary) * in_flight + per_layer
    has_logits = parallel.pipeline_model_parallel_size == 1
    logits = tokens * vocab // tensor * (value_bytes + 4) if has_logits else 0
    return kept + logits
