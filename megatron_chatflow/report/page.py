"""Writes a self-contained HTML page about one or several runs.

The page contains plotly.js, the data of its charts, tables and styles. Its content security policy
prevents the browser from loading anything else. All text from files is escaped. `follow_runs`
rewrites the page while runs are in progress, and the browser reloads it.
"""

import html
import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file
from megatron_chatflow.report.charts import (
    Chart,
    blend_charts,
    comparison_charts,
    describe_restarts,
    loss_charts,
    optimizer_charts,
    probe_charts,
    validation_charts,
)
from megatron_chatflow.report.data import (
    PLANNED_CAUSES,
    FloatArray,
    RunMetrics,
    RunReader,
    last_value,
    median,
    read_run,
    realised_shares,
    samples_per_record,
)
from megatron_chatflow.runtime.table import format_duration, format_percent, format_value

MAX_RESTARTS = 50
"""Maximum number of rows in the table of restarts."""
STATES = {
    "running": "running or killed",
    "exit_interval": "exited at its exit interval",
    "stop_requested": "stopped on request",
    "failed": "failed",
}
STYLE, SCRIPT = (
    Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
)
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def write_report(folders: Sequence[Path], output: Path) -> list[RunMetrics]:
    """Reads runs and writes their page, in the order of the folders."""
    runs = [read_run(folder) for folder in folders]
    write_page(runs, output)
    return runs


