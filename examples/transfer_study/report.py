"""Writes tables and figures of the study from its results, and puts them into the pages.

Pages have pairs of markers, ``<!-- begin NAME -->`` and ``<!-- end NAME -->``. What lies between
them is generated, the rest is written by hand.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from examples.transfer_study.analysis import (
    EQUAL_GOAL,
    GOAL,
    Analysis,
    Cell,
    Difference,
    Setting,
    name_of,
    probe_numbers,
    rate_of_source,
)
from examples.transfer_study.arms import DESCRIPTION, EQUAL_ARMS, SOURCES
from examples.transfer_study.figures import CAPTIONS, draw_figures
from examples.transfer_study.prepare import EVALUATED
from examples.transfer_study.results import Results
from examples.transfer_study.study import PROPOSED, PROPOSED_STATIC, REFERENCE, Study, plan
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import write_output_file

HERE = Path("examples/transfer_study")
PAGES = (HERE / "README.md", Path("docs/transfer_study.md"))
_IMAGES = Path("docs/images")


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
    figures = draw_figures(analysis, study)
    written = []
    if folder is not None:
        sections["figures"] = _show(figures, ".")
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
        sections["figures"] = _show(figures, place)
        write_output_file(page, fill_page(page.read_text(encoding="utf-8"), sections, page))
        written.append(page)
    return written


def _show(figures: Iterable[str], place: str) -> str:
    """Returns the figures, each with its caption, which is also its alternative text."""
    return "\n\n".join(
        f"![{CAPTIONS[one]}]({place}/transfer_{one}.png)\n\n*{CAPTIONS[one]}*" for one in figures
    )


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
        "by_source": _by_source(analysis),
        "state": _state(analysis, results, study, left_out),
        "training_text": _training_text(analysis, results),
        "held_out": _held_out(results),
        "abilities": _abilities(analysis, results),
        "summary": _summary(analysis),
        "direction": _contrasts(analysis, "direction"),
        "ramp": _contrasts(analysis, "ramp"),
        "totals": _totals(analysis),
        "rates": _rates(analysis),
        "verdicts": _verdicts(analysis),
        "final": "\n\n".join(_final_table(analysis, one) for one in settings),
        "differences": "\n\n".join(_difference_table(analysis, one) for one in settings),
        "speed": "\n\n".join(_speed_table(analysis, one) for one in settings),
        "speed_summary": _speed_summary(analysis),
        "proposal": _proposal(analysis, results),
    }


def _primary_cells(analysis: Analysis) -> list[Cell]:
    """Returns the cell of the primary endpoint at each size that has it."""
    wanted = DESCRIPTION["primary_endpoint"]
    cells = [
        Cell(model, wanted["learning_rate"], wanted["tail"], wanted["arm"])
        for model in dict.fromkeys(cell.model for cell in analysis.runs)
    ]
    return [cell for cell in cells if analysis.difference(cell, wanted["measure"]) is not None]


def _primary(analysis: Analysis) -> str:
    """Returns the primary endpoint at each size, and what it would be with equal weights."""
    wanted = DESCRIPTION["primary_endpoint"]
    rows = []
    for cell in _primary_cells(analysis):
        for measure in (wanted["measure"], EQUAL_GOAL):
            found = analysis.difference(cell, measure, wanted["minus"])
            assert found is not None
            interval = found.interval
            shown = f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "-"
            is_primary = measure == wanted["measure"]
            verdict = analysis.verdict(cell, measure) if is_primary else "exploratory"
            name = "weights of the endpoint" if is_primary else "equal weights"
            rows.append([cell.model, name, _shown(found), shown, str(found.num_seeds), verdict])
    head = ["model", "mean of log losses", "dynamic - static", "95 % interval", "seeds", "verdict"]
    return _table(head, rows) if rows else "Not measured yet."


def _by_source(analysis: Analysis) -> str:
    """Returns what the primary endpoint consists of."""
    rows = []
    for cell in _primary_cells(analysis):
        static = replace(cell, arm=REFERENCE)
        pairs = analysis.values(cell, SOURCES[0]).keys() & analysis.values(static, SOURCES[0])
        for source in SOURCES:
            values = [analysis.values(one, source) for one in (static, cell)]
            before, after = (fmean(one[pair] for pair in pairs) for one in values)
            found = analysis.difference(cell, source)
            logs = analysis.contrast(cell, source, (cell.arm, REFERENCE), lambda a, b: log(a / b))
            assert found is not None and logs is not None
            share = analysis.share_of_run(cell, source)
            rows.append(
                [
                    cell.model,
                    source,
                    f"{before:.3f}",
                    f"{after:.3f}",
                    _marked(found),
                    f"{100 * logs.mean:+.1f} %",
                    "-"
                    if share is None
                    else "{:+.0f} % ({:+.0f} to {:+.0f})".format(*(100 * one for one in share)),
                    f"{GOAL[source] / sum(GOAL.values()) * logs.mean:+.4f}",
                ]
            )
    head = ["model", "source", "static", "dynamic", "difference", "relative"]
    return _table([*head, "worth in tokens", "part of the endpoint"], rows)


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


def _training_text(analysis: Analysis, results: Results) -> str:
    """Returns how much of the training text the arms of equal totals read."""
    rows = []
    for cell in _primary_cells(analysis):
        entry = next(iter(analysis.runs[analysis.reference(cell)].values()))
        # Results of earlier versions have no sizes of the training text.
        sizes = results.models[cell.model].get("training_tokens", {})
        for source, available in sizes.items():
            read = entry["tokens_by_source"][source]
            share = f"{100 * read / available:.0f} %"
            rows.append([cell.model, source, f"{available:,}", f"{read:,}", share])
    head = ["model", "source", "tokens of the training text", "read by an arm", "of an epoch"]
    return _table(head, rows) if rows else "Not measured yet."


def _abilities(analysis: Analysis, results: Results) -> str:
    """Returns what the probes measure before training and after the arms with the primary's tail.

    These are means over all seeds of an arm; differences of pairs are in other tables.
    """
    numbers = [
        (label, number)
        for label, wanted in DESCRIPTION["probes"].items()
        for number in (wanted["number"], wanted.get("beside"))
        if number is not None
    ]
    rows = []
    for primary in _primary_cells(analysis):
        static, known = analysis.reference(primary), results.foundations[primary.model]
        weights = sorted({one for _, one in analysis.runs[static]})
        groups = {"foundation": [known[one] for one in weights]}
        for arm in analysis.arms((primary.model, primary.learning_rate, primary.has_tail)):
            cell = static if arm == REFERENCE else replace(primary, arm=arm)
            groups[arm] = list(analysis.runs[cell].values())
        for name, entries in groups.items():
            row = []
            for label, number in numbers:
                probes = [probe_numbers(entry)[label] for entry in entries]
                values = [one[number] for one in probes if number in one]
                row.append(f"{fmean(values):.3f}" if values else "-")
            if set(row) != {"-"}:
                rows.append([primary.model, name, *row, str(len(entries))])
    head = [f"{label}: {number.replace('_', ' ')}" for label, number in numbers]
    return _table(["model", "arm", *head, "runs"], rows) if rows else "Not measured yet."


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


_NUMBERS = ("mean ± standard error", "seeds", "error rate of the rule")
_CONTRASTS: dict[str, tuple[tuple[str, ...], Callable[..., float]]] = {
    "direction": (("dynamic", "reversed"), lambda ours, mirrored: (ours - mirrored) / 2),
    "ramp": (
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
    return _by_setting(cells, analysis.measures, analysis.difference)


def _contrasts(analysis: Analysis, name: str) -> str:
    """Returns a contrast of the two ramps and the static arm, by measure and setting."""
    arms, combine = _CONTRASTS[name]
    cells = [Cell(*setting, REFERENCE) for setting in analysis.settings()]
    return _by_setting(
        cells,
        analysis.measures,
        lambda cell, measure: analysis.contrast(cell, measure, arms, combine),
    )


def _by_setting(
    cells: Sequence[Cell],
    measures: Sequence[str],
    find: Callable[[Cell, str], Difference | None],
) -> str:
    """Returns a table of differences, in bold where they are clear; settings without are left out.

    Args:
        cells: One arm in each setting.
        measures: The measures.
        find: Returns the difference of a cell in a measure.
    """
    found = {cell: {one: find(cell, one) for one in measures} for cell in cells}
    shown = {cell: fields for cell, fields in found.items() if any(fields.values())}
    if not shown:
        return "Not measured yet."
    rows = [
        [measure, *(_marked(fields[measure]) for fields in shown.values())]
        for measure in measures
        if any(fields[measure] for fields in shown.values())
    ]
    seeds = [max(one.num_seeds for one in fields.values() if one) for fields in shown.values()]
    rows.append(["seeds", *map(str, seeds)])
    names = [name_of((cell.model, cell.learning_rate, cell.has_tail)) for cell in shown]
    return _table(["measure", *names], rows)


def _totals(analysis: Analysis) -> str:
    """Returns the arms with other totals beside the static one, in settings that have them."""
    parts = []
    for setting in analysis.settings():
        arms = [arm for arm in analysis.arms(setting) if arm.startswith("chinese_")]
        if not arms:
            continue
        rows = []
        found = {arm: analysis.values(Cell(*setting, arm), "goal") for arm in (REFERENCE, *arms)}
        common = set.intersection(*(set(one) for one in found.values()))
        for arm in found:
            values = [analysis.values(Cell(*setting, arm), name) for name in EVALUATED]
            if common:
                means = [fmean(one[pair] for pair in common) for one in values]
                rows.append([arm, *(f"{one:.3f}" for one in means), str(len(common))])
        parts.append(f"**{name_of(setting)}**\n\n{_table(['arm', *EVALUATED, 'seeds'], rows)}")
    return "\n\n".join(parts) or "Not measured yet."


def _rates(analysis: Analysis) -> str:
    """Returns the mean learning rate at which the arms of equal totals have read each source."""
    rows = []
    for setting in analysis.settings():
        for arm in EQUAL_ARMS:
            cell = Cell(*setting, arm)
            if arm == REFERENCE:
                cell = analysis.reference(cell)
            if runs := analysis.runs.get(cell):
                found = [rate_of_source(next(iter(runs.values())), name) for name in SOURCES]
                shown = ["-" if rate is None else f"{100 * rate:.0f} %" for rate in found]
                rows.append([name_of(setting), arm, *shown])
    return _table(["setting", "arm", *SOURCES], rows)


def _verdicts(analysis: Analysis) -> str:
    """Returns the claim's table: dynamic against static, at every setting and source."""
    rows = []
    for setting in analysis.settings():
        cell = Cell(*setting, "dynamic")
        for measure in analysis.measures:
            found = analysis.difference(cell, measure)
            if found is not None:
                verdict = analysis.verdict(cell, measure)
                rows.append([name_of(setting), measure, *_numbers(found), verdict])
    return _table(["setting", "measure", *_NUMBERS, "verdict"], rows)


