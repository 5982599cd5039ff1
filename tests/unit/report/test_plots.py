"""Tests the images of the blend: PNG files that show the given data."""

import io
from pathlib import Path

import numpy as np
import pytest
from test_report import synthetic_records, write_run

from docs_pictures import plot_blend
from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.plan import mixture_curve
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.errors import UserError
from megatron_chatflow.report.data import read_run
from megatron_chatflow.report.plots import (
    _characters,
    plot_mixture,
    readable_labels,
)

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
    shown = (pixels(num_sources, {})[..., :3] * 255).round().astype(int)
    colors, counts = np.unique(shown.reshape(-1, 3), axis=0, return_counts=True)
    is_grey = np.ptp(colors, axis=1) < 9  # text, frames and the dots of the draws
    assert (counts[~is_grey] > 300).sum() >= num_sources


def test_epochs_add_a_second_plot() -> None:
    assert pixels(3, {"s1": 70}).shape[0] > pixels(3, {}).shape[0]


def test_a_ramp_is_no_staircase() -> None:
    """The planned line has the schedule's own points, however coarse the bins of the draws are."""
    knots = [
        {"at": 10_000, "weights": {"a": 1}},
        {"at": 50_000, "weights": {"b": 1}, "ramp": "linear"},
        {"at": 60_000, "weights": {"a": 3, "b": 1}},
        {"at": 90_000, "weights": {"b": 1}, "ramp": "cosine"},
    ]
    schedule = Schedule.from_dict({"knots": knots}, ["a", "b"], 512)
    curve = mixture_curve(Blend(schedule), 100_000, num_bins=5)
    samples = np.arange(0, 100_000, 101)
    for k in (0, 1):
        drawn = np.interp(samples, curve.points, curve.shares[:, k])
        exact = [schedule.weights_at(int(sample))[k] / 2**32 for sample in samples]
        np.testing.assert_allclose(drawn, exact, atol=1e-3)
    assert (np.diff(curve.points) >= 0).all()
    assert (curve.points == 60_000).sum() == 2  # a jump is drawn as a vertical line


def test_the_planned_line_includes_an_edit_between_knots() -> None:
    old = Blend(Schedule.from_dict({"knots": [{"at": 0, "weights": {"a": 1}}]}, ["a", "b"], 8))
    ramp = [
        {"at": 0, "weights": {"a": 1}},
        {"at": 800, "weights": {"a": 1}},
        {"at": 1600, "weights": {"b": 1}, "ramp": "linear"},
    ]
    schedule = Schedule.from_dict({"knots": ramp}, ["a", "b"], 8)
    curve = mixture_curve(Blend(schedule, old.state_at(400)), 2000)
    assert {400, 800, 1600} <= set(curve.points.tolist())


def test_a_logged_blend_has_a_colour_for_every_source(tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    run = read_run(write_run(tmp_path / "run", synthetic_records(90, names)))
    shown = image.imread(io.BytesIO(plot_blend(run)), format="png")
    assert shown.shape[1] == 1600
    for color in ("#1f77b4", "#ff7f0e", "#2ca02c"):  # the first three colours of matplotlib
        wanted = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        assert (np.abs(shown[..., :3] - wanted).max(axis=-1) < 0.01).sum() > 500
    only_held_out = [{"iteration": 1, "validation": {"one": {"loss": 1.0}}}]
    with pytest.raises(UserError, match="no sources"):
        plot_blend(read_run(write_run(tmp_path / "other", only_held_out)))


def test_names_fall_back_to_fonts_that_have_them(caplog: pytest.LogCaptureFixture) -> None:
    bold = "\N{MATHEMATICAL SANS-SERIF BOLD CAPITAL A}"  # not in matplotlib's default font
    families, labels = readable_labels(["plain", bold])
    assert labels == ["plain", bold] and families[0] == "DejaVu Sans" and len(families) > 1
    assert "Last Resort" not in "".join(families)
    unknown = "\U0010fffd"  # a private-use character, which no font has
    assert readable_labels(["plain", unknown, "x"])[1] == ["plain", "#2", "x"]
    assert "no installed font has glyphs for \U0010fffd, which is shown as #2" in caplog.text


def test_fonts_that_are_newer_than_the_list_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    character = "\N{MATHEMATICAL SANS-SERIF BOLD CAPITAL A}"
    manager = font_manager.fontManager
    family = readable_labels([character])[0][1]
    paths = [font.fname for font in manager.ttflist if font.name == family]
    first = next(path for path in paths if ord(character) in _characters(path))
    stale = [font for font in manager.ttflist if ord(character) not in _characters(font.fname)]
    monkeypatch.setattr(manager, "ttflist", stale)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [first])
    assert readable_labels([character]) == (["DejaVu Sans", family], [character])
