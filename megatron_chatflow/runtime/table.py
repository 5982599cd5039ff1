"""Formats values and plain-text tables for terminals and logs.

Columns are aligned by display width, because Chinese characters take two columns in a terminal.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence

Cell = str | int | float | None
Row = Mapping[str, Cell]

_SIGNIFICANT_DIGITS = 4


def format_cell(value: Cell) -> str:
    """Formats a value: ``1,234,567``, ``0.01234``, ``1.2e-09``, or ``-`` for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        # The format `g` would write large numbers with an exponent.
        large = abs(value) >= 10**_SIGNIFICANT_DIGITS
        return f"{value:,.0f}" if large else f"{value:.{_SIGNIFICANT_DIGITS}g}"
    return value


def display_width(text: str) -> int:
    """Returns the width of a text in a terminal: two columns for wide characters, 0 for accents."""
    return sum(_character_width(character) for character in text)


def shorten(text: str, width: int) -> str:
    """Cuts a text to ``width`` columns, with an ellipsis if it is longer."""
    if display_width(text) <= width:
        return text
    used = 0
    for end, character in enumerate(text):
        used += _character_width(character)
        if used > width - 1:
            return text[:end] + "…"
    return text


def align(
    lines: Sequence[Sequence[str]], is_left: Sequence[bool], min_widths: Sequence[int] = ()
) -> list[str]:
    """Aligns lines of cells, with two spaces between columns.

    ``is_left`` says of each column whether it is left-aligned. ``min_widths`` are the minimum
    widths; empty for none.
    """
    least = list(min_widths) or [0] * len(is_left)
    widths = [
        max(least[k], *(display_width(line[k]) for line in lines)) for k in range(len(is_left))
    ]
    return ["  ".join(map(_pad, line, widths, is_left)).rstrip() for line in lines]


def format_table(rows: Sequence[Row]) -> str:
    """Formats rows under a header, with columns in the order of their first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return ""
    cells = [[format_cell(row.get(name)) for name in columns] for row in rows]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    widths = [
        max(display_width(line[k]) for line in (columns, *cells)) for k in range(len(columns))
    ]
    rule = ["-" * width for width in widths]
    return "\n".join(align([columns, rule, *cells], is_text))


def _pad(cell: str, width: int, is_left: bool) -> str:
    space = " " * (width - display_width(cell))
    return cell + space if is_left else space + cell


def _character_width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def format_value(value: float, digits: int = 4) -> str:
    """Formats a number with significant digits: 12.35, 1.204M, 3e-05; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= unit * (10 if suffix == "K" else 1) * (1 - 1e-9):
            return f"{value / unit:.{digits}g}{suffix}".replace("-", "−")
    if size < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    if size >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def format_percent(value: float) -> str:
    """Formats a fraction as a percentage with at most one decimal."""
    return "–" if not math.isfinite(value) else f"{100 * value:.1f}".removesuffix(".0") + " %"


def format_duration(seconds: float) -> str:
    """Formats a duration in its two largest units: 8.2 s, 3 min 20 s, 5 h 2 min, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{max(seconds, 0.0):.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size:,} {unit} {whole % size // part} {below}"
    return f"{whole // 60} min {whole % 60} s"
