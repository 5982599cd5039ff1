"""Plots as PNG files, drawn with matplotlib, which is imported only when something is drawn.

In: curves. Out: the bytes of a PNG.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_chatflow.data.plan import MixtureCurve
from megatron_chatflow.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_NAMED = 20
"""A legend of more sources than this would hide the plot."""


def plot_mixture(
    curve: MixtureCurve,
    sources: Sequence[str],
    samples_per_epoch: Mapping[str, int],
    *,
    title: str,
) -> bytes:
    """The mixture over a run: planned as areas, realised as dots, and epochs below where known.

    Args:
        curve: From `megatron_chatflow.data.plan.mixture_curve`.
        sources: Names in the curve's order.
        samples_per_epoch: By source; without any, no epochs are drawn.
        title: Stands above.

    Returns:
        A PNG.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "matplotlib: is not installed, and the plot needs it: pip install matplotlib"
        ) from error
    known = [name for name in sources if samples_per_epoch.get(name)]
    figure = Figure(figsize=(9, 6.5 if known else 4.2), layout="constrained")
    axes = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    map_name = "tab10" if len(sources) <= 10 else "turbo"
    places = np.arange(len(sources)) if len(sources) <= 10 else np.linspace(0, 1, len(sources))
    colors = [tuple(color) for color in colormaps[map_name](places)]
    _draw_shares(axes[0], curve, sources, colors)
    axes[0].set_title(title)
    if known:
        _draw_epochs(axes[1], curve, sources, samples_per_epoch, colors)
    axes[-1].set_xlabel("samples")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _draw_shares(
    axes: Axes, curve: MixtureCurve, sources: Sequence[str], colors: Sequence[tuple[float, ...]]
) -> None:
    edges = curve.edges
    middles = (edges[:-1] + edges[1:]) / 2
    bottom = np.zeros(len(middles))
    tops = np.cumsum(curve.realised, axis=1)
    for k, name in enumerate(sources):
        top = bottom + curve.planned[:, k]
        label = name if k < _NUM_NAMED else None
        axes.fill_between(
            edges,
            np.append(bottom, bottom[-1]),
            np.append(top, top[-1]),
            step="post",
            color=colors[k],
            alpha=0.55,
            linewidth=0,
            label=label,
        )
        if k + 1 < len(sources):
            axes.plot(middles, tops[:, k], ".", markersize=2, color="black")
        bottom = top
    axes.set_ylabel("share of samples\n(area: planned, dots: realised)")
    axes.set_ylim(0, 1)
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")


def _draw_epochs(
    axes: Axes,
    curve: MixtureCurve,
    sources: Sequence[str],
    samples_per_epoch: Mapping[str, int],
    colors: Sequence[tuple[float, ...]],
) -> None:
    drawn = np.cumsum(curve.realised * np.diff(curve.edges)[:, None], axis=0)
    for k, name in enumerate(sources):
        if size := samples_per_epoch.get(name):
            axes.plot(curve.edges, np.append(0, drawn[:, k]) / size, color=colors[k])
    axes.set_ylabel("epochs of the source")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
