"""The model as a megatron-core `GPTModel`: configuration and construction.

Touvron et al., "Llama 2", 2023: RMSNorm before each block, SwiGLU, rotary positions, grouped-query
attention. Other architectures add a bias to queries, keys and values (Yang et al., "Qwen2", 2024),
or an RMSNorm to the queries and the keys of each head (Yang et al., "Qwen3", 2025), see
`config.architectures`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch.nn.functional import silu

from megatron_chatflow.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_chatflow.config.shape import (
    head_counts,
    num_model_chunks,
    padded_vocab_size,
    unpadded_sizes,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels.attention import gather_facts
from megatron_chatflow.kernels.cross_entropy import choose_softmax
from megatron_chatflow.kernels.shared_group import share
from megatron_chatflow.model.initial_weights import draw_weights, leave_unset
from megatron_chatflow.model.layer_spec import (
    Layers,
    block_spec,
    check_layers,
    choose_layers,
    describe_precision,
    start_user_buffers,
)
from megatron_chatflow.model.rotary import Rotary
from megatron_chatflow.runtime import ranks as megatron
from megatron_chatflow.runtime.ranks import Ranks


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    ranks: Ranks,
    *,
    fuses_weight_gradients: bool = False,
) -> TransformerConfig:
    """Returns megatron-core's configuration of this run's transformer.

    Args:
        model: The model's shape.
        parallel: The parallel layout.
        train: Precision and recomputation.
        ranks: This process's place in the job.
        fuses_weight_gradients: Whether the layers add weight gradients to the gradient buffer.
    """
    dtype = torch.bfloat16 if train.bf16 else torch.float32
    num_chunks = num_model_chunks(model, parallel)
    is_interleaved = num_chunks > 1
    counts = head_counts(model, parallel)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=counts.heads,
        num_query_groups=counts.groups,
        kv_channels=counts.head_dim,
        softmax_scale=Rotary.of(model).softmax_scale,
        window_size=model.window_size,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_method_std,
        activation_func=silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_chunks if is_interleaved else None,
        # In the interleaved schedule two stages exchange messages in both directions at once, which
        # could not be told apart in a batch.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        # A workaround for torch before 2.0, which synchronizes the device at each exchange.
        batch_p2p_sync=False,
        # The interleaved schedule would free outputs while they are being sent, because gloo and
        # NCCL keep the tensor but not its data.
        deallocate_pipeline_outputs=not is_interleaved,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.tp_comm_overlap,
        bf16=train.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        recompute_granularity=train.recompute_granularity,
        recompute_modules=list(train.recompute_modules),
        recompute_method=train.recompute_method,
        recompute_num_layers=train.recompute_num_layers,
        fine_grained_activation_offloading=train.fine_grained_activation_offloading,
        offload_modules=list(train.offload_modules),
        use_cpu_initialization=not ranks.is_cuda,
        deterministic_mode=train.deterministic_mode,
        **_quantization(train),
        **_cuda_graphs(train),
        gradient_accumulation_fusion=fuses_weight_gradients,
        # By torch's compiler, which would take a minute on CPUs.
        bias_activation_fusion=ranks.is_cuda,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _quantization(train: TrainConfig) -> dict[str, Any]:
    """Returns megatron-core's settings for products in FP8 or FP4; none for a run in bf16."""
    if train.fp8_format is None and train.fp4_format is None:
        return {}
    settings: dict[str, Any] = {
        "first_last_layers_bf16": train.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": train.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": train.num_layers_at_end_in_bf16,
    }
    if train.fp4_format is not None:
        return {**settings, "fp4": train.fp4_format}
    return {
        **settings,
        "fp8": train.fp8_format,
        "fp8_recipe": train.fp8_recipe,
        "fp8_param": train.fp8_param_gather,
        "fp8_amax_history_len": train.fp8_amax_history_len,
        "fp8_amax_compute_algo": train.fp8_amax_compute_algo,
    }


def _cuda_graphs(train: TrainConfig) -> dict[str, Any]:
    """Returns megatron-core's settings for CUDA graphs; none for a run without them."""
    if train.cuda_graph_impl == "none":
        return {}
    # megatron-core 0.19 has another name for the parts that are captured.
    has_modules = "cuda_graph_modules" in {field.name for field in fields(TransformerConfig)}
    return {
        "cuda_graph_impl": train.cuda_graph_impl,
        "cuda_graph_modules" if has_modules else "cuda_graph_scope": list(train.cuda_graph_scope),
        "cuda_graph_warmup_steps": train.cuda_graph_warmup_steps,
    }


