"""Chooses what is drawn of a run: mixture, losses, validation, optimiser and throughput.

In: `RunMetrics`. Out: `Chart`s for `report_svg`, each source in the same colour everywhere.

Axes: from values to pixels, round tick positions, and numbers as people write them.

In: limits of the data. Out: `Scale` objects and short labels.

What tells curves and areas apart without colour: a shape on each curve, a hatch in each area.

In: palette indices, pixel positions. Out: SVG fragments. The first ones, which are
drawn most often, differ most.

Draws line and stacked charts as inline SVG within an HTML figure.

In: curves as float64 arrays, titles, units. Out: HTML text; colours come from the page's CSS
variables, and a JSON block beside each chart feeds the page's crosshair.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_chatflow.report.data import (
    ITERATION,
    PLANNED,
    Axis,
    FloatArray,
    Restart,
    RunMetrics,
    condense,
    deviation_from_plan,
    realised_shares,
    samples_per_record,
    smooth,
    smoothing_window,
)
from megatron_chatflow.runtime.table import format_duration, format_percent, format_value


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map of [low, high] to pixels [begin, end].

    Attributes:
        low: Value at pixel `begin`.
        high: Value at pixel `end`.
        begin: Pixel of `low`.
        end: Pixel of `high`.
        log: Whether the map is logarithmic; `low` is then positive.
    """

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def pixels(self, values: FloatArray) -> FloatArray:
        """Pixels of `values` (float64[n]); NaN stays NaN, as does a value <= 0 on a log axis."""
        low, high, mapped = self.low, self.high, values
        if self.log:
            low, high = math.log10(low), math.log10(high)
            mapped = np.log10(np.where(values > 0, values, np.nan))
        return self.begin + (mapped - low) / (high - low) * (self.end - self.begin)

    def ticks(self, target: int = 5) -> list[float]:
        """About `target` round values within the limits."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = nice_step((self.high - self.low) / target)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5 or 5 x 10^k that is not below `rough`."""
    magnitude = 10.0 ** math.floor(math.log10(rough))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0):
        if factor * magnitude >= rough * (1 - 1e-9):
            return factor * magnitude
    return 10.0 * magnitude


def fit(
    curves: Iterable[FloatArray],
    begin: float,
    end: float,
    *,
    from_zero: bool = False,
    log: bool = False,
    margin: float = 0.06,
) -> Scale:
    """A scale that holds every finite value of `curves`, with a margin.

    Args:
        curves: float64 arrays, NaN for gaps.
        begin: Pixel of the lower limit.
        end: Pixel of the upper limit.
        from_zero: Begin at 0 when no value is negative.
        log: Logarithmic.
        margin: Free part of the span at each end that is not 0.

    Returns:
        The scale; [0, 1] or its like where there is nothing to hold.
    """
    values = np.concatenate([np.ravel(curve) for curve in curves] or [np.empty(0)])
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return Scale(0.1 if log else 0.0, 1.0, begin, end, log)
    low, high = float(values.min()), float(values.max())
    if log:
        spread = max((high / low) ** margin, 1.1)
        return Scale(low / spread, high * spread, begin, end, True)
    if from_zero and low >= 0:
        low = 0.0
    if high == low:
        half = abs(high) * 0.1 or 0.5
        low, high = (0.0 if from_zero and low >= 0 else low - half), high + half
    span = high - low
    lower = low if low == 0.0 and from_zero else low - margin * span
    return Scale(lower, high + margin * span, begin, end)


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the limits, with 2 and 5 between them where there are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**k for k in exponents for f in factors if low <= f * 10.0**k <= high]
        if len(ticks) >= 4:
            break
    if len(ticks) > 8:
        ticks = ticks[:: math.ceil(len(ticks) / 8)]
    return ticks


NUM_COLORS = 8
REST = -2  # colour of sources too many to tell apart
INK = -1  # colour of a curve that stands for the whole rather than for one source

