"""Tests the study's schedules, its bookkeeping, and its analysis of scripted results."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import train_tokenizer

from examples.transfer_study import __main__ as command
from examples.transfer_study import prepare, report, study, training
from examples.transfer_study.analysis import (
    GOAL,
    Analysis,
    Cell,
    Reach,
    first_crossing,
    paired,
    values_of,
)
from examples.transfer_study.arms import (
    ARMS,
    EQUAL_ARMS,
    SOURCES,
    Budget,
    check_equal_totals,
    draws,
    make_schedule,
    random_schedule,
    static_schedule,
    totals,
)
from examples.transfer_study.prepare import (
    EVALUATED,
    Tokens,
    choose_documents,
    drop_overlapping,
    split_documents,
)
from examples.transfer_study.propose import observations, propose
from examples.transfer_study.results import Results
from examples.transfer_study.study import FULL, QUICK, Run, make_config, plan, training_digest
from examples.transfer_study.training import Clock, Prepared, missing_runs
from examples.transfer_study.worker import summarize
from megatron_chatflow.blend import Schedule
from megatron_chatflow.blend.fit import fit_recency
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


def test_a_static_schedule_draws_the_samples_of_another() -> None:
    budget = Budget(60, 8)
    block = random_schedule(3, budget)
    static = static_schedule(block, budget)
    ours, theirs = draws(static, budget), draws(block, budget)
    assert {k: len(v) for k, v in ours.items()} == {k: len(v) for k, v in theirs.items()}
    assert len(static["knots"]) < 4 and static != block


def test_the_order_of_the_runs_makes_parts_useful() -> None:
    runs = plan(FULL)
    assert len({run.key for run in runs}) == len(runs)
    first = runs[:21]  # a study of its own: seven schedules, three seeds
    assert {run.seed for run in first[:7]} == {1} and {run.seed for run in first} == {1, 2, 3}
    assert all(run.learning_rate == "wsd" and run.arm in EQUAL_ARMS for run in first)
    # Every arm is in the plan with and without tail; the static arm stands for both.
    for model, rate in (("small", "wsd"), ("small", "cosine"), ("smollm2", "wsd")):
        for arm in ARMS:
            tails = {
                r.has_tail for r in runs if (r.model, r.learning_rate, r.arm) == (model, rate, arm)
            }
            expected = {"static": 1, "english_only": model == "smollm2"}.get(arm, 2)
            assert len(tails) == expected, (model, rate, arm)
    for one in (FULL, QUICK):
        for model in one.models:  # an evaluation is at the start of the decay
            config = make_config(plan(one)[0], one)
            constant = config["train"]["train_iters"] - config["optimizer"]["lr_wsd_decay_iters"]
            assert constant % config["train"]["eval_interval"] == 0
            budget = model.budget
            assert (budget.iterations - budget.tail_iterations) % model.num_evaluations == 0


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small datasets where the study expects those of the small model, and a tokenizer."""
    for module in (study, prepare):
        monkeypatch.setattr(module, "WORK", tmp_path)
    for which in (FULL, QUICK):
        for prefix in {Path(p.with_suffix("")) for p in which.models[0].tokens.all_files()}:
            prefix.parent.mkdir(exist_ok=True)
            if "loss_mask" in prefix.name:
                writer = IndexedDatasetWriter(prefix, np.uint8)
                tokens = np.ones(8 * 513, dtype=np.uint8)
            else:
                writer = IndexedDatasetWriter(prefix, np.uint16)
                tokens = np.arange(8 * 513, dtype=np.uint16) % 500
            for _ in range(75):
                writer.add_document(tokens)
            writer.finalize()
    return train_tokenizer(tmp_path / "tokenizer.model")


