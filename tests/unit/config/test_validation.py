"""Tests that impossible combinations are refused with the path of the field to change."""

import pytest

from megatron_chatflow.config import validate_for_world
from megatron_chatflow.errors import UserError

TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
CONTEXT = "parallel.context_parallel_size"
CHUNKS = "parallel.num_virtual_stages_per_pipeline_rank"
CHUNK_LAYERS = "parallel.num_layers_per_virtual_pipeline_stage"

GRAPHS = {"train.cuda_graph_impl": "transformer_engine"}
FP8 = {"train.fp8_format": "hybrid"}
OVERLAP = {TENSOR: 2, "parallel.sequence_parallel": True, "parallel.tp_comm_overlap": True}

AWARE = "optimizer.use_precision_aware_optimizer"
OFFLOAD = "optimizer.optimizer_cpu_offload"
WITH_OFFLOAD = {AWARE: True, OFFLOAD: True, "parallel.use_distributed_optimizer": True}

MOVING = "train.fine_grained_activation_offloading"
MODULES = "train.offload_modules"

CONTROLLER = "data.schedule.controller"
KNOT = {"data.schedule.knots": [{"at": 0, "weights": {"english": 1, "chat": 1}}]}


def controller(**settings: object) -> dict[str, object]:
    return {**KNOT, CONTROLLER: {"name": "odm", "horizon": 1000, **settings}}


GATHER = "train.fp8_param_gather"
REUSE = "train.reuse_grad_buf_for_mxfp8_param_ag"
SHARDED = {"parallel.use_distributed_optimizer": True}

YARN = {
    "model.rope_scaling_type": "yarn",
    "model.rope_scaling_factor": 4.0,
    "model.rope_original_max_position_embeddings": 2048,
}

STAGES = "train.stages"
ALL = {"at": 0, "trainable": ["all"]}