# Around 0 0, about 8 pixels wide; all but the crosses are closed.
_SHAPES = (
    "M0-4a4 4 0 1 0 .01 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.8L4.6 3.4H-4.6z",
    "M0-5L5 0 0 5-5 0z",
    "M-4.2-4.2L4.2 4.2M-4.2 4.2L4.2-4.2",
    "M0 4.8L4.6-3.4H-4.6z",
    "M-5 0H5M0-5V5",
    "M-2.2-4.4h4.4l2.4 4.4-2.4 4.4h-4.4L-4.6 0z",
)
_OPEN_SHAPES = {4, 6}
# Strokes in a cell of 8 by 8 pixels; the first area stays plain.
_HATCHES = (
    "",
    "M-2 2l4-4M0 8l8-8M6 10l4-4",
    "M0 4h8",
    "M-2 6l4 4M0 0l8 8M6-2l4 4",
    "M2 2h.01M6 6h.01",
    "M4 0v8",
    "M0 4h8M4 0v8",
    "M0 8l8-8M0 0l8 8",
)
_FEWEST_PIXELS = 15.0  # of an area that its name fits into
_LONGEST_NAME = 22


def color_class(color: int) -> str:
    """CSS classes of a palette index: a colour, and from the second round on a dash pattern."""
    if color == INK:
        return "ink"
    if color == REST:
        return "rest"
    dash = min(color // NUM_COLORS, 2)
    return f"c{color % NUM_COLORS}" + (f" d{dash}" if dash else "")


def shape(color: int, x: float, y: float) -> str:
    """The shape of a palette index at a point; none for curves that stand for the whole."""
    if color < 0:
        return ""
    index = color % NUM_COLORS
    kind = "shape open" if index in _OPEN_SHAPES else "shape"
    path = f'<path class="{kind}" d="{_SHAPES[index]}"'
    return f'{path} transform="translate({x:.1f} {y:.1f})"/>'


def shapes_along(color: int, x: FloatArray, y: FloatArray, index: int, width: float) -> str:
    """Some shapes on a curve, at places where curves of other indices have none.

    Args:
        color: Palette index.
        x: float64[n], pixels, ascending.
        y: float64[n], pixels; NaN for gaps.
        index: Which of the chart's curves this is.
        width: Pixels of the picture.
    """
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if color < 0 or not len(known):
        return ""
    distance = 150.0
    begin = float(x[known[0]]) + 18 + index * 37.0 % distance
    wanted = np.arange(begin, width, distance)
    at = {int(known[np.abs(x[known] - px).argmin()]) for px in wanted if px <= x[known[-1]]}
    at = at or {int(known[-1])}
    return "".join(shape(color, float(x[k]), float(y[k])) for k in sorted(at))


def hatch_definitions() -> str:
    """The page's patterns, once a page: ``url(#hatch-3)`` fills an area with the third."""
    cells = "".join(
        f'<pattern id="hatch-{index}" width="8" height="8" patternUnits="userSpaceOnUse">'
        f'<path class="stroke" d="{path}"/></pattern>'
        for index, path in enumerate(_HATCHES)
        if path
    )
    return f'<svg class="defs" width="0" height="0" aria-hidden="true"><defs>{cells}</defs></svg>'


def hatch(color: int, path: str) -> str:
    """An area's hatch over its colour; none for the first of the palette."""
    if color < 0 or not _HATCHES[color % NUM_COLORS]:
        return ""
    return f'<path class="hatch" fill="url(#hatch-{color % NUM_COLORS})" d="{path}"/>'


def swatch(color: int, *, area: bool) -> str:
    """A piece of the curve, or of the area, for legends."""
    classes = f"swatch {color_class(color)}"
    if area:
        box = "M.5.5h21v11H.5z"
        body = f'<path class="area" d="{box}"/>{hatch(color, box)}'
    else:
        body = f'<path class="line" d="M1 6H21"/>{shape(color, 11, 6)}'
    return f'<svg class="{classes}" viewBox="0 0 22 12" aria-hidden="true">{body}</svg>'


def area_label(name: str, x: FloatArray, lower: FloatArray, upper: FloatArray) -> str:
    """A name inside its area where the area is thickest; "" where it is nowhere thick enough.

    Args:
        name: The source.
        x: float64[n], pixels, ascending.
        lower: float64[n], pixels of the area's lower boundary (the larger number).
        upper: float64[n], pixels of its upper boundary.
    """
    thickness = lower - upper
    if not np.isfinite(thickness).any():
        return ""
    text = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    # The whole width of the name has to find room, 7 pixels a letter.
    half = 3.5 * len(text) + 6
    inside = np.flatnonzero((x >= x[0] + half) & (x <= x[-1] - half))
    room = [(float(np.nanmin(thickness[np.abs(x - x[k]) <= half])), k) for k in inside.tolist()]
    if not room or max(room)[0] < _FEWEST_PIXELS:
        return ""
    at = max(room)[1]
    middle = (lower[at] + upper[at]) / 2 + 4
    return f'<text class="inside" x="{x[at]:.1f}" y="{middle:.1f}">{html.escape(text)}</text>'


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


MAX_SOURCES = 12
OTHERS = "others"
SAMPLES = "Samples consumed"
MAX_MARKS = 40


def source_colors(run: RunMetrics) -> dict[str, int]:
    """Palette index of every source that gets a curve of its own: the most drawn ones.

    Args:
        run: The run.

    Returns:
        At most `MAX_SOURCES` sources, in the order of the log.
    """
    names = list(run.sources) or list(run.validation)
    if len(names) > MAX_SOURCES and run.sources:
        steps, shares = samples_per_record(run), realised_shares(run)
        drawn = {name: np.nansum(shares[name] * steps) for name in names}
        most = set(sorted(names, key=lambda name: -drawn[name])[:MAX_SOURCES])
        names = [name for name in names if name in most]
    return {name: color for color, name in enumerate(names[:MAX_SOURCES])}


def blend_charts(run: RunMetrics) -> list[Chart]:
    """Planned against realised mixture, the deviation from the plan, epochs per source."""
    if not run.sources:
        return []
    samples, tokens = Axis.of(run, "consumed_samples", SAMPLES), Axis.of(run)
    charts: list[Chart] = []
    if len(run.sources) > 1:  # of a single source there is nothing to mix
        charts = [_mixture(run, samples), *_deviation(run, samples)]
    epochs = _per_source(run, run.sources, tokens.x, "epochs")
    if epochs:
        charts.append(
            Chart(
                "Epochs per source",
                "How often each source has been read so far.",
                tokens.label,
                "Epochs",
                epochs,
                from_zero=True,
                marks=marks(run, tokens),
                wide=len(charts) != 2,  # alone in its row
            )
        )
    return charts


def loss_charts(run: RunMetrics) -> list[Chart]:
    """Training loss, per source and over all."""
    axis = Axis.of(run)
    lines = [
        smoothed(name, axis.x, run.sources[name]["loss"], color)
        for name, color in source_colors(run).items()
        if name in run.sources
    ]
    if len(lines) != 1 and np.isfinite(run.columns["lm_loss"]).any():
        lines.append(smoothed("all sources", axis.x, run.columns["lm_loss"], INK))
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return []
    return [
        Chart(
            "Training loss per source",
            _smoothing_note(len(axis.x)),
            axis.label,
            "Loss (nats per token)",
            lines,
            marks=marks(run, axis),
            wide=True,
        )
    ]


def validation_charts(run: RunMetrics) -> list[Chart]:
    """Validation loss and bits per byte of each source."""
    charts = []
    axis = Axis.of(run)
    x = axis.at(run.validation_iteration)
    for field, title, caption, unit in (
        ("loss", "Validation loss", "On held-out documents.", "Loss (nats per token)"),
        (
            "bits_per_byte",
            "Validation bits per byte",
            "On held-out documents; comparable between vocabularies.",
            "Bits per byte of text",
        ),
    ):
        lines = _per_source(run, run.validation, x, field)
        if lines:
            charts.append(
                Chart(
                    title,
                    caption,
                    axis.label,
                    unit,
                    lines,
                    markers=len(lines[0].x) <= 60,
                    marks=marks(run, axis),
                )
            )
    return charts


def optimizer_charts(run: RunMetrics) -> list[Chart]:
    """Learning rate, gradient norm, throughput and what the step waited for."""
    axis = Axis(ITERATION, run.iteration, run.iteration)
    restarts = marks(run, axis)
    charts = []
    learning_rate = run.columns["learning_rate"]
    if np.isfinite(learning_rate).any():
        line = Line("learning rate", *condense(axis.x, learning_rate, "last"), color=0)
        charts.append(
            Chart(
                "Learning rate",
                "As the optimizer used it.",
                axis.label,
                "Learning rate",
                [line],
                from_zero=True,
                marks=restarts,
            )
        )
    norm = run.columns["grad_norm"]
    known = norm[np.isfinite(norm) & (norm > 0)]
    if len(known):
        log = bool(known.max() > 30 * np.median(known))
        charts.append(
            Chart(
                "Gradient norm",
                "Before clipping. " + _smoothing_note(len(axis.x)),
                axis.label,
                "Norm (logarithmic)" if log else "Norm",
                [smoothed("gradient norm", axis.x, norm, 1)],
                from_zero=not log,
                log=log,
                marks=restarts,
            )
        )
    return charts + _speed_charts(run, axis, restarts)


def _speed_charts(run: RunMetrics, axis: Axis, restarts: list[Mark]) -> list[Chart]:
    note = _smoothing_note(len(axis.x))
    charts = []
    if np.isfinite(run.columns["tokens_per_second"]).any():
        line = smoothed("tokens per second", axis.x, run.columns["tokens_per_second"], 2)
        charts.append(
            Chart(
                "Throughput",
                "All ranks together. " + note,
                axis.label,
                "Tokens per second",
                [line],
                from_zero=True,
                marks=restarts,
                wide=True,
            )
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        wait = run.columns["data_seconds"] / run.columns["seconds"]
    if np.isfinite(wait).any():
        charts[-1:] = [replace(chart, wide=False) for chart in charts[-1:]]
        charts.append(
            Chart(
                "Waiting for data",
                "Part of the step in which the reporting rank had no batch. " + note,
                axis.label,
                "Part of the step",
                [smoothed("waiting", axis.x, wait, 3)],
                from_zero=True,
                percent=True,
                marks=restarts,
                wide=not charts,
            )
        )
    return charts


def _mixture(run: RunMetrics, axis: Axis) -> Chart:
    """Realised shares as areas, planned ones as dashed boundaries."""
    colors = source_colors(run)
    steps = samples_per_record(run)
    realised_all = realised_shares(run)
    shares = {name: realised_all[name] for name in colors}
    plans = {name: run.sources[name]["weight"] for name in colors}
    rest = [name for name in run.sources if name not in colors]
    if rest:
        colors[OTHERS] = REST
        shares[OTHERS] = np.nansum([realised_all[name] for name in rest], axis=0)
        plans[OTHERS] = np.nansum([run.sources[name]["weight"] for name in rest], axis=0)
    realised, planned = [], []
    consumed = axis.x
    x, _ = condense(consumed, consumed, "last")  # one array, so that all curves share it
    for name, color in colors.items():
        _, share = condense(consumed, np.nan_to_num(shares[name]))
        _, plan = condense(consumed, np.nan_to_num(plans[name]))
        realised.append(Line(name, x, smooth(share, smoothing_window(len(share))), color))
        planned.append(Line(name, x, plan, color))
    num_mean = max(1, round(smoothing_window(len(x)) * len(consumed) / max(len(x), 1)))
    note = f", as means over {num_mean} logged iterations" if num_mean > 1 else ""
    batch = f" ({np.nanmedian(steps):,.0f} samples each)" if len(steps) else ""
    return Chart(
        "Mixture: planned against realised",
        f"Areas: share of the samples drawn{note}{batch}; dashed: the schedule's weights.",
        axis.label,
        "Share of samples",
        realised,
        planned=planned,
        stacked=True,
        percent=True,
        marks=marks(run, axis),
        wide=True,
    )


def _deviation(run: RunMetrics, axis: Axis) -> list[Chart]:
    """How far the draws are from the plan, where the log tells."""
    deviation = deviation_from_plan(run)
    if not deviation:
        return []
    every = np.array(list(deviation.values()))
    x, excess = condense(axis.x, every.max(axis=0), "extreme")
    _, shortfall = condense(axis.x, every.min(axis=0), "extreme")
    return [
        Chart(
            "Draws minus plan",
            "Samples of a source drawn so far less the sum of its weights, for the source that "
            "is farthest off. An exact blend never reaches one whole sample.",
            axis.label,
            "Deviation (samples)",
            [
                Line("largest excess", x, excess, color=0),
                Line("largest shortfall", x, shortfall, color=1),
            ],
            thin=True,
            levels=(-1.0, 0.0, 1.0),
            marks=marks(run, axis),
        )
    ]


def _per_source(
    run: RunMetrics, blocks: Mapping[str, Mapping[str, FloatArray]], x: FloatArray, field: str
) -> list[Line]:
    """One unsmoothed line per source that has values of `field`, all over the same x."""
    lines = []
    shared, _ = condense(x, x, "last")
    for name, color in source_colors(run).items():
        if name in blocks and np.isfinite(blocks[name][field]).any():
            lines.append(Line(name, shared, condense(x, blocks[name][field], "last")[1], color))
    return lines


def smoothed(label: str, x: FloatArray, y: FloatArray, color: int) -> Line:
    """A moving mean in bold with the values themselves behind it."""
    few_x, few_y = condense(x, y)
    window = smoothing_window(len(few_x))
    faint = few_y if window > 1 else None
    return Line(label, few_x, smooth(few_y, window), color, faint)


def _smoothing_note(num_records: int) -> str:
    num_drawn = len(condense(np.zeros(num_records), np.zeros(num_records), "last")[0])
    window = smoothing_window(num_drawn)
    if window == 1:
        return "Every logged iteration."
    num_mean = round(window * num_records / num_drawn)
    thin = "logged values" if num_drawn == num_records else "means of neighbours"
    return f"Bold: mean over {num_mean} logged iterations; thin: {thin}."


def marks(run: RunMetrics, axis: Axis) -> list[Mark]:
    """Where the run was restarted and its blend edited; what happened at one place is one mark."""
    at: dict[int, list[Restart]] = {}
    for restart in run.restarts:
        at.setdefault(restart.iteration, []).append(restart)
    # A run that was restarted hundreds of times shows those that cost the most.
    cost = {k: sum(np.nan_to_num(one.seconds_lost) for one in some) for k, some in at.items()}
    shown = sorted(sorted(at, key=lambda k: -cost[k])[:MAX_MARKS])
    found = [
        Mark(
            iteration,
            f"{describe_restarts(at[iteration])} at iteration {iteration:,}",
            "planned" if all(one.is_planned for one in at[iteration]) else "restart",
        )
        for iteration in shown
    ]
    edits = blend_edits(run)
    found += [
        Mark(iteration, f"{', '.join(edits[iteration])} at iteration {iteration:,}", "edit")
        for iteration in sorted(edits)[:MAX_MARKS]
    ]
    places = axis.at(np.array([mark.x for mark in found], dtype=np.float64))
    return [replace(mark, x=place) for mark, place in zip(found, places.tolist(), strict=True)]


def blend_edits(run: RunMetrics) -> dict[int, list[str]]:
    """What changed of schedule and sources, by the iteration after which it did.

    A source that first appears in the middle of the log was added, even if no record says so.
    """
    edits: dict[int, list[str]] = {}
    for restart in run.restarts:
        if restart.changes:
            known = edits.setdefault(restart.iteration, [])
            known += [change for change in restart.changes if change not in known]
    told = {change for changes in edits.values() for change in changes}
    for name, block in run.sources.items():
        first = np.flatnonzero(np.isfinite(block["weight"]))[:1].tolist()
        change = f"source {name} added"
        if first and first[0] > 0 and change not in told:
            edits.setdefault(int(run.iteration[first[0] - 1]), []).append(change)
    return edits


def describe_restarts(restarts: Sequence[Restart]) -> str:
    """How many there were, after what, and what failures have cost."""
    planned = [one for one in restarts if one.is_planned]
    others = [one for one in restarts if not one.is_planned]
    parts = []
    if others:
        count = len(others)
        lost = [one.seconds_lost for one in others if np.isfinite(one.seconds_lost)]
        cost = f" ({format_duration(sum(lost))} lost)" if lost else ""
        after = ""
        if all(one.cause == "failed" for one in others):
            after = " after failures" if count > 1 else " after a failure"
        parts.append(f"{count} restart{'s' if count > 1 else ''}{after}{cost}")
    if planned:
        causes = list(dict.fromkeys(PLANNED[one.cause] for one in planned))
        count = len(planned)
        parts.append(f"{count} planned restart{'s' if count > 1 else ''} ({', '.join(causes)})")
    return ", ".join(parts)
