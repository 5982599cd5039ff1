"""Draws the report's charts of one or several runs with plotly.

Every curve has a distinct marker or dash pattern and every area a distinct hatch, so that charts
can be read without colour. The script of the page adds the light or dark theme. Curves without a
colour have the colour of the text. Names are read from files and may contain any text, but plotly
interprets HTML, formulas and templates. `as_text` escapes them.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_chatflow.report.data import (
    ITERATION,
    PLANNED_CAUSES,
    PROBE_SEPARATOR,
    SAMPLES,
    BySource,
    FloatArray,
    Restart,
    RunMetrics,
    XAxis,
    condense,
    deviation_from_plan,
    last_value,
    realised_shares,
    samples_per_record,
    smooth,
    smoothing_window,
)
from megatron_chatflow.runtime.table import format_duration, format_percent, format_value, shorten

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# The contrast to the page's cards is at least 3:1 in both themes.
PALETTE = "#2a6fdb #d96a0b #0c8f76 #b83a8c #8a7200 #7a60e0 #0f86a8 #d0414a".split()
SYMBOLS = "circle square triangle-up diamond x triangle-down cross hexagon".split()
HATCHES = ("", "/", "-", "\\", ".", "|", "+", "x")
DASHES = ("solid", "dash", "dot")
# Validations of the average of the weights, of the test split, and of both.
VARIANTS = {" (test) (ema)": "longdashdot", " (ema)": "dashdot", " (test)": "longdash"}
NO_COLOR = -1
GREY = "#85909c"
MARK_STYLES = {
    "restart": ("restarted", "#d0414a", "triangle-down", "dot"),
    "planned": ("planned restart", GREY, "triangle-down", "dot"),
    "edit": ("blend edited", "#2a6fdb", "diamond", "solid"),
    "stage": ("stage begins", "#0c8f76", "square", "dash"),
}
MAX_MARKS = 40
MAX_COLORED_SOURCES = 12
MAX_COMPARED_SOURCES = 8
MAX_LAYERS = 12
MAX_PROBE_CHARTS = 24
# Ends of the names of a probe's numbers.
PROBE_UNITS = ("bits_per_token", "bits_per_byte", "bits_per_pair", "accuracy", "bits")
OTHERS = "others"
LOSS, BITS = "Loss (nats per token)", "Bits per byte"
SMOOTHED = "Bold: moving mean; thin: logged values."


@dataclass(frozen=True)
class Chart:
    """A figure with its heading."""

    title: str  # heading
    caption: str  # a sentence that describes the chart; may be empty
    figure: "Figure"  # the plotly figure
    wide: bool = False  # whether the chart has the full width of the page


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str  # legend entry
    x: FloatArray  # float64[n], ascending
    y: FloatArray  # float64[n]; NaN for missing values
    color: int  # index into the palette, or `NO_COLOR`
    # float64[n], the values before smoothing; None if they are not shown
    background: FloatArray | None = None
    dash: str = ""  # dash pattern; "" for that of the colour

    @classmethod
    def smoothed(cls, label: str, x: FloatArray, y: FloatArray, color: int) -> "Line":
        """Creates a curve of the moving mean, with the original values in the background."""
        few_x, few_y = condense(x, y)
        window = smoothing_window(len(few_x))
        return cls(label, few_x, smooth(few_y, window), color, few_y if window > 1 else None)


@dataclass(frozen=True)
class Mark:
    """A labelled vertical line."""

    x: float  # position on the x axis
    label: str  # description of the event
    # ``restart`` after a failure, ``planned`` restart, ``edit`` of the blend, or ``stage`` of
    # training that begins
    kind: Literal["restart", "planned", "edit", "stage"]


def as_text(label: str, max_columns: int = 40) -> str:
    """Escapes a label so that plotly shows it literally, and truncates it to ``max_columns``."""
    text = html.escape(shorten(label, max_columns), quote=False)
    return text.replace("$", "&#36;").replace("%", "&#37;")  # for formulas and templates


def new_figure(x_label: str, y_label: str, marks: Sequence[Mark]) -> "Figure":
    """Creates a figure with axes and marks."""
    from plotly.graph_objects import Figure

    figure = Figure(layout={"template": "none", "hovermode": "x unified"})
    figure.update_xaxes(title_text=x_label, hoverformat=",.0f")
    figure.update_layout(
        yaxis={"title_text": y_label},
        yaxis2={"overlaying": "y", "range": [0, 1], "fixedrange": True, "visible": False},
    )
    for kind, (name, color, symbol, dash) in MARK_STYLES.items():
        shown = [mark for mark in marks if mark.kind == kind]
        # Symbols of restarts are at the top and the others at the bottom, because a restart and an
        # edit can have the same position.
        ends = [0, 1, None] if kind in ("edit", "stage") else [1, 0, None]
        symbols = [symbol, "line-ew", "line-ew"]  # line-ew is invisible without an outline
        if shown:
            figure.add_scatter(
                name=name,
                meta=name,
                x=[mark.x for mark in shown for _ in ends],
                y=ends * len(shown),
                yaxis="y2",
                legendrank=2000,
                mode="lines+markers",
                line={"color": color, "dash": dash, "width": 1},
                marker={"symbol": symbols * len(shown), "color": color, "size": 10},
                cliponaxis=False,
                text=[as_text(mark.label, 200) for mark in shown for _ in ends],
                hovertemplate="%{text}<extra></extra>",
            )
    return figure


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    caption: str = "",
    *,
    from_zero: bool = False,
    percent: bool = False,
    log: bool = False,
    levels: Sequence[float] = (),
    wide: bool = False,
) -> list[Chart]:
    """Creates a chart of the curves that have finite values; an empty list if there are none.

    Args:
        title: Heading.
        x_label: Label of the x axis.
        y_label: Label of the y axis with its unit.
        lines: The curves.
        marks: Labelled vertical lines.
        caption: A sentence that describes the chart.
        from_zero: Whether the y axis begins at 0.
        percent: Whether the values are fractions, shown as percentages.
        log: Whether the y axis is logarithmic.
        levels: Positions of horizontal reference lines.
        wide: Whether the chart has the full width of the page.
    """
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return []
    figure = new_figure(x_label, y_label, marks)
    for line in lines:
        label, few = as_text(line.label), len(line.x) <= 60
        stroke: dict[str, object] = {"width": 2}
        marker: dict[str, object] = {"size": 8, "maxdisplayed": 0 if few else 8}
        if line.color != NO_COLOR:
            stroke["color"] = marker["color"] = PALETTE[line.color % 8]
            stroke["dash"] = line.dash or DASHES[line.color // 8 % 3]
            marker["symbol"] = SYMBOLS[line.color % 8]
        group = {"x": line.x, "legendgroup": label, "meta": label}
        if line.background is not None:
            thin = {**stroke, "width": 1, "dash": "solid"}
            hidden = {"showlegend": False, "hoverinfo": "skip", "opacity": 0.3}
            figure.add_scatter(y=line.background, mode="lines", line=thin, **group, **hidden)
        last = last_value(line.y)
        has_markers = few or (len(lines) > 1 and line.color != NO_COLOR)
        figure.add_scatter(
            y=line.y,
            name=f"{label} <b>{format_percent(last) if percent else format_value(last)}</b>",
            mode="lines+markers" if has_markers else "lines",
            line=stroke,
            marker=marker,
            hovertemplate=f"%{{y:{'.1%' if percent else '.4~g'}}}<extra>%{{meta}}</extra>",
            **group,
        )
    for level in levels:
        color = GREY if level == 0 else MARK_STYLES["restart"][1]
        figure.add_hline(level, line={"color": color, "dash": "dash", "width": 1})
    largest = max(float(np.nanmax(np.abs(line.y))) for line in lines)
    figure.update_layout(
        yaxis={
            "rangemode": "tozero" if from_zero else "normal",
            "type": "log" if log else "linear",
            "tickformat": ".0%" if percent else "",
            "exponentformat": "e" if largest < 0.01 else "B",
        }
    )
    return [Chart(title, caption, figure, wide)]


def source_colors(run: RunMetrics) -> dict[str, int]:
    """Returns palette indices of the `MAX_COLORED_SOURCES` most drawn sources, in logged order."""
    names = list(run.sources) or list(
        dict.fromkeys(_variant(run, one)[0] for one in run.validation)
    )
    if len(names) > MAX_COLORED_SOURCES and run.sources:
        steps, shares = samples_per_record(run), realised_shares(run)
        drawn = {name: np.nansum(shares[name] * steps) for name in names}
        most = set(sorted(names, key=lambda name: -drawn[name])[:MAX_COLORED_SOURCES])
        names = [name for name in names if name in most]
    return {name: color for color, name in enumerate(names[:MAX_COLORED_SOURCES])}


def _variant(run: RunMetrics, name: str) -> tuple[str, str]:
    """Returns the source that a validation is of, and the dash pattern of its curve."""
    if name not in run.sources:
        for suffix, dash in VARIANTS.items():
            if name.endswith(suffix):
                return name.removesuffix(suffix), dash
    return name, ""


def mixture_chart(run: RunMetrics) -> Chart:
    """Draws realised shares as stacked areas and planned shares as dashed boundaries."""
    axis = XAxis.of(run, SAMPLES)
    colors, realised = source_colors(run), realised_shares(run)
    planned = {name: block["weight"] for name, block in run.sources.items()}
    rest = [name for name in run.sources if name not in colors]
    if rest:
        colors[OTHERS] = NO_COLOR
        realised[OTHERS] = np.nansum([realised[name] for name in rest], axis=0)
        planned[OTHERS] = np.nansum([planned[name] for name in rest], axis=0)
    figure = new_figure(axis.label, "Share of samples", find_marks(run, axis))
    x, _ = condense(axis.x, axis.x, "last")
    pattern = {"fgcolor": "#fff", "fgopacity": 0.5, "solidity": 0.15}
    top, boundary = np.zeros(len(x)), np.zeros(len(x))
    boundaries, names = [], []
    for name, index in colors.items():
        _, share = condense(axis.x, np.nan_to_num(realised[name]))
        _, plan = condense(axis.x, np.nan_to_num(planned[name]))
        share = smooth(share, smoothing_window(len(share)))
        color = GREY if index == NO_COLOR else PALETTE[index % 8]
        shape = "" if index == NO_COLOR else HATCHES[index % 8]
        figure.add_scatter(
            name=f"{as_text(name)} <b>{format_percent(last_value(share))}</b>",
            x=x,
            y=share,
            customdata=plan,
            meta=as_text(name),
            stackgroup="realised",
            mode="lines",
            line={"width": 0.5, "color": color},
            fillcolor=color,
            fillpattern={**pattern, "bgcolor": color, "shape": shape},
            hovertemplate="%{y:.1%} (planned %{customdata:.1%})<extra>%{meta}</extra>",
        )
        at = len(x) // 8 + int(np.argmax(share[len(x) // 8 : len(x) - len(x) // 8]))
        if share[at] > 0.1:  # there is room for a name
            names.append({"x": x[at], "y": top[at] + share[at] / 2, "text": as_text(name)})
        top, boundary = top + share, boundary + plan
        boundaries.append(boundary)
    for boundary in boundaries[:-1]:  # the last one is at 100 %
        figure.add_scatter(
            name="planned",
            x=x,
            y=boundary,
            mode="lines",
            line={"width": 2, "dash": "dash"},
            showlegend=boundary is boundaries[0],
            legendrank=1500,
            hoverinfo="skip",
        )
    label = {"showarrow": False, "font": {"color": "#fff"}, "bgcolor": "rgba(0,0,0,.5)"}
    figure.update_layout(
        yaxis={"range": [0, 1], "tickformat": ".0%"},
        annotations=[{**label, **name} for name in names],
        legend={"itemclick": False, "itemdoubleclick": False, "traceorder": "normal"},
    )
    caption = "Areas: share of the samples drawn (moving mean); dashed: the schedule's weights."
    return Chart("Mixture: planned against realised", caption, figure, wide=True)


def blend_charts(run: RunMetrics) -> list[Chart]:
    """Draws the mixture, the deviation from the plan and the epochs of each source."""
    axis, by_samples = XAxis.of(run), XAxis.of(run, SAMPLES)
    charts = []
    if len(run.sources) > 1:
        charts.append(mixture_chart(run))
        deviation = list(deviation_from_plan(run).values())
        charts += line_chart(
            "Draws minus plan",
            by_samples.label,
            "Deviation (samples)",
            [
                Line(label, *condense(by_samples.x, extreme(deviation, axis=0), "extreme"), color)
                for color, (label, extreme) in enumerate(
                    (("largest excess", np.max), ("largest shortfall", np.min))
                )
                if deviation
            ],
            find_marks(run, by_samples),
            "Samples drawn so far minus samples planned, for the source with the largest "
            "deviation. An exact blend stays below one sample.",
            levels=(-1.0, 0.0, 1.0),
        )
    charts += decision_charts(run) + line_chart(
        "Weight in the objective",
        axis.label,
        "Weight",
        _per_source(run, run.sources, axis.x, "objective_weight"),
        find_marks(run, axis),
        "How much a loss token of each source counts in the objective.",
        from_zero=True,
    )
    return charts + line_chart(
        "Epochs per source",
        axis.label,
        "Epochs",
        _per_source(run, run.sources, axis.x, "epochs"),
        find_marks(run, axis),
        "Number of times each source has been read so far.",
        from_zero=True,
    )


def decision_charts(run: RunMetrics) -> list[Chart]:
    """Draws the weights that a controller decided, as steps from horizon to horizon."""
    bounds = [bound for one in run.decisions for bound in (one.begin, one.end)]
    x, colors = np.array(bounds, dtype=np.float64), source_colors(run)
    shares = [one.weights for one in run.decisions for _ in range(2)]
    lines = []
    for name, color in colors.items():
        y = np.array([weights.get(name, np.nan) for weights in shares], dtype=np.float64)
        lines.append(Line(name, *condense(x, y, "last"), color))
    return line_chart(
        "Decided weights",
        SAMPLES,
        "Share of samples",
        lines,
        caption=f"{len(run.decisions):,} decisions of the controller, where they apply.",
        from_zero=True,
        percent=True,
    )


def loss_charts(run: RunMetrics) -> list[Chart]:
    """Draws the training loss of each source and of all sources together."""
    axis = XAxis.of(run)
    colors = {name: color for name, color in source_colors(run).items() if name in run.sources}
    curves = [(name, run.sources[name]["loss"], color) for name, color in colors.items()]
    if len(colors) != 1:
        curves.append(("all sources", run.columns["lm_loss"], NO_COLOR))
    return line_chart(
        "Training loss per source",
        axis.label,
        LOSS,
        [Line.smoothed(name, axis.x, loss, color) for name, loss, color in curves],
        find_marks(run, axis),
        SMOOTHED,
        wide=True,
    )


def validation_charts(run: RunMetrics) -> list[Chart]:
    """Draws the validation loss and the bits per byte of each source."""
    axis = XAxis.of(run)
    x = axis.at(run.validation_iteration)
    colors = source_colors(run)
    variants = {name: _variant(run, name) for name in run.validation}
    loss, bits = (
        [
            Line(name, *condense(x, block[key], "last"), colors[source], dash=dash)
            for name, block in run.validation.items()
            for source, dash in (variants[name],)
            if source in colors
        ]
        for key in ("loss", "bits_per_byte")
    )
    held_out, marks = "On held-out documents", find_marks(run, axis)
    if any(name.endswith(" (ema)") for name in variants):
        held_out += "; (ema): of the average of the weights"
    comparable = f"{held_out}; comparable between vocabularies."
    return [
        *line_chart("Validation loss", axis.label, LOSS, loss, marks, f"{held_out}."),
        *line_chart("Validation bits per byte", axis.label, BITS, bits, marks, comparable),
    ]


def probe_charts(run: RunMetrics) -> list[Chart]:
    """Draws the numbers of every probe, those with the same unit in one chart."""
    axis = XAxis.of(run)
    x, marks = axis.at(run.probe_iteration), find_marks(run, axis)
    groups: dict[tuple[str, str], list[tuple[str, FloatArray]]] = {}
    for key, block in run.probes.items():
        label, _, name = key.rpartition(PROBE_SEPARATOR)
        unit = next((unit for unit in PROBE_UNITS if name.endswith(unit)), "")
        shown = name.removesuffix(unit).replace("_", " ").strip() or label
        groups.setdefault((label, unit), []).append((shown, block["value"]))
    charts: list[Chart] = []
    for (label, unit), curves in list(groups.items())[:MAX_PROBE_CHARTS]:
        lines = [
            Line(name, *condense(x, y, "last"), number)
            for number, (name, y) in enumerate(curves[:MAX_COLORED_SOURCES])
        ]
        name = unit.replace("_", " ").capitalize() or "Value"
        charts += line_chart(f"Probe {label}", axis.label, name, lines, marks, f"{name}.")
    return charts


def optimizer_charts(run: RunMetrics) -> list[Chart]:
    """Draws the rate, norms and speed, and the batch size and weight decay if they change."""
    x, columns = run.iteration, run.columns
    marks = find_marks(run, XAxis.of(run, ITERATION))
    weights = columns["params_norm"]
    is_known = np.isfinite(weights)  # only in iterations that were logged
    norm = columns["grad_norm"]
    batch, decay = (_if_changing(columns[key]) for key in ("global_batch_size", "weight_decay"))
    positive = norm[norm > 0]
    is_log = bool(len(positive) and positive.max() > 30 * np.median(positive))
    with np.errstate(divide="ignore", invalid="ignore"):
        waiting = columns["data_seconds"] / columns["seconds"]
    return [
        *line_chart(
            "Learning rate",
            ITERATION,
            "Learning rate",
            [Line("learning rate", *condense(x, columns["learning_rate"], "last"), 0)],
            marks,
            _describe_rate(run),
            from_zero=True,
        ),
        *line_chart(
            "Weight decay",
            ITERATION,
            "Weight decay",
            [Line("weight decay", *condense(x, decay, "last"), 6)],
            marks,
            "Of the parameters that have one.",
            from_zero=True,
        ),
        *line_chart(
            "Batch size",
            ITERATION,
            "Samples per iteration",
            [Line("global batch size", *condense(x, batch, "last"), 4)],
            marks,
            "The samples of all ranks.",
            from_zero=True,
        ),
        *line_chart(
            "Gradient norm",
            ITERATION,
            "Norm (logarithmic)" if is_log else "Norm",
            [Line.smoothed("gradient norm", x, norm, 1)] if len(positive) else [],
            marks,
            f"Before clipping. {SMOOTHED}",
            from_zero=not is_log,
            log=is_log,
        ),
        *line_chart(
            "Weight norm",
            ITERATION,
            "Norm",
            [Line("weight norm", *condense(x[is_known], weights[is_known], "last"), 5)],
            marks,
            "All weights, after the update.",
        ),
        *_layer_charts(run, marks),
        *line_chart(
            "Throughput",
            ITERATION,
            "Tokens per second",
            [Line.smoothed("tokens per second", x, columns["tokens_per_second"], 2)],
            marks,
            f"All ranks together. {SMOOTHED}",
            from_zero=True,
        ),
        *line_chart(
            "Waiting for data",
            ITERATION,
            "Part of the step",
            [Line.smoothed("waiting", x, waiting, 3)],
            marks,
            f"Fraction of the step in which the reporting rank waited for a batch. {SMOOTHED}",
            from_zero=True,
            percent=True,
        ),
    ]


def _if_changing(values: FloatArray) -> FloatArray:
    """Returns the values; NaN if all that are known are equal."""
    is_changing = len(np.unique(values[np.isfinite(values)])) > 1
    return values if is_changing else np.full_like(values, np.nan)


def _describe_rate(run: RunMetrics) -> str:
    """Describes the logged rate, which is not that of every tensor with some settings."""
    stages = run.setting("train", "stages")
    stages = stages if isinstance(stages, list) else []
    exceptions = []
    if run.setting("optimizer", "decoupled_lr") is not None:
        exceptions.append("embedding and output layer have one of their own (decoupled_lr)")
    if any(isinstance(stage, dict) and stage.get("lr_multipliers") for stage in stages):
        exceptions.append("stages multiply it for some tensors (lr_multipliers)")
    if not exceptions:
        return "As used by the optimizer."
    return f"The common rate; {' and '.join(exceptions)}."


def _layer_charts(run: RunMetrics, marks: Sequence[Mark]) -> list[Chart]:
    """Draws the norms of at most `MAX_LAYERS` layers."""
    names = list(run.layers)
    places = np.linspace(0, len(names) - 1, min(len(names), MAX_LAYERS)).round().astype(int)
    shown = [names[place] for place in places]
    which = "" if len(shown) == len(names) else f" {len(shown)} of {len(names)} layers."
    charts = []
    for title, key, when in (
        ("Gradient norm per layer", "grads", "Before clipping."),
        ("Weight norm per layer", "params", "After the update."),
    ):
        lines = [
            Line(name, *condense(run.layer_iteration, run.layers[name][key], "last"), color)
            for color, name in enumerate(shown)
        ]
        is_log = any((line.y > 0).any() for line in lines)
        charts += line_chart(
            title, ITERATION, "Norm (logarithmic)", lines, marks, when + which, log=is_log
        )
    return charts


def comparison_charts(runs: Sequence[RunMetrics], names: Sequence[str]) -> list[Chart]:
    """Draws curves of several runs in common charts. Each run has one colour in all charts."""
    axes = [XAxis.of(run) for run in runs]
    if any(axis.label == ITERATION for axis in axes):  # all runs must have the same axis
        axes = [XAxis.of(run, ITERATION) for run in runs]
    x_label = axes[0].label
    trained = [axis.x for axis in axes]
    validated = [axis.at(run.validation_iteration) for axis, run in zip(axes, runs, strict=True)]

    def lines(
        xs: Sequence[FloatArray], ys: Sequence[FloatArray | None], smoothed: bool = False
    ) -> list[Line]:
        found = []
        for color, (name, x, y) in enumerate(zip(names, xs, ys, strict=True)):
            if y is not None and smoothed:
                found.append(Line.smoothed(name, x, y, color))
            elif y is not None:
                found.append(Line(name, *condense(x, y, "last"), color))
        return found

    def overall(key: str, smoothed: bool) -> list[Line]:
        return lines(trained, [run.columns[key] for run in runs], smoothed)

    loss = overall("lm_loss", True)
    charts = line_chart("Training loss of every run", x_label, LOSS, loss, (), SMOOTHED, wide=True)
    sources = dict.fromkeys(name for run in runs for name in (*run.sources, *run.validation))
    for source in list(sources)[:MAX_COMPARED_SOURCES]:
        in_training = [run.sources.get(source, {}) for run in runs]
        held_out = [run.validation.get(source, {}) for run in runs]
        weights = lines(trained, [block.get("weight") for block in in_training])
        if any((line.y < 1).any() for line in weights):  # a single source always has weight 1
            title = f"{source}: planned weight"
            charts += line_chart(title, x_label, "Weight", weights, percent=True, from_zero=True)
        loss = lines(trained, [block.get("loss") for block in in_training], True)
        charts += line_chart(f"{source}: training loss", x_label, LOSS, loss, (), SMOOTHED)
        bits = lines(validated, [block.get("bits_per_byte") for block in held_out])
        charts += line_chart(f"{source}: held out", x_label, BITS, bits)
    title, rate = "Learning rate of every run", overall("learning_rate", False)
    charts += line_chart(title, x_label, "Learning rate", rate, from_zero=True)
    title, speed = "Throughput of every run", overall("tokens_per_second", True)
    return charts + line_chart(
        title, x_label, "Tokens per second", speed, (), SMOOTHED, from_zero=True
    )


def _per_source(run: RunMetrics, blocks: BySource, x: FloatArray, key: str) -> list[Line]:
    return [
        Line(name, *condense(x, blocks[name][key], "last"), color)
        for name, color in source_colors(run).items()
        if name in blocks
    ]


def find_marks(run: RunMetrics, axis: XAxis) -> list[Mark]:
    """Returns the marks of a run. Events of one kind at the same iteration share one mark."""
    restarts: dict[int, list[Restart]] = {}
    for restart in run.restarts:
        restarts.setdefault(restart.iteration, []).append(restart)
    events: list[tuple[int, str, Literal["restart", "planned", "edit", "stage"]]] = [
        (
            iteration,
            describe_restarts(several),
            "planned" if all(one.is_planned for one in several) else "restart",
        )
        for iteration, several in sorted(restarts.items())[-MAX_MARKS:]
    ]
    for iteration, changes in sorted(blend_edits(run).items())[-MAX_MARKS:]:
        events.append((iteration, ", ".join(changes), "edit"))
    events += [(at, label, "stage") for at, label in stage_starts(run).items()][-MAX_MARKS:]
    places = axis.at(np.array([iteration for iteration, _, _ in events], dtype=np.float64))
    return [
        Mark(x, f"{label} at iteration {iteration:,}", kind)
        for x, (iteration, label, kind) in zip(places.tolist(), events, strict=True)
    ]


def stage_starts(run: RunMetrics) -> dict[int, str]:
    """Describes each stage of training but the first, by the last iteration before it."""
    stages = run.columns["stage"]
    begins = 1 + np.flatnonzero((np.diff(stages) != 0) & np.isfinite(stages[1:]))
    configured = run.setting("train", "stages")
    starts = {}
    for begin in begins.tolist():
        number = int(stages[begin])
        trained = None
        if isinstance(configured, list) and 0 <= number < len(configured):
            stage = configured[number]
            trained = stage.get("trainable") if isinstance(stage, dict) else None
        what = f" trains {', '.join(map(str, trained))}" if isinstance(trained, list) else ""
        starts[int(run.iteration[begin - 1])] = f"stage {number}{what}"
    return starts


def blend_edits(run: RunMetrics) -> dict[int, list[str]]:
    """Returns changes of the schedule and its sources, by the last iteration before each change.

    A source that first appears in the middle of the log is reported as added, even without a
    record in `restarts.jsonl`.
    """
    edits: dict[int, list[str]] = {}
    for restart in run.restarts:
        for change in restart.changes:
            edits.setdefault(restart.iteration, []).append(change)
    recorded = {change for changes in edits.values() for change in changes}
    for name, block in run.sources.items():
        first = np.flatnonzero(np.isfinite(block["weight"]))[:1].tolist()
        change = f"source {name} added"
        if first and first[0] > 0 and change not in recorded:
            edits.setdefault(int(run.iteration[first[0] - 1]), []).append(change)
    return {iteration: list(dict.fromkeys(changes)) for iteration, changes in edits.items()}


def describe_restarts(restarts: Sequence[Restart]) -> str:
    """Describes the number of restarts, their causes and the time lost by failures."""
    parts = []
    failures = [one for one in restarts if not one.is_planned]
    if failures:
        plural = "s" if len(failures) > 1 else ""
        lost = [one.seconds_lost for one in failures if np.isfinite(one.seconds_lost)]
        cost = f" ({format_duration(sum(lost))} lost)" if lost else ""
        is_known = all(one.cause == "failed" for one in failures)
        after = f" after {'' if plural else 'a '}failure{plural}" if is_known else ""
        parts.append(f"{len(failures)} restart{plural}{after}{cost}")
    planned = [one for one in restarts if one.is_planned]
    if planned:
        causes = ", ".join(dict.fromkeys(PLANNED_CAUSES[one.cause] for one in planned))
        parts.append(f"{len(planned)} planned restart{'s' if planned[1:] else ''} ({causes})")
    return ", ".join(parts)
