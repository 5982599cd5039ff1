"""Several runs over each other: losses, schedules, learning rates, throughput.

In: `RunMetrics` of several runs. Out: `Chart`s with one curve a run, each run in the same colour
and with the same shape everywhere; along tokens, so that runs of other batches compare.
"""

from collections.abc import Sequence

import numpy as np

from megatron_chatflow.evaluation.report_charts import smoothed
from megatron_chatflow.evaluation.report_data import FloatArray, RunMetrics
from megatron_chatflow.evaluation.report_reduce import ITERATION, TOKENS, Axis, condense
from megatron_chatflow.evaluation.report_svg import Chart, Line

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
