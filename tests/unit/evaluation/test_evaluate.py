"""Tests evaluation on text, questions and tasks against transformers and manual sums."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_text import made_up_sentences

from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.choice import (
    ChoiceSettings,
    Question,
    build_prompt,
    encode_question,
    evaluate_choice,
    read_questions,
    select_few_shot_examples,
)
from megatron_chatflow.evaluation.evaluate import (
    EvaluationSettings,
    evaluate,
    format_results,
    to_json,
)
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.text import TextResult, TextSource, encode_document, evaluate_text
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.preprocess.templates import document_of_chat
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.chat_template import chat_of_exchanges
from megatron_chatflow.tokenizer.extend import extend_tokenizer

ROOT = Path(__file__).parents[3]
QUESTIONS = [
    Question("rivers", "Which is wet?", ("sand", "water", "salt"), 1),
    Question("rivers", "Which flows?", ("river", "stone"), 0),
    Question("bridges", "Which stands?", ("bridge", "rain", "wind", "fog"), 0),
]


@pytest.fixture(scope="module")
def model(random_llama: Path) -> LanguageModel:
    return LanguageModel(random_llama)


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def reference_log_probs(folder: Path, row: list[int]) -> np.ndarray:
    """Computes log-probabilities with transformers, without batching: float64[len(row) - 1]."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([row])).logits[0, :-1]
    chosen = logits.log_softmax(-1)[
        torch.arange(len(row) - 1), torch.tensor(row[1:], dtype=torch.int64)
    ]
    return chosen.double().numpy()


def test_log_probs_do_not_depend_on_the_batch(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [model.tokenizer.encode(text) for text in made_up_sentences(9)] + [[5]]
    expected = [reference_log_probs(model.folder, row) for row in rows]
    for limit in (1, 20_000, 2**27):
        monkeypatch.setattr("megatron_chatflow.evaluation.models._MAX_LOGITS", limit)
        for values, known in zip(model.log_probs(rows), expected, strict=True):
            assert values.dtype == np.float64
            np.testing.assert_allclose(values, known, rtol=1e-4, atol=1e-5)
    follow = model.next_log_probs(
        [row[:-1] for row in rows[:9]], [[row[-1], 7] for row in rows[:9]]
    )
    for values, known in zip(follow, expected, strict=False):
        assert values[0] == pytest.approx(known[-1], rel=1e-4)


def test_text_is_read_in_windows_that_count_every_token_once(
    model: LanguageModel, tmp_path: Path
) -> None:
    texts = [made_up_sentences(1)[0], " ".join(made_up_sentences(12)), ""]
    path = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in texts])
    result = evaluate_text(model, TextSource("s", str(path), CorpusSettings()))
    ids = [model.tokenizer.encode(text) for text in texts]
    assert len(ids[1]) > 2 * model.max_length
    # Nothing precedes the first token of a document, so it has no loss.
    assert model.prefix_ids == [] and ids[2] == []
    assert result.num_tokens == len(ids[0]) - 1 + len(ids[1]) - 1
    first = [model.tokenizer.decode(row[:1]) for row in ids[:2]]
    assert result.num_bytes == len("".join(texts).encode()) - len("".join(first).encode())
    assert result.num_documents == 3
    nats = 0.0
    for row in ids:
        for begin in range(0, len(row) - 1, 96):
            nats -= reference_log_probs(model.folder, row[begin : begin + 97]).sum()
    assert result.nats == pytest.approx(nats, rel=1e-4)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.num_bytes, rel=1e-4)
    assert result.to_dict()["perplexity"] == pytest.approx(math.exp(result.loss))
    first = evaluate_text(model, TextSource("s", str(path), CorpusSettings()), max_documents=1)
    assert first.num_documents == 1 and first.num_tokens == len(ids[0]) - 1


def test_only_answers_of_chats_count(model: LanguageModel, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "bana kifu"},
        {"role": "assistant", "content": "sodo 今 lan"},
    ]
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": messages}])
    result = evaluate_text(model, TextSource.parse(f"c:chat={path}"))
    answer = model.tokenizer.encode_continuation("sodo 今 lan")
    assert result.num_tokens == len(answer) + 1  # and the end of the answer
    assert result.num_bytes == len("sodo 今 lan".encode())
    document = document_of_chat(chat_of_exchanges(None, (("a", "bc"),)), "chatml", "response")
    ids, mask, num_bytes = encode_document(model, document)
    assert len(ids) == len(mask) and num_bytes == 2
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("bana kifu\t今\n")
    result = evaluate_text(model, TextSource.parse(f"p:pairs={pairs}"))
    assert result.num_tokens > 0


