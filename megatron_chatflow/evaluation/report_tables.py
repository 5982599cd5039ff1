"""The report's numbers: headline tiles, validation before and after, what each source gave.

In: `RunMetrics`. Out: HTML text.
"""

import html
from collections.abc import Sequence

import numpy as np

from megatron_chatflow.evaluation.report_data import FloatArray, RunMetrics
from megatron_chatflow.evaluation.report_lines import PLANNED
from megatron_chatflow.evaluation.report_reduce import realised_shares, samples_per_record
from megatron_chatflow.evaluation.report_scale import (
    format_duration,
    format_percent,
    format_value,
)

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
