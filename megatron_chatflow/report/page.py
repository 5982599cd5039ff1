"""One HTML page on one or several runs, readable offline.

In: run folders. Out: a self-contained page: inline SVG, CSS and a little script, nothing loaded
from anywhere.

The report page's style sheet, light and dark, and its script for crosshair and legend.

In: nothing. Out: two strings that `report` puts into the page; nothing is loaded from elsewhere.
The eight series colours keep a contrast of 3:1 against both backgrounds; shapes and hatches
(`report_marks`) tell series apart for readers who see few hues.

The report's numbers: headline tiles, validation before and after, what each source gave.

In: `RunMetrics`. Out: HTML text.

Several runs over each other: losses, schedules, learning rates, throughput.

In: `RunMetrics` of several runs. Out: `Chart`s with one curve a run, each run in the same colour
and with the same shape everywhere; along tokens, so that runs of other batches compare.

Follows running runs: the page is written anew as long as one of them goes on.

In: run folders, one of which may not have logged anything yet. Out: a page that loads itself anew,
and in the end one that no longer does.
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
from megatron_chatflow.report import charts as report_charts
from megatron_chatflow.report.charts import Chart, Line, hatch_definitions, render, smoothed
from megatron_chatflow.report.data import (
    ITERATION,
    PLANNED,
    TOKENS,
    Axis,
    FloatArray,
    RunMetrics,
    RunReader,
    condense,
    read_run,
    realised_shares,
    samples_per_record,
)
from megatron_chatflow.runtime.table import format_duration, format_percent, format_value

STYLE = """
:root{color-scheme:light dark;
--page:#f4f5f7;--card:#ffffff;--ink:#16202c;--soft:#556170;--faint:#8b96a3;--grid:#e7eaee;
--edge:#dde1e6;--shade:#16202c38;--accent:#1f5fbf;--good:#0b7a4b;--bad:#b3372b;
--c0:#2a6fdb;--c1:#d96a0b;--c2:#0c8f76;--c3:#b83a8c;--c4:#8a7200;--c5:#6a4fd0;--c6:#0f86a8;--c7:#c8323c}
@media (prefers-color-scheme:dark){:root{
--page:#10151b;--card:#181f27;--ink:#e8edf2;--soft:#a6b1bd;--faint:#7b8794;--grid:#262f39;
--edge:#2b3541;--shade:#000a;--accent:#7fb0ff;--good:#4fce95;--bad:#ff8b7d;
--c0:#5b9bff;--c1:#f5964a;--c2:#2fc3a2;--c3:#ee79c0;--c4:#d0b02f;--c5:#a48dff;--c6:#43bfe2;--c7:#ff737a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Noto Sans CJK SC",sans-serif}
main{max-width:1320px;margin:0 auto;padding:28px 24px 48px}
h1{font-size:26px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:17px;margin:34px 0 12px}
h3{font-size:15px;margin:0}
p{margin:0}
.lead{color:var(--soft);margin-top:6px}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin:0 0 22px}
a{color:var(--accent)}
article+article{margin-top:56px;border-top:1px solid var(--edge);padding-top:36px}
.progress{height:6px;border-radius:3px;background:var(--edge);margin-top:16px;overflow:hidden}
.progress i{display:block;height:100%;background:var(--accent)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(168px,1fr));gap:12px;margin-top:18px}
.tile,.chart,.table,details{background:var(--card);border:1px solid var(--edge);border-radius:10px}
.tile{padding:12px 16px}
.tile dt{color:var(--soft);font-size:13px}
.tile dd{margin:2px 0 0;font-size:23px;font-weight:600;font-variant-numeric:tabular-nums}
.tile dd i{font-style:normal;font-size:15px;font-weight:500;color:var(--soft)}
.tile small{display:block;font-size:13px;font-weight:400;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr));gap:16px}
.chart{margin:0;padding:16px 16px 8px;min-width:0;display:flex;flex-direction:column}
.chart.wide{grid-column:1/-1}
.chart:focus-visible,button:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
figcaption p{color:var(--soft);font-size:13px}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:8px 0 6px;padding:0;
font-size:13px;max-height:6.4em;overflow:auto}
.legend li,.legend button{display:inline-flex;align-items:center;gap:6px;min-width:0}
.legend span{overflow-wrap:anywhere;text-align:left}.legend b{white-space:nowrap}
.legend b{font-weight:600;font-variant-numeric:tabular-nums}
.legend button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}
.legend button[aria-pressed=false]{opacity:.4;text-decoration:line-through}
.swatch{width:22px;height:12px;flex:none}
.swatch.dashed{height:0;border-top:2px dashed var(--ink)}
.swatch.mark{width:10px;height:8px;background:var(--bad);clip-path:polygon(0 0,100% 0,50% 100%)}
.swatch.mark.planned{background:var(--faint)}
.swatch.mark.edit{height:10px;background:var(--accent);
clip-path:polygon(50% 0,100% 50%,50% 100%,0 50%)}
.defs{position:absolute}
.ink{--s:var(--ink)}.rest{--s:var(--faint)}.c0{--s:var(--c0)}.c1{--s:var(--c1)}.c2{--s:var(--c2)}.c3{--s:var(--c3)}
.c4{--s:var(--c4)}.c5{--s:var(--c5)}.c6{--s:var(--c6)}.c7{--s:var(--c7)}
.plot{position:relative;overflow-x:auto;overflow-y:hidden;margin-top:auto}
/* What scrolls has a shadow at the side where more follows. */
.plot,.table,pre{background:linear-gradient(90deg,var(--card) 30%,transparent) 0/44px 100% local,
linear-gradient(270deg,var(--card) 30%,transparent) 100%/44px 100% local,
linear-gradient(90deg,var(--shade),transparent) 0/14px 100% scroll,
linear-gradient(270deg,var(--shade),transparent) 100%/14px 100% scroll;
background-color:var(--card);background-repeat:no-repeat}
.plot>svg{display:block;width:100%;min-width:470px;height:auto}
.wide .plot>svg{min-width:760px}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.ytick{text-anchor:end}.xtick,.label{text-anchor:middle}
svg .label{fill:var(--ink)}
.grid{stroke:var(--grid)}.base,.tick{stroke:var(--faint)}.zero{stroke:var(--faint)}
.level{stroke:var(--bad);stroke-dasharray:6 4;opacity:.8}
.line{fill:none;stroke:var(--s);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.thin{stroke-width:1;opacity:.85}
.ink .line{stroke-width:2.4}
.faint{fill:none;stroke:var(--s);stroke-width:1;opacity:.28}
.d1 .line{stroke-dasharray:7 4}.d2 .line{stroke-dasharray:2 4}
.shape{fill:var(--s);stroke:var(--card);stroke-width:1.2}
.shape.open{fill:none;stroke:var(--s);stroke-width:2.2}
.stroke{stroke:var(--card);stroke-width:1.6;stroke-linecap:round;fill:none}
.hatch{opacity:.6}
svg .inside{fill:#fff;font-size:13px;font-weight:600;text-anchor:middle;paint-order:stroke;
stroke:#0009;stroke-width:3px;stroke-linejoin:round}
.area{fill:var(--s);opacity:.78;stroke:var(--card);stroke-width:1}
.d1 .area{opacity:.55}.d2 .area{opacity:.35}
.plan,.plan-under{fill:none;stroke-linejoin:round}
.plan-under{stroke:var(--card);stroke-width:3.4;opacity:.75}
.plan{stroke:var(--ink);stroke-width:1.6;stroke-dasharray:7 5}
.mark line{stroke:var(--bad);stroke-dasharray:2 4;opacity:.75}.mark path{fill:var(--bad)}
.mark.planned line{stroke:var(--faint)}.mark.planned path{fill:var(--faint)}
.mark.edit line{stroke:var(--accent);stroke-dasharray:none}.mark.edit path{fill:var(--accent)}
.cursor line{stroke:var(--ink);stroke-width:1;opacity:.55}
.cursor circle{stroke:var(--card);stroke-width:2;fill:var(--s)}
.hit{fill:transparent}
.off{display:none}
.tip{position:absolute;top:8px;pointer-events:none;background:var(--card);color:var(--ink);z-index:2;
border:1px solid var(--edge);border-radius:8px;box-shadow:0 4px 18px #0003;padding:8px 11px;
font-size:12.5px;line-height:1.45;white-space:nowrap}
.tip[hidden]{display:none}
.tip table{border-collapse:collapse}.tip td{padding:0 0 0 10px;text-align:right}
.tip td:first-child{padding:0;text-align:left}.tip .swatch{display:inline-block;margin-right:6px;
vertical-align:middle}
.tip th{font-weight:400;color:var(--soft);text-align:right;padding-left:10px}
.table{overflow-x:auto;padding:6px 16px 10px}
.table table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.table caption{text-align:left;color:var(--soft);font-size:13px;padding:8px 0 4px}
.table th,.table td{padding:7px 12px;text-align:right;border-top:1px solid var(--grid);
white-space:nowrap}
.table thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}
.table .name{text-align:left;padding-left:0}
.table .text{text-align:left;white-space:normal}
.table thead .span{text-align:center;border-bottom:1px solid var(--grid);padding-bottom:3px}
.table tbody th{font-weight:600}
.table .group{border-left:1px solid var(--edge)}
.table+.table,.charts+.table,.table+.charts{margin-top:16px}
.good{color:var(--good)}.bad{color:var(--bad)}
details{margin-top:16px;padding:10px 16px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
margin:10px 0 4px}
pre .key{color:var(--accent)}
footer{color:var(--soft);font-size:13px;margin-top:36px}
@media print{body{background:#fff}.chart,.table,details{break-inside:avoid}}
@media (max-width:560px){main{padding:18px 12px 32px}
.plot>svg{min-width:0}.wide .plot>svg{min-width:640px}
svg text{font-size:18px}svg .inside{font-size:20px}.label.y{display:none}
.legend{max-height:none}}
@media (max-width:760px){
.table table,.table caption,.table tbody,.table tr,.table tbody th,.table td{display:block}
.table thead{display:none}
.table tr{border-top:1px solid var(--grid);padding:8px 0}
.table tbody th,.table td{border:0;padding:1px 0;white-space:normal;overflow-wrap:anywhere}
.table td{display:flex;justify-content:space-between;gap:16px;text-align:right}
.table td::before{content:attr(data-label);color:var(--soft);text-align:left}
.table .group{border-left:0}}
"""

SCRIPT = """
'use strict';
for (const figure of document.querySelectorAll('figure.chart')) {
  const data = JSON.parse(figure.querySelector('script').textContent);
  const svg = figure.querySelector('.plot>svg'), tip = figure.querySelector('.tip');
  const cursor = svg.querySelector('.cursor'), rule = cursor.querySelector('line');
  const swatches = figure.querySelectorAll('.legend svg.swatch');
  const hidden = new Set(), longest = data.x.reduce((a, b) => b.length > a.length ? b : a, []);
  let at = -1;
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) { const mid = (low + high) >> 1; xs[mid] > x ? high = mid : low = mid; }
    return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  };
  const cell = (row, text, tag = 'td') => {
    const node = document.createElement(tag); node.textContent = text;
    row.append(node); return node;
  };
  const leave = () => { at = -1; tip.hidden = true; cursor.setAttribute('visibility', 'hidden'); };
  const show = x => {
    if (!longest.length) return;
    at = nearest(longest, x); x = longest[at];
    rule.setAttribute('x1', x); rule.setAttribute('x2', x);
    cursor.querySelectorAll('circle').forEach(node => node.remove());
    const table = document.createElement('table'), head = table.insertRow();
    cell(head, data.label.replace(/ \\(.*/, '') + ' ' + data.at[data.x.indexOf(longest)][at]);
    if (data.series.some(s => s.plan))
      for (const text of ['realised', 'planned']) cell(head, text, 'th');
    data.series.map((s, i) => [s, i]).sort((a, b) => data.series[0].y ? 0 : b[1] - a[1])
      .forEach(([s, i]) => {
        const own = data.x[s.x], k = own === longest ? at : nearest(own, x);
        if (hidden.has(i) || !own.length || Math.abs(own[k] - x) > 12 && own !== longest) return;
        const row = table.insertRow(), name = cell(row, '');
        name.append(swatches[i].cloneNode(true), s.name);
        cell(row, s.text[k]); if (s.plan) cell(row, s.plan[k]);
        if (s.y && s.y[k] !== null) {
          const dot = document.createElementNS('http://www.w3.org/2000/svg', 'circle');
          dot.setAttribute('cx', own[k]); dot.setAttribute('cy', s.y[k]); dot.setAttribute('r', 4);
          dot.setAttribute('class', s.class); cursor.append(dot);
        }
      });
    tip.replaceChildren(table); tip.hidden = false; cursor.setAttribute('visibility', 'visible');
    const scale = svg.clientWidth / svg.viewBox.baseVal.width, left = x * scale;
    tip.style.left = (left + 16 + tip.offsetWidth > svg.clientWidth
      ? Math.max(0, left - 16 - tip.offsetWidth) : left + 16) + 'px';
  };
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    show((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width);
  });
  svg.addEventListener('pointerleave', leave);
  figure.addEventListener('blur', leave);
  figure.addEventListener('keydown', event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === 'Escape') leave();
    if (!step || event.target !== figure) return;
    event.preventDefault();
    const last = longest.length - 1, next = at < 0 ? last : at + step * (event.shiftKey ? 10 : 1);
    show(longest[Math.min(Math.max(next, 0), last)]);
  });
  // A page that follows a run loads itself anew; what the reader had hidden stays hidden.
  const title = figure.closest('article').id + figure.querySelector('h3').textContent;
  for (const button of figure.querySelectorAll('.legend button')) {
    const index = Number(button.dataset.series), key = title + '/' + data.series[index].name;
    const set = off => {
      off ? hidden.add(index) : hidden.delete(index);
      button.setAttribute('aria-pressed', String(!off));
      svg.querySelector('g.series[data-series="' + index + '"]').classList.toggle('off', off);
      leave();
    };
    try { if (sessionStorage.getItem(key)) set(true); } catch { /* not every browser keeps any */ }
    button.onclick = () => {
      set(!hidden.has(index));
      try {
        hidden.has(index) ? sessionStorage.setItem(key, '1') : sessionStorage.removeItem(key);
      } catch { /* as above */ }
    };
  }
}
"""


MAX_RESTARTS = 50
_BEFORE_AFTER = ("before", "after", "change")
_RESTART_HEADS = (
    "Attempt",
    "Went on from iteration",
    "Iterations trained again",
    "Pause",
    "Why it had ended",
    "Changed",
)
_SOURCE_HEADS = (
    "Source",
    "Samples drawn",
    "Realised share",
    "Planned share",
    "Weight first",
    "Weight last",
    "Epochs",
    "Last loss",
)


def lead(run: RunMetrics) -> str:
    """One line on model, batch and parallelism, as far as the configuration tells."""
    parts = []
    preset = run.setting("model", "preset")
    layers, hidden = run.setting("model", "num_layers"), run.setting("model", "hidden_size")
    if layers and hidden:
        heads = run.setting("model", "num_attention_heads")
        parts.append(
            f"{f'{preset}: ' if preset else ''}{layers} layers, hidden {hidden}, {heads} heads"
        )
    if run.setting("data", "seq_length"):
        parts.append(f"sequence {run.setting('data', 'seq_length')}")
    if run.setting("train", "global_batch_size"):
        parts.append(f"global batch {run.setting('train', 'global_batch_size')}")
    sizes = [
        f"{short} {run.setting('parallel', key)}"
        for short, key in (
            ("TP", "tensor_model_parallel_size"),
            ("PP", "pipeline_model_parallel_size"),
            ("CP", "context_parallel_size"),
        )
        if run.setting("parallel", key)
    ]
    if sizes:
        parts.append(", ".join(sizes))
    if run.setting("train", "bf16") is not None:
        parts.append("bf16" if run.setting("train", "bf16") else "fp32")
    return html.escape(" · ".join(parts))


def progress(run: RunMetrics) -> float | None:
    """Finished part of the run in [0, 1], None where the configuration does not tell."""
    batch = run.goal("global_batch_size") or 1
    for key, done, whole in (
        ("train_iters", run.iteration, 1),
        ("train_samples", _consumed(run), batch),
    ):
        goal = run.goal(key)
        if goal is not None and np.isfinite(_last(done)):
            # Samples that do not fill a global batch are not trained.
            return 1.0 if goal - _last(done) < whole else _last(done) / goal
    return None


def restarts_table(run: RunMetrics) -> str:
    """Every restart with its cause and cost, the last ones of many; "" without any."""
    if not run.restarts:
        return ""
    shown = run.restarts[-MAX_RESTARTS:]
    causes = {"failed": "failed or killed", "unknown": "–", **PLANNED}
    rows = [
        _row(
            ("", f"{one.attempt or '–'}"),
            ("", f"{one.iteration:,}"),
            ("", f"{max(one.reached - one.iteration, 0):,}"),
            ("", format_duration(one.seconds_lost)),
            ("text", causes[one.cause]),
            ("text", html.escape(", ".join(one.changes)) or "–"),
            labels=_RESTART_HEADS,
        )
        for one in shown
    ]
    left_out = len(run.restarts) - len(shown)
    note = f" The last {len(shown)}; {left_out:,} came before." if left_out else ""
    head = "".join(f"<th>{text}</th>" for text in _RESTART_HEADS[:4])
    head += "".join(f'<th class="text">{text}</th>' for text in _RESTART_HEADS[4:])
    return _table(
        "Pause: from the last iteration that counts to the moment when training went on, which "
        f"after a failure is time lost.{note}",
        f"<tr>{head}</tr>",
        rows,
    )


def tiles(run: RunMetrics) -> str:
    """The headline figures as a description list."""
    if not len(run.iteration):
        return ""
    done = progress(run)
    loss = run.columns["lm_loss"]
    known = loss[np.isfinite(loss)]
    recent = known[-max(1, min(20, len(known) // 10)) :]
    entries = [
        (
            "Iterations",
            f"{run.iteration[-1]:,.0f}",
            "" if done is None else f"{format_percent(done)} of the run",
        ),
        ("Samples", format_value(_last(_consumed(run))), ""),
        ("Tokens", format_value(_last(run.columns["consumed_tokens"])), ""),
    ]
    if len(known):
        note = f"mean of the last {len(recent)}" if len(recent) > 1 else "last"
        began = f"began at {format_value(float(known[0]))}"
        entries.append(("Training loss", format_value(float(recent.mean())), f"{note}; {began}"))
    speed = _median(run.columns["tokens_per_second"])
    if np.isfinite(speed):
        entries.append(("Throughput", f"{format_value(speed)} <i>tok/s</i>", "median, all ranks"))
    flops, mfu = _median(run.columns["tflops_per_gpu"]), _median(run.columns["mfu"])
    if np.isfinite(flops):
        causal = _median(run.columns["mfu_causal"])
        halved = f", {format_percent(causal)} causal" if np.isfinite(causal) else ""
        note = f"MFU {format_percent(mfu)}{halved}" if np.isfinite(mfu) else "median per device"
        entries.append(("Compute per device", f"{format_value(flops, 3)} <i>TFLOP/s</i>", note))
    entries += _operation_tiles(run)
    items = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>'
        for name, value, note in entries
    )
    bar = (
        ""
        if done is None
        else f'<div class="progress"><i style="width:{100 * done:.1f}%"></i></div>'
    )
    return f'{bar}<dl class="tiles">{items}</dl>'


def _operation_tiles(run: RunMetrics) -> list[tuple[str, str, str]]:
    """Memory, waiting, and what faults have cost."""
    entries = []
    memory = _last(run.columns["memory_bytes"])
    if np.isfinite(memory):
        entries.append(("Memory", f"{memory / 2**30:.3g} <i>GiB</i>", "peak, reporting rank"))
    lost = _last(run.columns["seconds_lost"])
    count = max(len(run.restarts), int(np.nan_to_num(_last(run.columns["num_restarts"]))))
    planned = [one for one in run.restarts if one.is_planned]
    if planned:
        lost = float(np.nansum([one.seconds_lost for one in run.restarts if not one.is_planned]))
    if count > len(planned):
        entries.append(("Restarts", f"{count - len(planned):,}", f"{format_duration(lost)} lost"))
    if planned:
        entries.append(("Planned restarts", f"{len(planned):,}", "after a planned end"))
    skipped, rollbacks = (_last(run.columns[key]) for key in ("num_skipped", "num_rollbacks"))
    if skipped > 0 or rollbacks > 0:
        entries.append(("Updates left out", f"{skipped:,.0f}", f"{rollbacks:,.0f} rollbacks"))
    without_loss = _last(run.columns["skipped_no_loss_tokens"])
    if without_loss > 0:
        entries.append(("Steps without loss tokens", f"{without_loss:,.0f}", "updates left out"))
    return entries


def validation_table(run: RunMetrics) -> str:
    """First against last validation of every source, "" without a validation."""
    if not len(run.validation_iteration):
        return ""
    labels = [f"{kind} {when}" for kind in ("Loss", "Bits/byte") for when in _BEFORE_AFTER]
    rows = [
        _row(
            *_before_after(block["loss"]),
            *_before_after(block["bits_per_byte"]),
            name=name,
            labels=labels,
        )
        for name, block in run.validation.items()
    ]
    first, last = run.validation_iteration[0], run.validation_iteration[-1]
    before, *rest = _BEFORE_AFTER
    heads = f'<th class="group">{before}</th>' + "".join(f"<th>{text}</th>" for text in rest)
    return _table(
        f"Before: iteration {first:,.0f}. After: iteration {last:,.0f}. Lower is better.",
        '<tr><th rowspan="2" class="name">Source</th>'
        '<th colspan="3" class="group span">Loss (nats per token)</th>'
        f'<th colspan="3" class="group span">Bits per byte</th></tr><tr>{2 * heads}</tr>',
        rows,
    )


def sources_table(run: RunMetrics) -> str:
    """What was drawn of each source: samples, planned and realised share, epochs, last loss."""
    if not run.sources:
        return ""
    steps, shares = samples_per_record(run), realised_shares(run)
    total = float(np.nansum(steps)) or 1.0
    rows = []
    for name, block in run.sources.items():
        drawn = float(np.nansum(shares[name] * steps))
        plan = float(np.nansum(block["weight"] * steps))
        cells = (
            f"{drawn:,.0f}",
            format_percent(drawn / total),
            format_percent(plan / total),
            format_percent(float(block["weight"][0])),
            format_percent(float(block["weight"][-1])),
            format_value(_last(block["epochs"]), 3),
            format_value(_last(block["loss"])),
        )
        rows.append(_row(*(("", cell) for cell in cells), name=name, labels=_SOURCE_HEADS[1:]))
    head = f'<th class="name">{_SOURCE_HEADS[0]}</th>'
    head += "".join(f"<th>{text}</th>" for text in _SOURCE_HEADS[1:])
    return _table("Over the whole log.", f"<tr>{head}</tr>", rows)


def comparison_table(runs: Sequence[RunMetrics], run_names: Sequence[str]) -> str:
    """Last validation bits per byte of every source, a column per run; "" without any."""
    with_validation = [run for run in runs if len(run.validation_iteration)]
    names = list(dict.fromkeys(name for run in with_validation for name in run.validation))
    if not names:
        return ""
    heads = [
        name for run, name in zip(runs, run_names, strict=True) if len(run.validation_iteration)
    ]
    rows = [
        _row(
            *(
                ("", format_value(_last(run.validation[name]["bits_per_byte"])))
                if name in run.validation
                else ("", "–")
                for run in with_validation
            ),
            name=name,
            labels=heads,
        )
        for name in names
    ]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return _table(
        "Last validation of every run, bits per byte. Lower is better.",
        f'<tr><th class="name">Source</th>{head}</tr>',
        rows,
    )


def _table(caption: str, head: str, rows: Sequence[str]) -> str:
    """A table, whose rows a narrow screen shows as blocks of labelled values."""
    return (
        f'<div class="table"><table><caption>{caption}</caption><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(*cells: tuple[str, str], labels: Sequence[str], name: str | None = None) -> str:
    """A row of a table.

    Args:
        cells: CSS class and HTML of each.
        labels: The head of each cell's column, shown beside it on a narrow screen.
        name: Of the row, if it has a head.
    """
    head = f'<th scope="row" class="name">{html.escape(name)}</th>' if name is not None else ""
    body = "".join(
        f'<td{_class(kind)} data-label="{html.escape(label)}">{text}</td>'
        for (kind, text), label in zip(cells, labels, strict=True)
    )
    return f"<tr>{head}{body}</tr>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _before_after(values: FloatArray) -> list[tuple[str, str]]:
    """Three cells: first value, last value, relative change with an arrow."""
    before, after = float(values[0]), float(values[-1])
    change = ("same", "–")
    if len(values) > 1 and np.isfinite(before) and np.isfinite(after) and before:
        relative = after / before - 1
        kind, arrow = ("good", "▼") if relative < 0 else ("bad", "▲")
        sign = "−" if relative < 0 else "+"
        text = f"{arrow} {sign}{format_percent(abs(relative))}"
        change = (kind, text) if relative else ("", "0 %")
    start = format_value(before) if len(values) > 1 else "–"
    return [("group", start), ("", format_value(after)), change]


def _consumed(run: RunMetrics) -> FloatArray:
    return run.columns["consumed_samples"]


def _last(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else float("nan")


def _median(values: FloatArray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else float("nan")


MAX_SOURCES = 8
_BOLD = "Bold: moving mean; thin: logged values."


def comparison_charts(runs: Sequence[RunMetrics]) -> list[Chart]:
    """Everything that is drawn of several runs at once."""
    names = run_names(runs)
    axes = [Axis.of(run) for run in runs]
    # One run whose log knows no tokens puts all of them along iterations.
    if any(axis.label == ITERATION for axis in axes):
        axes = [Axis(ITERATION, run.iteration, run.iteration) for run in runs]
    charts = [
        *_overall(runs, names, axes, "lm_loss", "Training loss of every run", _BOLD),
        *_sources(runs, names, axes),
        *_overall(runs, names, axes, "learning_rate", "Learning rate of every run", ""),
        *_overall(runs, names, axes, "tokens_per_second", "Throughput of every run", _BOLD),
    ]
    return charts


def run_names(runs: Sequence[RunMetrics]) -> list[str]:
    """A name for each run that no other has: its folder's, and where two are alike the parent's."""
    names = [run.name for run in runs]
    longer = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    once = [
        long if names.count(name) > 1 else name for name, long in zip(names, longer, strict=True)
    ]
    return [f"{name} ({k})" if once.count(name) > 1 else name for k, name in enumerate(once, 1)]


def _overall(
    runs: Sequence[RunMetrics],
    names: Sequence[str],
    axes: Sequence[Axis],
    field: str,
    title: str,
    caption: str,
) -> list[Chart]:
    units = {"lm_loss": "Loss (nats per token)", "learning_rate": "Learning rate"}
    curves = [run.columns[field] for run in runs]
    lines = _lines(names, [axis.x for axis in axes], curves, smooth=field != "learning_rate")
    unit = units.get(field, "Tokens per second")
    if not lines:
        return []
    wide, from_zero = field == "lm_loss", field != "lm_loss"
    chart = Chart(title, caption, axes[0].label, unit, lines, from_zero=from_zero, wide=wide)
    return [chart]


def _sources(runs: Sequence[RunMetrics], names: Sequence[str], axes: Sequence[Axis]) -> list[Chart]:
    """Of each source its planned weight, its loss in training and its bits per byte held out."""
    known = dict.fromkeys(name for run in runs for name in (*run.sources, *run.validation))
    charts = []
    for source in list(known)[:MAX_SOURCES]:
        validation = [
            axis.at(run.validation_iteration) for run, axis in zip(runs, axes, strict=True)
        ]
        for block, field, title, unit, xs in (
            ("sources", "weight", "planned weight", "Weight", [axis.x for axis in axes]),
            ("sources", "loss", "training loss", "Loss (nats per token)", [a.x for a in axes]),
            ("validation", "bits_per_byte", "held out", "Bits per byte", validation),
        ):
            curves = [_curve(run, block, source, field) for run in runs]
            lines = _lines(names, xs, curves, smooth=field == "loss")
            # A weight of 1 in every run is no schedule to compare.
            if not lines or (field == "weight" and all(np.nanmin(line.y) == 1 for line in lines)):
                continue
            charts.append(
                Chart(
                    f"{source}: {title}",
                    _BOLD if field == "loss" else "",
                    TOKENS if axes[0].label == TOKENS else ITERATION,
                    unit,
                    lines,
                    from_zero=field == "weight",
                    percent=field == "weight",
                    markers=block == "validation" and max(len(line.x) for line in lines) <= 60,
                )
            )
    return charts


def _curve(run: RunMetrics, block: str, source: str, field: str) -> FloatArray:
    blocks = run.sources if block == "sources" else run.validation
    return blocks[source][field] if source in blocks else np.empty(0)


def _lines(
    names: Sequence[str], xs: Sequence[FloatArray], curves: Sequence[FloatArray], *, smooth: bool
) -> list[Line]:
    """One line a run that has the curve; its colour is that of the run."""
    lines = []
    for color, (name, x, curve) in enumerate(zip(names, xs, curves, strict=True)):
        if not np.isfinite(curve).any():
            continue
        if smooth:
            lines.append(smoothed(name, x, curve, color))
        else:
            lines.append(Line(name, *condense(x, curve, "last"), color))
    return lines


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
        f"{comparison_table(runs, names)}</article>"
    )


def _article(run: RunMetrics, name: str, anchor: str, now: datetime) -> str:
    sections = [
        ("Blend", _grid(report_charts.blend_charts(run)) + sources_table(run)),
        ("Loss", _grid(report_charts.loss_charts(run))),
        (
            "Validation",
            validation_table(run) + _grid(report_charts.validation_charts(run)),
        ),
        ("Optimizer and throughput", _grid(report_charts.optimizer_charts(run))),
        ("Restarts", restarts_table(run)),
    ]
    body = "".join(f"<section><h2>{head}</h2>{text}</section>\n" for head, text in sections if text)
    parts = [part for part in (lead(run), _state(run, now)) if part]
    config = ""
    if run.config_text:
        config = (
            f"<details><summary>Resolved configuration</summary><pre>"
            f"{_highlight(run.config_text)}</pre></details>"
        )
    return (
        f'<article id="{anchor}"><h1>{html.escape(name)}</h1>'
        f'<p class="lead">{" · ".join(parts)}</p>{tiles(run)}\n'
        f"{body}{config}</article>"
    )


def _state(run: RunMetrics, now: datetime) -> str:
    """How the run stands, and since when."""
    parts = []
    done = progress(run)
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


def follow_runs(
    folders: Sequence[Path],
    output: Path,
    interval: float,
    *,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> list[RunMetrics]:
    """Writes the page every ``interval`` seconds until every run is finished.

    Args:
        folders: Run folders; those without a logged iteration are waited for.
        output: The page.
        interval: Seconds between two pages.
        say: Told what is waited for, and of each new iteration.
        sleep: Waits; Ctrl-C ends it and the following.

    Returns:
        What was read last.

    Raises:
        UserError: A page cannot be written, or nothing can be read when Ctrl-C ends the waiting.
    """
    readers = [RunReader(folder) for folder in folders]
    runs: list[RunMetrics] = []
    shown = ""
    try:
        while True:
            try:
                runs = [reader.read() for reader in readers]
                is_over = all((progress(run) or 0.0) >= 1 for run in runs)
                write_page(runs, output, None if is_over else interval)
                state = ", ".join(f"{run.name}: iteration {_last_lines(run):,}" for run in runs)
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


def _last_lines(run: RunMetrics) -> int:
    known = run.iteration if len(run.iteration) else run.validation_iteration
    return int(known[-1])