def test_prompts() -> None:
    letter = ChoiceSettings("letter", 1)
    assert build_prompt(QUESTIONS[1], [QUESTIONS[0]], letter) == (
        "The following are multiple choice questions (with answers) about rivers.\n\n"
        "Which is wet?\nA. sand\nB. water\nC. salt\nAnswer: B\n\n"
        "Which flows?\nA. river\nB. stone\nAnswer:"
    )
    whole = ChoiceSettings("continuation", 0, "zh")
    assert build_prompt(QUESTIONS[1], [], whole) == (
        "以下是关于rivers的单项选择题，请选出其中的正确答案。\n\nWhich flows?\n答案："
    )
    assert select_few_shot_examples(QUESTIONS, 0, QUESTIONS, 5) == [QUESTIONS[1], QUESTIONS[2]]
    assert select_few_shot_examples(QUESTIONS, 2, QUESTIONS, 1) == [QUESTIONS[0]]


@pytest.mark.parametrize("scoring", ["letter", "continuation"])
def test_the_likeliest_choice_wins(model: LanguageModel, scoring: str) -> None:
    settings = ChoiceSettings(scoring)
    best = []
    for question in QUESTIONS:
        prompt = model.tokenizer.encode(build_prompt(question, [], settings))
        texts = ["A", "B", "C", "D"][: len(question.choices)]
        texts = texts if scoring == "letter" else list(question.choices)
        scores = []
        for text in texts:
            ids = model.tokenizer.encode_continuation(" " + text)
            row = [*prompt, *ids][-97:]
            scores.append(reference_log_probs(model.folder, row)[-len(ids) :].sum())
        best.append(int(np.argmax(scores)))
    result = evaluate_choice(model, QUESTIONS, settings)
    right = [a == question.answer for a, question in zip(best, QUESTIONS, strict=True)]
    assert result["accuracy"] == pytest.approx(np.mean(right))
    assert result["num_questions"] == 3
    assert result["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)
    assert result["subjects"] == {
        "rivers": pytest.approx(np.mean(right[:2])),
        "bridges": float(right[2]),
    }
    assert ("accuracy_per_byte" in result) == (scoring == "continuation")


def test_examples_that_do_not_fit_are_left_out(model: LanguageModel) -> None:
    long = [Question("x", "bana " * 60, ("a", "b"), 0)] * 2
    for scoring in ("letter", "continuation"):
        result = evaluate_choice(model, QUESTIONS[:1], ChoiceSettings(scoring, 2), pool=long)
        alone = evaluate_choice(model, QUESTIONS[:1], ChoiceSettings(scoring, 0))
        assert result["accuracy"] == alone["accuracy"]
    assert evaluate_choice(model, long, ChoiceSettings("letter"))["num_questions"] == 2


def test_question_files(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "q.jsonl",
        [
            {"subject": "a_b", "question": "q", "choices": ["x", "y"], "answer": 1},
            {"question": "q", "A": "x", "B": "y", "C": "z", "answer": "C"},
        ],
    )
    assert read_questions(path) == [
        Question("a b", "q", ("x", "y"), 1),
        Question("", "q", ("x", "y", "z"), 2),
    ]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_questions(path)) == 2
    for record in (
        {"question": "q", "choices": ["x", "y"], "answer": 2},
        {"question": "q", "choices": ["x", "y"], "answer": math.inf},
        {"question": "q", "choices": ["x", "y"], "answer": 0.5},
        {"question": "q", "choices": ["x", "y"], "answer": True},
        {"question": "q", "choices": ["x", "y"], "answer": ""},
        {"question": "q", "choices": ["x", "y", "z"], "answer": "BC"},
        {"question": "q", "choices": ["x", "y"], "answer": [0]},
        {"question": "q", "choices": ["", "y"], "answer": 1},
        {"question": "q", "choices": ["x", " \u3000"], "answer": 0},
        {"question": "q", "choices": ["x", None], "answer": 0},
        {"question": "q", "choices": "xy", "answer": 0},
        {"question": "\ud800", "choices": ["x", "y"], "answer": 0},
        {"question": "q", "choices": ["x"], "answer": 0},
        {"question": "q", "choices": ["x", "y"]},
        {"question": "q", "choices": ["x", "y"], "answer": "Z"},
        [],
    ):
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match="line 1 is not a question"):
            read_questions(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1 is not a question"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="contains no questions"):
        read_questions(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_questions(tmp_path / "none")


def test_json_texts_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    texts = ["a\u2028b", "a\u2029b", "a\u0085b", "a\x7fb"]
    records = [{"question": text, "choices": [text, "y"], "answer": 0} for text in texts]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    assert [question.question for question in read_questions(path)] == texts
    assert [question.choices[0] for question in read_questions(path)] == texts


def test_a_choice_without_any_token_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers

    fast = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="a"))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(" ", ""), normalizers.Replace("\u200b", "")]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    tokenizer = load_tokenizer(tmp_path)
    records = [
        {"question": "b", "choices": ["a", "b"], "answer": 0},
        {"question": "b", "choices": ["a", "\u200b"], "answer": 0},
    ]
    first, second = read_questions(write_lines(tmp_path / "q.jsonl", records))
    settings = ChoiceSettings("continuation")
    _, answers = encode_question(tokenizer, [0], 64, first, [], settings)
    assert all(answers)
    with pytest.raises(UserError, match=r"q.jsonl: line 2: choice B encodes to no tokens"):
        encode_question(tokenizer, [0], 64, second, [], settings)