def _final_table(analysis: Analysis, setting: Setting) -> str:
    rows = []
    for arm in analysis.arms(setting):
        row = [arm]
        for measure in EVALUATED:
            values = list(analysis.values(Cell(*setting, arm), measure).values())
            spread = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            row.append(f"{fmean(values):.3f}{spread}")
        rows.append([*row, str(len(values))])
    return f"**{name_of(setting)}**\n\n" + _table(["arm", *EVALUATED, "seeds"], rows)


def _difference_table(analysis: Analysis, setting: Setting) -> str:
    """Returns differences to the static arm, of losses and of probes; clear ones are bold."""
    probes = [one for one in analysis.measures if one.endswith("is better)")]
    tables = []
    for measures in ([one for one in analysis.measures if one not in probes], probes):
        rows = [
            [arm, *(_marked(analysis.difference(Cell(*setting, arm), one)) for one in measures)]
            for arm in analysis.arms(setting)
            if arm != REFERENCE
        ]
        tables.append(_table(["arm", *measures], rows))
    return f"**{name_of(setting)}**, arm - static\n\n" + "\n\n".join(tables)


def _speed_table(analysis: Analysis, setting: Setting) -> str:
    """Returns when arms reach values of the static arm; "" without curves that show it.

    A cosine has no start of the decay.
    """
    values = (True, False) if setting[1] == "wsd" else (False,)
    rows = [
        [
            arm,
            "before the decay" if before_decay else "final",
            *(
                str(analysis.reach(Cell(*setting, arm), source, before_decay=before_decay))
                for source in EVALUATED
            ),
        ]
        for arm in analysis.arms(setting)
        if arm != REFERENCE and analysis.reach(Cell(*setting, arm), SOURCES[0]).shares
        for before_decay in values
    ]
    if not rows:
        return ""
    return f"**{name_of(setting)}**\n\n" + _table(["arm", "static's value", *EVALUATED], rows)


