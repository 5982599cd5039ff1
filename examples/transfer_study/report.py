"""Writes tables and figures of the study from its results, and puts them into the pages.

Pages have pairs of markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. What lies between
them is generated, the rest is written by hand.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from examples.transfer_study.analysis import Analysis, Cell, Difference, paired
from examples.transfer_study.arms import ARMS, DESCRIPTION, EQUAL_ARMS
from examples.transfer_study.prepare import EVALUATED
from examples.transfer_study.study import PROPOSED, PROPOSED_STATIC, REFERENCE, Results, Study, plan
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file

HERE = Path("examples/transfer_study")
PAGES = (HERE / "README.md", Path("docs/transfer_study.md"))
_IMAGES = Path("docs/images")
# Readable without color: every arm has its own marker and line style.
_STYLES: dict[str, dict[str, Any]] = {
    "dynamic": {"marker": "o", "linestyle": "-", "color": "#0072b2"},
    "static": {"marker": "s", "linestyle": "--", "color": "#000000"},
    "reversed": {"marker": "^", "linestyle": "-.", "color": "#d55e00"},
    "two_stage": {"marker": "D", "linestyle": ":", "color": "#009e73"},
    "chinese_only": {"marker": "x", "linestyle": (0, (5, 1)), "color": "#cc79a7"},
    "chinese_then_instruction": {"marker": "+", "linestyle": (0, (1, 1)), "color": "#56b4e9"},
    "english_only": {"marker": "v", "linestyle": (0, (3, 3)), "color": "#999999"},
    PROPOSED: {"marker": "*", "linestyle": "-", "color": "#e69f00"},
    PROPOSED_STATIC: {"marker": "p", "linestyle": "--", "color": "#e69f00"},
}
_SHAPES = {"wsd": "constant rate, common decay", "cosine": "cosine over the whole run"}


def write_report(results: Results, study: Study, folder: Path | None) -> list[Path]:
    """Writes tables and figures and returns the files.

    Args:
        results: The results.
        study: The sizes.
        folder: Where to write ``report.md`` and the figures; None writes them into the pages of the
            repository.

    Raises:
        UserError: There are no results, matplotlib is missing, or a page lacks a marker.
    """
    entries, left_out = results.current(study)
    analysis = Analysis.of(entries.values())
    if not analysis.settings():
        raise UserError(f"{results.path}: has no complete static arm yet; run the study first")
    sections = make_sections(analysis, results, study, left_out)
    figures = draw_figures(analysis)
    written = []
    if folder is not None:
        sections["figures"] = "\n".join(f"![{one}](transfer_{one}.png)" for one in figures)
        text = "\n\n".join(f"## {name.capitalize()}\n\n{body}" for name, body in sections.items())
        write_output_file(folder / "report.md", f"# Results\n\n{text}\n")
        written.append(folder / "report.md")
    for name, content in figures.items():
        path = (folder or _IMAGES) / f"transfer_{name}.png"
        write_output_file(path, content)
        written.append(path)
    for page in PAGES if folder is None else ():
        up = Path(*[".."] * (len(page.parts) - 1))
        place = "images" if page.parts[0] == "docs" else str(up / _IMAGES)
        sections["figures"] = "\n".join(f"![{one}]({place}/transfer_{one}.png)" for one in figures)
        write_output_file(page, fill_page(page.read_text(encoding="utf-8"), sections, page))
        written.append(page)
    return written


def fill_page(text: str, sections: dict[str, str], page: Path) -> str:
    """Replaces what is between the markers of a page.

    Raises:
        UserError: A marker names no section.
    """

    def replace_one(match: re.Match[str]) -> str:
        name = match[1]
        if name not in sections:
            raise UserError(f"{page}: no section {name}; known: {', '.join(sections)}")
        return f"<!-- begin {name} -->\n{sections[name]}\n<!-- end {name} -->"

    pattern = re.compile(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", re.DOTALL)
    return pattern.sub(replace_one, text)


def make_sections(
    analysis: Analysis, results: Results, study: Study, left_out: dict[str, str]
) -> dict[str, str]:
    """Returns the generated parts of the pages by name."""
    settings = analysis.settings()
    return {
        "primary": _primary(analysis),
        "state": _state(analysis, results, study, left_out),
        "held_out": _held_out(results),
        "summary": _summary(analysis),
        "recency_summary": _recency_summary(analysis),
        "verdicts": _verdicts(analysis),
        "recency": _recency(analysis),
        "final": "\n\n".join(_final_table(analysis, one) for one in settings),
        "differences": "\n\n".join(_difference_table(analysis, one) for one in settings),
        "speed": "\n\n".join(_speed_table(analysis, one) for one in settings),
        "proposal": _proposal(analysis, results),
    }


def _primary(analysis: Analysis) -> str:
    """Returns the primary endpoint at each size."""
    wanted = DESCRIPTION["primary_endpoint"]
    rows = []
    for model in dict.fromkeys(cell.model for cell in analysis.runs):
        cell = Cell(model, wanted["learning_rate"], wanted["tail"], wanted["arm"])
        found = analysis.difference(cell, wanted["measure"], wanted["minus"])
        if found is not None:
            verdict = analysis.verdict(cell, wanted["measure"])
            rows.append([model, *_numbers(found), verdict])
    head = ["model", "dynamic - static, mean log loss", *_NUMBERS[1:], "verdict"]
    return _table(head, rows) if rows else "Not measured yet."


def _state(analysis: Analysis, results: Results, study: Study, left_out: dict[str, str]) -> str:
    """Returns what was trained, on what, and what is missing."""
    parts = []
    rows = []
    planned = plan(study)
    for model in study.models:
        known = results.foundations.get(model.name, {})
        mine = [
            entry
            for cell, pairs in analysis.runs.items()
            if cell.model == model.name
            for entry in pairs.values()
        ]
        num_planned = sum(run.model == model.name for run in planned)
        for device in sorted({one["device"] for one in (*mine, *known.values())}):
            here = [one for one in mine if one["device"] == device]
            all_here = here + [one for one in known.values() if one["device"] == device]
            probes = sum(one["probe_seconds"] for one in here)
            trained = sum(one["training_seconds"] for one in here)
            rows.append(
                [
                    model.name,
                    f"{device}{'' if all(one['bf16'] for one in all_here) else ', fp32'}",
                    f"{len(here)} of {num_planned}",
                    str(len(all_here) - len(here)),
                    f"{sum(one['tokens'] for one in all_here) / 1e6:.1f}M",
                    f"{sum(one['flops'] for one in all_here):.2g}",
                    f"{sum(one['core_seconds'] for one in all_here) / 3600:.1f}",
                    f"{100 * probes / trained:.1f} %" if trained else "-",
                ]
            )
    head = ["model", "device", "runs", "foundations", "tokens", "FLOPs", "core-hours", "probes"]
    parts.append(_table(head, rows))
    rows = [
        [
            model,
            weights[:8],
            f"{facts['tokens']:,}",
            " to ".join(f"{facts['curve'][k]['bits_per_byte']['english']:.3f}" for k in (0, -1)),
            f"{facts['final']['english']:.3f}",
            f"{facts['final']['chinese']:.3f}",
        ]
        for model, known in sorted(results.foundations.items())
        for weights, facts in sorted(known.items())
    ]
    head = ["foundation", "weights", "tokens", "English, on the text of the curves"]
    parts.append(_table([*head, "English, on all held-out text", "Chinese"], rows))
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {k}: {why}" for k, why in left_out.items()))
    return "\n\n".join(parts)


def _held_out(results: Results) -> str:
    """Returns documents and tokens of the held-out text."""
    rows = [
        [
            model,
            source,
            str(one["documents"]),
            f"{one['tokens']:,}",
            str(one["dropped"]),
            f"{100 * one['shared_with_training']:.1f} %",
        ]
        for model, facts in sorted(results.models.items())
        for source, one in facts["held_out"].items()
    ]
    head = ["model", "source", "documents", "tokens", "dropped as near-duplicates"]
    return _table([*head, "still shared with training text"], rows)


_NUMBERS = ("mean ± standard error", "seeds", "by noise alone")
_RECENCY_PARTS: dict[str, tuple[tuple[str, ...], Callable[..., float]]] = {
    "recency, (dynamic - reversed) / 2": (
        ("dynamic", "reversed"),
        lambda ours, mirrored: (ours - mirrored) / 2,
    ),
    "the rest, (dynamic + reversed) / 2 - static": (
        ("dynamic", "reversed", REFERENCE),
        lambda ours, mirrored, static: (ours + mirrored) / 2 - static,
    ),
}


def _numbers(found: Difference) -> list[str]:
    rate = found.false_positive_rate
    shown = f"{100 * rate:.0f} %" if np.isfinite(rate) else "-"
    return [_shown(found), str(found.num_seeds), shown]


def _summary(analysis: Analysis) -> str:
    """Returns dynamic minus static: a row for each measure, a column for each setting."""
    cells = [Cell(*setting, "dynamic") for setting in analysis.settings()]
    return _by_setting(
        cells, analysis.measures, lambda cell, measure: [analysis.difference(cell, measure)]
    )


def _recency_summary(analysis: Analysis) -> str:
    """Returns recency and the rest as `_recency` does, with a column for each setting."""
    cells = [Cell(*setting, REFERENCE) for setting in analysis.settings()]
    parts = _RECENCY_PARTS.values()
    return _by_setting(
        cells,
        ("goal", *EVALUATED),
        lambda cell, measure: [analysis.contrast(cell, measure, *part) for part in parts],
    )


def _by_setting(
    cells: Sequence[Cell],
    measures: Sequence[str],
    find: Callable[[Cell, str], Sequence[Difference | None]],
) -> str:
    """Returns a table of differences, in bold where they are clear; settings without are left out.

    Args:
        cells: One arm in each setting.
        measures: The measures.
        find: Returns the differences that share a field of the table.
    """
    found = {cell: {one: find(cell, one) for one in measures} for cell in cells}
    shown = {
        cell: fields
        for cell, fields in found.items()
        if any(one is not None for field in fields.values() for one in field)
    }
    if not shown:
        return "Not measured yet."
    rows = [
        [measure, *("; ".join(map(_marked, fields[measure])) for fields in shown.values())]
        for measure in measures
    ]
    numbers = [
        next(one for field in fields.values() for one in field if one is not None)
        for fields in shown.values()
    ]
    rows.append(["seeds", *(str(one.num_seeds) for one in numbers)])
    rows.append(["clear by noise alone", *(_numbers(one)[2] for one in numbers)])
    names = [_name_of((cell.model, cell.learning_rate, cell.has_tail)) for cell in shown]
    return _table(["measure", *names], rows)


def _verdicts(analysis: Analysis) -> str:
    """Returns the claim's table: dynamic against static, at every setting and source."""
    rows = []
    for setting in analysis.settings():
        cell = Cell(*setting, "dynamic")
        for measure in analysis.measures:
            found = analysis.difference(cell, measure)
            if found is not None:
                verdict = analysis.verdict(cell, measure)
                rows.append([_name_of(setting), measure, *_numbers(found), verdict])
    return _table(["setting", "measure", *_NUMBERS, "verdict"], rows)


