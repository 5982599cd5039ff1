"""Tests that every command begins texts as the tokenizer's configuration specifies."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_text import made_up_sentences

from megatron_chatflow.evaluation.choice import (
    ChoiceSettings,
    ChoiceValidator,
    build_prompt,
    encode_question,
    evaluate_choice,
    read_questions,
)
from megatron_chatflow.evaluation.evaluate import EvaluationSettings, evaluate
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.tasks import TaskSettings, evaluate_tasks
from megatron_chatflow.evaluation.text import TextSource, encode_document, evaluate_text
from megatron_chatflow.generation.generate import Generator
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer import load_tokenizer

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is an extra"
)
# Kind of folder, and whether it prepends BOS to texts.
KINDS = {"without": False, "configured": True, "processor": True, "denied": False, "no_bos": False}


@pytest.fixture(scope="module")
def folders(
    random_llama: Path, byte_level_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Creates folders of the same weights with tokenizers that begin texts differently."""
    made = {}
    for name in KINDS:
        folder = made[name] = tmp_path_factory.mktemp("kinds") / name
        shutil.copytree(random_llama, folder)
        config_path = folder / "tokenizer_config.json"
        if name in ("processor", "denied"):
            load_tokenizer(random_llama).save_pretrained(folder, add_bos_token=True)
        if name in ("configured", "denied"):
            # transformers 5 only reads the post-processor of tokenizer.json, which differs.
            config = json.loads(config_path.read_text())
            config_path.write_text(json.dumps({**config, "add_bos_token": name == "configured"}))
        if name == "no_bos":
            for old in ("tokenizer.model", "tokenizer.json", "special_tokens_map.json"):
                (folder / old).unlink(missing_ok=True)
            shutil.copy(byte_level_model, folder / "tokenizer.json")
            config_path.write_text(json.dumps({"bos_token": None, "eos_token": "<|endoftext|>"}))
    return made


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, LanguageModel]:
    return {name: LanguageModel(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_begins_a_text_alike(
    kind: str, models: dict[str, LanguageModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    model = models[kind]
    tokenizer = model.tokenizer
    begin = [tokenizer.bos_id] if KINDS[kind] else []
    assert model.prefix_ids == begin
    assert model.facts()["begins_with"] == ("<s>" if begin else None)
    text = "bana kifu"
    expected = begin + tokenizer.encode(text)
    assert encode_document(model, text)[0] == expected
    assert Generator(folders[kind]).encode(text) == expected
    assert model.hf_tokenizer(text)["input_ids"] == expected

    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "bana", "choices": ["kifu", "luno"], "answer": 0}))
    questions, settings = read_questions(path), ChoiceSettings("continuation")
    prompt = begin + tokenizer.encode(build_prompt(questions[0], [], settings))
    validator = ChoiceValidator.build(
        *("q", questions, settings),
        tokenizer=tokenizer,
        begins_with_bos=tokenizer.add_bos_token,
        seq_length=96,
        micro_batch_size=1,
    )
    assert validator.packed.batches[0].tokens[0, : len(prompt)].tolist() == prompt
    encoded, _ = encode_question(tokenizer, model.prefix_ids, 96, questions[0], [], settings)
    assert encoded == prompt


def test_a_template_that_writes_bos_gets_no_second(folders: dict[str, Path]) -> None:
    generator = Generator(folders["processor"])
    bos = generator._tokenizer.bos_token_id
    generator._tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    once = generator.encode_chat([{"role": "user", "content": "bana"}])
    generator._tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert generator.encode_chat([{"role": "user", "content": "bana"}]) == once
    assert once.count(bos) == 1 and once[0] == bos


def test_bytes_of_a_first_token_without_loss_are_not_counted(
    models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    texts = [*made_up_sentences(3), "今"]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = TextSource("s", str(path), CorpusSettings())
    for kind, model in models.items():
        result = evaluate_text(model, source)
        ids = [model.tokenizer.encode(text) for text in texts]
        num_bytes = len("".join(texts).encode())
        if KINDS[kind]:
            assert result.num_tokens == sum(map(len, ids))
            assert result.num_bytes == num_bytes
        else:
            assert result.num_tokens == sum(map(len, ids)) - len(texts)
            counted = [model.tokenizer.num_bytes_per_id[row].sum() for row in ids]
            firsts = [model.tokenizer.num_bytes_per_id[row[0]] for row in ids]
            prefix = 0 if kind == "no_bos" else 1  # the space that SentencePiece prepends
            assert sum(counted) - prefix * len(texts) == num_bytes
            assert result.num_bytes == num_bytes - sum(firsts) + prefix * len(texts)
        assert result.bits_per_byte == pytest.approx(
            result.nats / math.log(2) / result.num_bytes, rel=1e-12
        )


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if "datasets" in sys.modules:  # `datasets` has already read the variables
        import datasets.config

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_questions(folder: Path) -> Path:
    """Writes questions with Chinese and control tokens, and one beyond the model's context."""
    words = " ".join(made_up_sentences(60)).split()
    records = []
    for k in range(40):
        parts = words[7 * k : 7 * k + 7]
        question = " ".join(parts[:3]) + ("？" if k % 3 else " <s> </s>?")
        question = question * 12 if k % 10 == 9 else question
        choices = [parts[3], f"{parts[4]} 今 {parts[5]}", parts[6], f"{k}"][: 2 + k % 3]
        records.append({"question": question, "choices": choices, "answer": k % len(choices)})
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_task(folder: Path, questions: Path, scoring: str, num_few_shot: int) -> None:
    """Writes the same questions as an lm-eval task."""
    letters = "".join(
        "{% if choices|length > N %}\nL. {{ choices[N] }}{% endif %}".replace("N", str(n)).replace(
            "L", letter
        )
        for n, letter in enumerate("ABCD")
    )
    choices = '{{ ["A", "B", "C", "D"][:choices|length] }}' if scoring == "letter" else "choices"
    head = "The following are multiple choice questions (with answers).\n\n"
    config = {
        "task": f"quiz_{scoring}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": num_few_shot,
        "description": head,
        "doc_to_text": "{{question}}" + (letters if scoring == "letter" else "") + "\nAnswer:",
        "doc_to_choice": choices,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_bytes"}],
    }
    (folder / f"quiz_{scoring}.yaml").write_text(json.dumps(config))  # JSON is valid YAML


@needs_lm_eval
@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("num_few_shot", [0, 2])
@pytest.mark.parametrize("scoring", ["letter", "continuation"])
@pytest.mark.parametrize("kind", KINDS)
def test_choice_and_tasks_give_the_same_accuracy(
    kind: str,
    scoring: str,
    num_few_shot: int,
    models: dict[str, LanguageModel],
    tmp_path: Path,
) -> None:
    questions = write_questions(tmp_path)
    write_task(tmp_path, questions, scoring, num_few_shot)
    choice_settings = ChoiceSettings(scoring, num_few_shot)
    ours = evaluate_choice(models[kind], read_questions(questions), choice_settings)
    settings = TaskSettings((f"quiz_{scoring}",), include_path=tmp_path)
    theirs = evaluate_tasks(models[kind], settings)[f"quiz_{scoring}"]
    assert ours["accuracy"] == theirs["acc"]
    if scoring == "continuation":
        assert ours["accuracy_per_byte"] == theirs["acc_bytes"]
    assert 0 < ours["accuracy"] < 1


@needs_lm_eval
@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_has_the_same_log_probabilities(
    kind: str, models: dict[str, LanguageModel], tmp_path: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    from megatron_chatflow.evaluation.choice import _continuations, _scores
    from megatron_chatflow.evaluation.tasks import _adapter

    model, settings = models[kind], ChoiceSettings("continuation")
    adapter = _adapter(model, TaskSettings(("x",)), HFLM)
    for question in read_questions(write_questions(tmp_path)):
        prompt = build_prompt(question, [], settings)
        requests = [
            SimpleNamespace(args=(prompt, text)) for text in _continuations(question, settings)
        ]
        theirs = [score for score, _ in adapter.loglikelihood(requests, disable_tqdm=True)]
        ours = _scores(
            model,
            *encode_question(
                *(model.tokenizer, model.prefix_ids, model.max_length, question, [], settings)
            ),
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_a_base_beside_its_export(
    folders: dict[str, Path], random_llama: Path, tmp_path: Path
) -> None:
    from megatron_chatflow.convert.from_huggingface import import_huggingface
    from megatron_chatflow.convert.to_huggingface import export_checkpoint

    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": made_up_sentences(1)[0]}) + "\n")
    quiz = write_questions(tmp_path)
    settings = EvaluationSettings(
        sources=(TextSource.parse(f"s={path}"),), questions={"quiz": quiz}
    )
    for kind, begins in KINDS.items():
        run, export = tmp_path / f"{kind}_run", tmp_path / f"{kind}_export"
        import_huggingface(folders[kind], run)
        export_checkpoint(run, export)
        base, ours, checkpoint = (
            evaluate(model, settings) for model in (folders[kind], export, run)
        )
        assert base["begins_with"] == ("<s>" if begins else None)
        for name in ("begins_with", "sources", "choice"):
            assert base[name] == ours[name] == checkpoint[name], kind
