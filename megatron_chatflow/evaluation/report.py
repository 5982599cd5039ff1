"""One HTML page on one or several runs, readable offline.

In: run folders. Out: a self-contained page: inline SVG, CSS and a little script, nothing loaded
from anywhere.
"""

import contextlib
import html
import os
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation import report_charts, report_tables
from megatron_chatflow.evaluation.report_data import RunMetrics, read_run
from megatron_chatflow.evaluation.report_style import SCRIPT, STYLE
from megatron_chatflow.evaluation.report_svg import Chart, render


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
    page = build_page(runs, datetime.now(timezone.utc))
    partial = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {output}: {error.strerror}: name another --output") from None
    return runs


def build_page(runs: Sequence[RunMetrics], now: datetime) -> str:
    """The whole page.

    Args:
        runs: At least one run.
        now: The time that the footer names.

    Returns:
        HTML.
    """
    title = " and ".join(run.name for run in runs)
    body = [_comparison(runs)] if len(runs) > 1 else []
    body += [_article(run, f"run-{index}") for index, run in enumerate(runs)]
    torn = sum(run.num_unreadable_lines for run in runs)
    note = f" {torn} unreadable line{'s' if torn > 1 else ''} passed over." if torn else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)} – training report</title>"
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><main>\n'
        + "\n".join(body)
        + f"\n<footer>megatron_chatflow · {now:%Y-%m-%d %H:%M} UTC.{note} Point at a chart, or"
        " focus it and use the arrow keys, to read its values.</footer>\n</main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _comparison(runs: Sequence[RunMetrics]) -> str:
    links = "".join(
        f'<a href="#run-{index}">{html.escape(run.name)}</a>' for index, run in enumerate(runs)
    )
    return (
        f"<article><h1>{len(runs)} runs</h1><p class='lead'>Side by side, then one by one.</p>"
        f"<nav>{links}</nav>{_grid(report_charts.comparison_charts(runs))}"
        f"{report_tables.comparison_table(runs)}</article>"
    )


def _article(run: RunMetrics, anchor: str) -> str:
    sections = [
        ("Blend", _grid(report_charts.blend_charts(run)) + report_tables.sources_table(run)),
        ("Loss", _grid(report_charts.loss_charts(run))),
        (
            "Validation",
            report_tables.validation_table(run) + _grid(report_charts.validation_charts(run)),
        ),
        ("Optimizer and throughput", _grid(report_charts.optimizer_charts(run))),
    ]
    body = "".join(f"<section><h2>{name}</h2>{text}</section>\n" for name, text in sections if text)
    state = ""
    done = report_tables.progress(run)
    if done is not None:
        state = "finished" if done >= 1 else "running or stopped"
    parts = [part for part in (report_tables.lead(run), state, _resumes(run)) if part]
    config = ""
    if run.config_text:
        config = (
            f"<details><summary>Resolved configuration</summary><pre>"
            f"{_highlight(run.config_text)}</pre></details>"
        )
    return (
        f'<article id="{anchor}"><h1>{html.escape(run.name)}</h1>'
        f'<p class="lead">{" · ".join(parts)}</p>{report_tables.tiles(run)}\n'
        f"{body}{config}</article>"
    )


def _resumes(run: RunMetrics) -> str:
    if not run.resumed_at:
        return ""
    return "resumed at iteration " + ", ".join(f"{at:,}" for at in run.resumed_at)


def _grid(charts: Sequence[Chart]) -> str:
    """Charts two abreast; charts without a point on their x axis are left out."""
    drawn = [chart for chart in charts if any(np.isfinite(line.x).any() for line in chart.lines)]
    return f'<div class="charts">{"".join(render(chart) for chart in drawn)}</div>' if drawn else ""


def _highlight(text: str) -> str:
    """YAML with its keys marked."""
    return re.sub(
        r"(?m)^(\s*(?:- )?)([\w.\-]+)(?=:)", r'\1<span class="key">\2</span>', html.escape(text)
    )