def test_source_arguments(model: LanguageModel, tmp_path: Path) -> None:
    for text in ("x", "=x", "a=", "a:parquet=x"):
        with pytest.raises(UserError, match="--source"):
            TextSource.parse(text)
    assert TextSource.parse("a=b=c").path == "b=c"
    path = write_lines(tmp_path / "x.jsonl", [{"other": "key"}])
    with pytest.raises(UserError, match="contains no documents"):
        evaluate_text(model, TextSource.parse(f"a={path}"))


def test_table_sets_models_side_by_side() -> None:
    def results(name: str, bits: float) -> dict:
        values = {"loss": 1.0, "perplexity": math.e, "bits_per_byte": bits}
        return {"model": f"x/{name}", "sources": {"zh": values}, "tasks": {"t": {"acc": bits / 4}}}

    lines = format_results([results("base", 2.0), results("ours", 1.0)]).splitlines()
    assert lines[0].split() == ["base", "ours", "change"]
    assert lines[1].split() == ["zh", "bits_per_byte", "2.0000", "1.0000", "-50.0%"]
    assert lines[-1].split() == ["t", "acc", "0.5000", "0.2500", "-50.0%"]
    assert len({len(line) for line in lines}) == 1


def test_a_source_without_loss_tokens_is_null_in_json() -> None:
    result = TextResult(num_documents=1)
    assert math.isnan(result.loss)
    text = to_json([{"model": "m", "sources": {"chats": result.to_dict()}}])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    row = next(
        line for line in format_results(json.loads(text)).splitlines() if "chats loss" in line
    )
    assert row.split() == ["chats", "loss", "-"]
    values = json.loads(text, parse_constant=refuse)[0]["sources"]["chats"]
    assert values["loss"] is values["perplexity"] is values["bits_per_byte"] is None
    assert values["num_tokens"] == 0


def test_a_checkpoint_whose_tokenizer_moved(random_llama: Path, tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "t.jsonl", [{"text": made_up_sentences(1)[0]}])
    settings = EvaluationSettings(sources=(TextSource.parse(f"s={texts}"),))
    source = tmp_path / "source"
    shutil.copytree(random_llama, source)
    import_huggingface(source, tmp_path / "run")
    moved = source.rename(tmp_path / "moved")
    expected = evaluate(random_llama, settings)["sources"]
    # the run has its own copy of the tokenizer
    assert evaluate(tmp_path / "run", settings)["sources"] == expected
    # Earlier versions recorded only the path of the tokenizer.
    shutil.rmtree(tmp_path / "run" / "iter_0000000" / "huggingface")
    advice = "give the run's tokenizer with --tokenizer-model"
    with pytest.raises(UserError, match=f"the run's tokenizer is missing; {advice}$"):
        evaluate(tmp_path / "run", settings)
    results = evaluate(tmp_path / "run", settings, TokenizerChoice(moved))
    assert results["sources"] == expected
    other = extend_tokenizer(load_tokenizer(moved), ["龍"], tmp_path / "other")
    with pytest.raises(UserError, match=f"is not the tokenizer that .* trained with; {advice}$"):
        evaluate(tmp_path / "run", settings, TokenizerChoice(other.model_path))
