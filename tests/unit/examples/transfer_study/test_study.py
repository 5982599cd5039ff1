"""Tests the study's schedules, its bookkeeping, and its analysis of scripted results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import train_tokenizer

from examples.transfer_study import __main__ as command
from examples.transfer_study import prepare, report, study
from examples.transfer_study.analysis import Analysis, Cell, first_crossing, paired, values_of
from examples.transfer_study.arms import (
    ARMS,
    EQUAL_ARMS,
    SOURCES,
    Budget,
    check_equal_totals,
    draws,
    make_schedule,
    random_schedule,
    totals,
)
from examples.transfer_study.prepare import EVALUATED, Tokens, choose_documents
from examples.transfer_study.propose import observations, propose
from examples.transfer_study.study import FULL, QUICK, Prepared, Results, Run, make_config, plan
from examples.transfer_study.worker import summarize
from megatron_chatflow.blend import Schedule
from megatron_chatflow.config import load_config
from megatron_chatflow.config.yaml_file import dump_yaml
from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.errors import UserError
from megatron_chatflow.training.dry_run import dry_run

BUDGETS = [model.budget for one in (FULL, QUICK) for model in one.models]


@pytest.mark.parametrize("budget", [*BUDGETS, Budget(120, 16), Budget(24, 8), Budget(16, 4)])
def test_arms_of_equal_totals_draw_the_same_samples(budget: Budget) -> None:
    check_equal_totals(budget)
    for arm in EQUAL_ARMS:  # the same by hand: totals, order within sources, and not one order
        plain = draws(make_schedule(arm, budget, has_tail=False), budget)
        tailed = draws(make_schedule(arm, budget, has_tail=True), budget)
        assert {name: len(one) for name, one in plain.items()} == totals(budget)
        assert {name: one.tolist() for name, one in plain.items()} == {
            name: list(range(count)) for name, count in totals(budget).items()
        }
        assert {name: len(one) for name, one in tailed.items()} == totals(budget)


def test_a_schedule_that_is_not_closed_has_other_totals() -> None:
    """The check can fail: without closing, a ramp misses the totals."""
    budget = Budget(240, 8)
    block = make_schedule("dynamic", budget, has_tail=False)
    block["knots"] = [knot for knot in block["knots"] if max(knot["weights"].values()) < 1 << 20]
    block["knots"][-1]["weights"]["english"] += 1
    assert {name: len(one) for name, one in draws(block, budget).items()} != totals(budget)


def test_directions_and_stages_of_the_arms() -> None:
    budget = Budget(240, 8)

    def shares(arm: str, at: int, has_tail: bool = False) -> dict[str, float]:
        block = make_schedule(arm, budget, has_tail=has_tail)
        weights = Schedule.from_dict(block, SOURCES, 8).weights(at * 8) / 2**32
        return dict(zip(SOURCES, weights.tolist(), strict=True))

    for t in range(2, 238, 5):  # the reversed arm is the dynamic one backwards, without the ends
        ours, mirrored = shares("dynamic", t), shares("reversed", 239 - t)
        assert ours == pytest.approx(mirrored, abs=1e-8)
    assert shares("dynamic", 0)["instruction"] == 0
    assert shares("two_stage", 10)["instruction"] == 0
    assert shares("two_stage", 230)["instruction"] == 1
    assert shares("chinese_only", 100)["chinese"] == 1
    assert shares("chinese_then_instruction", 239)["instruction"] == 1
    tails = [shares(arm, 230, has_tail=True) for arm in ARMS]
    assert all(tail == tails[0] for tail in tails)
    assert min(tails[0].values()) > 0.1
    counts = {name: len(one) for name, one in draws(random_schedule(3, budget), budget).items()}
    assert sum(counts.values()) == budget.num_samples
    assert random_schedule(3, budget) == random_schedule(3, budget) != random_schedule(4, budget)


def test_the_order_of_the_runs_makes_parts_useful() -> None:
    runs = plan(FULL)
    assert len({run.key for run in runs}) == len(runs)
    first = [run for run in runs if run.model == "small" and run.learning_rate == "wsd"]
    assert {run.seed for run in first[: 2 * len(ARMS)]} == {1}
    kinds = [(run.model, run.learning_rate, run.arm.startswith("random_")) for run in runs]
    order = [("small", "wsd", False), ("small", "cosine", False), ("smollm2", "wsd", False)]
    assert list(dict.fromkeys(kinds)) == [*order, ("small", "wsd", True)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small datasets where the study expects those of the small model, and a tokenizer."""
    monkeypatch.setattr(study, "WORK", tmp_path)
    for prefix in {Path(p.with_suffix("")) for p in FULL.models[0].tokens.files()}:
        prefix.parent.mkdir(exist_ok=True)
        writer = IndexedDatasetWriter(prefix, np.uint16)
        tokens = np.arange(8 * 513, dtype=np.uint16) % 500
        for _ in range(75):
            writer.add_document(tokens)
        writer.finalize()
    return train_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("which", [FULL, QUICK])
