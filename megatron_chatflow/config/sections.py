"""The sections of a run's configuration, one frozen dataclass each.

The types are strict, and each field is checked individually; `validation` checks combinations of
fields. A field's description is the help text of its flag, the first line of a section's docstring
is the section's heading in ``--help`` and in `docs/reference/flags.md`, and the order of the fields
is their order in both.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictInt, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from megatron_chatflow.config.architectures import PRESETS, RopeScaling
from megatron_chatflow.config.fields import (
    CONFIG,
    Count,
    FilePath,
    Fraction,
    KnotWeights,
    Name,
    NonNegativeNumber,
    NumLayers,
    PositiveCount,
    PositiveNumber,
    Seed,
    Shares,
    Size,
    Stride,
    Switch,
    parse_number,
)
from megatron_chatflow.config.problems import did_you_mean
from megatron_chatflow.errors import UserError

# How to initialize the rows of new pieces. `megatron_chatflow.convert.vocabulary` describes them.
EmbeddingInit = Literal["mean-of-pieces", "mean", "normal", "copy-first-piece"]


def _fill(data: Any, defaults: Mapping[str, Any]) -> Any:
    """Fills missing or null keys of a validator's input from ``defaults``."""
    given = data.kwargs if isinstance(data, ArgsKwargs) else data
    if not isinstance(given, Mapping):
        return data
    present = {key: value for key, value in given.items() if value is not None}
    filled = {**given, **{key: value for key, value in defaults.items() if key not in present}}
    return ArgsKwargs(data.args, filled) if isinstance(data, ArgsKwargs) else filled


