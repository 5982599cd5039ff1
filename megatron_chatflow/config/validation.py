"""`RunConfig`, the complete configuration of a run, and the checks across its fields.

A `RunConfig` is frozen and consistent. It can be written as YAML, and reading that YAML gives an
equal object. Every check raises a `UserError` with one line that begins with the path of the field
to change.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from megatron_chatflow.config.architectures import YARN_FIELDS, architecture_of, longest_text
from megatron_chatflow.config.batch_ramp import BatchSizes
from megatron_chatflow.config.fields import CONFIG, differing_numbers
from megatron_chatflow.config.problems import describe, did_you_mean
from megatron_chatflow.config.run_length import RunLength
from megatron_chatflow.config.sections import (
    CheckpointConfig,
    ControllerConfig,
    DataConfig,
    FaultConfig,
    KnotConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenizerConfig,
    TrainConfig,
)
from megatron_chatflow.config.shape import head_counts, num_model_chunks
from megatron_chatflow.config.stages import selects_rows
from megatron_chatflow.config.yaml_file import dump_yaml
from megatron_chatflow.errors import UserError
from megatron_chatflow.remote import CachedPath

_LONGEST_LIST = 8
# Settings of which at most one may be set.
_EXCLUSIVE = (
    ("train.train_iters", "train.train_samples"),
    ("optimizer.lr_warmup_iters", "optimizer.lr_warmup_samples"),
    ("optimizer.lr_decay_iters", "optimizer.lr_decay_samples"),
    ("optimizer.lr_wsd_decay_iters", "optimizer.lr_wsd_decay_samples"),
    ("optimizer.lr_cycle_start_iters", "optimizer.lr_cycle_start_samples"),
    ("checkpoint.load_hf", "checkpoint.pretrained_checkpoint"),
    ("data.split", "data.holdout_every"),
)
# Settings that need another one, which is described by the rest of the message.
_REQUIRED = (
    ("optimizer.decoupled_min_lr", "optimizer.decoupled_lr", "; set that too"),
    ("checkpoint.finetune", "checkpoint.load", ", the folder of the initial weights"),
    (
        "parallel.ddp_pad_buckets_for_high_nccl_busbw",
        "parallel.use_distributed_optimizer",
        ", whose buckets it pads; set that too",
    ),
    ("parallel.disable_symmetric_registration", "parallel.use_nccl_ub", "; set that too"),
    ("checkpoint.save_interval", "checkpoint.save", ", the folder to write to"),
    ("checkpoint.save_remote", "checkpoint.save", ", the folder whose checkpoints it copies"),
    *(
        (f"optimizer.{name}", f"optimizer.{needed}", "; set that too")
        for name, needed in (
            ("optimizer_cpu_offload", "use_precision_aware_optimizer"),
            ("overlap_cpu_optimizer_d2h_h2d", "optimizer_cpu_offload"),
        )
    ),
    ("logging.use_pytorch_profiler", "logging.profile", "; set that too"),
    ("logging.use_pytorch_profiler", "checkpoint.save", ", the folder that the trace goes to"),
    ("logging.wandb_project", "checkpoint.save", ", the folder of the run"),
    ("logging.wandb_exp_name", "logging.wandb_project", "; set that too"),
    ("logging.wandb_entity", "logging.wandb_project", "; set that too"),
    ("logging.wandb_save_dir", "logging.wandb_project", "; set that too"),
)

# Settings of earlier versions, which are read and have no effect, and what decides instead.
REMOVED = {
    "train.fused_kernels": "nothing is measured at the start any more; --transformer-impl selects "
    "the layers, and csrc/kernels computes the loss where it is built",
}


def _divisors(*numbers: int) -> str:
    """Lists the common divisors for a message, such as ``1, 2, 4 or 8``."""
    greatest = math.gcd(*numbers)
    divisors = [n for n in range(1, greatest + 1) if greatest % n == 0]
    if len(divisors) > _LONGEST_LIST:
        return f"a divisor of {greatest}"
    words = [str(divisor) for divisor in divisors]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def check(config: "RunConfig") -> None:
    """Checks everything that does not depend on the number of processes."""
    check_model(config.model)
    _check_parallel(config)
    _check_sequence(config)
    _check_precision(config)
    _check_fp8_weights(config)
    _check_optimizer(config)
    _check_recompute(config)
    _check_cuda_graphs(config)
    _check_offloading(config)
    _check_combinations(config)
    _check_length(config)
    _check_learning_rate(config)
    _check_stages(config)
    _check_checkpoint(config)
    _check_faults(config)
    check_knots(config.data.schedule.knots, list(config.data.sources))
    if config.data.schedule.controller is not None:
        _check_controller(config, config.data.schedule.controller)


def check_model(model: ModelConfig) -> None:
    """Checks that the fields of a model's shape are consistent."""
    architecture_of(model)
    heads = model.num_attention_heads
    if model.kv_channels is None and model.hidden_size % heads:
        raise UserError(
            f"model.num_attention_heads: {heads} does not divide model.hidden_size "
            f"{model.hidden_size}; use a divisor of it, or set model.kv_channels"
        )
    if model.kv_channels is not None and model.kv_channels % 2:
        raise UserError(
            f"model.kv_channels: {model.kv_channels} is odd, but RoPE needs an even head size; "
            "use an even number"
        )
    if model.head_dim % 2:
        raise UserError(
            f"model.hidden_size: {model.hidden_size} / {heads} heads is the odd head size "
            f"{model.hidden_size // heads}, but RoPE needs an even one; change one of the two"
        )
    if heads % model.num_query_groups:
        raise UserError(
            f"model.num_query_groups: {model.num_query_groups} does not divide "
            f"model.num_attention_heads {heads}; use {_divisors(heads)}"
        )
    kind = model.rope_scaling_type
    for name, kinds in {
        "rope_low_freq_factor": ("llama3",),
        "rope_high_freq_factor": ("llama3",),
        "rope_original_max_position_embeddings": ("llama3", "yarn"),
    }.items():
        value = getattr(model, name)
        if (value is None) == (kind in kinds):
            raise UserError(
                f"model.{name}: {'is missing' if value is None else 'is set'}, and "
                f"model.rope_scaling_type is {kind or 'unset'}; {' and '.join(kinds)} "
                f"require{'s' if len(kinds) == 1 else ''} it, and the other types do not support it"
            )
    for name in YARN_FIELDS:
        if kind != "yarn" and getattr(model, name) is not None:
            raise UserError(
                f"model.{name}: is set, and model.rope_scaling_type is {kind or 'unset'}; only "
                "yarn supports it"
            )
    if (model.rope_scaling_factor is None) != (kind is None):
        raise UserError(
            "model.rope_scaling_type and model.rope_scaling_factor: one is set and the other is "
            "not; set both, or neither"
        )
    if kind == "dynamic" and model.head_dim == 2:
        raise UserError(
            "model.rope_scaling_type: dynamic scaling is undefined for heads of size 2; use "
            "larger heads"
        )
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    if low is not None and high is not None and low >= high:
        shown = differing_numbers(low, high)
        raise UserError(
            f"model.rope_low_freq_factor: {shown[0]} is not below model.rope_high_freq_factor "
            f"{shown[1]}; lower it"
        )
    if kind == "yarn":
        _check_yarn(model)
    if model.window_size is not None and (model.window_size[0] < 0 or model.window_size[1] != 0):
        raise UserError(
            f"model.window_size: {model.window_size[0]},{model.window_size[1]} is not the window "
            "of a causal model; use the number of tokens before a token, then 0, such as 4095,0"
        )


