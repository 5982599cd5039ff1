"""Compares what the prediction of a step assumes with what the simulated GPU executes."""

from dataclasses import replace

import pytest
from simulator import Simulator, example

from megatron_chatflow.config import RunConfig
from megatron_chatflow.simulate.layout_search import describe_step
from megatron_chatflow.simulate.observer import Observation
from megatron_chatflow.simulate.report import Simulation, describe, layer_launches
from megatron_chatflow.simulate.step_time import (
    LAYER_LAUNCHES,
    TENSOR_COLLECTIVES,
    TransformerShape,
    ring_bytes,
)

SMALL = "--preset none --num-layers 4 --hidden-size 512 --ffn-hidden-size 1408 --seq-length 256"
HEADS = "--num-attention-heads 8 --num-query-groups 8 --max-position-embeddings 256"
LAYOUT = "--tensor-model-parallel-size 4 --sequence-parallel --global-batch-size 4"
NUM_GPUS, NUM_MICRO_BATCHES = 8, 2


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return example("7b.yaml", *f"{SMALL} {HEADS} {LAYOUT} --vocab-size 32000".split())


@pytest.fixture(scope="module")
def observation(simulator: Simulator, config: RunConfig) -> Observation:
    return simulator.observe(config, world_size=NUM_GPUS)


def wire_bytes(observation: Observation, group: str, collective: str) -> float:
    return sum(
        one.wire_bytes
        for one in observation.messages
        if (one.group, one.collective) == (group, collective)
    )


def test_a_layer_launches_the_kernels_that_are_assumed(
    with_stand_in: Simulator, config: RunConfig
) -> None:
    observation = with_stand_in.observe(config, world_size=NUM_GPUS)
    found = observation.layer_launches["forward"], observation.layer_launches["backward"]
    assert found == pytest.approx(LAYER_LAUNCHES, rel=0.2)


def test_the_bytes_of_the_exchanges_are_those_of_the_formulas(
    config: RunConfig, observation: Observation
) -> None:
    shape = TransformerShape.of(config, 32_000)
    once = ring_bytes(256 * shape.hidden_size * 2, 4)
    # Per layer, and around the embedding and the output layer.
    num_gathers = shape.num_layers * (sum(TENSOR_COLLECTIVES) - 4) + 2
    num_reductions = shape.num_layers * 4 + 2
    gathered = wire_bytes(observation, "tensor (4)", "all-gather")
    reduced = wire_bytes(observation, "tensor (4)", "reduce-scatter")
    assert gathered == NUM_MICRO_BATCHES * num_gathers * once
    assert reduced == NUM_MICRO_BATCHES * num_reductions * once
    # The norms, which the prediction leaves out, and the padding of buffers.
    parameters = shape.num_layers * shape.layer_parameters / 4 + shape.table_parameters / 2
    assert wire_bytes(observation, "data (2)", "reduce-scatter") == pytest.approx(
        ring_bytes(4 * parameters, 2), rel=2e-3
    )
    assert wire_bytes(observation, "data (2)", "all-gather") == pytest.approx(
        ring_bytes(2 * parameters, 2), rel=2e-3
    )


def test_the_report_predicts_the_step_from_the_launches(
    simulator: Simulator, config: RunConfig, observation: Observation
) -> None:
    inputs, _ = simulator.prepare(config, NUM_GPUS)
    slow = replace(observation, layer_launches={"forward": 3000.0, "backward": 6000.0})
    simulation = Simulation(config, "h200", NUM_GPUS, inputs, [observation, slow], [(0,), (1,)])
    launches = layer_launches(simulation)
    assert launches == (3000, 6000)
    step = describe_step(config, inputs.vocab_size, NUM_GPUS, "h200", launches)
    assert step.startswith("predicted for 8 x h200, not measured: ")
    assert "largest loss: kernel launches" in step
    assert step in describe(simulation)
