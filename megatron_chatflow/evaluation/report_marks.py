"""What tells curves and areas apart without colour: a shape on each curve, a hatch in each area.

In: palette indices, pixel positions. Out: SVG fragments. The first ones, which are
drawn most often, differ most.
"""

import html

import numpy as np

from megatron_chatflow.evaluation.report_data import FloatArray

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
