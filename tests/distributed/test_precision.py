"""Tests FP8 with the stand-in for transformer-engine, whose products round their operands to FP8.

Which products are in FP8, by which recipe, and what surrounds them is tested; how fast or how exact
transformer-engine's own FP8 is cannot be.
"""

import json
from itertools import groupby
from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

# Sizes that every recipe accepts, also halved by tensor parallelism.
SIZES = ["--ffn-hidden-size", "192", "--bf16", "--num-query-groups", "4"]
HYBRID = ["--fp8-format", "hybrid"]
MIDDLE = [*HYBRID, "--first-last-layers-bf16"]
SEQUENCE = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
FULL = ["--recompute-granularity", "full", "--recompute-num-layers", "1"]

ALONE = {
    "bf16": [],
    "middle": MIDDLE,
    "delayed": [*HYBRID, "--fp8-recipe", "delayed", "--fp8-amax-history-len", "16"],
    "e4m3": ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"],
    "mxfp8": [*HYBRID, "--fp8-recipe", "mxfp8"],
    "nvfp4": ["--fp4-format", "e2m1"],
}
ON_TWO_RANKS = {
    "tp_sequence": [*HYBRID, *SEQUENCE],
    "tp_overlap": [*SEQUENCE, "--tp-comm-overlap"],
    "tp_overlap_middle": [*MIDDLE, *SEQUENCE, "--tp-comm-overlap"],
    "tp_delayed": [*HYBRID, *SEQUENCE, "--fp8-recipe", "delayed"],
    "tp_full": [*HYBRID, *SEQUENCE, *FULL, "--recompute-method", "uniform"],
    "pp_middle": [*MIDDLE, "--pipeline-model-parallel-size", "2"],
    "cp_sharded": [*HYBRID, "--context-parallel-size", "2", "--use-distributed-optimizer"],
    "dp_mxfp8": [*HYBRID, "--fp8-recipe", "mxfp8", "--use-distributed-optimizer"],
    "dp_bf16_gradients": ["--grad-reduce-in-bf16", "--use-distributed-optimizer"],
    "tp_bf16_gradients": ["--grad-reduce-in-bf16", *SEQUENCE],
}
WITH_QUESTIONS = ("bf16", "middle", "tp_sequence", "pp_middle")
# The sizes of the weights of a layer, in the order of its products.
LAYER = [[192, 64], [64, 64], [384, 64], [64, 192]]


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Returns a folder with the runs, and the products of those on one process."""
    folder = tiny_run.folder / "precision"
    folder.mkdir()
    base = ["--config", str(tiny_run.config), *SIZES]
    (folder / "quiz.jsonl").write_text(
        "".join(
            json.dumps({"question": "a" * k, "choices": ["b" * k, "c " * k], "answer": k % 2})
            + "\n"
            for k in range(1, 6)
        )
    )
    ask = ["--choice-questions", folder / "quiz.jsonl", "--choice-interval", 4]

    def flags_of(runs: dict[str, list[str]], name: str) -> list[object]:
        asks = ask if name in WITH_QUESTIONS else []
        return [*base, *runs[name], *asks, "--save", folder / name]

    again = [*base, *ALONE["middle"], "--save", folder / "resumed", "--load", folder / "resumed"]
    jobs.run_with_stand_in(
        1,
        [
            *(flags_of(ALONE, name) for name in ALONE),
            [*again, "--exit-interval", "5"],
            again,
        ],
        folder,
        {"TE_STANDIN_PRODUCTS": str(folder / "products")},
    )
    jobs.run_with_stand_in(
        2,
        [[*flags_of(ON_TWO_RANKS, name), "--exit-interval", "5"] for name in ON_TWO_RANKS],
        folder,
    )
    return folder


@pytest.mark.distributed
def test_each_recipe_reaches_exactly_its_layers(runs: Path) -> None:
    (path,) = runs.glob("products.*")
    products = json.loads(path.read_text())
    passes = [products[k : k + 16] for k in range(0, len(products), 16)]
    assert all([size for *size, _ in one] == 4 * LAYER for one in passes)
    recipes = [[one[k][-1] for k in range(16)] for one in passes]
    current, outer = "Float8CurrentScaling", [None] * 4
    middle = [*outer, *[current] * 8, *outer]
    names = ["TEDelayedScaling", "Float8BlockScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"]
    expected = [[None] * 16, middle, *([name] * 16 for name in names), middle]
    assert [recipe for recipe, _ in groupby(recipes)] == expected


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*list(ALONE)[1:], *ON_TWO_RANKS])
def test_losses_stay_close_to_those_of_bf16(runs: Path, name: str) -> None:
    expected, expected_validation = jobs.read_metrics(runs / "bf16")
    found, found_validation = jobs.read_metrics(runs / name)
    assert (len(found), len(expected)) == (5 if name in ON_TWO_RANKS else 10, 10)
    difference = [
        abs(ours["lm_loss"] - theirs["lm_loss"])
        for ours, theirs in zip(found, expected, strict=False)
    ]
    assert 1e-5 < max(difference) < 0.05
    assert found_validation and len(found_validation) <= len(expected_validation)


@pytest.mark.distributed
def test_a_resume_continues_bit_for_bit(runs: Path) -> None:
    expected, _ = jobs.read_metrics(runs / "middle")
    found, _ = jobs.read_metrics(runs / "resumed")
    assert [step["lm_loss"] for step in found] == [step["lm_loss"] for step in expected]
    assert [step["grad_norm"] for step in found] == [step["grad_norm"] for step in expected]


@pytest.mark.distributed
def test_a_resume_with_the_delayed_recipe_warns(runs: Path, tiny_run: TinyRun) -> None:
    folder = runs / "delayed"
    flags = ["--config", str(tiny_run.config), *SIZES, *ALONE["delayed"], "--load", folder]
    output = jobs.run_with_stand_in(1, [[*flags, "--train-iters", "11"]], runs)
    assert "the delayed recipe of FP8 starts with empty maxima" in output


@pytest.mark.distributed
@pytest.mark.parametrize("name", WITH_QUESTIONS[1:])
def test_choice_questions_are_padded_to_what_fp8_needs(runs: Path, name: str) -> None:
    found, expected = (
        [
            entry["choice"]["quiz"]
            for entry in map(json.loads, (runs / run / "metrics.jsonl").read_text().splitlines())
            if "choice" in entry
        ]
        for run in (name, "bf16")
    )
    assert 1 <= len(found) <= len(expected)
    for ours, theirs in zip(found, expected, strict=False):
        assert ours["num_questions"] == theirs["num_questions"] == 5
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.21)  # one question
