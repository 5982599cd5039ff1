"""Tests that the examples' configurations are valid for their numbers of processes."""

from pathlib import Path

import pytest

from megatron_chatflow.config import load_config, validate_for_world
from megatron_chatflow.config.memory import estimate_memory

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "smallest", "largest"), [("7b", 8, 256), ("13b", 8, 256), ("70b", 64, 256)]
)
def test_llama2_layouts_fit_their_gpus(name: str, smallest: int, largest: int) -> None:
    config = load_config(EXAMPLES / "llama2_7b" / f"{name}.yaml")
    for world_size in (smallest, largest):
        validate_for_world(config, world_size)
        memory = estimate_memory(config, 40076, world_size)
        assert memory.total < 72 * 2**30, f"{memory} leaves too little of 80 GB to the libraries"


@pytest.mark.parametrize(
    "name", ["tiny_cpu/foundation", "tiny_cpu/chatflow", "smollm2_zh/chatflow"]
)
def test_the_demos_run_on_two_processes(name: str) -> None:
    validate_for_world(load_config(EXAMPLES / f"{name}.yaml"), 2)
