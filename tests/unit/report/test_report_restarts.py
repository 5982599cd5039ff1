"""Tests the pages of runs that were restarted, are still running, are compared, or are damaged."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from test_report import (
    build,
    check_page,
    curves,
    marks,
    numbers,
    synthetic_records,
    without_labels,
    write_run,
)

from megatron_chatflow.errors import UserError
from megatron_chatflow.report.data import (
    Records,
    RunReader,
    deviation_from_plan,
    read_run,
    samples_per_record,
)
from megatron_chatflow.report.page import follow_runs, run_names

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{constructor}}"


class TagCheck(HTMLParser):
    """Collects the elements of a page, and the attributes that would run code."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.handlers: list[str] = []
        self.num_scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.num_scripts += tag == "script"
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.handlers += [
            name for name, value in attrs if name in ("href", "src") and "script:" in (value or "")
        ]


def restart(attempt: int, iteration: int, reached: int, seconds: float) -> dict[str, float]:
    return {
        "attempt": attempt,
        "iteration": iteration,
        "reached": reached,
        "seconds_lost": seconds,
    }


def test_restarts_are_marked_and_listed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", synthetic_records(60))
    records = [restart(2, 20, 27, 90.0), restart(3, 20, 22, 30.0), restart(4, 40, 55, 7.5)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "restarts.jsonl").write_text(text + '{"attempt": 5, "iter')
    page = build(folder)
    figures = check_page(page).figures
    assert len(figures) == 9
    labels = [
        "2 restarts (2 min 0 s lost) at iteration 20",
        "1 restart (7.5 s lost) at iteration 40",
    ]
    for figure in figures.values():
        by = figure.layout.xaxis.title.text
        scale = {"Iteration": 1, "Samples consumed": 16, "Tokens consumed": 16 * 256}[by]
        assert marks(figure) == {
            "restarted": dict(zip((20 * scale, 40 * scale), labels, strict=True))
        }
    assert "3 restarts (2 min 7 s lost)" in page or "3 restarts (2 min 8 s lost)" in page
    row = '<tr><th scope="row">3</th><td>20</td><td>2</td><td>30 s</td>'
    assert row in without_labels(page)
    assert "1 unreadable line skipped" in page


def test_planned_ends_are_no_failures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", synthetic_records(60), train_iters=100)
    records = [
        {**restart(2, 20, 20, 900.0), "cause": "exit_interval"},
        {**restart(3, 30, 35, 60.0), "cause": "failed"},
        {**restart(4, 40, 40, 500.0), "cause": "stop_requested"},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "restarts.jsonl").write_text(text)
    (folder / "status.json").write_text('{"status": "exit_interval"}')
    page = build(folder)
    assert marks(check_page(page).figures["Learning rate"]) == {
        "restarted": {30: "1 restart after a failure (1 min 0 s lost) at iteration 30"},
        "planned restart": {
            20: "1 planned restart (exit interval) at iteration 20",
            40: "1 planned restart (stop requested) at iteration 40",
        },
    }
    assert '<div class="tile"><dt>Restarts</dt><dd>1<small>1 min 0 s lost</small>' in page
    assert "<dt>Planned restarts</dt><dd>2<small>" in page
    assert "exited at its exit interval" in page and "running or stopped" not in page
    assert "<td>1 min 0 s</td>" in without_labels(page) and ">failed or killed</td>" in page


def test_boundaries_of_stages_are_marked(tmp_path: Path) -> None:
    records = synthetic_records(40)
    for record in records:
        if "lm_loss" in record:
            record["stage"] = (record["iteration"] > 10) + (record["iteration"] > 30)
    folder = write_run(tmp_path / "run", records)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["train"]["stages"] = [{"trainable": [name]} for name in ("new_rows", "<b>", "all")]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    figures = check_page(build(folder)).figures
    for title in ("Training loss per source", "Learning rate"):
        assert list(marks(figures[title])["stage begins"].values()) == [
            "stage 1 trains &lt;b&gt; at iteration 10",
            "stage 2 trains all at iteration 30",
        ]


def test_edits_of_the_blend_are_marked(tmp_path: Path) -> None:
    records = synthetic_records(60)
    for entry in records:
        if "lm_loss" in entry and entry["iteration"] <= 45:
            del entry["sources"]["instruction"]
    folder = write_run(tmp_path / "run", records)
    edit = {**restart(2, 20, 20, 5.0), "cause": "exit_interval", "changes": ["schedule edited"]}
    (folder / "restarts.jsonl").write_text(json.dumps(edit) + "\n")
    edits = [
        "schedule edited at iteration 20",
        "source instruction added at iteration 45",
    ]
    figures = check_page(build(folder)).figures
    assert len(figures) > 5
    for figure in figures.values():
        assert list(marks(figure)["blend edited"].values()) == edits
    # The record that names the source is sufficient: the edit is not marked twice.
    edit["changes"].append("source instruction added")
    (folder / "restarts.jsonl").write_text(json.dumps(edit) + "\n")
    figures = check_page(build(folder)).figures
    edits = ["schedule edited, source instruction added at iteration 20"]
    for figure in figures.values():
        assert list(marks(figure)["blend edited"].values()) == edits


