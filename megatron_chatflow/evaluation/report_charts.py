"""Chooses what is drawn of a run: mixture, losses, validation, optimiser and throughput.

In: `RunMetrics`. Out: `Chart`s for `report_svg`, each source in the same colour everywhere.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_chatflow.evaluation.report_data import FloatArray, RunMetrics
from megatron_chatflow.evaluation.report_reduce import (
    condense,
    deviation_from_plan,
    realised_shares,
    samples_per_record,
    smooth,
    smoothing_window,
)
from megatron_chatflow.evaluation.report_svg import INK, REST, Chart, Line

MAX_SOURCES = 12
OTHERS = "others"
ITERATION = "Iteration"


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
    consumed = run.columns["consumed_samples"]
    charts: list[Chart] = []
    if len(run.sources) > 1:  # of a single source there is nothing to mix
        charts = [_mixture(run, consumed), *_deviation(run, consumed)]
    epochs = _per_source(run, run.sources, run.iteration, "epochs")
    if epochs:
        charts.append(
            Chart(
                "Epochs per source",
                "How often each source has been read so far.",
                ITERATION,
                "Epochs",
                epochs,
                from_zero=True,
                marks=_marks(run, run.iteration),
                wide=len(charts) != 2,  # alone in its row
            )
        )
    return charts


def loss_charts(run: RunMetrics) -> list[Chart]:
    """Training loss, per source and over all."""
    x = run.iteration
    lines = [
        _smoothed(name, x, run.sources[name]["loss"], color)
        for name, color in source_colors(run).items()
        if name in run.sources
    ]
    if len(lines) != 1 and np.isfinite(run.columns["lm_loss"]).any():
        lines.append(_smoothed("all sources", x, run.columns["lm_loss"], INK))
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return []
    return [
        Chart(
            "Training loss per source",
            _smoothing_note(len(x)),
            ITERATION,
            "Loss (nats per token)",
            lines,
            marks=_marks(run, x),
            wide=True,
        )
    ]


def validation_charts(run: RunMetrics) -> list[Chart]:
    """Validation loss and bits per byte of each source."""
    charts = []
    for field, title, caption, unit in (
        ("loss", "Validation loss", "On held-out documents.", "Loss (nats per token)"),
        (
            "bits_per_byte",
            "Validation bits per byte",
            "On held-out documents; comparable between vocabularies.",
            "Bits per byte of text",
        ),
    ):
        lines = _per_source(run, run.validation, run.validation_iteration, field)
        if lines:
            charts.append(
                Chart(
                    title,
                    caption,
                    ITERATION,
                    unit,
                    lines,
                    markers=len(lines[0].x) <= 60,
                    marks=_marks(run, run.validation_iteration),
                )
            )
    return charts


def optimizer_charts(run: RunMetrics) -> list[Chart]:
    """Learning rate, gradient norm and throughput."""
    x, marks = run.iteration, _marks(run, run.iteration)
    charts = []
    learning_rate = run.columns["learning_rate"]
    if np.isfinite(learning_rate).any():
        line = Line("learning rate", *condense(x, learning_rate, "last"), color=0)
        charts.append(
            Chart(
                "Learning rate",
                "As the optimizer used it.",
                ITERATION,
                "Learning rate",
                [line],
                from_zero=True,
                marks=marks,
            )
        )
    note = _smoothing_note(len(x))
    norm = run.columns["grad_norm"]
    known = norm[np.isfinite(norm) & (norm > 0)]
    if len(known):
        log = bool(known.max() > 30 * np.median(known))
        unit = "Norm (logarithmic)" if log else "Norm"
        line = _smoothed("gradient norm", x, norm, 1)
        charts.append(
            Chart(
                "Gradient norm",
                "Before clipping. " + note,
                ITERATION,
                unit,
                [line],
                from_zero=not log,
                log=log,
                marks=marks,
            )
        )
    if np.isfinite(run.columns["tokens_per_second"]).any():
        line = _smoothed("tokens per second", x, run.columns["tokens_per_second"], 2)
        charts.append(
            Chart(
                "Throughput",
                "All ranks together. " + note,
                ITERATION,
                "Tokens per second",
                [line],
                from_zero=True,
                wide=True,
                marks=marks,
            )
        )
    return charts


def comparison_charts(runs: Sequence[RunMetrics]) -> list[Chart]:
    """Loss over all sources and throughput of several runs, one curve for each."""
    charts = []
    for field, title, unit, from_zero in (
        ("lm_loss", "Training loss of every run", "Loss (nats per token)", False),
        ("tokens_per_second", "Throughput of every run", "Tokens per second", True),
    ):
        lines = [
            _smoothed(run.name, run.iteration, run.columns[field], color)
            for color, run in enumerate(runs)
            if np.isfinite(run.columns[field]).any()
        ]
        if lines:
            caption = "Bold: moving mean; thin: logged values."
            charts.append(Chart(title, caption, ITERATION, unit, lines, from_zero=from_zero))
    return charts


def _mixture(run: RunMetrics, consumed: FloatArray) -> Chart:
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
        "Consumed samples",
        "Share of samples",
        realised,
        planned=planned,
        stacked=True,
        percent=True,
        marks=_marks(run, consumed),
        wide=True,
    )


def _deviation(run: RunMetrics, consumed: FloatArray) -> list[Chart]:
    """How far the draws are from the plan, where the log tells."""
    deviation = deviation_from_plan(run)
    if not deviation:
        return []
    every = np.array(list(deviation.values()))
    x, excess = condense(consumed, every.max(axis=0), "extreme")
    _, shortfall = condense(consumed, every.min(axis=0), "extreme")
    return [
        Chart(
            "Draws minus plan",
            "Samples of a source drawn so far less the sum of its weights, for the source that "
            "is farthest off. An exact blend never reaches one whole sample.",
            "Consumed samples",
            "Deviation (samples)",
            [
                Line("largest excess", x, excess, color=0),
                Line("largest shortfall", x, shortfall, color=1),
            ],
            thin=True,
            levels=(-1.0, 0.0, 1.0),
            marks=_marks(run, consumed),
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


def _smoothed(label: str, x: FloatArray, y: FloatArray, color: int) -> Line:
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


def _marks(run: RunMetrics, x: FloatArray) -> list[tuple[float, str]]:
    """Where the run was resumed, on the axis that `x` runs along."""
    marks = []
    for iteration in run.resumed_at:
        label = f"resumed: iteration {iteration:,} on"
        if x is run.columns["consumed_samples"]:
            index = int(np.searchsorted(run.iteration, iteration))
            if np.isfinite(x[index]):
                marks.append((float(x[index]), label))
        elif len(x) and x[0] <= iteration <= x[-1]:
            marks.append((float(iteration), label))
    return marks