REFUSED = [
    (
        {"checkpoint.embedding_init": "distill", "checkpoint.load_hf": "model"},
        "checkpoint.embedding_init: distill needs the whole model in one process; run",
    ),
    ({STAGES: [{**ALL, "at": 5}]}, f"{STAGES}[0].at: 5, but the first stage begins with the run"),
    ({STAGES: [ALL, ALL]}, f"{STAGES}[1].at: 0 is not above 0 of the previous stage; list the"),
    (
        {**WITH_OFFLOAD, STAGES: [ALL]},
        f"{STAGES}: does not work with {OFFLOAD}; remove one of them",
    ),
    (
        {
            AWARE: True,
            **SHARDED,
            "optimizer.exp_avg_dtype": "fp16",
            STAGES: [{"at": 0, "trainable": ["rows.9-"]}],
        },
        f"{STAGES}: rows.9- selects rows, and optimizer.exp_avg_dtype fp16 has one scale for all",
    ),
    (
        {"optimizer.decoupled_min_lr": 1e-5},
        "optimizer.decoupled_min_lr: needs optimizer.decoupled_lr; set that too",
    ),
    (
        {"optimizer.decoupled_lr": 1e-5, "optimizer.decoupled_min_lr": 1e-4},
        "optimizer.decoupled_min_lr: 0.0001 is above optimizer.decoupled_lr 1e-05; lower it",
    ),
    (
        {"optimizer.no_weight_decay": ["rows.9-"]},
        "optimizer.no_weight_decay: rows.9-: selects rows; name whole tensors, such as embeddings",
    ),
    ({GATHER: True}, f"{GATHER}: needs train.fp8_format; set that too"),
    ({**FP8, GATHER: True}, f"{GATHER}: needs parallel.use_distributed_optimizer; set that too"),
    (
        {**FP8, **SHARDED, GATHER: True, "train.fp8_recipe": "delayed"},
        f"{GATHER}: the scales of train.fp8_recipe delayed are not in checkpoints; use tensorwise",
    ),
    (
        {
            **FP8,
            **SHARDED,
            GATHER: True,
            "train.fp8_recipe": "mxfp8",
            "model.ffn_hidden_size": 704,
        },
        f"{REUSE}: is needed by {GATHER} with train.fp8_recipe mxfp8, and only then; set it",
    ),
    ({REUSE: True}, f"{REUSE}: is needed by {GATHER} with train.fp8_recipe mxfp8, and only then;"),
    (
        {**FP8, **WITH_OFFLOAD, GATHER: True},
        f"{GATHER}: needs fp32 master weights on the GPU, and optimizer.optimizer_cpu_offload is",
    ),
    ({MOVING: True}, f"{MOVING} and {MODULES}: one is set and the other is not; set both, or"),
    (
        {**FP8, MOVING: True, MODULES: ("core_attn",)},
        f"{MOVING}: would offload the quantized copies of weights as well; remove it, or",
    ),
    ({MODULES: ("core_attn",)}, f"{MOVING} and {MODULES}: one is set and the other is not"),
    (
        {MOVING: True, MODULES: ("core_attn",), "train.transformer_impl": "local"},
        f"{MOVING}: needs the layers of transformer-engine; remove it, or use",
    ),
    (
        {MOVING: True, MODULES: ("core_attn",), "train.cuda_graph_impl": "transformer_engine"},
        f"{MOVING} and train.cuda_graph_impl: both are set; remove one of them",
    ),
    (
        {MOVING: True, MODULES: ("attn_proj",)},
        f"{MODULES}: attn_proj needs core_attn, whose backward pass uses the same tensor; add it",
    ),
    (
        {MOVING: True, MODULES: ("core_attn",), "train.recompute_granularity": "selective"},
        f"{MODULES}: core_attn is in train.recompute_modules too; remove it from one of them",
    ),
    (
        {
            MOVING: True,
            MODULES: ("core_attn",),
            "train.recompute_granularity": "full",
            "train.recompute_method": "uniform",
            "train.recompute_num_layers": 1,
        },
        f"{MOVING}: train.recompute_granularity full stores no activations of these modules",
    ),
    ({OFFLOAD: True}, f"{OFFLOAD}: needs {AWARE}; set that too"),
    ({"optimizer.optimizer_offload_fraction": 0.5}, "optimizer.optimizer_offload_fraction: needs"),
    (
        {"optimizer.overlap_cpu_optimizer_d2h_h2d": True},
        f"optimizer.overlap_cpu_optimizer_d2h_h2d: needs {OFFLOAD}; set that too",
    ),
    (
        {**WITH_OFFLOAD, "optimizer.exp_avg_dtype": "bf16"},
        f"optimizer.exp_avg_dtype: {OFFLOAD} keeps state in fp32; use fp32, or",
    ),
    ({"optimizer.exp_avg_dtype": "bf16"}, f"optimizer.exp_avg_dtype: needs {AWARE}; set that, or"),
    ({AWARE: True}, f"{AWARE}: needs parallel.use_distributed_optimizer; set that, or"),
    (
        {AWARE: True, "parallel.use_distributed_optimizer": True, "train.bf16": False},
        f"{AWARE}: needs train.bf16; set that, or --no-use-precision-aware-optimizer",
    ),
    (
        {TENSOR: 3},
        f"{TENSOR}: 3 does not divide model.num_attention_heads 8; use 1, 2 or 4",
    ),
    (
        {TENSOR: 8},
        f"{TENSOR}: 8 does not divide model.num_query_groups 4; use 1, 2 or 4, "
        "or set parallel.pad_attention_heads",
    ),
    (
        {"model.ffn_hidden_size": 690, TENSOR: 4},
        f"{TENSOR}: 4 does not divide model.ffn_hidden_size 690; use 1 or 2",
    ),
    ({PIPELINE: 3}, f"{PIPELINE}: 3 does not divide model.num_layers 4; use 1, 2 or 4"),
    ({CHUNKS: 2}, f"{CHUNKS}: needs {PIPELINE} above 1; set that, or remove this one"),
    ({CHUNK_LAYERS: 2}, f"{CHUNK_LAYERS}: needs {PIPELINE} above 1; set that, or remove this one"),
    (
        {PIPELINE: 2, CHUNKS: 3},
        f"{CHUNKS}: 3 does not divide the 2 layers of a pipeline stage; use a divisor of that",
    ),
    (
        {PIPELINE: 2, CHUNK_LAYERS: 4},
        f"{CHUNK_LAYERS}: 4 does not divide the 2 layers of a pipeline stage; use a divisor of",
    ),
    (
        {PIPELINE: 2, CHUNKS: 2, CHUNK_LAYERS: 1},
        f"{CHUNK_LAYERS} and {CHUNKS}: both are set; remove one of them",
    ),
    (
        {
            "train.recompute_granularity": "full",
            "train.recompute_method": "block",
            "train.recompute_num_layers": 2,
            PIPELINE: 2,
            CHUNKS: 2,
        },
        "train.recompute_num_layers: 2 is above the 1 layers of a model chunk; use at most 1",
    ),
    (
        {"model.num_query_groups": 3},
        "model.num_query_groups: 3 does not divide model.num_attention",
    ),
    ({"model.num_attention_heads": 6}, "model.num_attention_heads: 6 does not divide model.hidden"),
    (
        {"model.num_attention_heads": 256},
        "model.hidden_size: 256 / 256 heads is the odd head size 1",
    ),
    (
        {
            "model.kv_channels": 2,
            "model.rope_scaling_type": "dynamic",
            "model.rope_scaling_factor": 2.0,
        },
        "model.rope_scaling_type: dynamic scaling is undefined for heads of size 2",
    ),
    ({"model.kv_channels": 33}, "model.kv_channels: 33 is odd, but RoPE needs an even head size"),
    ({"parallel.sequence_parallel": True}, "parallel.sequence_parallel: needs parallel.tensor_mod"),
    (
        {"parallel.sequence_parallel": True, TENSOR: 4, "data.seq_length": 126},
        "data.seq_length: with parallel.sequence_parallel the 126 tokens of a process",
    ),
    (
        {"parallel.sequence_parallel": True, TENSOR: 4, CONTEXT: 2, "data.seq_length": 124},
        "data.seq_length: with parallel.sequence_parallel the 62 tokens of a process",
    ),
    (
        {CONTEXT: 3},
        "data.seq_length: 128 is not divisible by 2 x parallel.context_parallel_size = 6",
    ),
    (
        {"data.seq_length": 4096},
        "data.seq_length: 4096 is above model.max_position_embeddings 2048",
    ),
    (
        {"model.rope_scaling_type": "linear"},
        "model.rope_scaling_type and model.rope_scaling_factor: one is set and the other",
    ),
    (
        {"model.rope_scaling_factor": 2.0},
        "model.rope_scaling_type and model.rope_scaling_factor: one is set and the other",
    ),
    (
        {"model.rope_scaling_type": "llama3", "model.rope_scaling_factor": 8.0},
        "model.rope_original_max_position_embeddings: is missing, and model.rope_scaling_type is",
    ),
    (
        {"model.rope_scaling_type": "yarn", "model.rope_scaling_factor": 4.0},
        "model.rope_original_max_position_embeddings: is missing, and model.rope_scaling_type is",
    ),
    ({"model.mscale": 1.0}, "model.mscale: is set, and model.rope_scaling_type is unset; only"),
    (
        {**YARN, "model.mscale": 1.0},
        "model.mscale and model.mscale_all_dim: one is set and the other is not",
    ),
    (
        {**YARN, "model.yarn_beta_fast": 0.5},
        "model.yarn_beta_fast: 0.5 is below model.yarn_beta_slow 1; raise it",
    ),
    ({**YARN, "data.seq_length": 8200}, "data.seq_length: 8200 is above model.max_position"),
    ({"model.window_size": [63, 63]}, "model.window_size: 63,63 is not the window of a causal"),
    ({"model.window_size": "-1,0"}, "model.window_size: -1,0 is not the window of a causal model"),
    (
        {"model.rope_low_freq_factor": 1.0},
        "model.rope_low_freq_factor: is set, and model.rope_scaling_type is unset",
    ),
    (
        {
            "model.rope_scaling_type": "llama3",
            "model.rope_scaling_factor": 8.0,
            "model.rope_original_max_position_embeddings": 512,
            "model.rope_low_freq_factor": 4.0,
        },
        "model.rope_low_freq_factor: 4 is not below model.rope_high_freq_factor 4",
    ),
    (
        {
            "model.rope_scaling_type": "dynamic",
            "model.rope_scaling_factor": 2.0,
            "data.seq_length": 4097,
        },
        "data.seq_length: 4097 is above model.max_position_embeddings 2048",
    ),
    (
        {"parallel.overlap_param_gather": True},
        "parallel.overlap_param_gather: needs parallel.use_d",
    ),
    (
        {"parallel.ddp_pad_buckets_for_high_nccl_busbw": True},
        "parallel.ddp_pad_buckets_for_high_nccl_busbw: needs parallel.use_distributed_optimizer, "
        "whose buckets it pads; set that too",
    ),
    (
        {"parallel.disable_symmetric_registration": True},
        "parallel.disable_symmetric_registration: needs parallel.use_nccl_ub; set that too",
    ),
    (
        {"train.cuda_graph_warmup_steps": 1},
        "train.cuda_graph_warmup_steps: needs train.cuda_graph_impl transformer_engine; set that",
    ),
    ({**GRAPHS, "train.bf16": False}, "train.cuda_graph_impl: needs train.bf16; set that, or"),
    (
        {**GRAPHS, "train.transformer_impl": "local"},
        "train.cuda_graph_impl: needs the layers of transformer-engine; remove it, or use",
    ),
    (
        {
            **GRAPHS,
            "train.recompute_granularity": "selective",
            "train.recompute_modules": ["mlp"],
        },
        "train.cuda_graph_impl: the MLP cannot be a CUDA graph and be recomputed; remove it, or",
    ),
    (
        {
            **GRAPHS,
            "train.recompute_granularity": "full",
            "train.recompute_method": "uniform",
            "train.recompute_num_layers": 1,
        },
        "train.cuda_graph_impl: the MLP cannot be a CUDA graph and be recomputed; remove it, or",
    ),
    (
        {"parallel.tp_comm_overlap": True},
        "parallel.tp_comm_overlap: needs parallel.sequence_parallel",
    ),
    (
        {**OVERLAP, "train.bf16": False},
        "parallel.tp_comm_overlap: transformer-engine has no user buffers for an fp32 run; use",
    ),
    (
        {**OVERLAP, "train.fp4_format": "e2m1"},
        "parallel.tp_comm_overlap: transformer-engine has no user buffers for train.fp4_format; ",
    ),
    (
        {**OVERLAP, **FP8, "train.fp8_recipe": "blockwise"},
        "parallel.tp_comm_overlap: transformer-engine has no user buffers for train.fp8_recipe blo",
    ),
    (
        {
            **{**OVERLAP, **FP8, "train.fp8_recipe": "mxfp8", "model.ffn_hidden_size": 256},
            **{"data.seq_length": 64, "train.micro_batch_size": 2},
        },
        "train.fp8_format: with parallel.tp_comm_overlap, mxfp8 needs a multiple of 128 tokens",
    ),
    (
        {"train.fp4_format": "e2m1", "data.seq_length": 40, "train.micro_batch_size": 1},
        "train.fp4_format: needs a multiple of 16 tokens in the micro-batch of a process",
    ),
    (
        {"parallel.grad_reduce_in_bf16": True, "train.bf16": False},
        "parallel.grad_reduce_in_bf16: the gradients of an fp32 run are fp32",
    ),
    ({"train.train_iters": None}, "train.train_iters: is missing; set it, or train.train_samples"),
    ({"train.train_samples": 100}, "train.train_iters and train.train_samples: both are set"),
    (
        {"train.train_iters": None, "train.train_samples": 7},
        "train.train_samples: 7 is below train.global_batch_size 8",
    ),
    ({"train.micro_batch_size": 3}, "train.micro_batch_size: 3 does not divide train.global_batch"),
    (
        {"train.first_last_layers_bf16": True},
        "train.first_last_layers_bf16: needs train.fp8_",
    ),
    ({**FP8, "train.fp4_format": "e2m1"}, "train.fp8_format and train.fp4_format: both are set"),
    ({**FP8, "train.bf16": False}, "train.fp8_format: needs train.bf16"),
    (
        {"train.fp4_format": "e2m1", "train.transformer_impl": "local"},
        "train.fp4_format: needs the layers of transformer-engine",
    ),
    (
        {**FP8, "train.fp8_recipe": "delayed", "train.first_last_layers_bf16": True},
        "train.first_last_layers_bf16: does not work with train.fp8_recipe delayed",
    ),
    (
        {
            **FP8,
            "train.first_last_layers_bf16": True,
            "train.num_layers_at_start_in_bf16": 2,
            "train.num_layers_at_end_in_bf16": 2,
        },
        "train.first_last_layers_bf16: keeps 4 layers in bf16, and the model has 4",
    ),
    (
        {**FP8, "data.seq_length": 60, "train.micro_batch_size": 1},
        "train.fp8_format: needs a multiple of 8 tokens in the micro-batch of a process",
    ),
    (
        {**FP8, "model.ffn_hidden_size": 176, TENSOR: 2},
        "train.fp8_format: needs sizes that are multiples of 16, and model.ffn_hidden_size / para",
    ),
    (
        {**FP8, "train.fp8_recipe": "mxfp8", "model.ffn_hidden_size": 176},
        "train.fp8_format: needs sizes that are multiples of 32, and model.ffn_hidden_size / para",
    ),
    (
        {
            **{**FP8, "train.fp8_recipe": "blockwise", "train.micro_batch_size": 1},
            **{TENSOR: 2, "parallel.sequence_parallel": True},
        },
        "train.fp8_format: parallel.sequence_parallel gathers blocks of 128 values",
    ),
    ({"train.recompute_granularity": "full"}, "train.recompute_granularity: full needs train.reco"),
    ({"train.recompute_method": "block"}, "train.recompute_method and train.recompute_num_layers:"),
    (
        {"train.recompute_modules": ["mlp"]},
        "train.recompute_modules: needs train.recompute_granularity selective",
    ),
    (
        {"train.recompute_granularity": "selective", "train.recompute_num_layers": 1},
        "train.recompute_method and train.recompute_num_layers: need",
    ),
    (
        {
            "train.recompute_granularity": "full",
            "train.recompute_method": "uniform",
            "train.recompute_num_layers": 3,
            PIPELINE: 2,
        },
        "train.recompute_num_layers: 3 is above the 2 layers of a pipeline stage",
    ),
    ({"optimizer.min_lr": 1e-3}, "optimizer.min_lr: 0.001 is above optimizer.lr 0.0003"),
    ({"optimizer.lr_warmup_iters": 100}, "optimizer.lr_warmup_iters: 100 is not below the 100"),
    ({"optimizer.lr_warmup_init": 1e-3}, "optimizer.lr_warmup_init: 0.001 is above optimizer.lr"),
    ({"checkpoint.load_optim": False}, "checkpoint.load_optim: --no-load-optim needs"),
    ({"checkpoint.finetune": True}, "checkpoint.finetune: needs checkpoint.load"),
    ({"faults.hang_timeout_minutes": 20}, "faults.hang_timeout_minutes: 20 is not below the 20 of"),
    ({"parallel.distributed_timeout_minutes": 2}, "faults.data_retry_seconds: a rank that waits"),
    ({"checkpoint.save_interval": 5}, "checkpoint.save_interval: needs checkpoint.save"),
    (
        {"data.schedule.knots.1.weights": {"chatt": 1}},
        "data.schedule.knots[1].weights.chatt: is not among data.sources (did you mean chat?)",
    ),
    (
        {"data.schedule.knots.1.objective_weights": {"chatt": 2}},
        "data.schedule.knots[1].objective_weights.chatt: is not among data.sources (did you mean",
    ),
    (
        {"data.schedule.knots.1.objective_weights": {"chat": 0}},
        "data.schedule.knots[1].objective_weights.chat: must be above 0, not 0",
    ),
    ({CONTROLLER: {"name": "odm"}}, f"{CONTROLLER}: decides the weights after the first two hor"),
    (controller(horizon=None), f"{CONTROLLER}.horizon: is missing; odm needs it"),
    (controller(run="r"), f"{CONTROLLER}.run: has no effect with odm; remove it"),
    (controller(name="replay"), f"{CONTROLLER}.horizon: has no effect with replay; remove it"),
    (controller(name="shearing"), f"{CONTROLLER}.reference_loss: is missing; shearing needs it"),
    (
        controller(name="shearing", reference_loss={"chat": 2}),
        f"{CONTROLLER}.reference_loss: has no loss of english; give one for every",
    ),
    (
        {
            **controller(name="shearing", reference_loss={"english": 2, "chat": 2}),
            "train.eval_interval": None,
        },
        f"{CONTROLLER}: shearing decides from validation losses; set train.eval_interval",
    ),
    (
        {**controller(), "data.schedule.knots": [{"at": 0, "weights": {"chat": 1}}]},
        f"{CONTROLLER}: needs at least two sources with a weight above 0",
    ),
    (
        {**controller(), "data.schedule.count": "tokens"},
        f"data.schedule.count: tokens does not work with {CONTROLLER}",
    ),
    (controller(floor=0.6), f"{CONTROLLER}.floor: the floors of all sources exceed 1"),
    (controller(cap=0.4), f"{CONTROLLER}.cap: the caps of all sources are below 1"),
    (controller(cap={"chatt": 1}), f"{CONTROLLER}.cap.chatt: is not among data.sources (did you"),
    (controller(cap={"chat": 2}), f"{CONTROLLER}.cap.chat: must be at most 1, not 2"),
    (controller(floor=-1), f"{CONTROLLER}.floor: must be between 0 and 1, not -1"),
    (
        controller(floor={"chat": 0.5}, cap={"chat": 0.2}),
        f"{CONTROLLER}.floor: 0.5 of chat is above its cap 0.2",
    ),
    ({"data.schedule.knots.0.weights": {"chat": 0}}, "data.schedule.knots[0].weights: all weights"),
    ({"data.schedule.knots.0.weights": {}}, "data.schedule.knots[0].weights: all weights are 0"),
    (
        {"data.schedule.knots.0.weights": {"chat": -1}},
        "data.schedule.knots[0].weights.chat: must be",
    ),
    (
        {"data.schedule.knots.0.weights": {"chat": float("nan")}},
        "data.schedule.knots[0].weights.chat: must be",
    ),
    ({"data.schedule.knots.1.at": 0}, "data.schedule.knots[1].at: 0 is not above 0 of the"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(config, changes, message) -> None:
    with pytest.raises(UserError) as caught:
        config(changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        {TENSOR: 4, "parallel.sequence_parallel": True},
        {PIPELINE: 4, CONTEXT: 2},
        {PIPELINE: 2, CHUNKS: 2},
        {PIPELINE: 2, CHUNK_LAYERS: 1},
        {PIPELINE: 4, CHUNKS: 1},
        {"parallel.overlap_grad_reduce": True},
        {"model.num_query_groups": 8, TENSOR: 8},
        {
            "parallel.use_distributed_optimizer": True,
            "parallel.overlap_grad_reduce": True,
            "parallel.overlap_param_gather": True,
        },
        {
            "train.recompute_granularity": "full",
            "train.recompute_method": "block",
            "train.recompute_num_layers": 4,
        },
        {"train.recompute_granularity": "selective"},
        {"optimizer.min_lr": 3e-4},
        {"optimizer.lr_warmup_iters": 99},
        {"checkpoint.load": "a", "checkpoint.finetune": True},
    ],
)
def test_allowed(config, changes) -> None:
    config(changes)


def test_many_divisors_are_not_listed(config) -> None:
    heads = {"model.num_attention_heads": 7, "model.num_query_groups": 7, "model.hidden_size": 5040}
    with pytest.raises(UserError, match="use a divisor of 5040"):
        config({**heads, "model.num_layers": 5040, PIPELINE: 11})


def test_the_interleaved_schedule_wants_whole_groups_of_micro_batches(config) -> None:
    run = config({PIPELINE: 2, CHUNKS: 2, "train.global_batch_size": 12})
    validate_for_world(run, 2)
    with pytest.raises(UserError) as caught:
        validate_for_world(run, 4)
    assert str(caught.value).startswith(
        "train.global_batch_size: 12 gives each pipeline 3 micro-batches, but the interleaved "
        f"schedule needs a multiple of {PIPELINE} 2; use a multiple of 8"
    )
    validate_for_world(config({PIPELINE: 2, "train.global_batch_size": 12}), 4)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_worlds_that_fit(config, world_size: int) -> None:
    validate_for_world(config({TENSOR: 2}), world_size)


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        (
            6,
            "parallel: tensor x pipeline x context parallel size 2 x 2 x 1 = 4 does not divide the",
        ),
        (
            12,
            "train.global_batch_size: 8 is not divisible by train.micro_batch_size 2 x 3 data-par",
        ),
    ],
)
def test_worlds_that_do_not_fit(config, world_size: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate_for_world(config({TENSOR: 2, PIPELINE: 2}), world_size)
    assert str(caught.value).startswith(message)