def _check_yarn(model: ModelConfig) -> None:
    fast, slow = model.yarn_beta_fast, model.yarn_beta_slow
    if fast is not None and slow is not None and fast < slow:
        shown = differing_numbers(fast, slow)
        raise UserError(
            f"model.yarn_beta_fast: {shown[0]} is below model.yarn_beta_slow {shown[1]}; raise it"
        )
    if model.rotary_base == 1:
        raise UserError("model.rotary_base: yarn needs a base other than 1; use that of the model")
    if (model.mscale is None) != (model.mscale_all_dim is None):
        raise UserError(
            "model.mscale and model.mscale_all_dim: one is set and the other is not, which has no "
            "effect; set both, or neither"
        )


def _check_parallel(config: "RunConfig") -> None:
    model, parallel = config.model, config.parallel
    tensor = parallel.tensor_model_parallel_size
    heads = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups,
    }
    cut = {"model.ffn_hidden_size": model.ffn_hidden_size}
    if not parallel.pad_attention_heads:
        cut = {**heads, **cut}
    for path, size in cut.items():
        if size % tensor:
            is_cure = path in heads and model.ffn_hidden_size % tensor == 0
            padded = ", or set parallel.pad_attention_heads" if is_cure else ""
            raise UserError(
                f"parallel.tensor_model_parallel_size: {tensor} does not divide {path} {size}; "
                f"use {_divisors(*cut.values())}{padded}"
            )
    stages = parallel.pipeline_model_parallel_size
    if model.num_layers % stages:
        raise UserError(
            f"parallel.pipeline_model_parallel_size: {stages} does not divide model.num_layers "
            f"{model.num_layers}; use {_divisors(model.num_layers)}"
        )
    num_model_chunks(model, parallel)
    if parallel.sequence_parallel and tensor == 1:
        raise UserError(
            "parallel.sequence_parallel: needs parallel.tensor_model_parallel_size above 1; set "
            "that, or --no-sequence-parallel"
        )
    if parallel.tp_comm_overlap and not parallel.sequence_parallel:
        raise UserError(
            "parallel.tp_comm_overlap: needs parallel.sequence_parallel; set that, or "
            "--no-tp-comm-overlap"
        )
    if parallel.tp_comm_overlap:
        _check_overlapped_products(config.train)
    if parallel.grad_reduce_in_bf16 and not config.train.bf16:
        raise UserError(
            "parallel.grad_reduce_in_bf16: the gradients of an fp32 run are fp32; set train.bf16, "
            "or --no-grad-reduce-in-bf16"
        )
    if parallel.overlap_param_gather and not (
        parallel.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        raise UserError(
            "parallel.overlap_param_gather: needs parallel.use_distributed_optimizer and "
            "parallel.overlap_grad_reduce; set both, or --no-overlap-param-gather"
        )


def _check_overlapped_products(train: TrainConfig) -> None:
    """Checks the precision of products whose messages go through transformer-engine's buffers."""
    if not train.bf16:
        kind = "an fp32 run"
    elif train.fp4_format is not None:
        kind = "train.fp4_format"
    elif train.fp8_format is not None and train.fp8_recipe == "blockwise":
        kind = "train.fp8_recipe blockwise"
    else:
        return
    raise UserError(
        f"parallel.tp_comm_overlap: transformer-engine has no user buffers for {kind}; use "
        "--no-tp-comm-overlap, or bf16 or another FP8 recipe"
    )


def _check_sequence(config: "RunConfig") -> None:
    length, parallel, model = config.data.seq_length, config.parallel, config.model
    if length > longest_text(model):
        raise UserError(
            f"data.seq_length: {length} is above model.max_position_embeddings "
            f"{model.max_position_embeddings}; shorten it, or raise that"
        )
    context = parallel.context_parallel_size
    # Each process computes one early and one late chunk of a sequence to balance the work.
    if context > 1 and length % (2 * context):
        raise UserError(
            f"data.seq_length: {length} is not divisible by 2 x parallel.context_parallel_size = "
            f"{2 * context}; use a multiple of it"
        )
    tensor = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel and (length // context) % tensor:
        raise UserError(
            f"data.seq_length: with parallel.sequence_parallel the {length // context} tokens of a "
            f"process are not divisible by parallel.tensor_model_parallel_size {tensor}; use a "
            f"multiple of {tensor * context}"
        )


def _check_precision(config: "RunConfig") -> None:
    train = config.train
    if train.fp8_format is None and train.fp4_format is None:
        if train.first_last_layers_bf16:
            raise UserError(
                "train.first_last_layers_bf16: needs train.fp8_format or train.fp4_format; set "
                "one of them, or --no-first-last-layers-bf16"
            )
        return
    name = "train.fp4_format" if train.fp8_format is None else "train.fp8_format"
    if train.fp8_format is not None and train.fp4_format is not None:
        raise UserError(f"{name} and train.fp4_format: both are set; remove one of them")
    if not train.bf16:
        raise UserError(f"{name}: needs train.bf16 for everything else; set that, or remove it")
    if train.transformer_impl == "local":
        raise UserError(
            f"{name}: needs the layers of transformer-engine; remove it, or use "
            "train.transformer_impl auto"
        )
    if train.first_last_layers_bf16:
        if train.fp8_format is not None and train.fp8_recipe == "delayed":
            raise UserError(
                "train.first_last_layers_bf16: does not work with train.fp8_recipe delayed; use "
                "tensorwise, or --no-first-last-layers-bf16"
            )
        num_bf16 = train.num_layers_at_start_in_bf16 + train.num_layers_at_end_in_bf16
        if num_bf16 >= config.model.num_layers:
            raise UserError(
                f"train.first_last_layers_bf16: keeps {num_bf16} layers in bf16, and the model has "
                f"{config.model.num_layers}, so {name} has no effect; remove it, or keep fewer"
            )
    _check_quantized_sizes(config, name)


def _check_fp8_weights(config: "RunConfig") -> None:
    train, optimizer = config.train, config.optimizer
    name = "train.fp8_param_gather"
    is_mxfp8 = train.fp8_recipe == "mxfp8"
    if train.reuse_grad_buf_for_mxfp8_param_ag != (train.fp8_param_gather and is_mxfp8):
        raise UserError(
            f"train.reuse_grad_buf_for_mxfp8_param_ag: is needed by {name} with train.fp8_recipe "
            f"mxfp8, and only then; {'set' if is_mxfp8 else 'remove'} it"
        )
    if not train.fp8_param_gather:
        return
    if train.fp8_format is None:
        raise UserError(f"{name}: needs train.fp8_format; set that too")
    if not config.parallel.use_distributed_optimizer:
        raise UserError(f"{name}: needs parallel.use_distributed_optimizer; set that too")
    if train.fp8_recipe == "delayed":
        raise UserError(
            f"{name}: the scales of train.fp8_recipe delayed are not in checkpoints; use tensorwise"
        )
    if is_mxfp8 and config.parallel.overlap_param_gather:
        raise UserError(
            f"{name}: with train.fp8_recipe mxfp8 it does not work with "
            "parallel.overlap_param_gather; use --no-overlap-param-gather"
        )
    if optimizer.main_params_dtype != "fp32" or optimizer.optimizer_cpu_offload:
        other = "optimizer_cpu_offload" if optimizer.optimizer_cpu_offload else "main_params_dtype"
        raise UserError(
            f"{name}: needs fp32 master weights on the GPU, and optimizer.{other} is set; remove "
            "one of them"
        )


def _check_quantized_sizes(config: "RunConfig", name: str) -> None:
    """Checks the operands of the products against the alignment that transformer-engine needs."""
    train, parallel = config.train, config.parallel
    is_mxfp8 = train.fp8_format is not None and train.fp8_recipe == "mxfp8"
    rows, columns = (32, 32) if is_mxfp8 else (8, 16)
    if train.fp8_format is None:
        rows = 16
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    tokens = train.micro_batch_size * config.data.seq_length // context
    if tokens % rows:
        raise UserError(
            f"{name}: needs a multiple of {rows} tokens in the micro-batch of a process, and "
            f"train.micro_batch_size x data.seq_length / parallel.context_parallel_size is "
            f"{tokens}; change one of them"
        )
    recipe = "nvfp4" if train.fp8_format is None else train.fp8_recipe
    block = {"blockwise": 128, "mxfp8": 32, "nvfp4": 16}.get(recipe, 1)
    gathered, hidden = tokens // tensor, config.model.hidden_size
    if is_mxfp8 and parallel.tp_comm_overlap and gathered % 128:
        raise UserError(
            f"{name}: with parallel.tp_comm_overlap, mxfp8 needs a multiple of 128 tokens on a "
            f"process, and train.micro_batch_size x data.seq_length / tensor- and "
            f"context-parallel size is {gathered}; change one of them"
        )
    if parallel.sequence_parallel and (gathered % block or hidden % block):
        raise UserError(
            f"{name}: parallel.sequence_parallel gathers blocks of {block} values with their "
            f"scales, and the {gathered} tokens of a process or model.hidden_size {hidden} are no "
            f"multiple of {block}; change the size, or use another recipe"
        )
    counts = head_counts(config.model, parallel)
    sizes = {
        "model.hidden_size": hidden,
        "model.ffn_hidden_size / parallel.tensor_model_parallel_size": (
            config.model.ffn_hidden_size // tensor
        ),
        "the size of the queries on a process": counts.query_size // tensor,
        "the size of queries, keys and values on a process": counts.projected_size // tensor,
    }
    for size_name, size in sizes.items():
        if size % columns:
            raise UserError(
                f"{name}: needs sizes that are multiples of {columns}, and {size_name} is {size}; "
                "change the tensor-parallel size, or remove it"
            )


def _check_optimizer(config: "RunConfig") -> None:
    optimizer = config.optimizer
    if optimizer.ema_decay is not None:
        for name, is_set in (
            ("optimizer.use_precision_aware_optimizer", optimizer.use_precision_aware_optimizer),
            ("optimizer.optimizer_cpu_offload", optimizer.optimizer_cpu_offload),
            ("train.fp8_param_gather", config.train.fp8_param_gather),
        ):
            if is_set:
                raise UserError(
                    "optimizer.ema_decay: averages fp32 master weights on the device, which "
                    f"{name} does not keep there as such; remove one of them"
                )
    if optimizer.optimizer_cpu_offload:
        for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(optimizer, name) != "fp32":
                raise UserError(
                    f"optimizer.{name}: optimizer.optimizer_cpu_offload keeps state in fp32; use "
                    "fp32, or --no-optimizer-cpu-offload"
                )
    elif optimizer.optimizer_offload_fraction != 1:
        raise UserError(
            "optimizer.optimizer_offload_fraction: needs optimizer.optimizer_cpu_offload; set that "
            "too"
        )
    if not optimizer.use_precision_aware_optimizer:
        for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(optimizer, name) != "fp32":
                raise UserError(
                    f"optimizer.{name}: needs optimizer.use_precision_aware_optimizer; set that, "
                    "or use fp32"
                )
        return
    for name, is_set in (
        ("parallel.use_distributed_optimizer", config.parallel.use_distributed_optimizer),
        ("train.bf16", config.train.bf16),
    ):
        if not is_set:
            raise UserError(
                f"optimizer.use_precision_aware_optimizer: needs {name}; set that, or "
                "--no-use-precision-aware-optimizer"
            )


def _check_recompute(config: "RunConfig") -> None:
    train = config.train
    if train.recompute_granularity == "full":
        if train.recompute_method is None or train.recompute_num_layers is None:
            raise UserError(
                "train.recompute_granularity: full needs train.recompute_method and "
                "train.recompute_num_layers; uniform and 1 save the most memory"
            )
        num_chunks = num_model_chunks(config.model, config.parallel)
        num_stages = config.parallel.pipeline_model_parallel_size * num_chunks
        most = config.model.num_layers // num_stages
        if train.recompute_num_layers > most:
            where = "pipeline stage" if num_chunks == 1 else "model chunk"
            raise UserError(
                f"train.recompute_num_layers: {train.recompute_num_layers} is above the {most} "
                f"layers of a {where}; use at most {most}"
            )
    elif train.recompute_method is not None or train.recompute_num_layers is not None:
        raise UserError(
            "train.recompute_method and train.recompute_num_layers: need "
            "train.recompute_granularity full; set that, or remove them"
        )
    if train.recompute_granularity != "selective" and train.recompute_modules != ("core_attn",):
        raise UserError(
            "train.recompute_modules: needs train.recompute_granularity selective; set that, or "
            "remove it"
        )


def _check_cuda_graphs(config: "RunConfig") -> None:
    train = config.train
    if train.cuda_graph_impl == "none":
        if train.cuda_graph_warmup_steps != type(train).cuda_graph_warmup_steps:
            raise UserError(
                "train.cuda_graph_warmup_steps: needs train.cuda_graph_impl transformer_engine; "
                "set that, or remove it"
            )
        return
    if not train.bf16:
        raise UserError("train.cuda_graph_impl: needs train.bf16; set that, or remove it")
    if train.transformer_impl == "local":
        raise UserError(
            "train.cuda_graph_impl: needs the layers of transformer-engine; remove it, or use "
            "train.transformer_impl auto"
        )
    if train.recompute_granularity == "full" or train.recomputes("mlp"):
        raise UserError(
            "train.cuda_graph_impl: the MLP cannot be a CUDA graph and be recomputed; remove it, "
            "or use train.recompute_granularity selective with train.recompute_modules core_attn"
        )


def _check_offloading(config: "RunConfig") -> None:
    train = config.train
    name, modules = "train.fine_grained_activation_offloading", train.offload_modules
    if train.fine_grained_activation_offloading != bool(modules):
        raise UserError(
            f"{name} and train.offload_modules: one is set and the other is not; set both, or "
            "neither"
        )
    if not modules:
        return
    if train.transformer_impl == "local":
        raise UserError(
            f"{name}: needs the layers of transformer-engine; remove it, or use "
            "train.transformer_impl auto"
        )
    if train.fp8_format is not None or train.fp4_format is not None:
        raise UserError(
            f"{name}: would offload the quantized copies of weights as well; remove it, or "
            "train.fp8_format and train.fp4_format"
        )
    if train.cuda_graph_impl != "none":
        raise UserError(f"{name} and train.cuda_graph_impl: both are set; remove one of them")
    if train.recompute_granularity == "full":
        raise UserError(
            f"{name}: train.recompute_granularity full stores no activations of these modules; "
            "remove one of them"
        )
    if "core_attn" in modules and train.recomputes("core_attn"):
        raise UserError(
            "train.offload_modules: core_attn is in train.recompute_modules too; remove it from "
            "one of them"
        )
    if "attn_proj" in modules and "core_attn" not in modules:
        raise UserError(
            "train.offload_modules: attn_proj needs core_attn, whose backward pass uses the same "
            "tensor; add it, or remove attn_proj"
        )


def _check_combinations(config: "RunConfig") -> None:
    for one, other in _EXCLUSIVE:
        if attrgetter(one)(config) and attrgetter(other)(config):
            raise UserError(f"{one} and {other}: both are set; remove one of them")
    for one, needed, description in _REQUIRED:
        if attrgetter(one)(config) and not attrgetter(needed)(config):
            raise UserError(f"{one}: needs {needed}{description}")
    train, logging = config.train, config.logging
    if (train.choice_questions is None) != (train.choice_interval is None):
        raise UserError(
            "train.choice_questions and train.choice_interval: one is set and the other is not; "
            "set both, or neither"
        )
    if bool(train.eval_probes) != (train.probe_interval is not None):
        raise UserError(
            "train.eval_probes and train.probe_interval: one is set and the other is not; set "
            "both, or neither"
        )
    if logging.profile and logging.profile_step_start >= logging.profile_step_end:
        raise UserError(
            f"logging.profile_step_start: {logging.profile_step_start} is not below "
            f"logging.profile_step_end {logging.profile_step_end}; lower it"
        )


def _check_length(config: "RunConfig") -> None:
    train = config.train
    if train.train_iters is None and train.train_samples is None:
        raise UserError("train.train_iters: is missing; set it, or train.train_samples")
    first = train.global_batch_size
    if train.rampup_batch_size is not None:
        _check_ramp(config, *train.rampup_batch_size)
        first = train.rampup_batch_size[0]
    if train.train_samples is not None and train.train_samples < first:
        size = "train.global_batch_size" if train.rampup_batch_size is None else "the first batch's"
        raise UserError(
            f"train.train_samples: {train.train_samples} is below {size} {first}, so the run would "
            "have no iteration; increase it"
        )
    if train.global_batch_size % train.micro_batch_size:
        raise UserError(
            f"train.micro_batch_size: {train.micro_batch_size} does not divide "
            f"train.global_batch_size {train.global_batch_size}; use a divisor of it"
        )


def _check_ramp(config: "RunConfig", start: int, increment: int, num_samples: int) -> None:
    """Checks a ramp of the batch size, under which iterations are no unit of length."""
    train, path = config.train, "train.rampup_batch_size"
    if train.train_samples is None:
        raise UserError(
            f"{path}: requires train.train_samples, because iterations have different sizes; "
            "replace train.train_iters by it"
        )
    if start >= train.global_batch_size:
        raise UserError(
            f"{path}: starts at {start}, which is not below train.global_batch_size "
            f"{train.global_batch_size}; lower it"
        )
    if (train.global_batch_size - start) % increment:
        raise UserError(
            f"{path}: steps of {increment} from {start} do not reach train.global_batch_size "
            f"{train.global_batch_size}; use a divisor of {train.global_batch_size - start}"
        )
    names = [f"lr_{name}_iters" for name in ("warmup", "cycle_start", "decay", "wsd_decay")]
    for name in names:
        if getattr(config.optimizer, name):
            raise UserError(
                f"optimizer.{name}: counts iterations, which have different sizes under {path}; "
                f"set optimizer.{name.replace('iters', 'samples')}"
            )
    if config.data.schedule.unit == "iterations":
        raise UserError(
            f"data.schedule.unit: counts iterations, which have different sizes under {path}; use "
            "samples or tokens"
        )
    if train.cuda_graph_impl != "none":
        raise UserError(
            f"{path}: changes the number of micro-batches, for which CUDA graphs are captured; "
            "remove it, or set train.cuda_graph_impl to none"
        )


def _check_learning_rate(config: "RunConfig") -> None:
    optimizer = config.optimizer
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(optimizer, name) > optimizer.lr:
            low, high = differing_numbers(getattr(optimizer, name), optimizer.lr)
            raise UserError(f"optimizer.{name}: {low} is above optimizer.lr {high}; lower it")
    if config.train.train_iters is not None:
        for name in (
            "lr_warmup_samples",
            "lr_decay_samples",
            "lr_wsd_decay_samples",
            "lr_cycle_start_samples",
        ):
            if getattr(optimizer, name):
                raise UserError(
                    f"optimizer.{name}: counts samples, and the run's length is train.train_iters; "
                    f"set optimizer.{name.replace('samples', 'iters')}, or train.train_samples"
                )
    is_wsd = optimizer.lr_decay_style == "WSD"
    decay = optimizer.lr_wsd_decay_iters or optimizer.lr_wsd_decay_samples
    if is_wsd != (decay is not None):
        unit = "iters" if config.train.train_iters is not None else "samples"
        raise UserError(
            f"optimizer.lr_wsd_decay_{unit}: is {'missing' if is_wsd else 'set'}, and "
            f"optimizer.lr_decay_style is {optimizer.lr_decay_style}; WSD requires it, and other "
            "styles have no such decay"
        )
    if not is_wsd and optimizer.lr_wsd_decay_style != OptimizerConfig.lr_wsd_decay_style:
        raise UserError(
            "optimizer.lr_wsd_decay_style: needs optimizer.lr_decay_style WSD; set that, or "
            "remove it"
        )
    _check_weight_decay(optimizer)
    # A resume decides where a cycle begins and, if it counts samples, its initial batch size.
    counts_iterations = config.train.train_iters is not None
    if config.checkpoint.load is None or (counts_iterations and not optimizer.lr_cycle_start_iters):
        RunLength.of(config).check_learning_rate(optimizer)


def _check_weight_decay(optimizer: OptimizerConfig) -> None:
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if optimizer.weight_decay_incr_style == "constant":
        for name in ("start_weight_decay", "end_weight_decay"):
            if getattr(optimizer, name) is not None:
                raise UserError(
                    f"optimizer.{name}: needs optimizer.weight_decay_incr_style linear or cosine; "
                    "set that, or optimizer.weight_decay instead"
                )
        return
    if start is None or end is None:
        raise UserError(
            f"optimizer.weight_decay_incr_style: {optimizer.weight_decay_incr_style} needs "
            "optimizer.start_weight_decay and optimizer.end_weight_decay; set both"
        )
    if start > end:
        low, high = differing_numbers(start, end)
        raise UserError(
            f"optimizer.start_weight_decay: {low} is above optimizer.end_weight_decay {high}; "
            "the weight decay can only grow"
        )


def _check_stages(config: "RunConfig") -> None:
    train, optimizer = config.train, config.optimizer
    for name in filter(selects_rows, optimizer.no_weight_decay):
        raise UserError(
            f"optimizer.no_weight_decay: {name}: selects rows; name whole tensors, such as "
            "embeddings"
        )
    if optimizer.decoupled_lr is not None:
        low = optimizer.min_lr if optimizer.decoupled_min_lr is None else optimizer.decoupled_min_lr
        if low > optimizer.decoupled_lr:
            shown = differing_numbers(low, optimizer.decoupled_lr)
            raise UserError(
                f"optimizer.decoupled_min_lr: {shown[0]} is above optimizer.decoupled_lr "
                f"{shown[1]}; lower it"
            )
    if train.stages and train.stages[0].at:
        raise UserError(
            f"train.stages[0].at: {train.stages[0].at}, but the first stage begins with the run; "
            "set it to 0, or put a stage before it"
        )
    for number, (before, after) in enumerate(pairwise(train.stages), start=1):
        if after.at <= before.at:
            raise UserError(
                f"train.stages[{number}].at: {after.at} is not above {before.at} of the previous "
                "stage; list the stages in increasing order"
            )
    names = [
        name
        for name in ("optimizer.decoupled_lr", "optimizer.no_weight_decay", "train.stages")
        if attrgetter(name)(config)
    ]
    if names and optimizer.optimizer_cpu_offload:
        raise UserError(
            f"{names[0]}: does not work with optimizer.optimizer_cpu_offload; remove one of them"
        )
    selectors = [
        name for stage in train.stages for name in (*stage.trainable, *stage.lr_multipliers)
    ]
    scaled = [
        name
        for name in ("main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        if getattr(optimizer, name) == "fp16"
    ]
    rows = next(filter(selects_rows, selectors), None)
    if optimizer.use_precision_aware_optimizer and scaled and rows is not None:
        raise UserError(
            f"train.stages: {rows} selects rows, and optimizer.{scaled[0]} fp16 has one scale for "
            "all rows of a tensor; use another dtype"
        )


def _check_checkpoint(config: "RunConfig") -> None:
    checkpoint = config.checkpoint
    for name in ("load_hf", "pretrained_checkpoint", "finetune"):
        if checkpoint.from_scratch and getattr(checkpoint, name):
            raise UserError(
                f"checkpoint.from_scratch and checkpoint.{name}: both are set, but the first "
                "requests random weights; remove one of them"
            )
    begins = (checkpoint.load, checkpoint.load_hf, checkpoint.pretrained_checkpoint)
    if checkpoint.embedding_init is not None and not any(begins):
        raise UserError(
            "checkpoint.embedding_init: needs weights with a smaller vocabulary; set "
            "checkpoint.load, checkpoint.load_hf or checkpoint.pretrained_checkpoint"
        )
    if checkpoint.embedding_init == "distill":
        raise UserError(
            "checkpoint.embedding_init: distill needs the whole model in one process; run "
            "convert_checkpoint.py import --embedding-init distill first, and start from its output"
        )
    if not checkpoint.load_optim and checkpoint.load is None:
        raise UserError(
            "checkpoint.load_optim: --no-load-optim needs checkpoint.load, the run to resume"
        )


def _check_faults(config: "RunConfig") -> None:
    minutes, limit = config.hang_timeout_minutes, config.parallel.distributed_timeout_minutes
    if minutes >= limit:
        shown = differing_numbers(minutes, limit)
        raise UserError(
            f"faults.hang_timeout_minutes: {shown[0]} is not below the {shown[1]} of "
            "parallel.distributed_timeout_minutes, so the ranks that wait for a hung rank would "
            "time out before it is reported; lower the first or raise the second"
        )
    seconds = config.faults.data_retry_seconds
    if minutes and seconds >= 60 * minutes:
        shown = differing_numbers(seconds, 60 * minutes)
        raise UserError(
            f"faults.data_retry_seconds: a rank that waits {shown[0]} s for a source would be "
            f"considered hung after {shown[1]} s (faults.hang_timeout_minutes); lower the first "
            "or raise the second"
        )


def check_knots(knots: Sequence[KnotConfig], sources: Sequence[str]) -> None:
    """Checks the order and the weights of a schedule's knots."""
    for number, knot in enumerate(knots):
        if not isinstance(knot.weights, str):  # the checkpoint has the weights of as_planned
            check_weights(knot.weights, sources, f"data.schedule.knots[{number}].weights")
        path = f"data.schedule.knots[{number}].objective_weights"
        check_names(knot.objective_weights or (), sources, path)
    for number, (before, after) in enumerate(pairwise(knots), start=1):
        if after.at <= before.at:
            raise UserError(
                f"data.schedule.knots[{number}].at: {after.at} is not above {before.at} of the "
                "previous knot; list the knots in increasing order"
            )


def _check_controller(config: "RunConfig", controller: ControllerConfig) -> None:
    """Checks the settings of what decides the weights."""
    path, knots = "data.schedule.controller", config.data.schedule.knots
    if config.data.schedule.count != "samples":
        raise UserError(
            f"data.schedule.count: {config.data.schedule.count} does not work with {path}, whose "
            "decisions are shares of samples; remove one of them"
        )
    weights = knots[0].weights
    if len(knots) > 1 or isinstance(weights, str):
        raise UserError(
            f"{path}: decides the weights after the first two horizons, so data.schedule.knots "
            "must be a single knot with their weights; remove the controller or the other knots"
        )
    active = [name for name in config.data.sources if weights.get(name)]
    needs: dict[str, tuple[str, ...]] = {
        "odm": ("horizon",),
        "shearing": ("horizon", "reference_loss"),
        "replay": ("run",),
    }
    for field in ("horizon", "reference_loss", "run"):
        is_needed, is_given = field in needs[controller.name], getattr(controller, field)
        if is_needed and is_given is None:
            raise UserError(f"{path}.{field}: is missing; {controller.name} needs it")
        if is_given is not None and not is_needed:
            raise UserError(f"{path}.{field}: has no effect with {controller.name}; remove it")
    if controller.name == "replay":
        return
    if len(active) < 2:
        raise UserError(f"{path}: needs at least two sources with a weight above 0 in the knot")
    bounds = {}
    for field, default in (("floor", 0.0), ("cap", 1.0)):
        given = getattr(controller, field)
        if isinstance(given, Mapping):
            check_names(given, active, f"{path}.{field}")
        else:
            given = dict.fromkeys(active, given)
        bounds[field] = {name: given.get(name, default) for name in active}
    for name in active:
        floor, cap = bounds["floor"][name], bounds["cap"][name]
        if floor > cap:
            raise UserError(f"{path}.floor: {floor:g} of {name} is above its cap {cap:g}; lower it")
    # Shares such as thirds do not sum to 1 exactly.
    if math.fsum(bounds["floor"].values()) > 1 + 1e-9:
        raise UserError(f"{path}.floor: the floors of all sources exceed 1; lower them")
    if math.fsum(bounds["cap"].values()) < 1 - 1e-9:
        raise UserError(f"{path}.cap: the caps of all sources are below 1; raise them")
    if controller.name != "shearing":
        return
    check_names(controller.reference_loss or {}, active, f"{path}.reference_loss")
    missing = [name for name in active if name not in (controller.reference_loss or {})]
    if missing:
        raise UserError(
            f"{path}.reference_loss: has no loss of {', '.join(missing)}; give one for every "
            "source with weight"
        )
    if not config.train.validates:
        raise UserError(
            f"{path}: shearing decides from validation losses; set train.eval_interval and "
            "train.eval_iters"
        )


def check_weights(weights: Mapping[str, float], sources: Sequence[str], path: str) -> None:
    """Checks that the weights of a knot name known sources and are not all 0."""
    check_names(weights, sources, path)
    if not any(weights.values()):
        raise UserError(f"{path}: all weights are 0; give at least one source a weight above 0")


def check_names(names: Iterable[str], sources: Sequence[str], path: str) -> None:
    """Checks that the keys of a mapping by source are known sources."""
    known = set(sources)
    for name in names:
        if name not in known:
            shown = ", ".join(sources[:8]) + (", ..." if len(sources) > 8 else "")
            raise UserError(
                f"{path}.{name}: is not among data.sources{did_you_mean(name, sources)}; known are "
                f"{shown}"
            )


def validate_for_world(config: "RunConfig", world_size: int) -> None:
    """Checks that the processes can be divided into groups, and the global batch among them."""
    parallel, train = config.parallel, config.train
    model_parallel = config.model_parallel_size
    if world_size % model_parallel:
        raise UserError(
            "parallel: tensor x pipeline x context parallel size "
            f"{parallel.tensor_model_parallel_size} x {parallel.pipeline_model_parallel_size} x "
            f"{parallel.context_parallel_size} = {model_parallel} does not divide the number of "
            f"processes {world_size}; use a multiple of {model_parallel} processes"
        )
    share = world_size // model_parallel * train.micro_batch_size
    _check_batch_size(config, share, train.global_batch_size, "train.global_batch_size")
    sizes = BatchSizes.of(train.global_batch_size, train.rampup_batch_size)
    # If the first two sizes and the last one fit, so do those between them.
    for size in sizes.levels()[:2]:
        _check_batch_size(config, share, size, "train.rampup_batch_size")


def _check_batch_size(config: "RunConfig", share: int, size: int, path: str) -> None:
    """Checks that a batch of ``size`` samples gives every rank whole micro-batches.

    ``share`` is the number of samples in one micro-batch of every data-parallel process.
    """
    micro_batch_size = config.train.micro_batch_size
    if size % share:
        raise UserError(
            f"{path}: {size} is not divisible by train.micro_batch_size {micro_batch_size} x "
            f"{share // micro_batch_size} data-parallel processes; use a multiple of {share}"
        )
    stages = config.parallel.pipeline_model_parallel_size
    if num_model_chunks(config.model, config.parallel) > 1 and size // share % stages:
        raise UserError(
            f"{path}: {size} gives each pipeline {size // share} micro-batches, but the "
            f"interleaved schedule needs a multiple of parallel.pipeline_model_parallel_size "
            f"{stages}; use a multiple of {share * stages}"
        )


def to_plain(value: Any) -> Any:
    """Converts a configuration or a part of one to plain dicts, lists, strings and numbers."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, CachedPath):
        return value.url
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class RunConfig:
    """The configuration of a run by section. It is validated as a whole on construction."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        check(self)
        return self

    @property
    def num_iterations(self) -> int:
        """Number of iterations if the global batch size never changes. See also `RunLength`."""
        return RunLength.of(self).last_iteration

    @property
    def num_samples(self) -> int:
        """Number of samples if the global batch size never changes. Only whole batches count."""
        return RunLength.of(self).num_samples

    @property
    def hang_timeout_minutes(self) -> float:
        """Minutes without progress after which a rank is considered hung; 0 disables the check."""
        given = self.faults.hang_timeout_minutes
        return self.parallel.distributed_timeout_minutes / 2 if given is None else given

    @property
    def model_parallel_size(self) -> int:
        """Number of processes that share one copy of the model."""
        return (
            self.parallel.tensor_model_parallel_size
            * self.parallel.pipeline_model_parallel_size
            * self.parallel.context_parallel_size
        )

    @property
    def has_bf16_gradients(self) -> bool:
        """Whether gradients are accumulated and reduced in bf16."""
        return self.parallel.grad_reduce_in_bf16 or self.optimizer.main_grads_dtype == "bf16"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Creates a configuration from a mapping of sections. Missing fields get their defaults."""
        # Validate a missing section as an empty one, so that messages name the missing field.
        given = {key: value for key, value in values.items() if value is not None}
        for path in removed_settings(given):
            section, _, name = path.partition(".")
            given[section] = {key: value for key, value in given[section].items() if key != name}
        sections: dict[str, Any] = {field.name: {} for field in fields(cls)}
        try:
            return _adapter.validate_python({**sections, **given})
        except ValidationError as error:
            raise UserError(describe(error, cls)) from None
        except RecursionError:
            raise UserError("the configuration is nested too deeply") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns all resolved fields as plain dicts, lists, strings and numbers."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    def to_yaml(self) -> str:
        """Returns all resolved fields as YAML. Reading it gives an equal configuration."""
        return dump_yaml(self.to_dict())


def removed_settings(values: Mapping[str, Any]) -> list[str]:
    """Returns the paths of the settings of `REMOVED` that a mapping of sections has."""
    paths = []
    for path in REMOVED:
        section, _, name = path.partition(".")
        given = values.get(section)
        if isinstance(given, Mapping) and name in given:
            paths.append(path)
    return paths


_adapter = TypeAdapter(RunConfig)