def test_rows_per_log_tell_of_the_deviation_from_the_plan(tmp_path: Path) -> None:
    fine = [entry for entry in synthetic_records(40) if "lm_loss" in entry]
    coarse = [{**entry, "interval": 4} for entry in fine[3::4]]
    for rows, has_deviation in ((coarse, True), (fine[3::4], False), (coarse[1:], False)):
        run = read_run(write_run(tmp_path / str(len(rows)) / str(has_deviation), rows))
        assert bool(deviation_from_plan(run)) == has_deviation
    run = read_run(write_run(tmp_path / "run", coarse))
    assert samples_per_record(run).tolist() == [4 * 16] * 10


def test_restarts_that_only_the_metrics_count(tmp_path: Path) -> None:
    records = [entry for entry in synthetic_records(30) if "lm_loss" in entry]
    for entry in records:
        entry["num_restarts"] = 0 if entry["iteration"] <= 12 else 2
        entry["seconds_lost"] = 0.0 if entry["iteration"] <= 12 else 33.0
    (one,) = read_run(write_run(tmp_path / "run", records)).restarts
    assert (one.iteration, one.attempt, one.seconds_lost) == (12, 3, 33.0)


def test_a_reader_reads_on_and_notices_a_file_that_was_cut(tmp_path: Path) -> None:
    records = synthetic_records(40)
    folder = write_run(tmp_path / "run", records[:10])
    path = folder / "metrics.jsonl"
    reader = RunReader(folder)
    assert reader.read().iteration[-1] == 9
    line = json.dumps(records[10])
    with path.open("a") as file:
        file.write(line[:50])
    assert reader.read().iteration[-1] == 9 and reader.read().num_unreadable_lines == 1
    with path.open("a") as file:
        file.write(line[50:] + "\n" + json.dumps(records[11]) + "\n")
    grown = reader.read()
    assert grown.iteration.tolist() == list(range(1, 12)) and grown.num_unreadable_lines == 0
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:6]))
    assert reader.read().iteration[-1] == 5
    beside = folder / "beside"
    beside.write_text("".join(json.dumps(record) + "\n" for record in records[:30]))
    beside.replace(path)  # as a resume does
    assert reader.read().iteration[-1] == 29


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    records = synthetic_records(30)
    folder, output = tmp_path / "run", tmp_path / "page.html"
    said: list[str] = []
    pages: list[str] = []

    def sleep(seconds: float) -> None:
        """Appends iterations to the run instead of sleeping."""
        assert seconds == 7
        if output.exists():
            pages.append(output.read_text())
        if not folder.exists():
            write_run(folder, records[:12], train_iters=30)
        else:
            num_lines = (folder / "metrics.jsonl").read_text().count("\n")
            with (folder / "metrics.jsonl").open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records[num_lines:][:10])

    (run,) = follow_runs([folder], output, 7, say=said.append, sleep=sleep)
    assert run.iteration[-1] == 30
    assert (
        said[0].startswith("waiting: ")
        and "folder not found" in said[0]
        and said[1] == "run: iteration 11"
    )
    assert pages and all('http-equiv="refresh" content="7"' in page for page in pages)
    assert 'http-equiv="refresh"' not in output.read_text()
    check_page(output.read_text())


