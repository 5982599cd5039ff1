"""Tests that the table of predicted speeds on the LLaMA-2 page is what the prediction says."""

from pathlib import Path

import pytest

from megatron_chatflow.config import load_config
from megatron_chatflow.simulate.layout_search import TIE, plan_layout, search_layouts
from megatron_chatflow.simulate.step_time import GPUS

FOLDER = Path(__file__).parents[3] / "examples" / "llama2_7b"
VOCAB_SIZE = 40_076
NUM_GPUS = {"paper": (8,), "7b": (8, 32, 64, 256), "13b": (8, 32, 64, 256), "70b": (32, 64, 256)}
ROWS = [(name, number) for name, numbers in NUM_GPUS.items() for number in numbers]
FLAGS = {("70b", 32): ["--pipeline-model-parallel-size", "8"]}


def predicted_row(name: str, num_gpus: int) -> tuple[str, float]:
    """Returns the row of the table, and how much slower than the fastest the layout is."""
    config = load_config(FOLDER / f"{name}.yaml", FLAGS.get((name, num_gpus), []))
    planned = plan_layout(config, num_gpus, GPUS["h100"], VOCAB_SIZE)
    found = search_layouts(config, num_gpus, GPUS["h100"], VOCAB_SIZE)
    assert planned.config in [layout.config for layout in found]
    slower = planned.seconds / min(layout.seconds for layout in found) - 1
    cells = (
        f"[{name}.yaml]({name}.yaml)",
        str(num_gpus),
        planned.name,
        f"{planned.memory / 2**30:.1f}",
        f"{planned.tokens_per_second / num_gpus:,.0f}",
        f"{100 * planned.mfu:.1f}",
        f"{8e9 / planned.tokens_per_second / 86400:.2f}",
        f"{100 * slower:.1f}",
    )
    return f"| {' | '.join(cells)} |", slower


@pytest.mark.parametrize(("name", "num_gpus"), ROWS)
def test_the_page_shows_the_prediction_of_a_layout_that_ties(name: str, num_gpus: int) -> None:
    row, slower = predicted_row(name, num_gpus)
    assert slower < TIE
    assert row in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines(), row