def test_configurations_pass_a_dry_run(which: study.Study, data: Path, tmp_path: Path) -> None:
    configs = [make_config(run, which) for run in plan(which) if run.model == "small"]
    chosen = {json.dumps(config["optimizer"]): config for config in configs}
    configs = [*chosen.values(), study.foundation_config(which.model("small"))]
    for config in configs:
        config["tokenizer"]["tokenizer_model"] = str(data)
        config["checkpoint"] = {"from_scratch": True}
        path = tmp_path / "run.yaml"
        path.write_text(dump_yaml(config))
        text = dry_run(load_config(path), 1)
        iterations = config["train"]["train_iters"]
        assert f"{iterations} iterations of 8 samples of 512 tokens" in text


def test_a_digest_covers_what_determines_a_run() -> None:
    run = Run("small", "dynamic", "wsd", False, 1)
    config = make_config(run, FULL)
    facts = Prepared("corpus", "foundation", Path("a"))
    digest = facts.digest(config)
    assert digest == replace(facts, checkpoint=Path("b")).digest(make_config(run, FULL))
    others = [
        replace(facts, corpus="x").digest(config),
        replace(facts, foundation="x").digest(config),
        facts.digest(make_config(run, replace(FULL, probes=("copy",)))),
        facts.digest(make_config(replace(run, seed=2), FULL)),
        facts.digest(make_config(replace(run, arm="static"), FULL)),
        facts.digest(make_config(replace(run, has_tail=True), FULL)),
        facts.digest(make_config(replace(run, learning_rate="cosine"), FULL)),
    ]
    assert len({digest, *others}) == len(others) + 1


