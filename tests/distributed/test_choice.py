"""Tests choice questions during training.

The answers are the same in every layout, and the questions do not affect the run.
"""

import json
import shutil
from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun, made_up_sentences

from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.evaluation.choice import ChoiceSettings, evaluate_choice, read_questions
from megatron_chatflow.evaluation.models import LanguageModel

LAYOUTS: dict[str, list[str]] = {
    "tp2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "dp2": [],
    "vpp2": "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1".split(),
    "overlap": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split(),
}
SETTINGS = ChoiceSettings("continuation", 1)


@pytest.fixture(scope="module")
def folder(tiny_run: TinyRun) -> Path:
    """Trains a run without questions, the same run with them, and one run per layout."""
    root = tiny_run.folder / "choice"
    root.mkdir()
    words = " ".join(made_up_sentences(40, seed=9)).replace(".", "").split()
    lines = []
    for k in range(21):
        choices = [" ".join(words[n : n + 1 + n % 3]) for n in range(5 * k, 5 * k + 2 + k % 3)]
        lines.append(json.dumps({"question": words[-k], "choices": choices, "answer": k % 2}))
    (root / "quiz.jsonl").write_text("\n".join(lines))
    base = ["--config", tiny_run.config, "--train-iters", 4]
    asked = [*base, "--choice-questions", root / "quiz.jsonl", "--choice-interval", 2]
    asked += ["--choice-scoring", "continuation", "--choice-num-fewshot", 1]
    plain: list[list[object]] = [[*base, "--save", root / "plain"]]
    # The same model file with a configuration that prepends BOS to texts.
    (root / "llama").mkdir()
    shutil.copy(tiny_run.tokenizer_model, root / "llama")
    (root / "llama" / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    begun = [*asked, "--tokenizer-model", root / "llama", "--save", root / "begun"]
    jobs.run_layouts(1, [*plain, [*asked, "--save", root / "asked"], begun], root)  # type: ignore[list-item]
    (root / "few.jsonl").write_text(lines[0])
    few = [*asked, *LAYOUTS["overlap"], "--choice-questions", root / "few.jsonl"]
    few += ["--choice-num-fewshot", 0, "--save", root / "few"]
    layouts = [[*asked, *flags, "--save", root / name] for name, flags in LAYOUTS.items()]
    jobs.run_layouts(2, [*layouts, few], root)  # type: ignore[list-item]
    return root


def choices_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "choice" in entry]


@pytest.mark.distributed
def test_questions_leave_the_run_as_it_was(folder: Path) -> None:
    expected, expected_validation = jobs.read_metrics(folder / "plain")
    found, found_validation = jobs.read_metrics(folder / "asked")
    assert len(found) == 4 and found_validation == expected_validation
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("batch_digest", "lm_loss", "grad_norm"):
            assert ours[name] == theirs[name]


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["asked", "begun"])
def test_results_are_those_of_an_export(folder: Path, run: str) -> None:
    logged = choices_of(folder / run)
    assert [entry["iteration"] for entry in logged] == [0, 2, 4]
    export_checkpoint(folder / run, folder / f"{run}_hf")
    model = LanguageModel(folder / f"{run}_hf", max_length=64)
    assert model.prefix_ids == ([model.tokenizer.bos_id] if run == "begun" else [])
    expected = evaluate_choice(model, read_questions(folder / "quiz.jsonl"), SETTINGS)
    assert logged[-1]["choice"] == {"quiz": expected}
    assert 0 < expected["accuracy"] < 1


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_answers(folder: Path, layout: str) -> None:
    assert choices_of(folder / layout) == choices_of(folder / "asked")


@pytest.mark.distributed
def test_a_rank_without_questions_holds_up_nobody(folder: Path) -> None:
    logged = choices_of(folder / "few")
    assert [entry["iteration"] for entry in logged] == [0, 2, 4]
    assert all(entry["choice"]["few"]["num_questions"] == 1 for entry in logged)
