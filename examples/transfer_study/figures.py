"""Draws the figures of the study. All bars are two standard errors.

They are readable without color: every arm has its own marker and line style.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.transfer_study.analysis import (
    Analysis,
    Cell,
    Difference,
    Setting,
    in_order,
    name_of,
    paired,
)
from examples.transfer_study.arms import SOURCES
from examples.transfer_study.prepare import EVALUATED
from examples.transfer_study.study import Run, Study, run_budget
from megatron_chatflow.blend import Schedule
from megatron_chatflow.errors import UserError

_MIRRORED = ("dynamic", "reversed")
_STYLES: dict[str, dict[str, Any]] = {
    "dynamic": {"marker": "o", "linestyle": "-", "color": "#0072b2"},
    "reversed": {"marker": "^", "linestyle": "-.", "color": "#d55e00"},
}
CAPTIONS = {
    "differences": (
        "Final loss of the dynamic and the reversed arm minus that of the static one, in bits per "
        "byte, for each source and setting. Bars are two standard errors over seeds; a point "
        "without a bar has one seed."
    ),
    "curves": (
        "The same differences during training, on a smaller held-out text. The panels of a row "
        "share a vertical axis; the dotted line is where the constant learning rate decays."
    ),
    "arms": "Shares of the sources over a run, with the common tail where an arm was run with it.",
}


def draw_figures(analysis: Analysis, study: Study) -> dict[str, bytes]:
    """Draws all figures as PNG, by name.

    Args:
        analysis: The results.
        study: The lengths of the runs.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "matplotlib is not installed; run pip install 'megatron-chatflow[report]'"
        ) from None
    settings = [one for one in analysis.settings() if set(_MIRRORED) & set(analysis.arms(one))]
    figures: dict[str, bytes] = {}
    if settings:
        figures |= {
            "differences": _draw_differences(Figure, analysis, settings),
            "curves": _draw_curves(Figure, analysis, settings),
        }
    return {**figures, "arms": _draw_arms(Figure, analysis, study)}