def write_probe_files(folder: Path) -> None:
    """Writes the files of the probes, with texts as long as the study's."""
    folder.mkdir()
    for name in ("fewshot_en", "fewshot_zh"):
        chats = [
            [{"role": "user", "content": f"{k} is"}, {"role": "assistant", "content": "a number"}]
            for k in range(30)
        ]
        lines = [json.dumps({"messages": chat}) for chat in chats]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    pairs = [json.dumps({"en": f"number {k}", "zh": f"{k} number"}) for k in range(90)]
    (folder / "translation.jsonl").write_text("\n".join(pairs))
    sentences = [json.dumps({"good": f"a number {k}", "bad": f"{k} a number"}) for k in range(90)]
    (folder / "pairs.jsonl").write_text("\n".join(sentences))


def test_a_second_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    lock = command._lock(tmp_path)
    with pytest.raises(UserError, match="another study is writing there"):
        command._lock(tmp_path)
    lock.release()
    command._lock(tmp_path).release()
    with pytest.raises(UserError, match="leave out --quick"):
        command.main(["--quick", "--report"])


@pytest.mark.parametrize("which", [FULL, QUICK])
def test_configurations_pass_a_dry_run(which: study.Study, data: Path, tmp_path: Path) -> None:
    runs = [run for run in plan(which) if run.model == "small" and not run.is_proposed]
    chosen = {
        json.dumps(config["optimizer"]): config for config in (make_config(r, which) for r in runs)
    }
    write_probe_files(prepare.text_folder())
    model = which.model("small")
    evaluation = study.evaluation_config(model)
    for config in [*chosen.values(), study.foundation_config(model), evaluation]:
        config["tokenizer"]["tokenizer_model"] = str(data)
        config["checkpoint"] = {"from_scratch": True}
        path = tmp_path / "run.yaml"
        path.write_text(dump_yaml(config))
        text = dry_run(load_config(path), 1)
        iterations = config["train"]["train_iters"]
        assert f"{iterations} iterations of 8 samples of 512 tokens" in text
    for label in ("copy", "fewshot_en", "fewshot_zh", "translation", "pairs"):
        assert re.search(rf"^\W*{label}\b", text, re.MULTILINE), text
    # What is evaluated has a digest of the contents of its files.
    before = model.evaluation_digest()
    pairs = prepare.text_folder() / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("a number 7", "a number x"))
    assert model.evaluation_digest() != before


def test_a_digest_covers_what_determines_the_weights_and_nothing_else() -> None:
    run = Run("small", "dynamic", "wsd", False, 1)
    config = make_config(run, FULL)
    digest = training_digest(config, "corpus", "foundation")

    def changed(section: str, **values: object) -> str:
        return training_digest(
            {**config, section: {**config[section], **values}}, "corpus", "foundation"
        )

    same = [
        changed("train", eval_interval=7),
        changed("train", micro_batch_size=2),
        changed("logging", log_interval=1),
        changed("tokenizer", tokenizer_model="elsewhere"),
        training_digest(
            make_config(run, replace(FULL, models=(replace(FULL.models[0], curve_bytes=9),))),
            *("corpus", "foundation"),
        ),
    ]
    assert set(same) == {digest}
    others = [
        training_digest(config, "x", "foundation"),
        training_digest(config, "corpus", "x"),
        changed("train", global_batch_size=16),
        changed("data", seq_length=256),
        changed("optimizer", lr=1.0),
        *(
            training_digest(make_config(other, FULL), "corpus", "foundation")
            for other in (
                replace(run, seed=2),
                replace(run, arm="reversed"),
                replace(run, has_tail=True),
                replace(run, learning_rate="cosine"),
            )
        ),
    ]
    assert len({digest, *others}) == len(others) + 1


