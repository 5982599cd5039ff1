"""Draws the plan of a run as a PNG image.

matplotlib is an optional dependency and is imported only when an image is drawn.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from megatron_chatflow.blend.plan import MixtureCurve
from megatron_chatflow.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

MAX_LEGEND_ENTRIES = 20
"""Maximum number of legend entries. A longer legend would leave no space for the plot."""


def plot_mixture(
    curve: MixtureCurve,
    sources: Sequence[str],
    samples_per_epoch: Mapping[str, int],
    *,
    title: str,
    unit: str = "samples",
    unit_per_sample: float = 1,
) -> bytes:
    """Draws the plan of a run as PNG: planned shares as areas, realised as dots, epochs below.

    Args:
        curve: The mixture, from `megatron_chatflow.blend.plan.mixture_curve`.
        sources: Names of the sources, in the order of the curve.
        samples_per_epoch: Samples per epoch by source. Epochs of missing sources are not drawn.
        title: Title of the image.
        unit: Unit of the horizontal axis.
        unit_per_sample: Number of units per sample.

    Raises:
        UserError: matplotlib is not installed.
    """
    import_matplotlib()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    known = [name for name in sources if samples_per_epoch.get(name)]
    families, labels = readable_labels([*sources, title])
    *labels, shown_title = labels
    figure = Figure(figsize=(9, 6.5 if known else 4.2), layout="constrained")
    axes = figure.subplots(2 if known else 1, 1, sharex=True, squeeze=False)[:, 0]
    map_name = "tab10" if len(sources) <= 10 else "turbo"
    places = np.arange(len(sources)) if len(sources) <= 10 else np.linspace(0, 1, len(sources))
    colors = [tuple(color) for color in colormaps[map_name](places)]
    points, edges = curve.points * unit_per_sample, curve.edges * unit_per_sample
    middles = (edges[:-1] + edges[1:]) / 2
    planned, realised = np.cumsum(curve.shares, axis=1), np.cumsum(curve.realised, axis=1)
    for k, label in enumerate(labels):
        below = planned[:, k] - curve.shares[:, k]
        name = label if k < MAX_LEGEND_ENTRIES else None
        style = {"color": colors[k], "alpha": 0.55, "linewidth": 0}
        axes[0].fill_between(points, below, planned[:, k], label=name, **style)
        if k + 1 < len(labels):
            axes[0].plot(middles, realised[:, k], ".", markersize=2, color="black")
    axes[0].set_title(shown_title, fontfamily=families)
    axes[0].set_ylabel("share of samples\n(area: planned, dots: realised)")
    axes[0].set_ylim(0, 1)
    axes[0].set_xlim(float(edges[0]), float(edges[-1]))
    fonts = {"family": families, "size": "small"}
    axes[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, prop=fonts)
    if known:
        for k, name in enumerate(sources):
            if size := samples_per_epoch.get(name):
                axes[1].plot(points, curve.drawn[:, k] / size, color=colors[k])
        axes[1].set_ylabel("epochs of the source")
        axes[1].set_ylim(bottom=0)
        axes[1].grid(alpha=0.3)
    axes[-1].set_xlabel(unit)
    axes[-1].xaxis.set_major_formatter(format_count)
    return to_png(figure, 130)


def import_matplotlib() -> None:
    """Raises `UserError` if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("matplotlib: is not installed; run pip install matplotlib") from error


def to_png(figure: Figure, dpi: int) -> bytes:
    """Returns a figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi)
    return png.getvalue()


def format_count(value: float, _: object = None) -> str:
    """Formats a count as in configurations: 500, 20K, 1.5B."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.10g}{suffix}"
    return f"{value:g}"


def readable_labels(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns font families that can display the texts, and the texts.

    The default font of matplotlib has no Chinese characters. If no installed font contains all
    characters of a text, the text is replaced by its number, and a warning is logged.
    """
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    missing = set(map(ord, "".join(texts))) - _characters(font_manager.findfont("DejaVu Sans"))
    if not missing:
        return families, list(texts)
    _add_new_fonts()
    # Upright and regular fonts first, because matplotlib selects the family in this style.
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
            "no installed font has glyphs for %s, which is shown as #%d; install one that has, "
            "such as Noto Sans CJK (fonts-noto-cjk)",
            *(text, number),
        )
    return families, labels


def _add_new_fonts() -> None:
    """Adds fonts that were installed after matplotlib cached its list of fonts."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            with suppress(OSError, RuntimeError, UnicodeDecodeError):  # unsupported font formats
                manager.addfont(path)


def _characters(path: str) -> set[int]:
    """Returns the code points of a font file."""
    from matplotlib import font_manager

    try:
        return set(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # the cached list of fonts may be older than the files
        return set()