def follow_runs(
    folders: Sequence[Path],
    output: Path,
    interval: float,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> list[RunMetrics]:
    """Writes the page every ``interval`` seconds until every run is finished or Ctrl-C is pressed.

    Folders without a logged iteration are read again until they have one. ``say`` is called with a
    line of text when the state changes, and ``sleep`` between two pages.

    Raises:
        UserError: A page cannot be written, or Ctrl-C was pressed before anything was logged.
    """
    readers = [RunReader(folder) for folder in folders]
    runs: list[RunMetrics] = []
    shown = ""
    try:
        while True:
            try:
                runs = [reader.read() for reader in readers]
                is_over = all((run.progress or 0.0) >= 1 for run in runs)
                write_page(runs, output, None if is_over else interval)
                state = ", ".join(f"{run.name}: iteration {run.last_iteration:,}" for run in runs)
                if is_over:
                    return runs
            except UserError as error:
                if runs:
                    raise
                state = f"waiting: {error}"
            if state != shown:
                say(state)
            shown = state
            sleep(interval)
    except KeyboardInterrupt:
        runs = [reader.read() for reader in readers]
        write_page(runs, output)
        return runs


def write_page(
    runs: Sequence[RunMetrics], output: Path, refresh_seconds: float | None = None
) -> None:
    """Writes the page of runs; see `build_page`."""
    page = build_page(runs, datetime.now(timezone.utc), refresh_seconds)
    # The name of a folder may contain bytes that are not UTF-8.
    write_output_file(output, page.encode("utf-8", errors="replace"))


def build_page(
    runs: Sequence[RunMetrics], now: datetime, refresh_seconds: float | None = None
) -> str:
    """Builds the HTML of at least one run; the footer shows the time ``now``.

    Browsers reload the page every ``refresh_seconds``; None for never.

    Raises:
        UserError: plotly is not installed.
    """
    names = run_names(runs)
    articles = [
        _article(run, name, f"run-{index}", now)
        for index, (run, name) in enumerate(zip(runs, names, strict=True))
    ]
    if len(runs) > 1:
        articles.insert(0, _comparison(runs, names))
    num_unreadable = sum(run.num_unreadable_lines for run in runs)
    notes = [f"megatron_chatflow · {now:%Y-%m-%d %H:%M} UTC."]
    if num_unreadable:
        notes.append(f"{num_unreadable} unreadable line{'s' * (num_unreadable > 1)} skipped.")
    refresh = ""
    if refresh_seconds is not None:
        refresh = f'<meta http-equiv="refresh" content="{max(1, round(refresh_seconds))}">'
        notes.append(f"The page reloads every {format_duration(refresh_seconds)}.")
    notes.append(
        "Point at a chart, or focus it and press the arrow keys, to read its values. Drag to zoom, "
        "double-click to zoom out; a click on a legend's entry hides its curve."
    )
    title = f"{' and '.join(names)} – training report"
    return html_page(title, articles, " ".join(notes), refresh)


def html_page(title: str, articles: Sequence[str], footer: str, head: str = "") -> str:
    """Builds a self-contained page of HTML articles with charts.

    Raises:
        UserError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("plotly: is not installed; run pip install plotly") from error
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{head}<title>{html.escape(title)}</title>"
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body><main>\n'
        + "\n".join(articles)
        + f"\n<footer>{footer}</footer>\n<noscript>The charts need JavaScript, which is "
        "included in this "
        f"file.</noscript>\n</main><script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script></body></html>\n"
    )


def run_names(runs: Sequence[RunMetrics]) -> list[str]:
    """Returns a unique name for each run.

    The name is the folder's name, with the parent folder's name or a number if necessary.
    """
    names = [run.name for run in runs]
    longer = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    names = [
        long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)
    ]
    return [f"{name} ({k})" if names.count(name) > 1 else name for k, name in enumerate(names, 1)]


def _comparison(runs: Sequence[RunMetrics], names: Sequence[str]) -> str:
    """Builds the comparison: common charts of all runs, and the last bits per byte by source."""
    links = [f'<a href="#run-{k}">{html.escape(name)}</a>' for k, name in enumerate(names)]
    validated = {
        name: run for name, run in zip(names, runs, strict=True) if len(run.validation_iteration)
    }
    rows = [
        [html.escape(source)]
        + [
            format_value(last_value(run.validation[source]["bits_per_byte"]))
            if source in run.validation
            else "–"
            for run in validated.values()
        ]
        for source in dict.fromkeys(name for run in validated.values() for name in run.validation)
    ]
    caption = "Last validation of every run in bits per byte. Lower is better."
    return (
        f'<article id="runs"><h1>{len(runs)} runs</h1><p class="lead">All runs in common charts, '
        f"then each run.</p><nav>{''.join(links)}</nav>{chart_grid(comparison_charts(runs, names))}"
        f"{html_table(caption, ['Source', *validated], rows)}</article>"
    )


def _article(run: RunMetrics, name: str, anchor: str, now: datetime) -> str:
    sections = [
        ("Blend", chart_grid(blend_charts(run)) + _sources_table(run)),
        ("Loss", chart_grid(loss_charts(run))),
        ("Validation", _validation_table(run) + chart_grid(validation_charts(run))),
        ("Probes of transfer", _probe_table(run) + chart_grid(probe_charts(run))),
        ("Optimizer and throughput", chart_grid(optimizer_charts(run))),
        ("Restarts", _restarts_table(run)),
    ]
    body = "".join(f"<section><h2>{head}</h2>{text}</section>\n" for head, text in sections if text)
    if run.config_text:
        keys = re.compile(r"(?m)^(\s*(?:- )?)([\w.\-]+)(?=:)")
        text = keys.sub(r"\1<b>\2</b>", html.escape(run.config_text))
        body += f"<details><summary>Resolved configuration</summary><pre>{text}</pre></details>"
    return (
        f'<article id="{anchor}"><h1>{html.escape(name)}</h1>'
        f'<p class="lead">{html.escape(_summary(run, now))}</p>{_tiles(run)}\n{body}</article>'
    )


def _summary(run: RunMetrics, now: datetime) -> str:
    """Describes the model, batch, parallelism and state of a run, as far as they are known."""
    parts = []
    setting = run.setting
    preset, hidden = setting("model", "preset"), setting("model", "hidden_size")
    if setting("model", "num_layers") and hidden:
        layers, heads = setting("model", "num_layers"), setting("model", "num_attention_heads")
        model = f"{layers} layers, hidden {hidden}, {heads} heads"
        parts.append(f"{preset}: {model}" if preset else model)
    if setting("data", "seq_length"):
        parts.append(f"sequence {setting('data', 'seq_length')}")
    if setting("train", "global_batch_size"):
        parts.append(f"global batch {setting('train', 'global_batch_size')}")
    ramp = setting("train", "rampup_batch_size")
    if isinstance(ramp, list) and len(ramp) == 3:
        parts.append(f"grown from {ramp[0]} over {ramp[2]} samples")
    sizes = [
        f"{short} {setting('parallel', key)}"
        for short, key in (
            ("TP", "tensor_model_parallel_size"),
            ("PP", "pipeline_model_parallel_size"),
            ("CP", "context_parallel_size"),
        )
        if setting("parallel", key)
    ]
    parts += [", ".join(sizes)] if sizes else []
    if setting("train", "bf16") is not None:
        parts.append("bf16" if setting("train", "bf16") else "fp32")
    if run.progress is not None and run.progress >= 1:
        parts.append("finished")
    elif run.progress is not None:
        age = now.timestamp() - last_value(run.columns["time"])
        ago = f", last logged {format_duration(age)} ago" if age >= 0 else ""
        parts.append(f"{STATES.get(run.status, 'running or stopped')}{ago}")
    if run.restarts:
        parts.append(describe_restarts(run.restarts))
    return " · ".join(parts)


def _tiles(run: RunMetrics) -> str:
    """Builds the progress bar and the tiles with the most important numbers."""
    if not len(run.iteration):
        return ""
    progress, columns = run.progress, run.columns
    last = {key: last_value(values) for key, values in columns.items()}
    typical = {key: median(values) for key, values in columns.items()}
    part = f"{format_percent(progress)} of the run" if progress is not None else ""
    tiles = [
        ("Iterations", f"{run.iteration[-1]:,.0f}", part),
        ("Samples", format_value(last["consumed_samples"]), ""),
        ("Tokens", format_value(last["consumed_tokens"]), ""),
    ]
    losses = columns["lm_loss"][np.isfinite(columns["lm_loss"])]
    if len(losses):
        recent = losses[-max(1, min(20, len(losses) // 10)) :]
        note = f"mean of the last {len(recent)}" if len(recent) > 1 else "last"
        note += f"; began at {format_value(float(losses[0]))}"
        tiles.append(("Training loss", format_value(float(recent.mean())), note))
    if np.isfinite(typical["tokens_per_second"]):
        speed = f"{format_value(typical['tokens_per_second'])} <i>tok/s</i>"
        tiles.append(("Throughput", speed, "median, all ranks"))
    if np.isfinite(typical["tflops_per_gpu"]):
        note = "median per device"
        if np.isfinite(typical["mfu"]):
            note = f"MFU {format_percent(typical['mfu'])}"
        if np.isfinite(typical["mfu_causal"]):
            note += f", {format_percent(typical['mfu_causal'])} causal"
        speed = f"{format_value(typical['tflops_per_gpu'], 3)} <i>TFLOP/s</i>"
        tiles.append(("Compute per device", speed, note))
    if np.isfinite(last["memory_bytes"]):
        memory = f"{last['memory_bytes'] / 2**30:.3g} <i>GiB</i>"
        tiles.append(("Memory", memory, "peak, reporting rank"))
    num_planned = sum(one.is_planned for one in run.restarts)
    num_restarts = max(len(run.restarts), int(np.nan_to_num(last["num_restarts"])))
    if num_restarts > num_planned:
        lost = last["seconds_lost"]
        if num_planned:  # the counter in the metrics includes planned pauses
            lost = np.nansum([one.seconds_lost for one in run.restarts if not one.is_planned])
        note = f"{format_duration(float(lost))} lost"
        tiles.append(("Restarts", f"{num_restarts - num_planned:,}", note))
    if num_planned:
        tiles.append(("Planned restarts", f"{num_planned:,}", "after a planned exit"))
    if last["num_skipped"] > 0 or last["num_rollbacks"] > 0:
        note = f"{last['num_rollbacks']:,.0f} rollbacks"
        tiles.append(("Skipped updates", f"{last['num_skipped']:,.0f}", note))
    if last["skipped_no_loss_tokens"] > 0:
        count = f"{last['skipped_no_loss_tokens']:,.0f}"
        tiles.append(("Steps without loss tokens", count, "updates skipped"))
    items = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>'
        for name, value, note in tiles
    )
    bar = f'<progress value="{progress:.4f}"></progress>' if progress is not None else ""
    return f'{bar}<dl class="tiles">{items}</dl>'


def _sources_table(run: RunMetrics) -> str:
    """Builds the table of samples, shares, weights, epochs and loss by source."""
    steps, shares = samples_per_record(run), realised_shares(run)
    total = float(np.nansum(steps)) or 1.0
    rows = []
    for name, block in run.sources.items():
        drawn = float(np.nansum(shares[name] * steps))
        shown = (drawn / total, float(np.nansum(block["weight"] * steps)) / total)
        ends = (float(block["weight"][0]), float(block["weight"][-1]))
        rows.append(
            [
                html.escape(name),
                f"{drawn:,.0f}",
                *(format_percent(share) for share in (*shown, *ends)),
                format_value(last_value(block["epochs"]), 3),
                format_value(last_value(block["loss"])),
            ]
        )
    heads = ["Source", "Samples drawn", "Realised share", "Planned share", "Weight first"]
    heads += ["Weight last", "Epochs", "Last loss"]
    return html_table("Over the whole log.", heads, rows)


def _validation_table(run: RunMetrics) -> str:
    """Builds the table of the first and the last validation by source."""
    if not len(run.validation_iteration):
        return ""
    heads = [
        f"{kind} {when}" for kind in ("Loss", "Bits/byte") for when in ("before", "after", "change")
    ]
    rows = [
        [html.escape(name), *_before_after(block["loss"]), *_before_after(block["bits_per_byte"])]
        for name, block in run.validation.items()
    ]
    first, last = run.validation_iteration[0], run.validation_iteration[-1]
    return html_table(
        f"Before: iteration {first:,.0f}. After: iteration {last:,.0f}. Loss in nats per token. "
        "Lower is better.",
        ["Source", *heads],
        rows,
    )


def _probe_table(run: RunMetrics) -> str:
    """Builds the table of the first and the last value of each probe's numbers."""
    if not len(run.probe_iteration):
        return ""
    rows = []
    for key, block in run.probes.items():
        cells = []
        for at in (0, -1):
            value, error = float(block["value"][at]), float(block["stderr"][at])
            cells.append(format_value(value))
            if np.isfinite(error):
                cells[-1] += f" ± {format_value(error)}"
        rows.append([html.escape(key.replace("_", " ")), *cells])
    first, last = run.probe_iteration[0], run.probe_iteration[-1]
    return html_table(
        f"Before: iteration {first:,.0f}. After: iteration {last:,.0f}. With standard errors over "
        "the texts of a probe.",
        ["Number", "Before", "After"],
        rows,
    )


def _before_after(values: FloatArray) -> tuple[str, str, str]:
    """Formats the first value, the last value, and the relative change with an arrow."""
    before, after = float(values[0]), float(values[-1])
    if len(values) == 1:
        return "–", format_value(after), "–"
    change = "–"
    if np.isfinite(before) and np.isfinite(after) and before:
        relative = after / before - 1
        style, arrow, sign = ("good", "▼", "−") if relative < 0 else ("bad", "▲", "+")
        change = f'<span class="{style}">{arrow} {sign}{format_percent(abs(relative))}</span>'
    return format_value(before), format_value(after), change


def _restarts_table(run: RunMetrics) -> str:
    """Builds the table of the last `MAX_RESTARTS` restarts."""
    shown = run.restarts[-MAX_RESTARTS:]
    causes = {"failed": "failed or killed", "unknown": "–", **PLANNED_CAUSES}
    rows = [
        [
            f"{one.attempt or '–'}",
            f"{one.iteration:,}",
            f"{max(one.reached - one.iteration, 0):,}",
            format_duration(one.seconds_lost),
            causes[one.cause],
            html.escape(", ".join(one.changes)) or "–",
        ]
        for one in shown
    ]
    num_omitted = len(run.restarts) - len(shown)
    note = (
        f" Only the last {len(shown)} are shown; {num_omitted:,} earlier ones are omitted."
        if num_omitted
        else ""
    )
    return html_table(
        "Pause: time from the last iteration that was kept until training continued; after a "
        f"failure this time is lost.{note}",
        "Attempt,Resumed from iteration,Iterations repeated,Pause,Reason for the "
        "exit,Changed".split(","),
        rows,
        num_text_columns=2,
    )


def html_table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int = 0
) -> str:
    """Builds a table of HTML cells, "" without rows. The first column contains the row heads.

    On narrow screens, rows are shown as blocks of labelled values. The last ``num_text_columns``
    columns contain text, aligned to the left.
    """
    if not rows:
        return ""
    styles = [""] * (len(heads) - num_text_columns) + [' class="text"'] * num_text_columns
    labels = [html.escape(head) for head in heads]
    head = "".join(f"<th{style}>{label}</th>" for style, label in zip(styles, labels, strict=True))
    body = ""
    for name, *cells in rows:
        columns = zip(styles[1:], labels[1:], cells, strict=True)
        body += f'<tr><th scope="row">{name}</th>'
        body += "".join(
            f'<td{style} data-label="{label}">{cell}</td>' for style, label, cell in columns
        )
        body += "</tr>"
    return (
        f'<div class="table"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def chart_grid(charts: Sequence[Chart]) -> str:
    """Arranges charts in rows of two. A single chart in a row has the full width."""
    figures = []
    num_narrow = 0
    for k, chart in enumerate(charts):
        is_last_narrow = k + 1 == len(charts) or charts[k + 1].wide
        is_wide = chart.wide or (num_narrow % 2 == 0 and is_last_narrow)
        num_narrow = 0 if is_wide else num_narrow + 1
        spec = chart.figure.to_json().replace("<", "\\u003c")
        title = html.escape(chart.title)
        num_entries = sum(trace.showlegend is not False for trace in chart.figure.data)
        figures.append(
            f'<figure class="chart{" wide" if is_wide else ""}" tabindex="0"><figcaption>'
            f"<h3>{title}</h3><p>{html.escape(chart.caption)}</p></figcaption>"
            f'<div class="plot" style="--entries:{num_entries}" role="img" aria-label="{title}">'
            "</div>"
            f'<script type="application/json">{spec}</script></figure>\n'
        )
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""