def _speed_summary(analysis: Analysis) -> str:
    """Returns when the dynamic arm reaches the final values of the static arm, by setting."""
    settings = [
        one
        for one in analysis.settings()
        if analysis.reach(Cell(*one, "dynamic"), SOURCES[0]).shares
    ]
    rows = [
        [source, *(str(analysis.reach(Cell(*one, "dynamic"), source)) for one in settings)]
        for source in EVALUATED
    ]
    return _table(["source", *map(name_of, settings)], rows)


def _proposal(analysis: Analysis, results: Results) -> str:
    """Returns the proposed schedules, and whether their predictions held."""
    parts = []
    for model, facts in results.proposals.items():
        goal = ", ".join(f"{name} {weight:g}" for name, weight in facts["goal"].items())
        knots = [
            [str(knot["at"]), *(f"{100 * knot['weights'][name]:.0f} %" for name in SOURCES)]
            for knot in facts["schedule"]["knots"]
        ]
        arms = (PROPOSED, PROPOSED_STATIC, facts["best_arm"])
        cells = {
            name: Cell(model, "wsd", False, arm)
            for name, arm in zip((PROPOSED, PROPOSED_STATIC, "best_arm"), arms, strict=True)
        }
        mixture = ", ".join(f"{name} {100 * w:.0f} %" for name, w in facts["best_static"].items())
        parts += [
            f"**{model}**, goal {goal}; linear between these iterations:",
            _table(["iteration", *SOURCES], knots),
            _predictions(analysis, facts, cells),
            f"`best_arm` is {facts['best_arm']}. `best_static` is the static blend with the best "
            f"prediction ({mixture}). The error of the fit is that of predicting an arm from the "
            "others, beside the standard deviation of the log losses.",
        ]
        parts += _comparisons(analysis, facts, cells)
    return "\n\n".join(parts) or "No schedule has been proposed yet."


