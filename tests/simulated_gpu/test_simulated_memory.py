"""Compares the memory estimate of the plain dry run with the simulated peak."""

from dataclasses import dataclass

import pytest
from simulator import Simulator, example

from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.simulate.run import rank_classes

TOLERANCE = 0.08


@dataclass(frozen=True)
class Layout:
    """A layout of an example's page.

    Attributes:
        file: Its configuration.
        world_size: Number of GPUs.
        flags: Further flags of the page.
        small: Flags for a model of the same widths with fewer layers.
        vocab_size: Rows of the embedding.
    """

    file: str
    world_size: int
    flags: str = ""
    small: str = "--num-layers 4"
    vocab_size: int = 32_000


CHUNKS = "--num-layers 16"  # two chunks of two layers in each of four stages
LAYOUTS = [
    Layout("paper.yaml", 8),
    *(Layout("7b.yaml", number) for number in (8, 16, 64, 256)),
    *(Layout("13b.yaml", number) for number in (8, 16, 64, 256)),
    *(Layout("70b.yaml", number, small=CHUNKS) for number in (64, 128, 256)),
    Layout("70b.yaml", 32, "--pipeline-model-parallel-size 8", "--num-layers 32"),
    Layout("7b.yaml", 32, "--context-parallel-size 2"),
    Layout("7b.yaml", 8, "--recompute-granularity selective --recompute-modules mlp"),
    Layout("../qwen_zh_to_X/qwen3_8b.yaml", 8, vocab_size=151_936),
    *(
        Layout(file, world_size, f"--preset {preset} --vocab-size {rows}", small, rows)
        for file, world_size, preset, rows, small in (
            ("7b.yaml", 8, "mistral-7b-v0.1", 32_000, "--num-layers 4"),
            ("7b.yaml", 64, "qwen2.5-7b", 152_064, "--num-layers 4"),
            ("70b.yaml", 64, "qwen2.5-72b", 152_064, CHUNKS),
            ("70b.yaml", 64, "qwen3-32b", 151_936, CHUNKS),
        )
    ),
]


def compare(simulator: Simulator, layout: Layout, *flags: str) -> None:
    config = example(layout.file, *layout.flags.split(), *flags)
    stages = list(rank_classes(config, layout.world_size, "stages"))
    # The first stage holds the most activations, the last one computes the loss.
    peaks = [
        simulator.observe(config, world_size=layout.world_size, rank=rank).peak_bytes
        for rank in {stages[0], stages[-1]}
    ]
    estimate = estimate_memory(config, layout.vocab_size, layout.world_size).total
    print(f"{layout}: {estimate / max(peaks) - 1:+.1%}")
    assert estimate == pytest.approx(max(peaks), rel=TOLERANCE)


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda one: f"{one.file}-{one.world_size}{one.flags}"
)
@pytest.mark.slow
def test_the_estimate_is_near_the_simulated_peak(simulator: Simulator, layout: Layout) -> None:
    compare(simulator, layout)


# The layouts of the page that differ in more than the number of replicas, with fewer layers.
SMALL = [
    layout
    for layout in LAYOUTS
    if layout.flags or layout.world_size == (64 if layout.file == "70b.yaml" else 8)
]


@pytest.mark.parametrize("layout", SMALL, ids=lambda one: f"{one.file}-{one.world_size}{one.flags}")
def test_the_estimate_is_near_the_peak_of_few_layers(simulator: Simulator, layout: Layout) -> None:
    compare(simulator, layout, *layout.small.split())


OTHER_LAYERS = {
    "biases": "--add-qkv-bias",
    "norms": "--qk-layernorm --kv-channels 256",
    "norms of groups": "--qk-layernorm --num-query-groups 8",
    "windowed": "--window-size 511,0 --num-query-groups 8",
    "windowed, context": "--window-size 1023,0 --num-query-groups 8 --context-parallel-size 2",
    "windowed, recomputed": "--window-size 511,0 --recompute-granularity selective",
    "norms recomputed": "--qk-layernorm --num-query-groups 8 --recompute-granularity selective",
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_the_estimate_knows_what_other_architectures_store(simulator: Simulator, name: str) -> None:
    flags = f"--num-layers 8 --micro-batch-size 4 {OTHER_LAYERS[name]}"
    compare(simulator, Layout("13b.yaml", 64), *flags.split())


RECOMPUTATION = {
    "selective": "--recompute-granularity selective",
    "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
}


@pytest.mark.parametrize("name", RECOMPUTATION)
def test_the_estimate_knows_what_layers_store(simulator: Simulator, name: str) -> None:
    # With this batch, layers hold most of the memory.
    flags = f"--num-layers 8 --micro-batch-size 4 {RECOMPUTATION[name]}"
    compare(simulator, Layout("13b.yaml", 64), *flags.split())
