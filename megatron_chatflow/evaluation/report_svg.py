"""Draws line and stacked charts as inline SVG within an HTML figure.

In: curves as float64 arrays, titles, units. Out: HTML text; colours come from the page's CSS
variables, and a JSON block beside each chart feeds the page's crosshair.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_chatflow.evaluation.report_data import FloatArray
from megatron_chatflow.evaluation.report_marks import (
    area_label,
    color_class,
    hatch,
    shape,
    shapes_along,
    swatch,
)
from megatron_chatflow.evaluation.report_scale import Scale, fit, format_percent, format_value

LEFT, RIGHT, TOP, BOTTOM = 62.0, 16.0, 12.0, 46.0
MAX_BRIDGE = 30.0  # pixels: a source that is drawn now and then still makes one curve


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        label: Legend entry.
        x: float64[n], ascending.
        y: float64[n]; NaN breaks the curve.
        color: Index into the palette, or `INK`.
        faint: float64[n] drawn thin behind it (the values before smoothing), or None.
    """

    label: str
    x: FloatArray
    y: FloatArray
    color: int
    faint: FloatArray | None = None


@dataclass(frozen=True)
class Mark:
    """A labelled vertical line.

    Attributes:
        x: Where it stands.
        label: What happened there.
        kind: ``restart`` after a failure, ``planned`` after a planned end, ``edit`` of the blend.
    """

    x: float
    label: str
    kind: Literal["restart", "planned", "edit"] = "restart"


MARK_NAMES = {
    "restart": "restarted",
    "planned": "restarted as planned",
    "edit": "schedule or sources edited",
}