def scripted(run: Run, values: dict[str, float], foundation: str = "f") -> dict[str, Any]:
    """Returns an entry of results whose evaluations are made up."""
    model = FULL.model(run.model)
    budget = study.run_budget(run, model)
    tokens = budget.num_samples * 512
    final = dict.fromkeys(EVALUATED, 3.0) | values
    points = [6.0, 5.0, 4.5, None]
    block = {"knots": [{"at": 0, "weights": {"english": 1, "chinese": 1}}]}
    digest = ""
    if not run.is_proposed:
        config = make_config(run, FULL)
        block, digest = config["data"]["schedule"], training_digest(config, "c", "made")
    schedule = Schedule.from_dict(block, SOURCES, 8)
    parts = range(0, budget.num_samples, budget.num_samples // 20)
    rows = [schedule.weights(at) / 2**32 * tokens / len(parts) for at in parts]
    return {
        **vars(run),
        "digest": digest,
        "evaluation": "e",
        "foundation": foundation,
        "schedule": block,
        "tokens": tokens,
        "tokens_by_source": dict.fromkeys(SOURCES, tokens // 4),
        "flops": 1,
        **{"seconds": 1.0, "core_seconds": 1.0, "training_seconds": 1.0, "probe_seconds": 0.01},
        **{"device": "CPU", "bf16": True},
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
    for model in FULL.models:
        held_out = {"english": {"documents": 1, "tokens": 2, "dropped": 3}}
        held_out["english"]["shared_with_training"] = 0
        results.models[model.name] = {
            **{"corpus": "c", "evaluation": "e", "foundation": "made", "held_out": held_out},
            "training_tokens": dict.fromkeys(SOURCES, model.budget.num_samples * 512),
        }
        results.foundations[model.name] = {
            "f": {
                **{"tokens": 1, "flops": 1, "core_seconds": 1.0, "device": "CPU", "bf16": True},
                **{"curve": [scripted_point()], **scripted_point()},
                "probes": {"copy": {"gain_bits_per_token": 7.0}, "pairs": {"accuracy": None}},
            }
        }
    for entry in entries:
        results.add(Run.of(entry), entry)
    results.write()
    return results


def scripted_point() -> dict[str, Any]:
    values = dict.fromkeys(EVALUATED, 4.0)
    return {"bits_per_byte": values, "final": values}


def test_complete_runs_are_skipped_and_changed_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that records its jobs takes the place of the workers."""
    sizes = replace(FULL, folder=tmp_path, stages=(FULL.stages[0],), is_complete=False)
    runs = plan(sizes)[:3]
    facts = Prepared("e", "f", tmp_path)
    trained: list[str] = []

    class Recorder(training.Workers):
        def train(self, job: Any) -> dict[str, Any]:
            trained.append(job["folder"])
            run = next(run for run in runs if job["folder"] == str(tmp_path / run.key))
            if run.arm == "reversed" and len(trained) <= 3:
                raise UserError("killed")
            return {key: scripted(run, {})[key] for key in ("final", "tokens", "seconds")}

    def train_missing(prepared: Prepared = facts, clock: Clock | None = None) -> list[str]:
        missing = missing_runs(runs, sizes, results, prepared.weights)
        pool = Recorder(1, 1)
        return training.train_all(missing, sizes, prepared, results, pool, clock or Clock())

    path = tmp_path / "results.json"
    results = write_results(path, [])
    assert train_missing() == ["small/wsd/tail/reversed/seed_1: killed"]  # and the others go on
    assert sorted(Results(path).entries) == sorted(run.key for run in runs if run.arm != "reversed")
    assert train_missing(clock=Clock(0.0)) == [] and len(trained) == 3  # no time for it
    assert train_missing() == [] and trained[3:] == [str(tmp_path / runs[2].key)]
    # With another corpus, everything is trained again, and old folders are emptied.
    old = tmp_path / runs[0].key / "run/iter_0000001"
    old.mkdir(parents=True)
    results.models["small"]["corpus"] = "d"
    train_missing()
    assert len(trained) == 7 and not old.exists()


def test_a_seed_that_another_foundation_began_gets_its_own_static_run(tmp_path: Path) -> None:
    """Another machine, with other weights: only runs from the same weights are compared."""
    static, dynamic, reversed_ = plan(FULL)[:3]
    entries = [scripted(static, {"chinese": 3}), scripted(dynamic, {"chinese": 3.1})]
    results = write_results(tmp_path / "r.json", entries)
    assert missing_runs([static, dynamic, reversed_], FULL, results, "f") == [reversed_]
    assert missing_runs([static, dynamic], FULL, results, "g") == []
    assert missing_runs([static, dynamic, reversed_], FULL, results, "g") == [static, reversed_]
    results.add(reversed_, scripted(reversed_, {"chinese": 9}, "g"))
    cell = Cell("small", "wsd", True, "reversed")
    assert Analysis.of(results.current(FULL)[0].values()).difference(cell, "chinese") is None
    results.add(static, scripted(static, {"chinese": 8}, "g"))
    again = Results(tmp_path / "r.json")
    found = Analysis.of(again.current(FULL)[0].values()).difference(cell, "chinese")
    assert found is not None and found.mean == pytest.approx(1) and found.num_seeds == 1
    assert missing_runs([static, dynamic, reversed_], FULL, again, "g") == []


def test_the_list_and_the_page_tell_current_from_stale_results(tmp_path: Path) -> None:
    runs = plan(FULL)[:4]
    entries = [scripted(run, {}) for run in runs]
    entries[1]["digest"], entries[2]["evaluation"] = "other", "other"
    results = write_results(tmp_path / "r.json", entries[:3])
    lines = command.list_runs(runs, FULL, results)
    assert [line.split()[0] for line in lines[:4]] == ["done", "remains", "remains", "remains"]
    assert "configuration has changed" in lines[1] and "evaluation has changed" in lines[2]
    assert "changed" not in lines[3] and lines[-1].startswith("1 of ")
    kept, left_out = results.current(FULL)
    assert list(kept) == [runs[0].key] and left_out.keys() == {runs[1].key, runs[2].key}


def make_entries(
    model: str, differences: dict[str, list[float]], has_tail: bool = False
) -> list[dict[str, Any]]:
    """Returns static runs whose level depends on the seed, and others with these differences."""
    entries = []
    num_seeds = len(next(iter(differences.values())))
    for seed in range(1, num_seeds + 1):
        level = 3 + 0.5 * seed  # much larger than the differences: only pairs can see these
        entries.append(scripted(Run(model, "static", "wsd", has_tail, seed), {"chinese": level}))
        for arm, values in differences.items():
            run = Run(model, arm, "wsd", has_tail, seed)
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
    analysis = Analysis.of(entries)

    def verdict(arm: str, model: str = "small") -> str:
        return analysis.verdict(Cell(model, "wsd", False, arm), "chinese")

    assert verdict("dynamic") == "lower: clear here, same sign at the other size (2 seeds)"
    assert verdict("reversed") == "higher: clear here, other sign at the other size (2 seeds)"
    assert verdict("two_stage") == "not clear"
    assert verdict("chinese_only") == "lower: clear here, one size only"
    assert verdict("two_stage", "smollm2") == "too few seeds"
    assert verdict("chinese_then_instruction") == "not measured"
    found = analysis.difference(Cell("small", "wsd", False, "dynamic"), "chinese")
    assert found is not None
    low, high = found.interval or (0, 0)
    assert (low + high) / 2 == found.mean and high - low == pytest.approx(
        2 * 4.303 * found.standard_error
    )
    # Static gains half a bit per third of the run, on the text of the curves.
    share = analysis.share_of_run(Cell("small", "wsd", False, "dynamic"), "chinese")
    assert share == pytest.approx((0.02 / 1.5, 0.019 / 1.5, 0.021 / 1.5), rel=1e-3)
    assert found.mean == pytest.approx(-0.02) and found.false_positive_rate == 0.184
    assert found.standard_error == pytest.approx(0.001 / 3**0.5)
    recency = analysis.contrast(
        Cell("small", "wsd", False, "static"),
        "chinese",
        ("dynamic", "reversed"),
        lambda a, b: (a - b) / 2,
    )
    assert recency is not None and recency.mean == pytest.approx(-0.02)
    one = paired([0.3])
    assert one is not None and one.verdict == "too few seeds"
    # A static run stands for both tails.
    tailed = [scripted(Run("small", "dynamic", "wsd", True, 1), {"chinese": 3.6})]
    both = Analysis.of([*entries, *tailed])
    shown = both.difference(Cell("small", "wsd", True, "dynamic"), "chinese")
    assert shown is not None and shown.mean == pytest.approx(0.1)
    assert set(both.settings()) >= {("small", "wsd", True), ("small", "wsd", False)}


def test_speed_is_the_interpolated_first_crossing() -> None:
    curve = [{"tokens": 100 * k, "bits_per_byte": {"x": v}} for k, v in enumerate([5, 4, 2, 3])]
    assert first_crossing(curve, "x", 4.5) == 50
    assert first_crossing(curve, "x", 2.5) == 175  # and not after the later rise
    assert first_crossing(curve, "x", 1.9) is None
    assert first_crossing(curve, "x", 6) == 0
    analysis = Analysis.of(make_entries("small", {"dynamic": [-0.5, 0.1]}))
    cell = Cell("small", "wsd", False, "dynamic")
    reach = analysis.reach(cell, "chinese")
    # Seed 1: from 4.5 at two thirds to 3.0 at the end, where static has 3.5; seed 2 ends above 4.
    assert reach.shares == pytest.approx([8 / 9, float("inf")])
    assert str(reach) == "not reached (1 of 2 seeds reach it)"
    assert analysis.reach(cell, "chinese", before_decay=True).shares == pytest.approx(
        [2 / 3, 2 / 3], abs=1e-3
    )
    assert str(Reach((0.5, 0.7, float("inf")))) == "70 % (2 of 3 seeds reach it)"
    assert str(Reach((0.0, 0.0, 0.7))) == "at the start"


def test_the_page_regenerates_from_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    differences = {arm: [0.01 * k, 0.012 * k, 0.011 * k] for k, arm in enumerate(ARMS) if k != 1}
    entries = make_entries("small", differences, has_tail=True)  # and no arm but one without
    entries += [
        scripted(run, {"chinese": 3 + 0.01 * k})
        for k, run in enumerate(plan(FULL))
        if run.arm.startswith("random_")
    ]
    entries.append(scripted(Run("small", "two_stage", "wsd", False, 1), {}))
    entries[-1]["probes"] = {"copy": {"gain_bits_per_token": 0.5, "first": 1.0}}
    probed = [one for one in entries if one["arm"] == "static"]
    for number, entry in enumerate(probed):
        entry["probes"] = {"copy": {"gain_bits_per_token": number, "first_bits_per_token": 9}}
    write_results(tmp_path / "results.json", entries)
    contents = []
    for name in ("a", "b"):
        results = Results(tmp_path / "results.json")
        written = report.write_report(results, FULL, tmp_path / name)
        contents.append([path.read_bytes() for path in written])
        assert {path.suffix for path in written} == {".md", ".png"}
    assert contents[0] == contents[1]
    results.entries = dict(reversed(results.entries.items()))  # as in the session that made them
    again = report.write_report(results, FULL, tmp_path / "c")
    assert [path.read_bytes() for path in again] == contents[0]
    text = contents[0][0].decode()
    assert "**+0.033 ± 0.002**" in text  # two_stage on Chinese
    # Dynamic equals static, so half of the reversed arm's difference is due to the direction and
    # half to the ramp.
    direction, ramp = (section_of(text, name) for name in ("Direction", "Ramp"))
    assert "| chinese | **-0.0110 ± 0.0006** |" in direction
    assert "| chinese | **+0.0110 ± 0.0006** |" in ramp
    assert "| chinese | +0.0000 ± 0.0000 |" in text
    assert "| small | chinese | 737,280 | 184,320 | 25 % |" in section_of(text, "Training_text")
    abilities = section_of(text, "Abilities")  # other arms have no probes
    assert "| small | foundation | 7.000 | - | - | - | - | - | - | - | 1 |" in abilities
    assert "| small | static | 1.000 | 9.000 | - | - | - | - | - | - | 3 |" in abilities
    assert "| small | dynamic |" not in abilities
    assert "No schedule has been proposed yet." in text
    page = "by hand\n<!-- begin state -->\nold\n<!-- end state -->\nby hand\n"
    filled = report.fill_page(page, {"state": "new"}, Path("x.md"))
    assert filled == page.replace("old", "new")
    assert report.fill_page(filled, {"state": "new"}, Path("x.md")) == filled
    with pytest.raises(UserError, match=r"x\.md: no section state; known: other"):
        report.fill_page(page, {"other": ""}, Path("x.md"))


def test_both_pages_name_sections_that_exist() -> None:
    root = Path(report.__file__).parents[2]
    results = Results(FULL.results)
    analysis = Analysis.of(results.current(FULL)[0].values())
    names = [*report.make_sections(analysis, results, FULL, {}), "figures"]
    sections = dict.fromkeys(names, "generated")
    shown: set[str] = set()
    for page in report.PAGES:
        text = (root / page).read_text(encoding="utf-8")
        filled = report.fill_page(text, sections, page)
        assert filled.count("<!-- begin ") == filled.count(" -->\ngenerated\n<!-- end ") >= 4
        shown.update(re.findall("<!-- begin (\\w+) -->", text))
    assert shown == set(names)


def section_of(text: str, title: str) -> str:
    """Returns a section of the report."""
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_a_proposal_is_recorded_and_stays_as_it_is(data: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    entries = []
    for run in plan(FULL):
        if run.model == "small" and run.seed == 1 and not run.is_proposed:
            entry = scripted(run, {})
            last = entry["trajectory"][-1]["tokens"]
            noise = 0.002 * rng.normal()
            entry["final"]["chinese"] -= 0.5 * last["chinese"] / sum(last.values()) + noise
            entries.append(entry)
    results = write_results(tmp_path / "results.json", entries)
    small = FULL.models[0]
    block = propose(results, FULL, small)
    again = Results(tmp_path / "results.json")
    again.entries.popitem()  # other results do not change a recorded prediction
    assert propose(again, FULL, small) == block == again.proposals["small"]["schedule"]
    assert len(again.proposals["small"]["made_of"]) == len(entries)
    Schedule.from_dict(block, SOURCES, 8)
    # Chinese gets better by what comes last, nothing else depends on anything.
    last_weights = block["knots"][-1]["weights"]
    assert max(last_weights, key=last_weights.get) == "chinese"
    predicted = again.proposals["small"]["predicted"]
    low, high = predicted["proposed"]["chinese"][1:]
    assert low < high < 3
    # With the same totals only the order differs, and the best static blend has its own totals.
    goals = {name: one["goal"][0] for name, one in predicted.items()}
    assert goals["proposed"] < goals["proposed_static"]
    assert goals["proposed"] < goals["best_static"]
    # The scripted learning rates are the same, so both shapes of an arm count as one run. The
    # Chinese-only arm, with and without tail, is one without mixture and one with.
    fitted = observations(Analysis.of(results.current(FULL)[0].values()), "small")
    assert len(fitted) == 2 * (len(ARMS) - 2) + 2 + 12 - 1
    # It is better than the ramp that has the most Chinese at the end. Chinese alone is not fitted.
    [dynamic] = [one for one in fitted if one.group == "dynamic" and "has_tail=False" in one.name]
    fit = fit_recency(fitted, SOURCES)
    assert goals["proposed"] < fit.predict_goal(dynamic.trajectory, GOAL)[0]
    proposed = Run("small", "proposed_static", "wsd", False, 1)
    config = make_config(proposed, FULL, again.proposals)
    budget = small.budget
    ours, theirs = draws(config["data"]["schedule"], budget), draws(block, budget)
    assert {k: len(v) for k, v in ours.items()} == {k: len(v) for k, v in theirs.items()}


def test_a_summary_has_the_curve_and_the_tokens_by_learning_rate() -> None:
    def iteration(n: int) -> dict[str, Any]:
        sources = {"a": {"tokens": 10 * n}, "b": {"tokens": 0}}
        row = {"iteration": n, "lm_loss": 1.0, "learning_rate": n, "sources": sources}
        return row | {"consumed_tokens": 10 * n}

    def validation(n: int, value: float) -> dict[str, Any]:
        return {"iteration": n, "validation": {"a": {"loss": 1, "bits_per_byte": value}}}

    entries = [validation(0, 3.0), *map(iteration, range(1, 121)), validation(120, 2.0)]
    found = summarize(entries, 10)
    probes = {"copy": {"gain_bits_per_token": 0.5, "first": 5}, "pairs": {"accuracy": 1.0}}
    values = values_of({"final": {"a": 2.0}, "probes": probes})
    assert values == {"a": 2.0, "copy (higher is better)": 0.5}
    assert found["curve"][0] == {"tokens": 0, "bits_per_byte": {"a": 3.0}}
    assert found["tokens"] == 1200
    assert found["trajectory"][1] == {"learning_rate": 3.5, "tokens": {"a": 20}}
    assert sum(row["tokens"]["a"] for row in found["trajectory"]) == 1200


def test_held_out_documents_are_spread_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    records = [{"text": f"{number:04}" + "x" * 1500} for number in range(100)]
    path.write_text("\n".join(map(json.dumps, records)))
    chosen = [json.loads(line)["text"] for line in choose_documents(path, 15_200).splitlines()]
    assert [text[:4] for text in chosen] == [f"{number:04}" for number in range(0, 100, 10)]
    kept, held = split_documents(records, 12)
    assert len(held) == 8 and {id(one) for one in (*kept, *held)} == {id(one) for one in records}


def test_held_out_documents_that_training_text_contains_are_dropped() -> None:
    rng = np.random.default_rng(1)
    words = ["".join(map(chr, rng.integers(97, 123, 400))) for _ in range(4)]
    held_out = {
        "text": [{"text": words[0]}, {"text": words[1]}, {"text": "short"}],
        "pairs": [{"en": words[2], "zh": "x"}],
        "chats": [{"messages": [{"role": "user", "content": words[3]}]}],
    }
    training = ["short", "before " + words[0][100:139], words[1][:30], words[2][50:200], words[3]]
    found = drop_overlapping(held_out, [*training, words[1][200:240]])
    # A string of 39 characters is not shared; one of 40 is a tenth of its text, which stays.
    assert found["text"] == (held_out["text"], 0, pytest.approx(40 / 805))
    assert found["pairs"][:2] == ([], 1) and found["chats"][:2] == ([], 1)


def test_tokens_have_a_digest_of_their_contents(data: Path) -> None:
    tokens: Tokens = FULL.models[0].tokens
    before = prepare.digest_of_files(tokens.files())
    path = next(path for path in tokens.files() if "loss_mask.bin" in path.name)
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    assert prepare.digest_of_files(tokens.files()) != before
    assert prepare.digest_of({"a": 1, "b": 2}) == prepare.digest_of({"b": 2, "a": 1})


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for content in ("{", "[]", '{"runs": {}}'):
        path.write_text(content)
        with pytest.raises(UserError, match="not the results of a study"):
            Results(path)
    path.write_text(
        '{"format_version": 9, "runs": {}, "models": {}, "foundations": {}, "proposals": {}}'
    )
    with pytest.raises(UserError, match="has format 9, not 2"):
        Results(path)