def _draw_differences(make_figure: Any, analysis: Analysis, settings: Sequence[Setting]) -> bytes:
    """Draws final differences to the static arm: a panel for each source, a row per setting."""
    height = 2 * (0.9 + 0.36 * len(settings))
    figure = make_figure(figsize=(11, height), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
    names = [name_of(setting) for setting in settings]
    for axes, source in zip(panels, EVALUATED, strict=True):
        for number, arm in enumerate(_MIRRORED):
            found = {
                k + 0.25 * (number - 0.5): analysis.difference(Cell(*setting, arm), source)
                for k, setting in enumerate(settings)
            }
            shown = {place: one for place, one in found.items() if one is not None}
            axes.errorbar(
                [one.mean for one in shown.values()],
                list(shown),
                xerr=[2 * _finite(one.standard_error) for one in shown.values()],
                label=arm,
                capsize=3,
                **{**_STYLES[arm], "linestyle": "none"},
            )
        axes.axvline(0, color="black", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(source, fontsize="medium")
    panels[0].set_yticks(range(len(settings)), names)
    panels[0].set_ylim(len(settings) - 0.5, -0.5)
    for axes in panels[3:]:
        axes.set_xlabel("bits per byte minus static")
    _add_legend(figure, panels[0])
    return _png(figure)


def _draw_curves(make_figure: Any, analysis: Analysis, settings: Sequence[Setting]) -> bytes:
    """Draws differences to the static arm over the run: a row for each setting."""
    figure = make_figure(figsize=(12, 0.6 + 2.1 * len(settings)), layout="constrained")
    grid = figure.subplots(len(settings), len(SOURCES), squeeze=False, sharey="row")
    for line, setting in zip(grid, settings, strict=True):
        for axes, source in zip(line, SOURCES, strict=True):
            for arm in _MIRRORED:
                cell = Cell(*setting, arm)
                if cell not in analysis.runs:
                    continue
                tokens, found = curve_of_differences(analysis, cell, source)
                axes.errorbar(
                    tokens,
                    [one.mean for one in found],
                    yerr=[2 * _finite(one.standard_error) for one in found],
                    label=arm,
                    capsize=2,
                    **{**_STYLES[arm], "markersize": 4},
                )
                if setting[1] == "wsd":
                    axes.axvline(tokens[-2], color="gray", linewidth=0.8, linestyle=":")
            axes.axhline(0, color="black", linewidth=0.8)
        line[0].set_ylabel(name_of(setting).replace(", ", ",\n"), fontsize="small")
    for axes, source in zip(grid[0], SOURCES, strict=True):
        axes.set_title(source, fontsize="medium")
    figure.supxlabel("million tokens", fontsize="medium")
    figure.supylabel("bits per byte minus static", fontsize="medium")
    _add_legend(figure, grid[0][0])
    return _png(figure)


def curve_of_differences(
    analysis: Analysis, cell: Cell, source: str
) -> tuple[list[float], list[Difference]]:
    """Returns tokens in millions, and paired differences to the static arm at these."""
    ours = analysis.runs[cell]
    static = analysis.runs.get(analysis.reference(cell), {})
    points: dict[int, list[float]] = {}
    for pair in sorted(ours.keys() & static.keys()):
        for one, other in zip(ours[pair]["curve"], static[pair]["curve"], strict=True):
            difference = one["bits_per_byte"][source] - other["bits_per_byte"][source]
            points.setdefault(one["tokens"], []).append(difference)
    found = {tokens: paired(values) for tokens, values in sorted(points.items())}
    return [tokens / 1e6 for tokens in found], [one for one in found.values() if one is not None]


def _draw_arms(make_figure: Any, analysis: Analysis, study: Study) -> bytes:
    """Draws the shares of the sources in each arm of the first model, with a line style each."""
    model = study.models[0].name
    cells: dict[str, Cell] = {}
    for cell in analysis.runs:
        if cell.model == model and not cell.arm.startswith("random_"):
            known = cells.get(cell.arm)
            if known is None or cell.has_tail > known.has_tail:
                cells[cell.arm] = cell
    arms = in_order(cells)
    columns = -(-len(arms) // 2)
    figure = make_figure(figsize=(11, 4.8), layout="constrained")
    grid = figure.subplots(2, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, arm in zip(grid, arms, strict=False):
        entry = next(iter(analysis.runs[cells[arm]].values()))
        _draw_shares(axes, entry, study)
        axes.set_title(arm, fontsize="small")
        axes.set_ylim(-0.02, 1.02)
    for axes in grid[len(arms) :]:
        axes.set_axis_off()
    figure.supxlabel("million tokens", fontsize="medium")
    figure.supylabel("share of the samples", fontsize="medium")
    _add_legend(figure, grid[0])
    return _png(figure)


def _draw_shares(axes: Any, entry: Mapping[str, Any], study: Study) -> None:
    """Draws the weights of a run's schedule, without the iterations that close its totals."""
    budget = run_budget(Run.of(entry), study.model(entry["model"]))
    schedule = Schedule.from_dict(entry["schedule"], SOURCES, budget.samples_per_iteration)
    size = budget.samples_per_iteration
    rows = np.array([schedule.weights(t * size) for t in range(budget.iterations)], np.float64)
    rows /= rows.sum(axis=1, keepdims=True)
    # One iteration or a few of a part have other weights, so that its totals are whole numbers.
    smooth = np.stack([_running_median(row) for row in rows.T], axis=1)
    tokens = (np.arange(budget.iterations) + 0.5) * entry["tokens"] / budget.iterations / 1e6
    for name, row, style in zip(SOURCES, smooth.T, ("-", "--", ":", "-."), strict=True):
        axes.plot(tokens, row, style, label=name)


def _running_median(values: Any, reach: int = 5) -> Any:
    padded = np.pad(values, reach, mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def _add_legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without the date and version, the same results give the same file.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _finite(value: float) -> float:
    return value if np.isfinite(value) else 0.0
