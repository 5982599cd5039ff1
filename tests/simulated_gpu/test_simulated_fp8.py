"""Tests FP8 on the simulated GPU, with the stand-in for transformer-engine.

Its layers hold what transformer-engine's hold: two copies of every matrix in FP8, and the inputs of
products in FP8 for the backward pass.
"""

import pytest
from simulator import Simulator, example

from megatron_chatflow.config.memory import estimate_memory

TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel --num-layers 2"
DEEP = "--tensor-model-parallel-size 2 --sequence-parallel --num-layers 4 --micro-batch-size 4"
STAGES = "--num-layers 8 --num-layers-per-virtual-pipeline-stage 1"
WEIGHTS = "--fp8-format hybrid --fp8-param-gather"
BLOCKS = f"{WEIGHTS} --fp8-recipe blockwise"
MX = f"{WEIGHTS} --fp8-recipe mxfp8 --reuse-grad-buf-for-mxfp8-param-ag --no-overlap-param-gather"
BF16_ENDS = "--first-last-layers-bf16"
TOLERANCE = 0.08  # as in test_simulated_memory


def run(simulator: Simulator, name: str, flags: str, world_size: int, rank: int) -> None:
    """Runs a rank and compares its memory with the estimate."""
    config = example(name, *flags.split())
    gpu = "b200" if "mxfp8" in flags else "h100"
    found = simulator.observe(config, world_size=world_size, rank=rank, gpu=gpu)
    assert found.num_steps == 2
    assert found.cpu_tensors == []
    assert ("stored in FP8" in found.implementations["precision"]) == (WEIGHTS in flags)
    phases = {one.phase for one in found.synchronizations}
    assert phases <= {"gradients", "update", "after"}, found.synchronizations
    expected = estimate_memory(config, 32_000, world_size)
    print(f"{flags}: {expected.total / found.peak_bytes - 1:+.1%}")
    if rank == 0:  # the stage that needs the most
        assert expected.total == pytest.approx(found.peak_bytes, rel=TOLERANCE)
        assert found.memory["weights"] == pytest.approx(expected.weights, rel=0.01)
    else:
        assert expected.total > found.peak_bytes * (1 - TOLERANCE)


def test_a_step_with_weights_in_fp8(with_stand_in: Simulator) -> None:
    run(with_stand_in, "7b.yaml", f"{TENSOR} {WEIGHTS}", 8, 0)


CASES = {
    "tensorwise": f"{DEEP} {WEIGHTS}",
    "tensorwise, bf16 weights": f"{DEEP} --fp8-format hybrid",
    "delayed, bf16 weights": f"{DEEP} --fp8-format hybrid --fp8-recipe delayed",
    "blockwise": f"{DEEP} {BLOCKS} {BF16_ENDS}",
    "mxfp8": f"{DEEP} {MX}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_7b_by_recipe(with_stand_in: Simulator, name: str) -> None:
    run(with_stand_in, "7b.yaml", CASES[name], 8, 0)


@pytest.mark.slow
def test_context_parallel_ranks_of_7b(with_stand_in: Simulator) -> None:
    run(with_stand_in, "7b.yaml", f"--num-layers 4 --context-parallel-size 2 {WEIGHTS}", 32, 0)


OFFLOADING = "--fine-grained-activation-offloading --offload-modules"


@pytest.mark.slow
@pytest.mark.parametrize("modules", ["core_attn", "qkv_linear core_attn attn_proj"])
def test_the_estimate_knows_offloaded_activations(with_stand_in: Simulator, modules: str) -> None:
    run(with_stand_in, "7b.yaml", f"{DEEP} {OFFLOADING} {modules}", 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [WEIGHTS, BLOCKS, MX], ids=["tensorwise", "blockwise", "mxfp8"])
def test_7b_fits_its_estimate(with_stand_in: Simulator, flags: str) -> None:
    run(with_stand_in, "7b.yaml", flags, 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 63])
@pytest.mark.parametrize("flags", [WEIGHTS, BLOCKS, MX], ids=["tensorwise", "blockwise", "mxfp8"])
def test_stages_of_70b(with_stand_in: Simulator, flags: str, rank: int) -> None:
    run(with_stand_in, "70b.yaml", f"{STAGES} {flags}", 64, rank)


@pytest.mark.slow
def test_70b_fits_its_estimate(with_stand_in: Simulator) -> None:
    run(with_stand_in, "70b.yaml", f"{WEIGHTS} {BF16_ENDS}", 64, 0)