class HiddenStatesOut(ColumnParallelLinear):  # type: ignore[misc]
    """An output layer that holds its weight and passes hidden states on to the chunked loss."""

    def forward(self, input_: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Returns its input; `linear_cross_entropy` multiplies by the weight, chunk by chunk."""
        return input_, None


@dataclass(frozen=True)
class Llama:
    """The model as this process holds it.

    Attributes:
        chunks: The `GPTModel` of each virtual pipeline stage here.
        config: megatron-core's configuration, shared by the chunks.
        vocab_size: Size of the tokenizer's vocabulary.
        padded_vocab_size: Number of rows of the embedding over all tensor-parallel ranks.
        rotary: The rotary embedding's settings.
        loss: The implementation of the loss, see `loss.chunk_loss`.
        implementations: What computes each part and why, for the log.
    """

    chunks: list[Any]
    config: Any
    vocab_size: int
    padded_vocab_size: int
    rotary: Rotary
    loss: str
    implementations: Mapping[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        dtype: torch.dtype = self.config.params_dtype
        return dtype

    @property
    def window(self) -> int | None:
        """Number of tokens that a token sees, itself included; None for all before it."""
        return None if self.config.window_size is None else self.config.window_size[0] + 1

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output layer; only on the last pipeline stage."""
        model = self.chunks[-1]
        shared: torch.Tensor | None = (
            model.shared_embedding_or_output_weight()
            if model.share_embeddings_and_output_weights
            else model.output_layer.weight
        )
        assert shared is not None
        return shared

    def num_local_parameters(self) -> int:
        """Returns the number of parameters that this process holds."""
        return sum(p.numel() for chunk in self.chunks for p in chunk.parameters())


def build_llama(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    ranks: Ranks,
    *,
    vocab_size: int,
    sequence_length: int | None = None,
) -> Llama:
    """Builds this process's part of the model; ``train.seed`` gives the same weights at any layout.

    Args:
        model: The model's shape.
        parallel: The parallel layout.
        train: Precision and recomputation.
        ranks: This process's place in the job.
        vocab_size: Size of the tokenizer's vocabulary.
        sequence_length: Tokens of a sample, which dynamic rotary scaling depends on; the model's
            longest if None.
    """
    dtype = torch.bfloat16 if train.bf16 else torch.float32
    facts = gather_facts(
        ranks.device,
        dtype,
        head_counts(model, parallel).head_dim,
        deterministic=train.deterministic_mode,
        window=model.window,
    )
    layers = choose_layers(train, facts)
    check_layers(train, parallel, facts, layers.implementation)
    fuses, weight_gradients = layers.weight_gradients(
        ranks.device, dtype, requested=train.gradient_accumulation_fusion
    )
    try:
        config = transformer_config(model, parallel, train, ranks, fuses_weight_gradients=fuses)
    except (AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines() or ["an assertion fails"]
        raise UserError(f"megatron-core refuses the configuration: {reason[0]}") from error
    if layers.are_transformer_engine:
        config.attention_backend = AttnBackend[layers.backend]
    for name in ("init_method", "output_layer_init_method", "embedding_init_method"):
        setattr(config, name, leave_unset)
    length = sequence_length or model.max_position_embeddings
    if parallel.tp_comm_overlap:
        tokens = train.micro_batch_size * length // parallel.context_parallel_size
        start_user_buffers(config, tokens)
    if train.fine_grained_activation_offloading:
        PipelineOffloadManager.reset_instance()  # of an earlier run of this process
    rows = padded_vocab_size(model, parallel, vocab_size)
    num_chunks = num_model_chunks(model, parallel)
    loss, loss_reason = choose_softmax(
        rows // ranks.tensor_parallel_size, config.params_dtype, ranks.device
    )
    chunks = []
    for number in range(num_chunks):
        chunk = _build_chunk(
            config,
            model,
            layers=layers,
            rows=rows,
            vp_stage=number if num_chunks > 1 else None,
            is_first=ranks.is_first_stage and number == 0,
            is_last=ranks.is_last_stage and number == num_chunks - 1,
        )
        # Checkpoints leave padded heads out.
        chunk.unpadded_sizes = unpadded_sizes(model, parallel)
        if ranks.is_cuda:
            chunk.cuda(ranks.device)
        draw_weights(
            chunk,
            seed=train.seed,
            num_layers=model.num_layers,
            std=model.init_method_std,
            tensor_parallel_rank=ranks.tensor_parallel_rank,
            tensor_parallel_size=ranks.tensor_parallel_size,
            unpadded_sizes=chunk.unpadded_sizes,
        )
        chunks.append(chunk)
    return Llama(
        chunks=chunks,
        config=config,
        vocab_size=vocab_size,
        padded_vocab_size=rows,
        rotary=Rotary.of(model, sequence_length),
        loss=loss,
        implementations={
            **layers.descriptions,
            "weight gradients": weight_gradients,
            "CUDA graphs": _describe_graphs(train),
            "precision": describe_precision(train),
            "cross-entropy": loss_reason,
            "tensor-parallel collectives": _collectives(parallel, ranks),
        },
    )


def _describe_graphs(train: TrainConfig) -> str:
    if train.cuda_graph_impl == "none":
        return "none: --cuda-graph-impl none"
    parts = ", ".join(train.cuda_graph_scope)
    return f"transformer-engine's, of {parts}, from step {train.cuda_graph_warmup_steps + 1} on"


def _collectives(parallel: ParallelConfig, ranks: Ranks) -> str:
    """Enables shared-memory collectives if possible; returns a description for the log."""
    if ranks.tensor_parallel_size == 1:
        return "none: layers are not split"
    if ranks.is_cuda:
        return "NCCL"
    if not parallel.shared_memory_collectives:
        return "gloo: --no-shared-memory-collectives"
    return share(
        megatron.tensor_parallel_group(),
        timeout_seconds=60 * parallel.distributed_timeout_minutes,
    )


def _build_chunk(
    config: TransformerConfig,
    model: ModelConfig,
    *,
    layers: Layers,
    rows: int,
    vp_stage: int | None,
    is_first: bool,
    is_last: bool,
) -> GPTModel:
    """Builds a chunk of layers, with the embedding in the first and the output in the last."""
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(layers, config, vp_stage),
        vocab_size=rows,
        max_sequence_length=model.max_position_embeddings,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        # Our attention rotates queries and keys itself, with angles computed once per micro-batch.
        position_embedding_type="none",
        vp_stage=vp_stage,
    )
    if is_last:
        # The weight stays where megatron-core's checkpoints and gradients expect it.
        chunk.output_layer.__class__ = HiddenStatesOut
    return chunk
