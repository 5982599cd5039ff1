"""Chooses what is drawn of a run: mixture, losses, validation, optimiser and throughput.

In: `RunMetrics`. Out: `Chart`s for `report_svg`, each source in the same colour everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_chatflow.evaluation.report_data import FloatArray, RunMetrics
from megatron_chatflow.evaluation.report_lines import PLANNED, Restart
from megatron_chatflow.evaluation.report_marks import INK, REST
from megatron_chatflow.evaluation.report_reduce import (
    ITERATION,
    Axis,
    condense,
    deviation_from_plan,
    realised_shares,
    samples_per_record,
    smooth,
    smoothing_window,
)
from megatron_chatflow.evaluation.report_scale import format_duration
from megatron_chatflow.evaluation.report_svg import Chart, Line, Mark

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