def _recency(analysis: Analysis) -> str:
    """Returns what recency explains: half the difference between a ramp and its mirror image."""
    rows = []
    for setting in analysis.settings():
        for name, (arms, combine) in _RECENCY_PARTS.items():
            for measure in ("goal", *EVALUATED):
                found = analysis.contrast(Cell(*setting, REFERENCE), measure, arms, combine)
                if found is not None:
                    clear = "yes" if found.verdict in ("lower", "higher") else found.verdict
                    rows.append([_name_of(setting), name, measure, *_numbers(found), clear])
    return _table(["setting", "part", "measure", *_NUMBERS, "clear"], rows)


def _final_table(analysis: Analysis, setting: tuple[str, str, bool]) -> str:
    rows = []
    for arm in _in_order(analysis.arms(setting)):
        cell = Cell(*setting, arm)
        row = [arm]
        for measure in _measures(analysis, cell):
            values = list(analysis.values(cell, measure).values())
            spread = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            row.append(f"{fmean(values):.3f}{spread}" if values else "-")
        rows.append([*row, str(len(analysis.values(cell, analysis.measures[0])))])
    measures = _measures(analysis, Cell(*setting, REFERENCE))
    return f"**{_name_of(setting)}**\n\n" + _table(["arm", *measures, "seeds"], rows)