def _given(data: Any, key: str) -> Any:
    given = data.kwargs if isinstance(data, ArgsKwargs) else data
    return given.get(key) if isinstance(given, Mapping) else None


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ModelConfig:
    """Shape of the LLaMA model.

    Sizes that are not given are filled from the preset, so every size is set after construction.
    """

    preset: Name | None = Field(
        default=None, description="published shape that fills what is unset: " + ", ".join(PRESETS)
    )
    num_layers: NumLayers = Field(description="transformer layers")
    hidden_size: Size = Field(description="width of the residual stream")
    ffn_hidden_size: Size = Field(description="width inside the SwiGLU feed-forward block")
    num_attention_heads: Size = Field(description="attention heads")
    num_query_groups: Size = Field(
        description="key/value heads of grouped-query attention; as many as heads when unset"
    )
    kv_channels: Size | None = Field(
        default=None, description="size of a head; hidden_size over the heads when unset"
    )
    max_position_embeddings: Size = Field(description="longest sequence, in tokens")
    rotary_base: PositiveNumber = Field(default=10000.0, description="base of the rotary angles")
    rope_scaling_type: RopeScaling | None = Field(
        default=None, description="how rotary angles are scaled for longer texts"
    )
    rope_scaling_factor: PositiveNumber | None = Field(
        default=None, description="how much longer texts get by the scaling"
    )
    rope_low_freq_factor: PositiveNumber | None = Field(
        default=None, description="of llama3's scaling: where its ramp begins (1 when unset)"
    )
    rope_high_freq_factor: PositiveNumber | None = Field(
        default=None, description="of llama3's scaling: where its ramp ends (4 when unset)"
    )
    rope_original_max_position_embeddings: Size | None = Field(
        default=None, description="of llama3's scaling: longest sequence before it"
    )
    norm_epsilon: PositiveNumber = Field(default=1e-5, description="epsilon of RMSNorm")
    init_method_std: PositiveNumber = Field(
        default=0.02, description="spread of the initial weights"
    )
    untie_embeddings_and_output_weights: Switch = Field(
        default=True, description="own weights for the output layer"
    )
    make_vocab_size_divisible_by: Size = Field(
        default=128,
        description="the vocabulary is padded to a multiple of this, and of the TP size",
    )
    vocab_size: Size | None = Field(
        default=None, description="vocabulary before padding; the tokenizer's when unset"
    )

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
            data = _fill(data, shape)
        if _given(data, "rope_scaling_type") == "llama3":
            data = _fill(data, {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0})
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


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TokenizerConfig:
    """Tokenizer that the corpus was encoded with."""

    tokenizer_type: Literal["auto", "Llama2Tokenizer", "HuggingFaceTokenizer"] = Field(
        default="auto", description="kind of tokenizer; auto: as its files say"
    )
    tokenizer_model: FilePath = Field(
        description="SentencePiece model, tokenizer.json, or a folder with one"
    )
    old_tokenizer_model: FilePath | None = Field(
        default=None,
        description="with --embedding-init: where the tokenizer of the weights lies now, if not "
        "where they say",
    )


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ParallelConfig:
    """Parallel layout. Data parallelism uses the processes that the other kinds leave."""

    tensor_model_parallel_size: Size = Field(
        default=1, description="processes that share each layer"
    )
    pipeline_model_parallel_size: Size = Field(default=1, description="stages of layers")
    num_layers_per_virtual_pipeline_stage: Size | None = Field(
        default=None, description="layers of each model chunk, for the interleaved schedule"
    )
    num_virtual_stages_per_pipeline_rank: Size | None = Field(
        default=None, description="model chunks of each pipeline stage, the other way to say it"
    )
    pad_attention_heads: Switch = Field(
        default=False,
        description="heads of zeros where tensor_model_parallel_size does not divide them",
    )
    context_parallel_size: Size = Field(default=1, description="processes that share each sequence")
    sequence_parallel: Switch = Field(
        default=False,
        description="norms and residuals cut along the sequence over the TP processes",
    )
    use_distributed_optimizer: Switch = Field(
        default=False, description="optimizer state cut over the data-parallel processes"
    )
    overlap_grad_reduce: Switch = Field(
        default=False, description="reduce gradients while the backward pass goes on"
    )
    overlap_param_gather: Switch = Field(
        default=False, description="gather parameters while the forward pass goes on"
    )
    shared_memory_collectives: Switch = Field(
        default=True,
        description="TP processes on one machine without GPUs exchange through shared memory",
    )
    distributed_timeout_minutes: Size = Field(
        default=20, description="minutes after which a stuck collective ends the run"
    )


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class SourceConfig:
    """Datasets of a source, and how samples are cut from them."""

    paths: tuple[FilePath, ...] = Field(
        min_length=1, description="prefixes of .bin/.idx files, such as data/en_text_document"
    )
    validation_paths: tuple[FilePath, ...] = Field(
        default=(), description="prefixes that only validation reads"
    )
    loss: Literal["all", "response"] | None = Field(
        default=None,
        description="tokens that count in the loss: all, or those of the loss-mask files; when "
        "unset all, with a warning where there are masks",
    )
    packing: Literal["none", "best_fit"] = Field(
        default="none",
        description="none: documents run on across samples; best_fit: whole ones are packed",
    )
    boundaries: Literal["ignore", "isolate"] = Field(
        default="ignore", description="isolate: attention does not cross documents"
    )
    max_epochs: PositiveNumber | None = Field(
        default=None, description="error before training if the source would repeat more often"
    )


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class KnotConfig:
    """Weights of all sources at one position of the run. An omitted source has weight 0."""

    at: Count = Field(description="where, in the schedule's unit")
    weights: KnotWeights = Field(
        description="relative weights by source; or as_planned, in a run that goes on: up to here "
        "the schedule of its checkpoint"
    )
    ramp: Literal["step", "linear", "cosine"] = Field(
        default="step", description="how the interval that ends here is crossed"
    )


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ScheduleConfig:
    """Weights of the sources over the run."""

    unit: Literal["samples", "tokens", "iterations"] = Field(
        default="samples", description="what the knots count"
    )
    knots: tuple[KnotConfig, ...] = Field(min_length=1, description="weights by position")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class DataConfig:
    """Data sources, and the schedule that blends them.

    With a single source, the schedule may be omitted; the source then has the whole weight.
    """

    seq_length: Size = Field(description="tokens in a sample")
    sources: dict[Name, SourceConfig] = Field(min_length=1, description="datasets by source")
    schedule: ScheduleConfig = Field(description="weights of the sources over the run")
    holdout_every: Stride | None = Field(
        default=None,
        description="every k-th document of a source without validation_paths is held out",
    )
    split: Shares | None = Field(
        default=None,
        description="instead: shares of training, validation and test in the documents of each "
        "dataset, in order, such as 969,30,1",
    )
    num_prefetch: Size = Field(default=2, description="global batches that are prepared ahead")
    data_verify: Switch = Field(
        default=False,
        description="compare every dataset whole with its .json before training, not in samples",
    )

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

    lr: PositiveNumber = Field(description="peak learning rate")
    min_lr: NonNegativeNumber = Field(
        default=0.0, description="learning rate at the end of the decay"
    )
    lr_warmup_init: NonNegativeNumber = Field(
        default=0.0, description="learning rate of the first iteration of a warmup"
    )
    lr_warmup_iters: Count = Field(default=0, description="iterations of linear warmup")
    lr_warmup_samples: Count = Field(
        default=0, description="samples of linear warmup, for a run whose length is train_samples"
    )
    lr_decay_style: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="form of the decay"
    )
    lr_decay_iters: PositiveCount | None = Field(
        default=None, description="iteration at which the decay ends; the run's last when unset"
    )
    lr_decay_samples: PositiveCount | None = Field(
        default=None,
        description="sample at which the decay ends, for a run whose length is train_samples",
    )
    weight_decay: NonNegativeNumber = Field(default=0.1, description="decoupled weight decay")
    adam_beta1: Fraction = Field(default=0.9, description="decay of Adam's first moment")
    adam_beta2: Fraction = Field(default=0.95, description="decay of Adam's second moment")
    adam_eps: PositiveNumber = Field(default=1e-8, description="epsilon of Adam")
    clip_grad: NonNegativeNumber = Field(
        default=1.0, description="largest gradient norm; 0 is no limit"
    )


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class TrainConfig:
    """Length of the run, batch sizes, precision, recomputation, evaluation and kernels."""

    train_iters: PositiveCount | None = Field(
        default=None, description="iterations of the whole run"
    )
    train_samples: PositiveCount | None = Field(
        default=None, description="samples of the whole run, instead of iterations"
    )
    micro_batch_size: Size = Field(description="samples in one forward pass of one process")
    global_batch_size: Size = Field(description="samples in one iteration, over all processes")
    seed: Seed = Field(default=1234, description="seed of the weights and of the data's order")
    new_data_seed: Switch = Field(
        default=False,
        description="let a resume change the seed; each source takes it from its next epoch on",
    )
    bf16: Switch = Field(default=True, description="compute in bfloat16 over fp32 master weights")
    recompute_granularity: Literal["full", "selective"] | None = Field(
        default=None, description="activations to recompute in the backward pass"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        default=None, description="which layers full recomputation takes"
    )
    recompute_num_layers: Size | None = Field(
        default=None, description="layers of a recomputed chunk (uniform) or of a stage (block)"
    )
    eval_interval: PositiveCount | None = Field(
        default=None, description="iterations between validations; none when unset"
    )
    eval_iters: Count = Field(
        default=8, description="global batches of a validation, per source; 0 for no validation"
    )
    choice_questions: FilePath | None = Field(
        default=None, description="multiple-choice questions, JSON lines, scored while training"
    )
    choice_interval: PositiveCount | None = Field(
        default=None, description="iterations between scorings of choice_questions"
    )
    choice_num_fewshot: Count = Field(
        default=0, description="solved questions shown before each of choice_questions"
    )
    choice_scoring: Literal["letter", "continuation"] = Field(
        default="letter", description="what is compared: the answers' letters, or whole answers"
    )
    choice_language: Literal["en", "zh"] = Field(
        default="en", description="of the words around choice_questions"
    )
    exit_interval: PositiveCount | None = Field(
        default=None, description="save and leave at multiples of this iteration"
    )
    exit_duration_in_mins: Size | None = Field(
        default=None, description="save and leave after this many minutes"
    )
    attention_backend: Literal[
        "auto",
        "transformer_engine",
        "flash_attn_4",
        "flash_attn_3",
        "flash_attn_2",
        "cudnn",
        "flash",
        "sdpa",
    ] = Field(default="auto", description="attention kernels; auto: on GPUs the fastest there is")
    fused_kernels: Literal["measured", "ours", "torch"] = Field(
        default="measured",
        description="norm, RoPE, SwiGLU, loss on GPUs: the fastest here, csrc/kernels', composed",
    )
    manual_gc_interval: PositiveCount | None = Field(
        default=None, description="iterations between garbage collections; Python's own when unset"
    )
    deterministic_mode: Switch = Field(
        default=False, description="only kernels whose result is the same every time"
    )

    @property
    def validates(self) -> bool:
        """Whether validation is enabled."""
        return self.eval_interval is not None and self.eval_iters > 0


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class CheckpointConfig:
    """Where checkpoints are saved, and where the initial weights are loaded from."""

    save: FilePath | None = Field(default=None, description="folder of the run")
    load: FilePath | None = Field(
        default=None, description="folder to resume from, or to fine-tune from"
    )
    save_interval: PositiveCount | None = Field(
        default=None, description="iterations between checkpoints; only the last when unset"
    )
    async_save: Switch = Field(
        default=True,
        description="train on while a checkpoint is written from a copy in host memory",
    )
    ckpt_verify: Switch = Field(
        default=False, description="compare every file's hash before a checkpoint is loaded"
    )
    save_retain: Size | None = Field(
        default=None, description="checkpoints kept, the newest; all when unset"
    )
    save_keep_every: PositiveCount | None = Field(
        default=None, description="iterations whose multiples are kept besides"
    )
    pretrained_checkpoint: FilePath | None = Field(
        default=None, description="weights to begin with where --load holds no checkpoint yet"
    )
    load_hf: FilePath | None = Field(
        default=None,
        description="Hugging Face folder of the weights to begin with where --load holds no "
        "checkpoint yet; the model section is taken from its config.json",
    )
    embedding_init: EmbeddingInit | None = Field(
        default=None,
        description="how rows of new pieces begin where the tokenizer goes on from that of the "
        "weights; without it such a tokenizer is refused",
    )
    finetune: Switch = Field(
        default=False, description="load the weights alone and begin at iteration 0"
    )
    from_scratch: Switch = Field(
        default=False,
        description="begin with random weights on purpose where --load holds no checkpoint, "
        "without the warning",
    )
    load_optim: Switch = Field(
        default=True,
        description="resume with the optimizer's state; without it at the same iteration and with "
        "a fresh optimizer",
    )


