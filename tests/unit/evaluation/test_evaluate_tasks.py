"""Tests lm-eval on local task files without a network: counts, few-shot examples, and bad input."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.choice import ChoiceSettings
from megatron_chatflow.evaluation.evaluate import EvaluationSettings, evaluate
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.tasks import ALIASES, TaskSettings, evaluate_tasks

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra"
)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if "datasets" in sys.modules:  # `datasets` has already read the variables
        import datasets.config

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_task(folder: Path, name: str, answers: list[int], few_shot_answers: list[int]) -> None:
    """Writes a task of two-choice questions, given the index of the right choice for each."""
    for split, numbers in (("test", answers), ("dev", few_shot_answers)):
        lines = [
            json.dumps({"question": f"bana {k}?", "choices": ["kifu", "sodo"], "answer": answer})
            for k, answer in enumerate(numbers)
        ]
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n")
    files = f"{{test: {folder}/{name}.test.jsonl, dev: {folder}/{name}.dev.jsonl}}"
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\n"
        "output_type: multiple_choice\ntest_split: test\nfewshot_split: dev\n"
        "fewshot_config: {sampler: first_n}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list: [{metric: acc}]\n"
    )


@needs_lm_eval
def test_a_local_task(random_llama: Path, tmp_path: Path) -> None:
    # The questions differ only in a number, so mixed answers are right for half of them.
    write_task(tmp_path, "local_choice", [0, 1, 0, 1, 1, 1], [0, 1, 0])
    settings = TaskSettings(("local_choice",), include_path=tmp_path, limit=4)
    results = evaluate(random_llama, EvaluationSettings(tasks=settings))["tasks"]
    assert results["local_choice"]["acc"] == 0.5
    assert results["local_choice"]["num_few_shot"] == 0
    with_examples = TaskSettings(("local_choice",), 2, include_path=tmp_path)
    results = evaluate_tasks(LanguageModel(random_llama), with_examples)
    assert results["local_choice"]["num_few_shot"] == 2


@needs_lm_eval
def test_gaokao_is_the_mean_over_questions(random_llama: Path, tmp_path: Path) -> None:
    tasks, few_shot = ALIASES["gaokao"]
    for k, task in enumerate(tasks):
        write_task(tmp_path, task, [0] * (k + 1) if k % 2 else [1], [0])
    model = LanguageModel(random_llama)
    results = evaluate_tasks(model, TaskSettings(("gaokao",), include_path=tmp_path))
    assert set(results) == {"gaokao", *tasks}
    right = sum(results[task]["acc"] * (k + 1 if k % 2 else 1) for k, task in enumerate(tasks))
    assert results["gaokao"]["acc"] == pytest.approx(right / 24)
    assert few_shot == 0 and {values["num_few_shot"] for values in results.values()} == {0}


@needs_lm_eval
def test_lm_eval_has_the_tasks_and_their_examples() -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    folders = [folder / part for part in ("mmlu/default", "ceval", "cmmlu", "agieval")]
    manager = lm_eval.tasks.TaskManager(
        include_path=list(map(str, folders)), include_defaults=False
    )
    for name, (tasks, few_shot) in ALIASES.items():
        assert set(tasks) <= set(manager.all_tasks), name
        assert few_shot == (0 if name == "gaokao" else 5)
    # The five examples are the first of the subject's own development split.
    for name in ("mmlu/default", "cmmlu"):
        text = (folder / name / "_default_template_yaml").read_text()
        assert "fewshot_split: dev" in text and "sampler: first_n" in text
    text = (folder / "ceval" / "_default_ceval_yaml").read_text()
    assert "validation_split: val" in text and "fewshot_split: dev" in text


@needs_lm_eval
def test_bad_input(random_llama: Path, tmp_path: Path) -> None:
    model = LanguageModel(random_llama)

    def run(*tasks: str, include_path: Path = tmp_path) -> None:
        evaluate_tasks(model, TaskSettings(tasks, include_path=include_path))

    with pytest.raises(UserError, match="--include-path: .* is not a folder"):
        run("x", include_path=tmp_path / "none")
    write_task(tmp_path, "lost", [0], [0])
    with pytest.raises(UserError, match="has no task no_such_task"):
        run("lost", "no_such_task")
    (tmp_path / "lost.test.jsonl").unlink()
    with pytest.raises(UserError, match="its data cannot be loaded .*test.jsonl"):
        run("lost")
    write_task(tmp_path, "lost", [0], [0])
    wrong = (tmp_path / "lost.yaml").read_text().replace("{{question}}", "{{question")
    (tmp_path / "lost.yaml").write_text(wrong)
    with pytest.raises(UserError, match="lost cannot run"):
        run("lost")
    (tmp_path / "lost.test.jsonl").write_text("no json")
    with pytest.raises(UserError, match="lost cannot run"):
        run("lost")


def test_ranges() -> None:
    for wrong in ("0", "-1", "x", "", "auto:0"):
        with pytest.raises(UserError, match="--batch-size"):
            TaskSettings(("x",), batch_size=wrong)
    for right in ("1", "auto", "auto:4"):
        TaskSettings(("x",), batch_size=right)
    with pytest.raises(UserError, match="--limit: must be at least 1, not 0"):
        TaskSettings(("x",), limit=0)
    with pytest.raises(UserError, match="--num-fewshot: must be at least 0, not -1"):
        EvaluationSettings(tasks=TaskSettings(("x",), -1))
    with pytest.raises(UserError, match="--num-fewshot: must be at least 0, not -2"):
        EvaluationSettings(choice=ChoiceSettings(num_few_shot=-2))
    with pytest.raises(UserError, match="--max-documents: must be at least 1, not 0"):
        EvaluationSettings(max_documents=0)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is here")
def test_missing_lm_eval_is_named(random_llama: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'megatron-chatflow\[eval\]'"):
        evaluate(random_llama, EvaluationSettings(tasks=TaskSettings(("mmlu",))))