def _difference_table(analysis: Analysis, setting: tuple[str, str, bool]) -> str:
    """Returns paired differences to the static arm; those that exceed two errors are bold."""
    rows = []
    for arm in _in_order(analysis.arms(setting)):
        if arm == REFERENCE:
            continue
        cell = Cell(*setting, arm)
        row = [arm]
        for measure in _measures(analysis, cell):
            row.append(_marked(analysis.difference(cell, measure)))
        rows.append(row)
    measures = _measures(analysis, Cell(*setting, REFERENCE))
    return f"**{_name_of(setting)}**, arm - static\n\n" + _table(["arm", *measures], rows)


def _speed_table(analysis: Analysis, setting: tuple[str, str, bool]) -> str:
    """Returns when arms reach two values of the static arm."""
    rows = [
        [
            arm,
            "before the decay" if before_decay else "final",
            *(
                str(analysis.reach(Cell(*setting, arm), source, before_decay=before_decay))
                for source in EVALUATED
            ),
        ]
        for arm in _in_order(analysis.arms(setting))
        if arm != REFERENCE
        for before_decay in (True, False)
    ]
    return f"**{_name_of(setting)}**\n\n" + _table(["arm", "static's value", *EVALUATED], rows)


def _proposal(analysis: Analysis, results: Results) -> str:
    """Returns whether the predictions of the proposed schedules held."""
    parts = []
    for model, facts in results.proposals.items():
        goal = ", ".join(f"{name} {weight:g}" for name, weight in facts["goal"].items())
        rows = []
        cells = {
            "proposed": Cell(model, "wsd", False, PROPOSED),
            "best arm": Cell(model, "wsd", False, facts["best_arm"]),
        }
        for name in facts["predicted"]:
            value, low, high = facts["predicted"][name]
            row = [name, f"{value:.3f} ({low:.3f} to {high:.3f})"]
            measured = list(analysis.values(cells["proposed"], name).values())
            if measured:
                mean = fmean(measured)
                row += [f"{mean:.3f}", "yes" if low <= mean <= high else "no"]
            else:
                row += ["not run yet", "-"]
            best = list(analysis.values(cells["best arm"], name).values())
            fit = facts["fit"][name]
            error = f"{100 * fit['leave_arm_out_error']:.1f} % of {100 * fit['spread']:.1f} %"
            rows.append([*row, f"{fmean(best):.3f}" if best else "-", error])
        head = ["source", "predicted", "measured", "inside", f"best arm ({facts['best_arm']})"]
        text = f"**{model}**, goal {goal}:\n\n"
        text += _table([*head, "leave-arm-out error of spread"], rows)
        if facts["extrapolated"]:
            text += f"\n\nThe fit extrapolates for {', '.join(facts['extrapolated'])}."
        comparisons = []
        for other in (PROPOSED_STATIC, facts["best_arm"]):
            for measure in ("goal", *facts["predicted"]):
                found = analysis.difference(cells["proposed"], measure, other)
                if found is not None:
                    comparisons.append([other, measure, *_numbers(found), found.verdict])
        if comparisons:
            head = ["proposed minus", "measure", *_NUMBERS, "verdict"]
            text += "\n\n" + _table(head, comparisons)
        parts.append(text)
    return "\n\n".join(parts) or "No schedule has been proposed yet."


def draw_figures(analysis: Analysis) -> dict[str, bytes]:
    """Draws all figures as PNG, by name.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "matplotlib is not installed; run pip install 'megatron-chatflow[report]'"
        ) from None
    compared = {*EQUAL_ARMS, PROPOSED} - {REFERENCE}
    settings = [one for one in analysis.settings() if compared & set(analysis.arms(one))]
    figures = {}
    if settings:
        figures |= {
            "differences": _draw_differences(Figure, analysis, settings),
            "curves": _draw_curves(Figure, analysis, settings),
        }

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    arms = _in_order([cell.arm for cell in analysis.runs])
    grid = figure.subplots(2, -(-len(arms) // 2), squeeze=False).ravel()
    for axes, arm in zip(grid, arms, strict=False):
        cells = [cell for cell in analysis.runs if cell.arm == arm]
        cell = min(cells, key=lambda cell: cell.has_tail)
        _draw_shares(axes, next(iter(analysis.runs[cell].values())), arm)
    for axes in grid[len(arms) :]:
        axes.set_axis_off()
    grid[0].legend(fontsize="small")
    figures["arms"] = _png(figure)
    return figures


def _draw_differences(
    make_figure: Any, analysis: Analysis, settings: Sequence[tuple[str, str, bool]]
) -> bytes:
    """Draws final differences to the static arm by source, for each setting."""
    figure = make_figure(figsize=(11, 2.6 * len(settings)), layout="constrained")
    rows = figure.subplots(len(settings), 1, squeeze=False)[:, 0]
    for axes, setting in zip(rows, settings, strict=True):
        arms = [arm for arm in _in_order(analysis.arms(setting)) if arm in _STYLES]
        arms = [arm for arm in arms if arm in (*EQUAL_ARMS, PROPOSED) and arm != REFERENCE]
        for number, arm in enumerate(arms):
            found = [analysis.difference(Cell(*setting, arm), name) for name in EVALUATED]
            places = [k for k, one in enumerate(found) if one is not None]
            shown = [one for one in found if one is not None]
            axes.errorbar(
                [k + 0.15 * (number - (len(arms) - 1) / 2) for k in places],
                [one.mean for one in shown],
                yerr=[2 * _finite(one.standard_error) for one in shown],
                label=arm,
                capsize=3,
                **{**_STYLES[arm], "linestyle": "none"},
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(EVALUATED)), EVALUATED)
        axes.set_ylabel("bits per byte\nminus static")
        axes.set_title(_name_of(setting), fontsize="medium")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _png(figure)


def _draw_curves(
    make_figure: Any, analysis: Analysis, settings: Sequence[tuple[str, str, bool]]
) -> bytes:
    """Draws differences to the static arm over the run, for each setting."""
    shown_sources = ("chinese", "english", "instruction")
    figure = make_figure(figsize=(12, 3.2 * len(settings)), layout="constrained")
    grid = figure.subplots(len(settings), len(shown_sources), squeeze=False)
    for line, setting in zip(grid, settings, strict=True):
        for axes, source in zip(line, shown_sources, strict=True):
            for arm in _in_order(analysis.arms(setting)):
                if arm not in (*EQUAL_ARMS, PROPOSED) or arm == REFERENCE:
                    continue
                tokens, found = curve_of_differences(analysis, Cell(*setting, arm), source)
                axes.errorbar(
                    tokens,
                    [one.mean for one in found],
                    yerr=[2 * _finite(one.standard_error) for one in found],
                    label=arm,
                    capsize=2,
                    **{**_STYLES[arm], "markersize": 4},
                )
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_title(source, fontsize="medium")
            axes.set_xlabel("million tokens")
        name = _name_of(setting).replace(", common decay", ",\ncommon decay")
        line[0].set_ylabel(f"{name}\nbits per byte minus static", fontsize="small")
        line[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _png(figure)


def curve_of_differences(
    analysis: Analysis, cell: Cell, source: str
) -> tuple[list[float], list[Difference]]:
    """Returns tokens in millions, and paired differences to the static arm at these."""
    ours = analysis.runs[cell]
    static = analysis.runs.get(analysis.reference(cell), {})
    points: dict[int, list[float]] = {}
    for pair in sorted(ours.keys() & static.keys()):
        for one, other in zip(ours[pair]["curve"], static[pair]["curve"], strict=True):
            difference = one["bits_per_byte"][source] - other["bits_per_byte"][source]
            points.setdefault(one["tokens"], []).append(difference)
    found = {tokens: paired(values) for tokens, values in sorted(points.items())}
    return [tokens / 1e6 for tokens in found], [one for one in found.values() if one is not None]


def _draw_shares(axes: Any, entry: Mapping[str, Any], title: str) -> None:
    """Draws the shares of the sources over a run, with a line style for each."""
    rows = [row["tokens"] for row in entry["trajectory"]]
    places = (np.arange(len(rows)) + 0.5) / len(rows)
    for name, style in zip(EVALUATED, ("-", "--", ":", "-."), strict=False):
        axes.plot(places, [row.get(name, 0) / sum(row.values()) for row in rows], style, label=name)
    axes.set_title(title, fontsize="small")
    axes.set_ylim(-0.02, 1.02)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without the date and version, the same results give the same file.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _finite(value: float) -> float:
    return value if np.isfinite(value) else 0.0


def _in_order(arms: Sequence[str]) -> list[str]:
    return [arm for arm in (*ARMS, PROPOSED, PROPOSED_STATIC) if arm in arms]


def _measures(analysis: Analysis, cell: Cell) -> list[str]:
    return [name for name in analysis.measures if analysis.values(cell, name)]


def _name_of(setting: tuple[str, str, bool]) -> str:
    model, shape, has_tail = setting
    return f"{model}, {_SHAPES[shape]}{', common tail' if has_tail else ''}"


def _shown(found: Difference) -> str:
    if found.num_seeds < 2:
        return f"{found.mean:+.3f}"
    digits = 4 if found.standard_error < 0.001 else 3
    return f"{found.mean:+.{digits}f} ± {found.standard_error:.{digits}f}"


def _marked(found: Difference | None) -> str:
    """Returns a difference, in bold if it is clear at its size."""
    if found is None:
        return "-"
    return f"**{_shown(found)}**" if found.verdict in ("lower", "higher") else _shown(found)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
