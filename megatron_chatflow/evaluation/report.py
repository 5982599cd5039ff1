"""One HTML page on one or several runs, readable offline.

In: run folders. Out: a self-contained page: inline SVG, CSS and a little script, nothing loaded
from anywhere.
"""

import html
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from megatron_chatflow.evaluation import report_charts, report_tables
from megatron_chatflow.evaluation.report_compare import comparison_charts, run_names
from megatron_chatflow.evaluation.report_data import RunMetrics, read_run
from megatron_chatflow.evaluation.report_marks import hatch_definitions
from megatron_chatflow.evaluation.report_scale import format_duration
from megatron_chatflow.evaluation.report_style import SCRIPT, STYLE
from megatron_chatflow.evaluation.report_svg import Chart, render
from megatron_chatflow.files import write_output_file

_STATES = {
    "running": "running or killed",
    "exit_interval": "left at its exit interval",
    "stop_requested": "stopped as asked",
    "failed": "failed",
}


def write_report(folders: Sequence[Path], output: Path) -> list[RunMetrics]:
    """Reads the runs and writes the page.

    Args:
        folders: Run folders, in the order in which they are shown.
        output: The page; replaced in one step when it is complete.

    Returns:
        What was read.

    Raises:
        UserError: If a folder is no run, or the page cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    write_page(runs, output)
    return runs


def write_page(
    runs: Sequence[RunMetrics], output: Path, refresh_seconds: float | None = None
) -> None:
    """Writes the page of runs that were read.

    Args:
        runs: At least one.
        output: The page; replaced in one step when it is complete.
        refresh_seconds: After how long a browser loads it anew; never if None.

    Raises:
        UserError: If it cannot be written.
    """
    page = build_page(runs, datetime.now(timezone.utc), refresh_seconds)
    # A folder's name may hold bytes that are no UTF-8.
    write_output_file(output, page.encode("utf-8", errors="replace"))


def build_page(
    runs: Sequence[RunMetrics], now: datetime, refresh_seconds: float | None = None
) -> str:
    """The whole page.

    Args:
        runs: At least one run.
        now: The time that the footer names.
        refresh_seconds: After how long a browser loads it anew; never if None.

    Returns:
        HTML.
    """
    names = run_names(runs)
    title = " and ".join(names)
    body = [_comparison(runs, names)] if len(runs) > 1 else []
    body += [
        _article(run, name, f"run-{index}", now)
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    torn = sum(run.num_unreadable_lines for run in runs)
    note = f" {torn} unreadable line{'s' if torn > 1 else ''} passed over." if torn else ""
    refresh = ""
    if refresh_seconds is not None:
        refresh = f'<meta http-equiv="refresh" content="{max(1, round(refresh_seconds))}">'
        note += f" The page loads itself anew every {format_duration(refresh_seconds)}."
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{refresh}<title>{html.escape(title)} – training report</title>"
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>'
        f"{hatch_definitions()}<main>\n"
        + "\n".join(body)
        + f"\n<footer>megatron_chatflow · {now:%Y-%m-%d %H:%M} UTC.{note} Point at a chart, or"
        " focus it and use the arrow keys, to read its values.</footer>\n</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _comparison(runs: Sequence[RunMetrics], names: Sequence[str]) -> str:
    links = "".join(
        f'<a href="#run-{index}">{html.escape(name)}</a>' for index, name in enumerate(names)
    )
    return (
        f'<article id="runs"><h1>{len(runs)} runs</h1>'
        '<p class="lead">Over each other, then one by one.</p>'
        f"<nav>{links}</nav>{_grid(comparison_charts(runs))}"
        f"{report_tables.comparison_table(runs, names)}</article>"
    )


def _article(run: RunMetrics, name: str, anchor: str, now: datetime) -> str:
    sections = [
        ("Blend", _grid(report_charts.blend_charts(run)) + report_tables.sources_table(run)),
        ("Loss", _grid(report_charts.loss_charts(run))),
        (
            "Validation",
            report_tables.validation_table(run) + _grid(report_charts.validation_charts(run)),
        ),
        ("Optimizer and throughput", _grid(report_charts.optimizer_charts(run))),
        ("Restarts", report_tables.restarts_table(run)),
    ]
    body = "".join(f"<section><h2>{head}</h2>{text}</section>\n" for head, text in sections if text)
    parts = [part for part in (report_tables.lead(run), _state(run, now)) if part]
    config = ""
    if run.config_text:
        config = (
            f"<details><summary>Resolved configuration</summary><pre>"
            f"{_highlight(run.config_text)}</pre></details>"
        )
    return (
        f'<article id="{anchor}"><h1>{html.escape(name)}</h1>'
        f'<p class="lead">{" · ".join(parts)}</p>{report_tables.tiles(run)}\n'
        f"{body}{config}</article>"
    )


def _state(run: RunMetrics, now: datetime) -> str:
    """How the run stands, and since when."""
    parts = []
    done = report_tables.progress(run)
    if done is not None and done >= 1:
        parts.append("finished")
    elif done is not None:
        logged = run.columns["time"][-1:]
        age = now.timestamp() - float(logged[0]) if len(logged) else float("nan")
        ago = f", last logged {format_duration(age)} ago" if age >= 0 else ""
        parts.append(f"{_STATES.get(run.status, 'running or stopped')}{ago}")
    if run.restarts:
        parts.append(report_charts.describe_restarts(run.restarts))
    return " · ".join(parts)


def _grid(charts: Sequence[Chart]) -> str:
    """Charts two abreast; charts without a point on their x axis are left out."""
    drawn = [chart for chart in charts if any(np.isfinite(line.x).any() for line in chart.lines)]
    return f'<div class="charts">{"".join(render(chart) for chart in drawn)}</div>' if drawn else ""


def _highlight(text: str) -> str:
    """YAML with its keys marked."""
    return re.sub(
        r"(?m)^(\s*(?:- )?)([\w.\-]+)(?=:)", r'\1<span class="key">\2</span>', html.escape(text)
    )
