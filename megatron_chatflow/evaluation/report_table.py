"""Results as a table of plain text.

In: rows by column name. Out: aligned lines; numbers stand right, with as many digits as say
something.
"""

from collections.abc import Mapping, Sequence

Cell = str | int | float | None
Row = Mapping[str, Cell]

_SIGNIFICANT_DIGITS = 4


def format_cell(value: Cell) -> str:
    """One value: ``1,234,567``, ``0.01234``, ``1.2e-09``, or ``-`` where there is none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        # `g` would write large numbers with an exponent.
        large = abs(value) >= 10**_SIGNIFICANT_DIGITS
        return f"{value:,.0f}" if large else f"{value:.{_SIGNIFICANT_DIGITS}g}"
    return value


def format_table(rows: Sequence[Row]) -> str:
    """The rows under a line of column names, columns in the order in which they first come.

    Returns:
        Lines without a newline at the end; an empty string for no rows.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not columns:
        return ""
    cells = [[format_cell(row.get(name)) for name in columns] for row in rows]
    is_text = [any(isinstance(row.get(name), str) for row in rows) for name in columns]
    lines = [columns, ["" for _ in columns], *cells]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    lines[1] = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )
