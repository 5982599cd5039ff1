"""Tests the report: what it reads and draws, and that the page loads no external resource."""

import base64
import html
import json
import math
import re
import sys
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from plotly.graph_objects import Figure, Scatter
from plotly.offline import get_plotlyjs
from tool_calls import call_tool

from megatron_chatflow.errors import UserError
from megatron_chatflow.report.charts import mixture_chart, probe_charts, source_colors
from megatron_chatflow.report.data import (
    deviation_from_plan,
    read_run,
    realised_shares,
    smooth,
    smoothing_window,
)
from megatron_chatflow.report.page import SCRIPT, STYLE, build_page, write_report

ROOT = Path(__file__).parents[3]
FLOORS = {"english": 2.9, "chinese": 3.4, "parallel": 2.3, "instruction": 1.9}
CONFIG = """model:
  num_layers: 4
  hidden_size: 256
  num_attention_heads: 8
data:
  seq_length: 256
train:
  train_iters: {train_iters}
  global_batch_size: 16
  bf16: true
parallel:
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 1
"""


def planned_weights(progress: float, names: list[str]) -> np.ndarray:
    """Returns a ramp from the first half of the sources to the second."""
    share = min(1.0, progress / 0.7)
    start = np.linspace(2, 0, len(names)) ** 2 + 0.01
    end = np.linspace(0.3, 2, len(names)) ** 2
    weights = (1 - share) * start / start.sum() + share * end / end.sum()
    return weights / weights.sum()


def validation_block(names: list[str], drawn: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns held-out losses after these numbers of samples.

    The first source is forgotten slightly.
    """
    block = {}
    for index, name in enumerate(names):
        gain = 1 - math.exp(-drawn[index] / 900)
        loss = FLOORS.get(name, 3.0) + 2.4 * (1 - gain) + (0.2 * gain if index == 0 else 0)
        block[name] = {"loss": loss, "bits_per_byte": loss / math.log(2) / 3.1}
    return block


def without_labels(page: str) -> str:
    """Returns the page without the labels that narrow screens show beside each cell."""
    return re.sub(r' data-label="[^"]*"', "", page)


def synthetic_records(
    num_iterations: int, names: list[str] | None = None, batch: int = 16, eval_interval: int = 50
) -> list[dict]:
    """Returns the log of a run of `num_iterations` with an exact blend and plausible curves."""
    names = names or list(FLOORS)
    rng = np.random.default_rng(0)
    credit, drawn = np.zeros(len(names)), np.zeros(len(names))
    records: list[dict] = []

    def validate(iteration: int) -> None:
        records.append({"iteration": iteration, "validation": validation_block(names, drawn)})

    validate(0)
    for iteration in range(1, num_iterations + 1):
        weights = planned_weights(iteration / num_iterations, names)
        counts = np.zeros(len(names), dtype=int)
        for _ in range(batch):
            credit += weights
            pick = int(np.argmax(credit))
            credit[pick] -= 1
            counts[pick] += 1
        drawn += counts
        loss = {
            name: FLOORS.get(name, 3.0)
            + 2.4 * math.exp(-drawn[index] / 900)
            + rng.normal(0, 0.12 / math.sqrt(max(counts[index], 1)))
            for index, name in enumerate(names)
        }
        warm = min(1.0, iteration / (0.05 * num_iterations))
        rate = 3e-4 * warm * 0.5 * (1 + math.cos(math.pi * iteration / num_iterations))
        records.append(
            {
                "iteration": iteration,
                "consumed_samples": iteration * batch,
                "consumed_tokens": iteration * batch * 256,
                "lm_loss": float(np.dot(counts, list(loss.values())) / batch),
                "learning_rate": rate,
                "grad_norm": float(rng.lognormal(-0.2, 0.3)) + 6 * math.exp(-iteration / 12),
                "tokens_per_second": 5200 + float(rng.normal(0, 160)) - 3000 * (iteration == 1),
                "tflops_per_gpu": 0.31,
                "mfu": 0.121,
                "batch_digest": f"{iteration:016x}",
                "sources": {
                    name: {
                        "loss": loss[name] if counts[index] else None,
                        "weight": float(weights[index]),
                        "realised": counts[index] / batch,
                        "tokens": int(drawn[index]) * 256,
                        "loss_tokens": int(counts[index]) * 200,
                        "epochs": float(drawn[index]) / (700 + 300 * index),
                    }
                    for index, name in enumerate(names)
                },
            }
        )
        if iteration % eval_interval == 0:
            validate(iteration)
    return records


def write_run(folder: Path, records: list[dict], train_iters: int | None = None) -> Path:
    """Writes a run's folder with these records."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    config = CONFIG.format(train_iters=train_iters or records[-1]["iteration"])
    (folder / "config.yaml").write_text(config)
    return folder


class PageCheck(HTMLParser):
    """Collects the URLs that a page would load, its unclosed elements and its figures."""

    VOID = {"meta", "link", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.figures: dict[str, Figure] = {}
        self.is_figure = False
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        for key in ("src", "href"):
            if values.get(key) and not re.match(r"#|data:,", values[key] or ""):
                self.loads.append(f"{tag} {values[key]}")
        self.is_figure = tag == "script" and values.get("type") == "application/json"
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        if tag == "div" and values.get("class") == "plot":
            self.title = values["aria-label"] or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.is_figure = False

    def handle_data(self, data: str) -> None:
        if self.is_figure:
            self.figures.setdefault(self.title, Figure(json.loads(data)))


def numbers(values: object) -> np.ndarray:
    """Returns a column of a figure, which plotly writes as a list or as base64 of its bytes."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])
    return np.array(values, dtype=np.float64)


def curves(figure: Figure) -> dict[str, Scatter]:
    """Returns the curves and areas of a chart by label, without marks and backgrounds."""
    shown = [trace for trace in figure.data if trace.yaxis is None and trace.meta]
    return {trace.meta: trace for trace in shown if trace.showlegend is not False}


def marks(figure: Figure) -> dict[str, dict[float, str]]:
    """Returns the labels of a chart's marks by kind and position."""
    found = {}
    for trace in figure.data:
        if trace.yaxis == "y2":
            assert sorted(trace.y[:2]) == [0, 1] and trace.y[2] is None  # a vertical line
            found[trace.name] = dict(zip(trace.x[::3], trace.text[::3], strict=True))
    return found


def check_page(page: str) -> PageCheck:
    """Checks that the page is well-formed, loads nothing, and has figures that plotly accepts."""
    check = PageCheck()
    library = get_plotlyjs()
    assert page.count(library) == 1
    check.feed(page.replace(library, ""))
    check.close()
    assert check.open == []
    assert check.loads == []
    assert "default-src 'none'" in check.policy and "http" not in check.policy
    assert "@import" not in STYLE and "url(" not in STYLE and "http" not in SCRIPT
    return check


def build(*folders: Path) -> str:
    return build_page(
        [read_run(folder) for folder in folders], datetime(2026, 1, 2, tzinfo=timezone.utc)
    )


def test_page_is_self_contained_and_holds_every_plot(tmp_path: Path) -> None:
    run = write_run(tmp_path / "chatflow", synthetic_records(300), train_iters=600)
    page = build(run)
    check = check_page(page)
    assert list(check.figures) == [
        "Mixture: planned against realised",
        "Draws minus plan",
        "Epochs per source",
        "Training loss per source",
        "Validation loss",
        "Validation bits per byte",
        "Learning rate",
        "Gradient norm",
        "Throughput",
    ]
    assert "50 % of the run" in page
    assert "hidden 256" in page and "TP 2, PP 1" in page
    assert "<b>seq_length</b>: 256" in page
    metrics = read_run(run)
    mixture = curves(check.figures["Mixture: planned against realised"])
    assert list(mixture) == list(FLOORS)
    for name, area in mixture.items():
        assert np.allclose(numbers(area.customdata), metrics.sources[name]["weight"])
        realised = smooth(metrics.sources[name]["realised"], smoothing_window(300))
        assert np.allclose(numbers(area.y), realised)
    held_out = curves(check.figures["Validation loss"])["chinese"]
    assert np.allclose(numbers(held_out.y), metrics.validation["chinese"]["loss"])
    assert numbers(held_out.x)[-1] == 300 * 16 * 256
    loss = check.figures["Training loss per source"]
    assert list(curves(loss)) == [*FLOORS, "all sources"]
    behind = [trace for trace in loss.data if trace.showlegend is False]
    assert np.allclose(numbers(behind[-1].y), metrics.columns["lm_loss"])


def test_long_runs_stay_small(tmp_path: Path) -> None:
    records = synthetic_records(3000, batch=4, eval_interval=500)
    page = build(write_run(tmp_path / "long", records))
    check_page(page)
    assert len(page) - len(get_plotlyjs()) < 700_000


def test_many_sources_are_grouped(tmp_path: Path) -> None:
    names = [f"source_{index:02d}" for index in range(40)]
    run = write_run(tmp_path / "many", synthetic_records(30, names, batch=80))
    metrics = read_run(run)
    assert len(source_colors(metrics)) == 12
    areas = curves(mixture_chart(metrics).figure)
    assert list(areas)[-1] == "others" and len(areas) == 13
    assert np.allclose(np.sum([area.y for area in areas.values()], axis=0), 1.0)
    assert np.allclose(np.sum([area.customdata for area in areas.values()], axis=0), 1.0)
    check_page(build(run))


def test_resumed_run_keeps_the_last_account_of_an_iteration(tmp_path: Path) -> None:
    records = synthetic_records(120, eval_interval=20)
    first = [record for record in records if record["iteration"] <= 100]
    again = [dict(record) for record in records if 80 < record["iteration"] <= 90]
    for record in again:
        record["learning_rate"] = 1.0
    folder = write_run(tmp_path / "resumed", first)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 101, "lm_lo\n')
        file.writelines(json.dumps(record) + "\n" for record in again)
        file.write('{"iteration": 91, "consu')
    metrics = read_run(folder)
    assert metrics.iteration.tolist() == list(range(1, 91))
    assert metrics.validation_iteration.tolist() == [0, 20, 40, 60, 80]
    assert metrics.columns["learning_rate"][79] < 1e-3
    assert metrics.columns["learning_rate"][80:].tolist() == [1.0] * 10
    assert [(one.iteration, one.reached) for one in metrics.restarts] == [(80, 100)]
    assert metrics.num_unreadable_lines == 2
    page = build(folder)
    check_page(page)
    assert "1 restart at iteration 80" in page and "2 unreadable lines skipped" in page


def test_deviation_of_an_exact_blend_stays_below_one_sample(tmp_path: Path) -> None:
    metrics = read_run(write_run(tmp_path / "run", synthetic_records(200)))
    deviation = deviation_from_plan(metrics)
    assert list(deviation) == list(FLOORS)
    assert max(np.abs(values).max() for values in deviation.values()) < 1
    # Draws that ignore the plan must be visible.
    assert deviation["english"].any()
    sparse = [record for record in synthetic_records(200) if record["iteration"] % 5 == 0]
    assert deviation_from_plan(read_run(write_run(tmp_path / "sparse", sparse))) == {}


def test_sparse_log_counts_every_draw(tmp_path: Path) -> None:
    every = synthetic_records(200)
    sparse = [record for record in every if record["iteration"] % 7 == 0]
    sparse_run = read_run(write_run(tmp_path / "sparse", sparse))
    dense_run = read_run(write_run(tmp_path / "dense", every))
    for name, shares in realised_shares(sparse_run).items():
        expected = realised_shares(dense_run)[name][:196].reshape(28, 7).mean(axis=1)
        assert np.allclose(shares, expected)


def test_running_run_with_one_iteration_and_missing_values(tmp_path: Path) -> None:
    record = synthetic_records(1)[1]
    record["grad_norm"] = float("nan")
    record["sources"]["chinese"]["loss"] = None
    del record["tokens_per_second"]
    page = build(write_run(tmp_path / "new", [record], train_iters=10))
    check_page(page)
    assert "Gradient norm" not in page and "Throughput" not in page


def test_names_are_escaped(tmp_path: Path) -> None:
    names = ["a</script><b>", 'q"&']
    page = build(write_run(tmp_path / "run", synthetic_records(60, names)))
    check = check_page(page)
    assert "<b>a" not in page and "a</script>" not in page
    mixture = curves(check.figures["Mixture: planned against realised"])
    assert list(mixture) == [html.escape(name, quote=False) for name in names]


def test_names_that_no_page_can_contain_are_left_out(tmp_path: Path) -> None:
    records = [*synthetic_records(60), *synthetic_records(61, ["half \ud83d"])[-1:]]
    folder = write_run(tmp_path / "run", records)
    metrics = read_run(folder)
    assert metrics.iteration[-1] == 60
    assert metrics.num_unreadable_lines == 1
    build(folder).encode()


def test_validation_table_compares_first_and_last(tmp_path: Path) -> None:
    blocks = [
        {"iteration": 0, "validation": {"zh": {"loss": 4.0, "bits_per_byte": 2.0}}},
        {"iteration": 9, "validation": {"zh": {"loss": 3.0, "bits_per_byte": 2.5}}},
    ]
    page = build(write_run(tmp_path / "run", blocks))
    page = without_labels(page)
    assert '<td>4</td><td>3</td><td><span class="good">▼ −25 %</span></td>' in page
    assert '<td>2</td><td>2.5</td><td><span class="bad">▲ +25 %</span></td>' in page


def test_steps_without_loss_tokens_are_counted(tmp_path: Path) -> None:
    records = [entry for entry in synthetic_records(10) if "lm_loss" in entry]
    records[4]["lm_loss"] = None
    for record in records[4:]:
        record["skipped_no_loss_tokens"] = 1
    page = build(write_run(tmp_path / "run", records))
    assert "Steps without loss tokens" in page and "Skipped updates" not in page


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, synthetic_records(100, ["english"] if index == 0 else None))
        for index, name in enumerate(("foundation", "chatflow"))
    ]
    page = build(*runs)
    check_page(page)
    assert "2 runs" in page and 'id="run-1"' in page
    assert "<th>foundation</th><th>chatflow</th>" in page


def test_averages_and_test_splits_are_drawn_beside_their_source(tmp_path: Path) -> None:
    records = synthetic_records(200)
    for record in records:
        block = record.get("validation", {})
        for suffix in (" (ema)", " (test)", " (test) (ema)"):
            block |= {f"{name}{suffix}": block[name] for name in FLOORS if block}
    figures = check_page(build(write_run(tmp_path / "run", records))).figures
    for title in ("Validation loss", "Validation bits per byte"):
        shown = curves(figures[title])
        assert len(shown) == 4 * len(FLOORS)
        for name in FLOORS:
            lines = [shown[f"{name}{end}"] for end in ("", " (ema)", " (test)", " (test) (ema)")]
            assert len({line.line.color for line in lines}) == 1
            assert len({line.line.dash for line in lines}) == 4
    # Without rows of training, sources are known by their validations only.
    only = [record for record in records if "validation" in record]
    only[-1]["iteration"] = 200
    figures = check_page(build(write_run(tmp_path / "only", only))).figures
    assert len(curves(figures["Validation loss"])) == 4 * len(FLOORS)


def test_what_schedules_change_is_drawn(tmp_path: Path) -> None:
    records = synthetic_records(60)
    for record in records:
        if "lm_loss" in record:
            at = record["iteration"]
            record["weight_decay"] = 0.01 * at
            for index, block in enumerate(record["sources"].values()):
                block["objective_weight"] = 1.0 + index * at
            if at % 10 == 0:
                record["layer_norms"] = {
                    f"layers.{k}": {"params": 10.0 + k, "grads": 0.1 * (k + 1)} for k in range(30)
                }
    shares = [[2**31, 2**31, 0, 0], [2**30] * 4]
    for number, row in enumerate([shares[1], shares[0]]):
        weights = dict(zip(FLOORS, row, strict=True))
        place = {"horizon": number, "begin": 480 * number, "end": 480 * (number + 1)}
        records.insert(30, {"iteration": 20, "decision": {**place, "weights": weights}})
    page = build(write_run(tmp_path / "run", records))
    figures = check_page(page).figures
    assert numbers(curves(figures["Weight decay"])["weight decay"].y)[-1] == pytest.approx(0.6)
    objective = curves(figures["Weight in the objective"])
    assert numbers(objective["instruction"].y)[-1] == 181.0
    decided = curves(figures["Decided weights"])["english"]
    assert numbers(decided.x).tolist() == [0, 480, 480, 960]
    assert numbers(decided.y).tolist() == [0.25, 0.25, 0.5, 0.5]
    layers = curves(figures["Gradient norm per layer"])
    assert len(layers) == 12 and {"layers.0", "layers.29"} <= set(layers)
    assert numbers(layers["layers.29"].x).tolist() == [10, 20, 30, 40, 50, 60]
    assert "12 of 30 layers" in page and "Weight norm per layer" in page


def test_probes_are_drawn_and_listed(tmp_path: Path) -> None:
    records = synthetic_records(40)
    for at in (0, 20, 40):
        result = {"first_bits_per_token": 9.0, "gain_bits_per_token": at / 10, "num_strings": 3}
        result["gain_bits_per_token_stderr"] = 0.125
        found = {"copy": result, "pairs <zh>": {"accuracy": 0.5, "difference_bits": 2.0}}
        records.append({"iteration": at, "probes": found, "probe_seconds": 1.0})
    records.append({"iteration": 41, "probes": [], "probe_seconds": None})
    run = write_run(tmp_path / "run", sorted(records, key=lambda record: record["iteration"]))
    page = build(run)
    check_page(page)
    assert "copy: gain bits per token" in page and "4 ± 0.125" in page
    assert "num strings" not in page and "pairs &lt;zh&gt;: accuracy" in page
    metrics = read_run(run)
    charts = probe_charts(metrics)
    assert [chart.title for chart in charts] == ["Probe copy", *["Probe pairs <zh>"] * 2]
    gain = curves(charts[0].figure)["gain"]
    assert numbers(gain.y)[:3].tolist() == [0.0, 2.0, 4.0]
    assert metrics.num_unreadable_lines == 0


def test_the_rate_that_is_not_every_tensor_s_is_described(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", synthetic_records(20))
    assert "As used by the optimizer." in build(folder)
    text = (folder / "config.yaml").read_text()
    settings = text.replace("train:\n", "train:\n  stages: [{lr_multipliers: {output: 2}}]\n")
    (folder / "config.yaml").write_text(settings + "optimizer: {decoupled_lr: 0.1}\n")
    page = build(folder)
    assert "The common rate; embedding and output layer have one of their own" in page
    assert "and stages multiply it" in page and "As used by the optimizer." not in page


def test_a_single_source_has_no_mixture(tmp_path: Path) -> None:
    page = build(write_run(tmp_path / "one", synthetic_records(60, ["english"])))
    check_page(page)
    assert "Mixture" not in page and "Draws minus plan" not in page and "all sources" not in page
    assert "Epochs per source" in page and "Training loss per source" in page


def test_errors_name_the_place(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder not found"):
        read_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no logged iteration"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\xfe\n[1]\n{"loss": 2}\n')
    with pytest.raises(UserError, match="no logged iteration"):
        read_run(tmp_path)
    run = write_run(tmp_path / "run", synthetic_records(2))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report([run], tmp_path / "file" / "page.html")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml: is not valid YAML"):
        read_run(run)


def test_a_missing_plotly_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", synthetic_records(3))
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UserError, match="plotly: is not installed.*pip install plotly"):
        write_report([run], tmp_path / "page.html")


def test_command_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", synthetic_records(20))
    done = call_tool("plot_run.py", run)
    assert done.returncode == 0, done.stderr
    assert "20 logged iterations" in done.stdout
    check_page((run / "report.html").read_text())
    assert sorted(path.name for path in run.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ]
    failed = call_tool("plot_run.py", tmp_path / "x")
    assert failed.returncode == 2
    assert "folder not found" in failed.stderr and failed.stderr.count("\n") == 1


def test_every_cell_names_its_column_for_narrow_screens(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, synthetic_records(60)) for name in ("one", 'two<"')]
    (folders[0] / "restarts.jsonl").write_text(
        '{"attempt": 2, "iteration": 20, "reached": 20, "seconds_lost": 1.0}\n'
    )
    page = build(*folders)
    check_page(page)
    tables = page.split('<div class="table">')[1:]
    assert len(tables) == 6
    for table in tables:
        body = table.split("</table>")[0].split("<tbody>")[1]
        num_cells = body.count("<td")
        assert num_cells > 0 and body.count(' data-label="') == num_cells
    assert 'data-label="Bits/byte change"' in page
    assert 'data-label="two&lt;&quot;"' in page
    narrow = page.split("@media (max-width:760px){")[1].split("\n@media")[0]
    assert "content:attr(data-label)" in narrow and "thead{display:none}" in narrow
