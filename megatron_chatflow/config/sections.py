"""The sections of a run's configuration, one frozen dataclass each.

The types are strict, and each field is checked individually; `validation` checks combinations of
fields. The docstring below a field is the help text of its flag, the first line of a section's
docstring is the section's heading in ``--help`` and in `docs/reference/flags.md`, and the order of
the fields is their order in both.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, StrictInt, StrictStr, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from megatron_chatflow.config.architectures import (
    NULLABLE_FIELDS,
    PRESETS,
    YARN_DEFAULTS,
    RopeScaling,
    without_other_rope,
)
from megatron_chatflow.config.fields import (
    CONFIG,
    Count,
    FilePath,
    Fraction,
    KnotWeights,
    Location,
    Name,
    NonNegativeNumber,
    NumLayers,
    PositiveCount,
    PositiveNumber,
    RemoteFolder,
    RunFolder,
    Seed,
    Share,
    Shares,
    SharesBySource,
    Size,
    Stride,
    Switch,
    WindowSize,
    parse_number,
)
from megatron_chatflow.config.problems import did_you_mean
from megatron_chatflow.config.stages import parse_selector
from megatron_chatflow.errors import UserError

# How to initialize the rows of new pieces. `megatron_chatflow.convert.vocabulary` describes them.
EmbeddingInit = Literal["mean-of-pieces", "mean", "normal", "copy-first-piece", "distill"]


Selector = Annotated[StrictStr, AfterValidator(parse_selector)]
"""What a stage trains, in a form that `parse_selector` accepts."""


def _fill(data: Any, defaults: Mapping[str, Any]) -> Any:
    """Fills missing or null keys of a validator's input from ``defaults``.

    A null of `NULLABLE_FIELDS` is a value.
    """
    given = data.kwargs if isinstance(data, ArgsKwargs) else data
    if not isinstance(given, Mapping):
        return data
    present = {key for key, value in given.items() if value is not None or key in NULLABLE_FIELDS}
    filled = {**given, **{key: value for key, value in defaults.items() if key not in present}}
    return ArgsKwargs(data.args, filled) if isinstance(data, ArgsKwargs) else filled


def _given(data: Any, key: str) -> Any:
    given = data.kwargs if isinstance(data, ArgsKwargs) else data
    return given.get(key) if isinstance(given, Mapping) else None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ModelConfig:
    """Shape of the model, a decoder with RMSNorm, SwiGLU and rotary positions.

    Sizes that are not given are filled from the preset, so every size is set after construction.
    """

    preset: Name | None = Field(
        default=None,
        description="published model whose sizes are used for the sizes that are not set: "
        + ", ".join(PRESETS),
    )
    num_layers: NumLayers
    """number of transformer layers"""
    hidden_size: Size
    """size of the hidden states"""
    ffn_hidden_size: Size
    """size of the intermediate activations of the SwiGLU MLP"""
    num_attention_heads: Size
    """number of attention heads (query heads)"""
    num_query_groups: Size
    """number of key/value heads for grouped-query attention; num_attention_heads when unset"""
    kv_channels: Size | None = None
    """size of an attention head; hidden_size / num_attention_heads when unset"""
    add_qkv_bias: Switch = False
    """add a bias to queries, keys and values, as in Qwen2"""
    qk_layernorm: Switch = False
    """normalize the queries and the keys of each head with RMSNorm, as in Qwen3"""
    max_position_embeddings: Size
    """maximum sequence length in tokens"""
    rotary_base: PositiveNumber = 10000.0
    """base of the rotary position embedding (RoPE theta)"""
    rope_scaling_type: RopeScaling | None = None
    """type of RoPE scaling for a longer context; no scaling when unset"""
    rope_scaling_factor: PositiveNumber | None = None
    """factor by which RoPE scaling extends the context"""
    rope_low_freq_factor: PositiveNumber | None = None
    """low_freq_factor of llama3 RoPE scaling; 1 when unset"""
    rope_high_freq_factor: PositiveNumber | None = None
    """high_freq_factor of llama3 RoPE scaling; 4 when unset"""
    rope_original_max_position_embeddings: Size | None = None
    """maximum sequence length in tokens before llama3 or yarn RoPE scaling"""
    yarn_beta_fast: PositiveNumber | None = None
    """turns within the original length above which yarn keeps a frequency; 32 when unset"""
    yarn_beta_slow: PositiveNumber | None = None
    """turns within the original length below which yarn divides a frequency; 1 when unset"""
    yarn_correction_range_round_to_int: Switch | None = None
    """round both ends of yarn's ramp to whole frequencies (truncate of transformers); on when
    unset"""
    yarn_attention_factor: PositiveNumber | None = None
    """attention_factor of yarn, on cosines and sines; from the other settings when unset"""
    mscale: PositiveNumber | None = None
    """numerator's mscale of yarn's attention factor; used with mscale_all_dim"""
    mscale_all_dim: PositiveNumber | None = None
    """denominator's mscale of yarn's attention factor; used with mscale"""
    window_size: WindowSize | None = None
    """sliding-window attention: LEFT,RIGHT, the numbers of tokens before and behind a token that it
    sees beside itself. RIGHT is 0. A window of 4096 tokens, as Mistral's, is 4095,0; no window
    when unset"""
    norm_epsilon: PositiveNumber = 1e-5
    """epsilon in the denominator of RMSNorm"""
    init_method_std: PositiveNumber = 0.02
    """standard deviation of the initial weights"""
    untie_embeddings_and_output_weights: Switch = True
    """use separate weights for the embedding and the output layer"""
    make_vocab_size_divisible_by: Size = 128
    """pad the vocabulary size to a multiple of this value and of the tensor-parallel size"""
    vocab_size: Size | None = None
    """vocabulary size before padding; the tokenizer's when unset"""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        preset = _given(data, "preset")
        if isinstance(preset, str):
            if preset not in PRESETS:
                raise UserError(
                    f"model.preset: there is no {preset!r}{did_you_mean(preset, PRESETS)}; "
                    f"use one of {', '.join(PRESETS)}"
                )
            # The preset's number of groups applies only to the preset's number of heads.
            heads = _given(data, "num_attention_heads")
            shape = dict(PRESETS[preset])
            if heads not in (None, shape["num_attention_heads"]):
                del shape["num_query_groups"]
            given = data.kwargs if isinstance(data, ArgsKwargs) else data
            if isinstance(given, Mapping):
                shape = without_other_rope(shape, given)
            data = _fill(data, shape)
        if _given(data, "rope_scaling_type") == "llama3":
            data = _fill(data, {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0})
        if _given(data, "rope_scaling_type") == "yarn":
            data = _fill(data, YARN_DEFAULTS)
        heads = _given(data, "num_attention_heads")
        return data if heads is None else _fill(data, {"num_query_groups": heads})

    @model_validator(mode="after")
    def _leave_out_usual_head_size(self) -> "ModelConfig":
        if self.kv_channels == self.hidden_size / self.num_attention_heads:
            object.__setattr__(self, "kv_channels", None)  # equal shapes must compare equal
        return self

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int | None:
        """Number of tokens that a token sees with its window, itself included; None for all."""
        return None if self.window_size is None else self.window_size[0] + 1


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TokenizerConfig:
    """Tokenizer that the corpus was encoded with."""

    tokenizer_type: Literal["auto", "Llama2Tokenizer", "HuggingFaceTokenizer"] = "auto"
    """type of the tokenizer; auto detects it from the files"""
    tokenizer_model: FilePath
    """path of a SentencePiece model, a tokenizer.json, or a folder that contains one"""
    old_tokenizer_model: FilePath | None = None
    """with --embedding-init: path of the tokenizer that the loaded weights were trained with;
    the path recorded with the weights when unset. Without it, for weights that were grown
    elsewhere: path of the tokenizer without the new tokens, which are new_rows in train.stages"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ParallelConfig:
    """Parallel layout. Data parallelism uses the processes that the other kinds leave."""

    tensor_model_parallel_size: Size = 1
    """number of tensor-parallel ranks, which split every layer"""
    pipeline_model_parallel_size: Size = 1
    """number of pipeline stages; each one holds a part of the layers"""
    num_layers_per_virtual_pipeline_stage: Size | None = None
    """number of layers per model chunk; enables the interleaved pipeline schedule"""
    num_virtual_stages_per_pipeline_rank: Size | None = None
    """number of model chunks per pipeline stage, as an alternative to
    num_layers_per_virtual_pipeline_stage"""
    pad_attention_heads: Switch = False
    """add zero-valued attention heads if tensor_model_parallel_size does not divide their number"""
    context_parallel_size: Size = 1
    """number of context-parallel ranks, which split every sequence"""
    sequence_parallel: Switch = False
    """split the norms and residuals along the sequence over the tensor-parallel ranks"""
    use_distributed_optimizer: Switch = False
    """shard the optimizer state over the data-parallel ranks"""
    overlap_grad_reduce: Switch = False
    """overlap the gradient reduction with the backward pass"""
    tp_comm_overlap: Switch = False
    """overlap tensor-parallel messages with matrix products, through user buffers of
    transformer-engine; needs sequence_parallel"""
    grad_reduce_in_bf16: Switch = False
    """accumulate and reduce gradients in bf16 instead of fp32, which halves their memory and
    messages and is less precise"""
    overlap_param_gather: Switch = False
    """overlap the parameter all-gather of the distributed optimizer with the forward pass"""
    ddp_pad_buckets_for_high_nccl_busbw: Switch = False
    """pad the gradient buckets of the distributed optimizer to multiples of 2^16 values, which
    NCCL reduces faster over many ranks"""
    use_nccl_ub: Switch = False
    """allocate the gradient and parameter buffers as registered NCCL user buffers, whose
    collectives use fewer multiprocessors of the GPU"""
    disable_symmetric_registration: Switch = False
    """with use_nccl_ub: register the buffers in each process instead of symmetrically"""
    shared_memory_collectives: Switch = True
    """on CPUs, use shared memory instead of gloo between tensor-parallel ranks of one machine"""
    distributed_timeout_minutes: Size = 20
    """timeout of a collective in minutes; the run fails when it expires"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SourceConfig:
    """Datasets of a source, and how samples are cut from them."""

    paths: tuple[Location, ...] = Field(min_length=1)
    """prefixes of the source's .bin/.idx files, such as data/en_text_document"""
    validation_paths: tuple[Location, ...] = ()
    """prefixes of datasets that are used only for validation"""
    loss: Literal["all", "response"] | None = None
    """tokens that count in the loss: all, or response (only those marked in the loss-mask
    files). When unset, all tokens count, with a warning if there are loss masks"""
    objective_weight: PositiveNumber = 1.0
    """weight of the source's loss tokens in the training objective, relative to other sources"""
    packing: Literal["none", "best_fit"] = "none"
    """none: concatenate the documents and cut them every seq_length tokens; best_fit: pack
    whole documents into samples"""
    boundaries: Literal["ignore", "isolate"] = "ignore"
    """ignore: attention crosses document boundaries within a sample; isolate: it does not"""
    max_epochs: PositiveNumber | None = None
    """maximum number of epochs of the source; a schedule that needs more is an error before
    training. No limit when unset"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class KnotConfig:
    """Weights of all sources at one position of the run. An omitted source has weight 0."""

    at: Count
    """position of the knot in the schedule's unit"""
    weights: KnotWeights
    """relative weights by source; or as_planned, in a resumed run: keep the checkpoint's
    schedule up to this knot"""
    ramp: Literal["step", "linear", "cosine"] = "step"
    """how the weights change from the previous knot to this one"""
    objective_weights: dict[Name, PositiveNumber] | None = None
    """objective_weight by source at this knot, ramped like the weights; a source that is not named
    has the objective_weight of its own"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ControllerConfig:
    """Decides the weights during the run, from losses. The schedule then has a single knot."""

    name: Literal["odm", "shearing", "replay"]
    """rule of the decisions"""
    horizon: PositiveCount | None = None
    """length of the parts of the run with the same weights, in the schedule's unit; at least one
    global batch. Needed by odm and shearing"""
    floor: SharesBySource = 0.0
    """lowest weight of a source, for all sources or by source"""
    cap: SharesBySource = 1.0
    """highest weight of a source, for all sources or by source"""
    smoothing: Fraction = 0.9
    """odm: how much of a source's reward is kept at each decision"""
    reference_loss: dict[Name, NonNegativeNumber] | None = None
    """shearing: validation loss by source, in nats, at which the source gets no more weight"""
    run: FilePath | None = None
    """replay: folder of the run or checkpoint whose decisions are replayed"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ScheduleConfig:
    """Weights of the sources over the run."""

    unit: Literal["samples", "tokens", "iterations"] = "samples"
    """unit of the knots' positions"""
    count: Literal["samples", "tokens", "loss_tokens"] = "samples"
    """what the weights are shares of"""
    knots: tuple[KnotConfig, ...] = Field(min_length=1)
    """positions and weights, in increasing order of the positions"""
    controller: ControllerConfig | None = None
    """decides the weights during the run from losses"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class DataConfig:
    """Data sources, and the schedule that blends them.

    With a single source, the schedule may be omitted; the source then has the whole weight.
    """

    seq_length: Size
    """length of a sample in tokens"""
    sources: dict[Name, SourceConfig] = Field(min_length=1)
    """datasets and settings by name of the source"""
    schedule: ScheduleConfig
    """weights of the sources over the run"""
    holdout_every: Stride | None = None
    """hold out every k-th document of each source without validation_paths for validation; no
    documents are held out when unset"""
    split: Shares | None = None
    """alternative to holdout_every: shares of the documents of each dataset for training,
    validation and test, in order, such as 969,30,1"""
    num_prefetch: Size = 2
    """number of global batches to load ahead"""
    data_verify: Switch = False
    """compare all bytes of every dataset with its .json before training, instead of a sample of
    blocks"""

    @model_validator(mode="before")
    @classmethod
    def _fill_schedule(cls, data: Any) -> Any:
        sources = _given(data, "sources")
        if isinstance(sources, Mapping) and len(sources) == 1:
            return _fill(
                data, {"schedule": {"knots": [{"at": 0, "weights": dict.fromkeys(sources, 1)}]}}
            )
        return data


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class OptimizerConfig:
    """AdamW and the learning-rate schedule."""

    lr: PositiveNumber
    """maximum learning rate, reached at the end of the warmup"""
    min_lr: NonNegativeNumber = 0.0
    """minimum learning rate, reached at the end of the decay"""
    decoupled_lr: PositiveNumber | None = None
    """maximum learning rate of the embedding and the output layer; lr when unset"""
    decoupled_min_lr: NonNegativeNumber | None = None
    """minimum learning rate of the embedding and the output layer, with decoupled_lr; min_lr when
    unset"""
    lr_warmup_init: NonNegativeNumber = 0.0
    """learning rate at the start of the warmup"""
    lr_warmup_iters: Count = 0
    """length of the linear warmup in iterations; --lr-warmup-fraction sets it as a fraction of the
    decay's length"""
    lr_warmup_samples: Count = 0
    """length of the linear warmup in samples; requires train_samples"""
    lr_cycle_start_iters: Count = 0
    """iteration at which the schedule begins again with a warmup, for another cycle of a resumed
    run"""
    lr_cycle_start_samples: Count = 0
    """sample at which the schedule begins again; requires train_samples"""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """shape of the learning rate decay; WSD is constant until lr_wsd_decay_iters before its end"""
    lr_decay_iters: PositiveCount | None = None
    """iteration at which the decay ends; the last iteration when unset"""
    lr_decay_samples: PositiveCount | None = None
    """sample at which the decay ends; requires train_samples"""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """shape of the decay at the end of a WSD schedule"""
    lr_wsd_decay_iters: PositiveCount | None = None
    """length of the decay at the end of a WSD schedule in iterations"""
    lr_wsd_decay_samples: PositiveCount | None = None
    """length of the decay at the end of a WSD schedule in samples; requires train_samples"""
    weight_decay: NonNegativeNumber = 0.1
    """coefficient of the decoupled weight decay of AdamW"""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """how the weight decay grows over the run, from start_weight_decay to end_weight_decay"""
    start_weight_decay: NonNegativeNumber | None = None
    """weight decay at the start, unless weight_decay_incr_style is constant"""
    end_weight_decay: NonNegativeNumber | None = None
    """weight decay at the end, unless weight_decay_incr_style is constant"""
    ema_decay: Fraction | None = None
    """share that an update keeps of the exponential moving average of the weights, such as 0.999;
    validations also evaluate the average, and checkpoints hold it; no average when unset"""
    no_weight_decay: tuple[Selector, ...] = ()
    """tensors without weight decay, in addition to norms: embeddings, output, layers.0-3, or
    patterns of names such as decoder.layers.*.mlp.*"""
    adam_beta1: Fraction = 0.9
    """decay rate of Adam's first moment"""
    adam_beta2: Fraction = 0.95
    """decay rate of Adam's second moment"""
    adam_eps: PositiveNumber = 1e-8
    """epsilon in the denominator of Adam"""
    clip_grad: NonNegativeNumber = 1.0
    """maximum global gradient norm; 0 disables clipping"""
    use_precision_aware_optimizer: Switch = False
    """let transformer-engine's Adam hold master weights and moments, in the following dtypes; fp32
    master weights then take 2 bytes beside bf16 weights; needs use_distributed_optimizer"""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """dtype of accumulated and reduced gradients, with use_precision_aware_optimizer"""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """dtype of the master weights, with use_precision_aware_optimizer"""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """dtype of Adam's first moment, with use_precision_aware_optimizer"""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """dtype of Adam's second moment, with use_precision_aware_optimizer"""
    optimizer_cpu_offload: Switch = False
    """keep optimizer state in host memory and update there; needs use_precision_aware_optimizer"""
    optimizer_offload_fraction: Share = 1.0
    """share of the optimizer state that optimizer_cpu_offload moves to host memory"""
    overlap_cpu_optimizer_d2h_h2d: Switch = False
    """overlap the updates on the CPU with the copies of gradients and weights, one weight at a
    time"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class StageConfig:
    """What is trained from one position of the run on."""

    at: Count
    """position of the stage's beginning in the unit of data.schedule; 0 for the first stage"""
    trainable: tuple[Selector, ...] = Field(min_length=1)
    """what is trained, everything else is frozen: all, embeddings, output, new_rows, layers.0-3,
    rows.49152-, or patterns of names such as decoder.layers.*.mlp.*"""
    lr_multipliers: dict[Selector, PositiveNumber] = Field(default_factory=dict)
    """factors of the learning rate by what they apply to, named as in trainable; of several that
    apply, the last one counts"""


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrainConfig:
    """Length of the run, batch sizes, precision, recomputation, evaluation and kernels."""

    train_iters: PositiveCount | None = None
    """total number of iterations of the run"""
    train_samples: PositiveCount | None = None
    """total number of samples of the run, as an alternative to train_iters"""
    micro_batch_size: Size
    """number of samples per forward pass of a rank"""
    global_batch_size: Size
    """number of samples per iteration over all ranks"""
    rampup_batch_size: tuple[PositiveCount, ...] | None = Field(
        default=None, min_length=3, max_length=3
    )
    """global batch size at the start, its increment, and the number of samples over which it grows
    to global_batch_size; requires train_samples"""
    stages: tuple[StageConfig, ...] = ()
    """stages of training, in increasing order of their positions; one stage that trains everything
    when unset"""
    seed: Seed = 1234
    """seed of the initial weights and of the order of the data"""
    new_data_seed: Switch = False
    """allow a resumed run to use another seed for the data; each source uses it from its next
    epoch on"""
    bf16: Switch = True
    """compute in bfloat16 with fp32 master weights; fp32 otherwise"""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """compute the matrix products of the layers in FP8: e4m3 for all operands, or e5m2 for
    gradients (hybrid); needs transformer-engine; bf16 when unset"""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """how FP8 values are scaled: by the current maximum of a tensor (tensorwise), by those of
    earlier iterations (delayed), by blocks (blockwise), or by 32 values (mxfp8)"""
    fp8_amax_history_len: PositiveCount = 1
    """number of iterations whose maxima the delayed recipe stores"""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """which of the stored maxima the delayed recipe uses"""
    fp8_param_gather: Switch = False
    """store the matrices of the layers in FP8 beside fp32 master weights, and gather them in FP8;
    needs use_distributed_optimizer"""
    reuse_grad_buf_for_mxfp8_param_ag: Switch = False
    """gather updated weights in the gradient buffer; fp8_param_gather needs it with mxfp8"""
    fp4_format: Literal["e2m1"] | None = None
    """compute the matrix products of the layers in FP4 (NVFP4); needs transformer-engine and a
    Blackwell GPU; bf16 when unset"""
    first_last_layers_bf16: Switch = False
    """keep the first and last layers in bf16 with fp8_format"""
    num_layers_at_start_in_bf16: Count = 1
    """number of first layers that first_last_layers_bf16 keeps in bf16"""
    num_layers_at_end_in_bf16: Count = 1
    """number of last layers that first_last_layers_bf16 keeps in bf16"""
    gradient_accumulation_fusion: Switch = True
    """add weight gradients to the gradient buffer inside the matrix product, on GPUs; a product
    and a sum when unset"""
    cuda_graph_impl: Literal["none", "transformer_engine"] = "none"
    """run parts of the layers as CUDA graphs, which saves the host the time of their kernel
    launches; needs transformer-engine"""
    cuda_graph_scope: tuple[Literal["mlp"], ...] = Field(default=("mlp",), min_length=1)
    """parts of a layer that are CUDA graphs; attention cannot be, because its documents differ in
    every micro-batch"""
    cuda_graph_warmup_steps: Count = 3
    """number of iterations before the CUDA graphs are captured"""
    recompute_granularity: Literal["full", "selective"] | None = None
    """what to recompute in the backward pass to save memory: whole layers (full) or parts of
    layers (selective); nothing when unset"""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = Field(
        default=("core_attn",), min_length=1
    )
    """parts of a layer that selective recomputation recomputes: the attention core, the MLP"""
    recompute_method: Literal["uniform", "block"] | None = None
    """how full recomputation selects layers: uniform (chunks of all layers) or block (the first
    layers of each stage)"""
    recompute_num_layers: Size | None = None
    """number of layers per recomputed chunk (uniform) or of recomputed layers per stage (block)"""
    fine_grained_activation_offloading: Switch = False
    """move activations of offload_modules to host memory between forward and backward pass; needs
    transformer-engine and a GPU"""
    offload_modules: tuple[Literal["qkv_linear", "core_attn", "attn_proj"], ...] = ()
    """parts of a layer whose stored activations fine_grained_activation_offloading moves: the QKV
    projection with its norm, the attention core, the output projection"""
    eval_interval: PositiveCount | None = None
    """number of iterations between validations; no validation when unset"""
    eval_iters: Count = 8
    """maximum number of global batches per source in a validation; 0 disables validation"""
    choice_questions: FilePath | None = None
    """JSON Lines file of multiple-choice questions to evaluate during training"""
    choice_interval: PositiveCount | None = None
    """number of iterations between evaluations of choice_questions"""
    choice_num_fewshot: Count = 0
    """number of few-shot examples before each question of choice_questions"""
    choice_scoring: Literal["letter", "continuation"] = "letter"
    """what is scored for choice_questions: the answers' letters (letter) or the whole answers
    (continuation)"""
    choice_language: Literal["en", "zh"] = "en"
    """language of the prompt around choice_questions"""
    eval_probes: tuple[Name, ...] = ()
    """probes of transfer to evaluate during training, each as NAME, NAME:FILE or
    NAME,KEY=VALUE,...:FILE, where NAME is copy, fewshot, translation or pairs"""
    probe_interval: PositiveCount | None = None
    """number of iterations between evaluations of eval_probes"""
    exit_interval: PositiveCount | None = None
    """save a checkpoint and exit at every multiple of this iteration; never when unset"""
    exit_duration_in_mins: Size | None = None
    """save a checkpoint and exit after this many minutes; never when unset"""
    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """implementation of the layers: transformer-engine's, or megatron-core's own (local); auto
    uses transformer-engine's on GPUs where it is installed"""
    attention_backend: Literal[
        "auto",
        "transformer_engine",
        "flash_attn_4",
        "flash_attn_3",
        "flash_attn_2",
        "cudnn",
        "flash",
        "sdpa",
    ] = "auto"
    """attention implementation; auto selects the fastest available one on GPUs"""
    manual_gc_interval: PositiveCount | None = None
    """number of iterations between manual Python garbage collections; automatic collection when
    unset"""
    deterministic_mode: Switch = False
    """use only deterministic kernels"""

    def recomputes(self, module: Literal["core_attn", "mlp"]) -> bool:
        """Returns whether selective recomputation recomputes a part of a layer."""
        return self.recompute_granularity == "selective" and module in self.recompute_modules

    @property
    def validates(self) -> bool:
        """Whether validation is enabled."""
        return self.eval_interval is not None and self.eval_iters > 0


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CheckpointConfig:
    """Where checkpoints are saved, and where the initial weights are loaded from."""

    save: RunFolder | None = None
    """folder of the run, for checkpoints, logs and metrics; nothing is saved when unset"""
    save_remote: RemoteFolder | None = None
    """URL of a folder on a store, such as s3://bucket/run, to copy every checkpoint to in the
    background; a run with --load equal to --save first copies a newer checkpoint from there"""
    load: Location | None = None
    """folder of the checkpoints to resume from or, with finetune, to take the weights from"""
    save_interval: PositiveCount | None = None
    """number of iterations between checkpoints; only the last iteration is saved when unset"""
    async_save: Switch = True
    """continue training while a checkpoint is written from a copy in host memory"""
    ckpt_verify: Switch = False
    """verify the hash of every checkpoint file before loading"""
    save_retain: Size | None = None
    """number of newest checkpoints to keep; all are kept when unset"""
    save_keep_every: PositiveCount | None = None
    """additionally keep the checkpoints at multiples of this iteration"""
    pretrained_checkpoint: Location | None = None
    """checkpoint to take the initial weights from if --load contains no checkpoint yet"""
    load_hf: Location | None = None
    """Hugging Face model folder to take the initial weights from if --load contains no
    checkpoint yet; its config.json sets the model section"""
    embedding_init: EmbeddingInit | None = None
    """initialization of the embedding rows of new tokens if the tokenizer extends that of the
    loaded weights; an extended tokenizer is an error when unset. Only convert_checkpoint.py can
    distill"""
    finetune: Switch = False
    """load only the weights and start at iteration 0"""
    from_scratch: Switch = False
    """start with random weights without a warning if --load contains no checkpoint"""
    load_optim: Switch = True
    """load the optimizer state on a resume; otherwise the run continues at the same iteration
    with a new optimizer state"""