Factor = Annotated[float, BeforeValidator(parse_number), Field(gt=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class FaultConfig:
    """Handling of bad steps, hung ranks and missing data files."""

    on_nan: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description=(
            "what a step whose loss or gradient is not finite, or whose loss is a spike, leads to: "
            "end the run; leave the update out; or take the weights of the last checkpoint and go "
            "on with the data that follows"
        ),
    )
    loss_spike_factor: Factor | None = Field(
        default=None,
        description="a loss above this multiple of the recent median is a spike; none when unset",
    )
    loss_spike_window: Size = Field(
        default=100, description="good steps whose median a spike is measured against"
    )
    max_bad_steps: Size = Field(
        default=10, description="bad steps in a row after which the run ends whatever --on-nan says"
    )
    hang_timeout_minutes: NonNegativeNumber | None = Field(
        default=None,
        description=(
            "minutes without progress after which a rank ends, its stacks written; 0: never; half "
            "of the distributed timeout when unset, which would end the healthy ranks first"
        ),
    )
    data_retry_seconds: NonNegativeNumber = Field(
        default=60.0, description="seconds in which a source that went away may come back"
    )


Rank = Annotated[StrictInt, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class LoggingConfig:
    """Logs, metrics and profiles."""

    log_interval: PositiveCount = Field(
        default=1, description="iterations between logs, each a mean over those since the last"
    )
    metrics_every_iteration: Switch = Field(
        default=True, description="a row of metrics.jsonl for every iteration, not for every log"
    )
    tensorboard: Switch = Field(
        default=True, description="write TensorBoard files beside the metrics"
    )
    log_straggler: Switch = Field(
        default=False, description="time every rank's computing and waiting, and name the slowest"
    )
    straggler_minmax_count: Size = Field(default=1, description="ranks that are named as slowest")
    profile: Switch = Field(
        default=False,
        description="profile some iterations: NVTX ranges between cudaProfilerStart and -Stop",
    )
    use_pytorch_profiler: Switch = Field(
        default=False, description="profile by torch's profiler, into a trace in the run's folder"
    )
    profile_step_start: Count = Field(default=10, description="iterations before the profile")
    profile_step_end: PositiveCount = Field(
        default=12, description="the last iteration of the profile"
    )
    profile_ranks: tuple[Rank, ...] = Field(
        default=(0,), min_length=1, description="ranks that are profiled"
    )
    wandb_project: Name | None = Field(
        default=None, description="project at Weights & Biases; nothing is sent when unset"
    )
    wandb_exp_name: Name | None = Field(
        default=None, description="name of the run there; that of checkpoint.save when unset"
    )
    wandb_entity: Name | None = Field(default=None, description="team or user there")
    wandb_save_dir: FilePath | None = Field(
        default=None, description="folder of its local files; that of checkpoint.save when unset"
    )
