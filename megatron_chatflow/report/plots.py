"""Plots as PNG files, drawn with matplotlib, which is imported only when something is drawn."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_chatflow.blend.plan import MixtureCurve
from megatron_chatflow.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

_NUM_NAMED = 20
"""A legend of more sources than this would hide the plot."""


def plot_mixture(
    curve: MixtureCurve,
    sources: Sequence[str],
    samples_per_epoch: Mapping[str, int],
    *,
    title: str,
    unit: str = "samples",
    unit_per_sample: float = 1,
) -> bytes:
    """Draws the mixture over a run: planned as areas, realised as dots, epochs below where known.

    Args:
        curve: From `megatron_chatflow.blend.plan.mixture_curve`.
        sources: Names in the curve's order.
        samples_per_epoch: By source; without any, no epochs are drawn.
        title: Stands above.
        unit: What the horizontal axis counts.
        unit_per_sample: How many of them a sample is.

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
    families, labels = _readable_labels([*sources, title])
    *labels, shown_title = labels
    figure = Figure(figsize=(9, 6.5 if known else 4.2), layout="constrained")
    axes = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    map_name = "tab10" if len(sources) <= 10 else "turbo"
    places = np.arange(len(sources)) if len(sources) <= 10 else np.linspace(0, 1, len(sources))
    colors = [tuple(color) for color in colormaps[map_name](places)]
    _draw_shares(axes[0], curve, labels, colors, families, unit_per_sample)
    axes[0].set_title(shown_title, fontfamily=families)
    if known:
        _draw_epochs(axes[1], curve, sources, samples_per_epoch, colors, unit_per_sample)
    axes[-1].set_xlabel(unit)
    axes[-1].xaxis.set_major_formatter(_format_count)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png.getvalue()


def _format_count(value: float, _: object = None) -> str:
    """A count as configurations write it: 500, 20K, 1.5B."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.10g}{suffix}"
    return f"{value:g}"


def _readable_labels(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Font families that show the texts, and the texts as they can be shown.

    matplotlib's own font has no Chinese. Where no installed font has a character either, the text
    is replaced by its number and a warning names it.
    """
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    missing = set(map(ord, "".join(texts))) - _characters(font_manager.findfont("DejaVu Sans"))
    if not missing:
        return families, list(texts)
    # Upright and regular fonts first: matplotlib asks for the family in this style.
    fonts = [font for font in font_manager.fontManager.ttflist if "Last Resort" not in font.name]
    fonts.sort(key=lambda font: (font.style != "normal", str(font.weight) not in ("400", "normal")))
    for font in fonts:
        if missing and (found := missing & _characters(font.fname)):
            families.append(font.name)
            missing -= found
    labels = []
    for number, text in enumerate(texts, 1):
        if missing.isdisjoint(map(ord, text)):
            labels.append(text)
            continue
        labels.append(f"#{number}")
        logger.warning(
            "no installed font shows %s, which is drawn as #%d; install one that does, such as "
            "Noto Sans CJK (fonts-noto-cjk)",
            *(text, number),
        )
    return families, labels


def _characters(path: str) -> set[int]:
    """The code points that a font file has."""
    from matplotlib import font_manager

    try:
        return set(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # the cached list of fonts may be older than the files
        return set()


def _draw_shares(
    axes: Axes,
    curve: MixtureCurve,
    labels: Sequence[str],
    colors: Sequence[tuple[float, ...]],
    families: list[str],
    unit_per_sample: float,
) -> None:
    points, edges = curve.points * unit_per_sample, curve.edges * unit_per_sample
    middles = (edges[:-1] + edges[1:]) / 2
    bottom = np.zeros(len(points))
    tops = np.cumsum(curve.realised, axis=1)
    for k, label in enumerate(labels):
        top = bottom + curve.shares[:, k]
        axes.fill_between(
            points,
            bottom,
            top,
            color=colors[k],
            alpha=0.55,
            linewidth=0,
            label=label if k < _NUM_NAMED else None,
        )
        if k + 1 < len(labels):
            axes.plot(middles, tops[:, k], ".", markersize=2, color="black")
        bottom = top
    axes.set_ylabel("share of samples\n(area: planned, dots: realised)")
    axes.set_ylim(0, 1)
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        prop={"family": families, "size": "small"},
    )


def _draw_epochs(
    axes: Axes,
    curve: MixtureCurve,
    sources: Sequence[str],
    samples_per_epoch: Mapping[str, int],
    colors: Sequence[tuple[float, ...]],
    unit_per_sample: float,
) -> None:
    points = curve.points * unit_per_sample
    for k, name in enumerate(sources):
        if size := samples_per_epoch.get(name):
            axes.plot(points, curve.drawn[:, k] / size, color=colors[k])
    axes.set_ylabel("epochs of the source")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