Factor = Annotated[float, BeforeValidator(parse_number), Field(gt=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FaultConfig:
    """Handling of bad steps, hung ranks and missing data files."""

    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """what to do if the loss or gradient of a step is not finite, the loss is a spike or the
    gradient norm is above grad_norm_limit: stop the run, skip the update, or roll back to the
    last checkpoint and continue with the data that follows"""
    grad_norm_limit: PositiveNumber | None = None
    """a gradient norm above this value, before clipping, makes a step bad; no limit when unset"""
    loss_spike_factor: Factor | None = None
    """a loss above this multiple of the median of recent losses is a spike; no spike detection
    when unset"""
    loss_spike_window: Size = 100
    """number of recent good steps whose median loss spikes are compared with"""
    max_bad_steps: Size = 10
    """number of consecutive bad steps after which the run stops, whatever on_nan is"""
    hang_timeout_minutes: NonNegativeNumber | None = None
    """minutes without progress after which a rank writes the stacks of its threads and exits; 0
    disables the check; half of distributed_timeout_minutes when unset, so that the hung rank is
    reported before the timeout stops the others"""
    data_retry_seconds: NonNegativeNumber = 60.0
    """seconds to wait for missing data files before the run fails"""


Rank = Annotated[StrictInt, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LoggingConfig:
    """Logs, metrics and profiles."""

    log_interval: PositiveCount = 1
    """number of iterations between log lines; each line averages the iterations since the
    previous one"""
    metrics_every_iteration: Switch = True
    """write a line of metrics.jsonl for every iteration instead of every log_interval"""
    tensorboard: Switch = True
    """write TensorBoard files next to the metrics"""
    log_params_norm: Switch = False
    """log the L2 norm of the weights every log_interval iterations"""
    log_layer_norms: Switch = False
    """record the L2 norms of the weights and of the gradients of every layer in the metrics every
    log_interval iterations"""
    log_straggler: Switch = False
    """measure the computing and waiting time of every rank and report the slowest ranks"""
    straggler_minmax_count: Size = 1
    """number of slowest ranks to report with log_straggler"""
    profile: Switch = False
    """profile some iterations with NVTX ranges between cudaProfilerStart and cudaProfilerStop,
    for Nsight Systems"""
    use_pytorch_profiler: Switch = False
    """use PyTorch's profiler and write a trace to the run's folder; requires profile"""
    profile_step_start: Count = 10
    """number of iterations before the profiled ones"""
    profile_step_end: PositiveCount = 12
    """last profiled iteration"""
    profile_ranks: tuple[Rank, ...] = Field(default=(0,), min_length=1)
    """ranks to profile"""
    wandb_project: Name | None = None
    """Weights & Biases project; nothing is sent when unset"""
    wandb_exp_name: Name | None = None
    """name of the Weights & Biases run; the folder name of checkpoint.save when unset"""
    wandb_entity: Name | None = None
    """Weights & Biases team or user; the account's default when unset"""
    wandb_save_dir: FilePath | None = None
    """folder of the local Weights & Biases files; checkpoint.save when unset"""


for _section in list(globals().values()):
    for _field in getattr(_section, "__pydantic_fields__", {}).values():
        if _field.description is not None:  # pydantic keeps the line breaks of docstrings
            _field.description = " ".join(_field.description.split())