@dataclass(frozen=True)
class Chart:
    """What line and stacked charts share.

    Attributes:
        title: Heading.
        caption: One sentence below it: what is seen, in which unit.
        x_label: Axis label with unit.
        y_label: Axis label with unit.
        lines: The curves; of a stacked chart, the shares from bottom to top.
        planned: Stacked charts: the shares as planned, drawn as dashed boundaries.
        stacked: Whether the curves are shares on top of each other.
        from_zero: Whether the y axis begins at 0.
        log: Whether the y axis is logarithmic.
        percent: Whether values are fractions to show as percentages.
        thin: Whether curves are thin, for values that jump back and forth.
        markers: Whether each point gets a dot.
        marks: Labelled vertical lines.
        levels: y of horizontal dashed reference lines.
        wide: Whether it takes the page's full width.
    """

    title: str
    caption: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    planned: Sequence[Line] = ()
    stacked: bool = False
    from_zero: bool = False
    log: bool = False
    percent: bool = False
    thin: bool = False
    markers: bool = False
    marks: Sequence[Mark] = ()
    levels: Sequence[float] = ()
    wide: bool = False

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the picture."""
        return (1240.0, 380.0) if self.wide else (620.0, 316.0)

    def format(self, value: float) -> str:
        """A value of the y axis as text."""
        return format_percent(value) if self.percent else format_value(value)


def render(chart: Chart) -> str:
    """The chart as a `<figure>` with legend, SVG and crosshair data.

    Args:
        chart: What to draw.

    Returns:
        HTML.
    """
    width, height = chart.size
    x_scale = fit(
        [line.x for line in chart.lines], LEFT, width - RIGHT, margin=0.0 if chart.stacked else 0.01
    )
    y_scale = _y_scale(chart, height - BOTTOM, TOP)
    body = [
        _axes(chart, x_scale, y_scale),
        *(_stack(chart, x_scale, y_scale) if chart.stacked else _curves(chart, x_scale, y_scale)),
        _marks(chart, x_scale),
    ]
    cursor = (
        f'<g class="cursor" visibility="hidden"><line y1="{TOP}" y2="{height - BOTTOM}"/></g>'
        f'<rect class="hit" x="{LEFT}" y="{TOP}" width="{width - LEFT - RIGHT}"'
        f' height="{height - TOP - BOTTOM}"/>'
    )
    label = html.escape(f"{chart.title}: {chart.y_label} over {chart.x_label}", quote=True)
    classes = "chart wide" if chart.wide else "chart"
    return (
        f'<figure class="{classes}" tabindex="0"><figcaption><h3>{html.escape(chart.title)}</h3>'
        f"<p>{html.escape(chart.caption)}</p></figcaption>{_legend(chart)}"
        f'<div class="plot"><svg viewBox="0 0 {width:g} {height:g}" role="img"'
        f' aria-label="{label}">{"".join(body)}{cursor}</svg><div class="tip" hidden></div></div>'
        f'<script type="application/json">{_crosshair_data(chart, x_scale, y_scale)}</script>'
        "</figure>\n"
    )


def _y_scale(chart: Chart, begin: float, end: float) -> Scale:
    if chart.stacked:
        return Scale(0.0, 1.0, begin, end)
    curves = [line.y for line in chart.lines] + [np.array(chart.levels, dtype=np.float64)]
    # Noise behind a smoothed curve may leave the picture at its extremes, but never shapes it.
    for line in chart.lines:
        if line.faint is not None and np.isfinite(line.faint).any():
            curves.append(np.nanpercentile(line.faint, [0.5, 99.5]))
    return fit(curves, begin, end, from_zero=chart.from_zero, log=chart.log)


def _path(x: FloatArray, y: FloatArray) -> str:
    """SVG path commands of a polyline; wide gaps stay open, a lone point becomes a dot."""
    known = np.isfinite(x) & np.isfinite(y)
    xs, ys = x[known], y[known]
    jumps = np.flatnonzero(np.abs(np.diff(xs)) > max(MAX_BRIDGE, *_spacing(x))) + 1
    parts: list[str] = []
    for piece_x, piece_y in zip(np.split(xs, jumps), np.split(ys, jumps), strict=True):
        points = [f"{px:.1f} {py:.1f}" for px, py in zip(piece_x, piece_y, strict=True)]
        if points:
            parts.append("M" + "L".join(points) + ("h.1" if len(points) == 1 else ""))
    return "".join(parts)


def _spacing(x: FloatArray) -> tuple[float, ...]:
    """Distance at which points are neighbours even where all of them are known."""
    return (1.01 * float(np.abs(np.diff(x)).max()),) if len(x) > 1 else (0.0,)


def _curves(chart: Chart, x_scale: Scale, y_scale: Scale) -> list[str]:
    width, height = chart.size
    left, top = LEFT - 4, TOP - 4
    inner_width, inner_height = width - LEFT - RIGHT + 8, height - TOP - BOTTOM + 8
    out = [  # a nested picture clips what leaves the axes
        f'<svg x="{left}" y="{top}" width="{inner_width}" height="{inner_height}"'
        f' viewBox="{left} {top} {inner_width} {inner_height}">'
    ]
    for index, line in enumerate(chart.lines):
        x = x_scale.pixels(line.x)
        y = y_scale.pixels(line.y)
        out.append(f'<g class="series {color_class(line.color)}" data-series="{index}">')
        if line.faint is not None:
            out.append(f'<path class="faint" d="{_path(x, y_scale.pixels(line.faint))}"/>')
        weight = "line thin" if chart.thin else "line"
        out.append(f'<path class="{weight}" d="{_path(x, y)}"/>')
        if chart.markers:
            out += [
                shape(line.color, px, py)
                for px, py in zip(x.tolist(), y.tolist(), strict=True)
                if np.isfinite(py)
            ]
        elif len(chart.lines) > 1:
            out.append(shapes_along(line.color, x, y, index, width))
        out.append("</g>")
    return [*out, "</svg>"]


def _stack(chart: Chart, x_scale: Scale, y_scale: Scale) -> list[str]:
    """Areas of the shares, then the planned boundaries on top of them."""
    x = x_scale.pixels(chart.lines[0].x)
    lower = np.zeros(len(x))
    out: list[str] = []
    names: list[str] = []
    for index, line in enumerate(chart.lines):
        upper = np.minimum(lower + np.nan_to_num(line.y), 1.0)
        edge = _path(x, y_scale.pixels(upper))
        back = _path(x[::-1], y_scale.pixels(lower)[::-1]).replace("M", "L", 1)
        path = f"{edge}{back}Z"
        out.append(
            f'<g class="series {color_class(line.color)}" data-series="{index}">'
            f'<path class="area" d="{path}"/>{hatch(line.color, path)}</g>'
        )
        names.append(area_label(line.label, x, y_scale.pixels(lower), y_scale.pixels(upper)))
        lower = upper
    boundary = np.zeros(len(x))
    for line in chart.planned[:-1]:  # the last one's upper boundary is 100 %
        boundary = boundary + np.nan_to_num(line.y)
        path = _path(x, y_scale.pixels(boundary))
        out.append(f'<path class="plan-under" d="{path}"/><path class="plan" d="{path}"/>')
    return out + names


def _axes(chart: Chart, x_scale: Scale, y_scale: Scale) -> str:
    width, height = chart.size
    base = height - BOTTOM
    out = ['<g class="axes">']
    ticks = y_scale.ticks(5)
    for value, py in zip(ticks, y_scale.pixels(np.array(ticks)).tolist(), strict=True):
        text = format_percent(value) if chart.percent else format_value(value, 3)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
            f'<text class="ytick" x="{LEFT - 8}" y="{py + 4:.1f}">{text}</text>'
        )
    ticks = x_scale.ticks(10 if chart.wide else 6)
    for value, px in zip(ticks, x_scale.pixels(np.array(ticks)).tolist(), strict=True):
        out.append(
            f'<line class="tick" x1="{px:.1f}" x2="{px:.1f}" y1="{base}" y2="{base + 5}"/>'
            f'<text class="xtick" x="{px:.1f}" y="{base + 18}">{format_value(value)}</text>'
        )
    for level, py in zip(chart.levels, y_scale.pixels(np.array(chart.levels)), strict=True):
        kind = "zero" if level == 0 else "level"
        out.append(
            f'<line class="{kind}" x1="{LEFT}" x2="{width - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
        )
    middle = (TOP + base) / 2
    out.append(
        f'<line class="base" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>'
        f'<text class="label" x="{(LEFT + width - RIGHT) / 2}" y="{height - 8}">'
        f"{html.escape(chart.x_label)}</text>"
        f'<text class="label y" transform="translate(14 {middle}) rotate(-90)">'
        f"{html.escape(chart.y_label)}</text></g>"
    )
    return "".join(out)


def _marks(chart: Chart, x_scale: Scale) -> str:
    _, height = chart.size
    base = height - BOTTOM
    out: list[str] = []
    for mark in chart.marks:
        px = float(x_scale.pixels(np.array([mark.x]))[0])
        if not np.isfinite(px):
            continue
        # Two marks at one place stay apart: restarts at the top, edits at the bottom.
        if mark.kind == "edit":
            path = f"M{px:.1f} {base - 10}l5 5-5 5-5-5z"
        else:
            path = f"M{px - 5:.1f} {TOP - 8}h10l-5 8z"
        out.append(
            f'<g class="mark {mark.kind}"><line x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}"'
            f' y2="{base}"/><path d="{path}"/><title>{html.escape(mark.label)}</title></g>'
        )
    return "".join(out)


def _legend(chart: Chart) -> str:
    """Swatch, name and last value of every curve; a button hides or shows it."""
    items = []
    for index, line in enumerate(chart.lines):
        known = line.y[np.isfinite(line.y)]
        last = chart.format(float(known[-1])) if len(known) else "–"
        name = (
            swatch(line.color, area=chart.stacked)
            + f"<span>{html.escape(line.label)}</span> <b>{last}</b>"
        )
        if chart.stacked or len(chart.lines) == 1:
            items.append(f"<li>{name}</li>")
        else:
            items.append(
                f'<li><button type="button" data-series="{index}" aria-pressed="true"'
                f' title="hide or show">{name}</button></li>'
            )
    if chart.planned:
        items.append('<li><i class="swatch dashed"></i><span>planned</span></li>')
    shown = {mark.kind for mark in chart.marks}
    items += [
        f'<li><i class="swatch mark {kind}"></i><span>{name}</span></li>'
        for kind, name in MARK_NAMES.items()
        if kind in shown
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _crosshair_data(chart: Chart, x_scale: Scale, y_scale: Scale) -> str:
    """What the page's script needs to find the nearest point and to name its values."""
    xs: list[FloatArray] = []
    series = []
    planned = {line.label: line for line in chart.planned}
    for line in chart.lines:
        shared = [index for index, x in enumerate(xs) if x is line.x]
        if not shared:
            xs.append(line.x)
        entry = {
            "name": line.label,
            "class": color_class(line.color),
            "x": shared[0] if shared else len(xs) - 1,
            "text": [chart.format(float(value)) for value in line.y],
        }
        if line.label in planned:
            entry["plan"] = [chart.format(float(value)) for value in planned[line.label].y]
        if not chart.stacked:
            entry["y"] = _pixel_list(y_scale.pixels(line.y))
        series.append(entry)
    data = {
        "label": chart.x_label,
        "x": [_pixel_list(x_scale.pixels(x)) for x in xs],
        "at": [[format_value(value, 5) for value in x.tolist()] for x in xs],
        "series": series,
    }
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _pixel_list(pixels: FloatArray) -> list[float | None]:
    return [round(value, 1) if np.isfinite(value) else None for value in pixels.tolist()]