def _predictions(analysis: Analysis, facts: Mapping[str, Any], cells: Mapping[str, Cell]) -> str:
    """Returns predicted and measured values: of the proposed schedule all, of others the goal."""
    rows = []
    for name, predicted in facts["predicted"].items():
        for measure in predicted if name == PROPOSED else ["goal"]:
            value, low, high = predicted[measure]
            row = [name, measure, f"{value:.3f} ({low:.3f} to {high:.3f})"]
            measured = analysis.values(cells[name], measure) if name in cells else {}
            if measured:
                mean = fmean(measured.values())
                row += [f"{mean:.3f}", "yes" if low <= mean <= high else "no"]
            else:
                row += ["not trained", "-"]
            if fit := facts["fit"].get(measure):
                error, spread = (100 * fit[key] for key in ("leave_arm_out_error", "spread"))
                row.append(f"{error:.1f} % of {spread:.1f} %")
            else:
                row.append("-")
            rows.append(row)
    head = ["schedule", "measure", "predicted", "measured", "inside", "error of the fit"]
    return _table(head, rows)


def _comparisons(
    analysis: Analysis, facts: Mapping[str, Any], cells: Mapping[str, Cell]
) -> list[str]:
    """Returns the proposed schedule minus its control and the best arm, if they were trained."""
    rows = []
    for name in (PROPOSED_STATIC, "best_arm"):
        for measure in facts["predicted"][PROPOSED]:
            found = analysis.difference(cells[PROPOSED], measure, cells[name].arm)
            if found is not None:
                ours, theirs = (facts["predicted"][one][measure][0] for one in (PROPOSED, name))
                row = [name, measure, f"{ours - theirs:+.4f}"]
                rows.append([*row, *_numbers(found), found.verdict])
    head = ["proposed minus", "measure", "predicted", *_NUMBERS, "verdict"]
    return [_table(head, rows)] if rows else []


def _shown(found: Difference) -> str:
    if found.num_seeds < 2:
        return f"{found.mean:+.4f}"
    digits = 4 if found.standard_error < 0.001 else 3
    return f"{found.mean:+.{digits}f} ± {found.standard_error:.{digits}f}"


def _marked(found: Difference | None) -> str:
    """Returns a difference, in bold if it is clear at its size."""
    if found is None:
        return "-"
    return f"**{_shown(found)}**" if found.verdict in ("lower", "higher") else _shown(found)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
