"""The mixture plot: a PNG that shows what it is given."""

import io

import numpy as np
import pytest

from megatron_chatflow.data.blend import Blend
from megatron_chatflow.data.plan import mixture_curve
from megatron_chatflow.data.schedule import Schedule
from megatron_chatflow.evaluation.plots import plot_mixture

image = pytest.importorskip("matplotlib.image")


def pixels(num_sources: int, sizes: dict[str, int]) -> np.ndarray:
    names = [f"s{k}" for k in range(num_sources)]
    knots = [
        {"at": 0, "weights": dict.fromkeys(names, 1)},
        {"at": 2000, "weights": {"s0": 1}, "ramp": "cosine"},
    ]
    blend = Blend(Schedule.from_dict({"knots": knots}, names, 8))
    png = plot_mixture(mixture_curve(blend, 3000), names, sizes, title="a run")
    return image.imread(io.BytesIO(png), format="png")


@pytest.mark.parametrize("num_sources", [1, 4, 40])
def test_every_source_has_its_area(num_sources: int) -> None:
    shown = pixels(num_sources, {})
    colors = {tuple(color) for color in (shown.reshape(-1, 4) * 15).round().astype(int)}
    assert len(colors) >= num_sources + 2


def test_epochs_add_a_second_plot() -> None:
    assert pixels(3, {"s1": 70}).shape[0] > pixels(3, {}).shape[0]