def test_following_ends_with_ctrl_c(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", synthetic_records(5), train_iters=100)
    output = tmp_path / "page.html"

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    follow_runs([folder], output, 1, say=lambda text: None, sleep=interrupt)
    assert 'http-equiv="refresh"' not in output.read_text()


def test_runs_lie_over_each_other(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a" / "run", synthetic_records(80)),
        write_run(tmp_path / "b" / "run", synthetic_records(50, ["english", "chinese"], batch=32)),
    ]
    runs = [read_run(folder) for folder in folders]
    assert run_names(runs) == ["a/run", "b/run"]
    figures = check_page(build(*folders)).figures
    weight = curves(figures["english: planned weight"])
    assert list(weight) == ["a/run", "b/run"]
    assert figures["english: planned weight"].layout.xaxis.title.text == "Tokens consumed"
    ends = [numbers(line.x)[-1] for line in weight.values()]
    assert ends == [80 * 16 * 256, 50 * 32 * 256]
    assert list(curves(figures["instruction: training loss"])) == ["a/run"]
    held_out = curves(figures["chinese: held out"])
    assert np.allclose(numbers(held_out["a/run"].y), runs[0].validation["chinese"]["bits_per_byte"])
    assert run_names([runs[0], runs[0]]) == ["a/run (1)", "a/run (2)"]


def test_curves_and_areas_differ_without_colour(tmp_path: Path) -> None:
    names = [f"s{k}" for k in range(12)]
    folder = write_run(tmp_path / "run", synthetic_records(80, names))
    figures = check_page(build(folder)).figures
    areas = list(curves(figures["Mixture: planned against realised"]).values())
    assert len({area.fillpattern.shape for area in areas[:8]}) == 8
    lines = list(curves(figures["Training loss per source"]).values())
    assert len({(line.marker.symbol, line.line.dash) for line in lines}) == len(lines) == 13
    assert all("markers" in line.mode for line in lines[:12])


def test_hostile_names_and_values_stay_text(tmp_path: Path) -> None:
    names = [HOSTILE, "$x$ %{x}", "\u2028\u202e<b>", "x" * 3000]
    records = synthetic_records(20, names)
    folder = write_run(tmp_path / HOSTILE.replace("/", ""), records)
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "model": {"preset": HOSTILE, "num_layers": HOSTILE, "hidden_size": HOSTILE},
                "data": {"seq_length": HOSTILE},
                "train": {"global_batch_size": [HOSTILE], "train_iters": 1e400},
                "parallel": {"tensor_model_parallel_size": HOSTILE},
            }
        ).replace("Infinity", ".inf")
    )
    page = build(folder, folder)
    check = check_page(page)
    tags = TagCheck()
    tags.feed(page.replace(get_plotlyjs(), ""))
    assert not tags.found & {"img", "iframe", "object", "embed", "form", "base"}
    num_figures = page.count('<script type="application/json">')
    assert tags.num_scripts == num_figures + 2 and not tags.handlers
    shown = [label for figure in check.figures.values() for label in curves(figure)]
    assert any(label.startswith("&lt;/script&gt;&lt;img src=x") for label in shown)
    assert "&#36;x&#36; &#37;{x}" in shown
    assert not any(sign in label for label in shown for sign in "<>$%")


def test_absurd_numbers_are_gaps(tmp_path: Path) -> None:
    records = synthetic_records(50)
    for entry, value in zip(
        records[5:], (1e308, -1e308, 10**400, True, "7", [1], {}), strict=False
    ):
        for key in ("lm_loss", "grad_norm", "consumed_tokens", "tokens_per_second"):
            entry[key] = value
    records[20]["sources"] = [1, 2]
    records[21]["sources"]["chinese"] = None
    records[22]["consumed_tokens"] = 3  # less than before
    folder = write_run(tmp_path / "run", records)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"iteration": -1, "lm_loss": 1}\n{"iteration": 1e3}\n{"iteration": true}\n')
        file.write(b"[" * 100_000 + b"\n\xff\xfe\n\x00\n")
    page = build(folder)
    check_page(page)
    assert "6 unreadable lines" in page


def test_damaged_configuration_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", synthetic_records(3))
    for text in (b"\xff\xfe", b"[" * 20_000, b"a: !!python/object:os.system {}"):
        (folder / "config.yaml").write_bytes(text)
        with pytest.raises(UserError, match=r"config\.yaml: is not valid YAML"):
            read_run(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
KNOWN = st.sampled_from(
    [
        *("lm_loss", "sources", "validation", "consumed_tokens", "num_restarts"),
        *("decision", "layer_norms", "weight_decay"),
    ]
)
RECORD = st.dictionaries(KNOWN, JSON, max_size=5)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), RECORD), min_size=1, max_size=12), st.binary())
def test_any_record_makes_a_page(tmp_path_factory: pytest.TempPathFactory, rows, junk) -> None:
    folder = tmp_path_factory.mktemp("any") / "run"
    folder.mkdir()
    lines = [json.dumps({**record, "iteration": at}) for at, record in rows]
    (folder / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n" + junk)
    (folder / "restarts.jsonl").write_bytes(junk + b"\n" + json.dumps(rows[0][1]).encode())
    try:
        page = build(folder)
    except UserError as error:
        assert "no logged iteration" in str(error)
        return
    check_page(page)


def test_columns_keep_their_rows_together() -> None:
    records = Records(("a", "b"), "s", ("x",))
    records.append({"iteration": 1, "a": 1, "s": {"one": {"x": 1.5}}})
    records.append({"iteration": 2, "b": 2, "s": {"two": {"x": 2.5}}})
    assert records.column("a")[0] == 1 and math.isnan(records.column("a")[1])
    assert math.isnan(records.column("b")[0])
    assert list(records.by_source()) == ["one", "two"]
    assert math.isnan(records.column("two", "x")[0]) and records.column("two", "x")[1] == 2.5
    assert records.cut(2) and not records.cut(2)
    assert {len(column) for column in records.columns.values()} == {1}