def scripted(run: Run, values: dict[str, float]) -> dict[str, Any]:
    """Returns an entry of results whose evaluations are made up."""
    model = FULL.model(run.model)
    budget = study.run_budget(run, model)
    tokens = budget.num_samples * 512
    final = dict.fromkeys(EVALUATED, 3.0) | values
    points = [5.0, 4.5, None]
    block = {"knots": [{"at": 0, "weights": {"english": 1, "chinese": 1}}]}
    if run.arm != study.PROPOSED:
        block = make_config(run, FULL)["data"]["schedule"]
    schedule = Schedule.from_dict(block, SOURCES, 8)
    parts = range(0, budget.num_samples, budget.num_samples // 20)
    rows = [schedule.weights(at) / 2**32 * tokens / len(parts) for at in parts]
    return {
        **vars(run),
        "digest": Prepared("c", "f", Path()).digest(make_config(run, FULL, block)),
        "corpus": "c",
        "foundation": "f",
        "schedule": block,
        "tokens": tokens,
        "flops": 1,
        "core_seconds": 1.0,
        "final": final,
        "probes": {},
        "curve": [
            {
                "tokens": tokens * k // (len(points) - 1),
                "bits_per_byte": {name: final[name] if value is None else value for name in final},
            }
            for k, value in enumerate(points)
        ],
        "trajectory": [
            {"learning_rate": 1e-3, "tokens": dict(zip(SOURCES, row.tolist(), strict=True))}
            for row in rows
        ],
    }


def write_results(path: Path, entries: list[dict[str, Any]]) -> Results:
    results = Results(path)
    results.foundations = {
        model.name: {"digest": "f", "tokens": 1, "curve": [scripted_point()], **scripted_point()}
        for model in FULL.models
    }
    for entry in entries:
        run = Run(*(entry[name] for name in ("model", "arm", "learning_rate", "has_tail", "seed")))
        results.entries[run.key] = entry
    results.write()
    return results


def scripted_point() -> dict[str, Any]:
    values = dict.fromkeys(EVALUATED, 4.0)
    return {"bits_per_byte": values, "final": values}


def test_complete_runs_are_skipped_and_changed_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pool that records its jobs takes the place of the workers."""
    small = replace(FULL.models[0], seeds=(1,), tails=(False,), learning_rates=("wsd",))
    sizes = replace(FULL, models=(small,), folder=tmp_path)
    runs = [(run, make_config(run, sizes)) for run in plan(sizes)[:3]]
    facts = Prepared("c", "f", tmp_path)
    trained: list[str] = []

    class Recorder(study.Workers):
        def train(self, job: Any) -> dict[str, Any]:
            trained.append(job["folder"])
            run = next(run for run, _ in runs if job["folder"] == str(tmp_path / run.key))
            if run.arm == "reversed" and len(trained) <= 3:
                raise UserError("killed")
            return {"final": {"chinese": 3.0}, "tokens": 1}

    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="1 of 3 runs failed; first: killed"):
        study.train_all(runs, sizes, facts, Results(path), Recorder(1, 1))
    assert sorted(Results(path).entries) == sorted(
        run.key for run, _ in runs if run.arm != "reversed"
    )
    study.train_all(runs, sizes, facts, Results(path), Recorder(1, 1))  # only the failed one
    assert trained[3:] == [str(tmp_path / runs[2][0].key)]
    assert capsys.readouterr().out.count("done, skipped") == 2
    # With another corpus, everything is trained again, and old folders are emptied.
    old = tmp_path / runs[0][0].key / "run/iter_0000001"
    old.mkdir(parents=True)
    study.train_all(runs, sizes, replace(facts, corpus="d"), Results(path), Recorder(1, 1))
    assert len(trained) == 7 and not old.exists()


def test_the_list_tells_done_from_changed_runs(tmp_path: Path) -> None:
    runs = plan(FULL)[:3]
    entries = [scripted(run, {}) for run in runs]
    entries[1]["digest"] = "other"
    results = write_results(tmp_path / "r.json", entries[:2])
    lines = command.list_runs(runs, FULL, results)
    assert [line.split()[0] for line in lines[:3]] == ["done", "remains", "remains"]
    assert "configuration has changed" in lines[1] and "changed" not in lines[2]
    assert lines[-1].startswith("1 of ")


def make_entries(model: str, differences: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns static runs whose level depends on the seed, and others with these differences."""
    entries = []
    num_seeds = len(next(iter(differences.values())))
    for seed in range(1, num_seeds + 1):
        level = 3 + 0.5 * seed  # much larger than the differences: only pairs can see these
        entries.append(scripted(Run(model, "static", "wsd", False, seed), {"chinese": level}))
        for arm, values in differences.items():
            run = Run(model, arm, "wsd", False, seed)
            entries.append(scripted(run, {"chinese": level + values[seed - 1]}))
    return entries


def test_verdicts_follow_the_rules() -> None:
    small = {
        "dynamic": [-0.020, -0.021, -0.019],  # clear, and so at the other size
        "reversed": [0.02, 0.021, 0.019],  # clear, and reversed at the other size
        "two_stage": [0.02, -0.02, 0.021],  # within two standard errors
        "chinese_only": [-0.2, -0.21, -0.19],  # clear, at one size only
    }
    large = {"dynamic": [-0.001, -0.01], "reversed": [-0.01, 0.001], "two_stage": [0.1, 0.1]}
    entries = [*make_entries("small", small), *make_entries("smollm2", large)]
    analysis = Analysis.of({str(k): entry for k, entry in enumerate(entries)}, {})

    def verdict(arm: str, model: str = "small") -> str:
        return analysis.verdict(Cell(model, "wsd", False, arm), "chinese")

    assert verdict("dynamic") == "lower, at both sizes"
    assert verdict("reversed") == "higher, other sign at the other size"
    assert verdict("two_stage") == "no difference"
    assert verdict("chinese_only") == "lower, one size only"
    assert verdict("two_stage", "smollm2") == "higher, at both sizes"
    assert verdict("chinese_then_instruction") == "not measured"
    found = analysis.difference(Cell("small", "wsd", False, "dynamic"), "chinese")
    assert found is not None
    assert found.mean == pytest.approx(-0.02)
    assert found.standard_error == pytest.approx(0.001 / 3**0.5)
    one = paired([0.3])
    assert one is not None and one.verdict == "one seed"


def test_runs_from_another_foundation_are_left_out() -> None:
    entries = make_entries("small", {"dynamic": [0.1, 0.1]})
    entries[1]["foundation"] = "old"
    analysis = Analysis.of(dict(enumerate(entries)), {"small": {"digest": "f"}})  # type: ignore[arg-type]
    assert analysis.values(Cell("small", "wsd", False, "dynamic"), "chinese").keys() == {2}


def test_speed_is_the_interpolated_first_crossing() -> None:
    curve = [{"tokens": 100 * k, "bits_per_byte": {"x": v}} for k, v in enumerate([5, 4, 2, 3])]
    assert first_crossing(curve, "x", 4.5) == 50
    assert first_crossing(curve, "x", 2.5) == 175  # and not after the later rise
    assert first_crossing(curve, "x", 1.9) is None
    assert first_crossing(curve, "x", 6) == 0
    entries = make_entries("small", {"dynamic": [-0.5, 0.1]})
    analysis = Analysis.of(dict(enumerate(entries)), {})  # type: ignore[arg-type]
    reach = analysis.reach(Cell("small", "wsd", False, "dynamic"), "chinese")
    # Seed 1 goes from 4.5 to 3 over the second half and passes 3.5; seed 2 ends above 4.
    assert reach.shares == pytest.approx([5 / 6]) and reach.num_seeds == 2
    assert str(reach) == "83 % (1 of 2 seeds)"


def test_the_page_regenerates_from_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    differences = {arm: [0.01 * k, 0.012 * k, 0.011 * k] for k, arm in enumerate(ARMS) if k != 1}
    entries = make_entries("small", differences)
    entries += [
        scripted(run, {"chinese": 3 + 0.01 * k})
        for k, run in enumerate(plan(FULL))
        if run.arm.startswith("random_")
    ]
    write_results(tmp_path / "results.json", entries)
    contents = []
    for name in ("a", "b"):
        results = Results(tmp_path / "results.json")
        written = report.write_report(results, FULL, tmp_path / name)
        contents.append([path.read_bytes() for path in written])
        assert {path.suffix for path in written} == {".md", ".png"}
    assert contents[0] == contents[1]
    text = contents[0][0].decode()
    assert "**+0.033 ± 0.002**" in text  # two_stage on Chinese
    assert "No schedule has been proposed yet." in text
    page = "by hand\n<!-- begin state -->\nold\n<!-- end state -->\nby hand\n"
    filled = report.fill_page(page, {"state": "new"}, Path("x.md"))
    assert filled == page.replace("old", "new")
    assert report.fill_page(filled, {"state": "new"}, Path("x.md")) == filled
    with pytest.raises(UserError, match=r"x\.md: no section state; known: other"):
        report.fill_page(page, {"other": ""}, Path("x.md"))


def test_both_pages_name_sections_that_exist() -> None:
    root = Path(report.__file__).parents[2]
    sections = dict.fromkeys(
        ("state", "verdicts", "final", "differences", "speed", "proposal"), "generated"
    )
    for page in report.PAGES:
        text = (root / page).read_text(encoding="utf-8")
        filled = report.fill_page(text, sections, page)
        assert filled.count("<!-- begin ") == filled.count(" -->\ngenerated\n<!-- end ") >= 4


def test_a_proposal_is_recorded_and_made_again_only_from_other_results(
    data: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    entries = []
    for run in plan(FULL):
        if run.model == "small" and run.seed == 1:
            entry = scripted(run, {})
            last = entry["trajectory"][-1]["tokens"]
            noise = 0.002 * rng.normal()
            entry["final"]["chinese"] -= 0.5 * last["chinese"] / sum(last.values()) + noise
            entries.append(entry)
    results = write_results(tmp_path / "results.json", entries)
    block = propose(results, FULL.models[0])
    again = Results(tmp_path / "results.json")
    assert propose(again, FULL.models[0]) == block == again.proposals["small"]["schedule"]
    Schedule.from_dict(block, SOURCES, 8)
    # Chinese gets better by what comes last, nothing else depends on anything.
    last_weights = block["knots"][-1]["weights"]
    assert max(last_weights, key=last_weights.get) == "chinese"
    low, high = again.proposals["small"]["predicted"]["chinese"][1:]
    assert low < high < 3
    # The scripted learning rates are the same, so both shapes of an arm count as one run.
    analysis = Analysis.of(again.entries, again.foundations)
    assert len(observations(analysis, "small")) == 2 * len(ARMS) + 12
    again.entries.popitem()
    propose(again, FULL.models[0])
    assert again.proposals["small"]["made_of"] != results.proposals["small"]["made_of"]


def test_a_summary_has_the_curve_and_the_tokens_by_learning_rate() -> None:
    def iteration(n: int) -> dict[str, Any]:
        sources = {"a": {"tokens": 10 * n}, "b": {"tokens": 0}}
        row = {"iteration": n, "lm_loss": 1.0, "learning_rate": n, "sources": sources}
        return row | {"consumed_tokens": 10 * n}

    def validation(n: int, value: float) -> dict[str, Any]:
        return {"iteration": n, "validation": {"a": {"loss": 1, "bits_per_byte": value}}}

    entries = [validation(0, 3.0), *map(iteration, range(1, 121)), validation(120, 2.0)]
    numbers = [{"gain": k, "gain_stderr": 1.0, "num_texts": 5} for k in (1.5, 0.5)]
    entries += [{"iteration": 120 * k, "probes": {"copy": numbers[k]}} for k in (0, 1)]
    found = summarize(entries, 10)
    assert values_of(found) == {"a": 2.0, "copy: gain": 0.5}
    assert found["probe_curve"][0]["results"]["copy"]["gain"] == 1.5
    assert found["curve"][0] == {"tokens": 0, "bits_per_byte": {"a": 3.0}}
    assert found["final"] == {"a": 2.0} and found["tokens"] == 1200
    assert found["trajectory"][1] == {"learning_rate": 3.5, "tokens": {"a": 20}}
    assert sum(row["tokens"]["a"] for row in found["trajectory"]) == 1200


def test_held_out_documents_are_spread_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"{number:04}" + "x" * 2000}) for number in range(100)]
    path.write_text("\n".join(lines))
    chosen = [json.loads(line)["text"] for line in choose_documents(path, 15_200).splitlines()]
    assert [text[:4] for text in chosen] == [f"{number:04}" for number in range(0, 100, 10)]
    assert {len(text) for text in chosen} == {1500}


def test_tokens_have_a_digest_of_their_contents(data: Path) -> None:
    tokens: Tokens = FULL.models[0].tokens
    before = tokens.digest()
    path = tokens.files()[0]
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    assert tokens.digest() != before
    assert prepare.digest_of({"a": 1, "b": 2}) == prepare.digest_of({"b": 2, "a": 1})


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for content in ("{", "[]", '{"runs": {}}'):
        path.write_text(content)
        with pytest.raises(UserError, match="not the results of a study"):
            Results(path)
    path.write_text('{"format_version": 9, "runs": {}, "foundations": {}, "proposals": {}}')
    with pytest.raises(UserError, match="has format 9, not 1"):
        Results(path)
