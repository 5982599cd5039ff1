"""Tests that transformer-engine's layers run on a simulated GPU, with the stand-in for them.

On a GPU a run takes them without being asked. The stand-in's functions are compositions, so that
memory and launches are not those of transformer-engine, but shapes, dtypes, devices and messages
are.
"""

import pytest
from simulator import Simulator, example

from megatron_chatflow.config.memory import estimate_memory

TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel --num-layers 2"
LARGE = "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --num-layers 8"
GRAPHS = "--cuda-graph-impl transformer_engine --cuda-graph-warmup-steps 1"
PIPELINE = (
    "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
    "--num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
)
CASES = {
    "7b": ("7b.yaml", TENSOR, 8, 0),
    "7b, context parallel": ("7b.yaml", f"{TENSOR} --context-parallel-size 2", 8, 2),
    "7b, deterministic": ("7b.yaml", f"{TENSOR} --deterministic-mode", 8, 0),
    "7b, cuDNN": ("7b.yaml", f"{TENSOR} --attention-backend cudnn", 8, 0),
    "7b, selective recomputation": (
        "7b.yaml",
        f"{TENSOR} --recompute-granularity selective",
        8,
        0,
    ),
    "7b, overlapped products": ("7b.yaml", f"{TENSOR} --tp-comm-overlap", 8, 0),
    "7b, overlapped products in FP8": (
        "7b.yaml",
        f"{TENSOR} --num-layers 4 --tp-comm-overlap --fp8-format hybrid --first-last-layers-bf16",
        8,
        0,
    ),
    "70b, overlapped products": ("70b.yaml", f"{LARGE} --tp-comm-overlap", 32, 9),
    "7b, CUDA graphs": ("7b.yaml", f"{TENSOR} {GRAPHS}", 8, 0),
    "7b, CUDA graphs, context parallel": (
        "7b.yaml",
        f"{TENSOR} {GRAPHS} --context-parallel-size 2 --micro-batch-size 2",
        8,
        5,
    ),
    "7b, CUDA graphs, interleaved stages": ("7b.yaml", f"{PIPELINE} {GRAPHS}", 8, 4),
    "7b, CUDA graphs, FP8": ("7b.yaml", f"{TENSOR} {GRAPHS} --fp8-format hybrid", 8, 0),
    "70b, first stage": (
        "70b.yaml",
        f"{LARGE} --num-layers-per-virtual-pipeline-stage 1",
        32,
        0,
    ),
    "70b, last stage": (
        "70b.yaml",
        f"{LARGE} --num-layers-per-virtual-pipeline-stage 1 --micro-batch-size 2",
        64,
        63,
    ),
}


AWARE = "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"


@pytest.mark.parametrize("name", CASES)
def test_a_step_runs_and_the_host_never_waits_in_a_layer(
    with_stand_in: Simulator, name: str
) -> None:
    base, flags, world_size, rank = CASES[name]
    found = with_stand_in.observe(example(base, *flags.split()), world_size=world_size, rank=rank)
    assert found.num_steps == 2
    assert found.implementations["layers"].startswith("transformer-engine 2.9.0, through")
    # The second step replays graphs, which hold their inputs.
    is_captured = any("get_layer_static_inputs" in one.line for one in found.holders)
    assert is_captured == (GRAPHS in flags)
    assert any("te_standin/transformer_engine/pytorch/module" in one.line for one in found.holders)
    assert found.cpu_tensors == []
    phases = {one.phase for one in found.synchronizations}
    assert phases <= {"gradients", "update", "after"}, found.synchronizations


@pytest.mark.parametrize("aware", ["", AWARE, f"{AWARE} --main-grads-dtype bf16"])
def test_the_precision_aware_optimizer_takes_the_estimated_memory(
    with_stand_in: Simulator, aware: str
) -> None:
    config = example("7b.yaml", *TENSOR.split(), *aware.split())
    found = with_stand_in.observe(config, world_size=8, rank=0)
    expected = estimate_memory(config, 32_000, 8)
    assert found.memory["optimizer"] == pytest.approx(expected.optimizer, rel=0.01)
    assert found.memory["gradients"] == pytest.approx(expected.gradients, rel=0.01)
    phases = {one.phase for one in found.synchronizations}
    assert phases <= {"gradients", "update", "after"}, found.synchronizations


# The optimizer that offloads moves whole parameters, until their share is reached.
@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 0, 0), (0.5, 0.2, 0.5)])
def test_offloaded_state_leaves_the_gpu(
    with_stand_in: Simulator, share: float, least: float, most: float
) -> None:
    flags = f"{TENSOR} --use-precision-aware-optimizer --optimizer-cpu-offload"
    flags += f" --optimizer-offload-fraction {share} --overlap-cpu-optimizer-d2h-h2d"
    config = example("7b.yaml", *flags.split())
    found = with_stand_in.observe(config, world_size=128, rank=0)
    whole = estimate_memory(config, 32_000, 128, on_cpu=True).optimizer
    assert least * whole <= found.memory.get("optimizer", 0) <= most * whole
    assert found.cpu_tensors == []
    phases = {one.phase for one in found.synchronizations}
    assert phases <= {"gradients", "update", "after"}, found.synchronizations


OFFLOADING = "--fine-grained-activation-offloading --offload-modules"
LAYERS = "--tensor-model-parallel-size 2 --sequence-parallel --num-layers 4"


@pytest.mark.parametrize(
    "modules",
    ["qkv_linear", "core_attn", "core_attn attn_proj", "qkv_linear core_attn attn_proj"],
)
def test_offloaded_activations_leave_the_gpu(with_stand_in: Simulator, modules: str) -> None:
    plain, found = (
        with_stand_in.observe(example("7b.yaml", *flags.split()), world_size=8, rank=0)
        for flags in (LAYERS, f"{LAYERS} {OFFLOADING} {modules}")
    )
    assert found.num_steps == 2
    assert found.cpu_tensors == []
    assert found.flops == plain.flops
    assert found.peak_bytes < plain.peak_bytes
    phases = {one.phase for one in found.synchronizations}
    assert phases <= {"gradients", "update", "after"}, found.synchronizations
