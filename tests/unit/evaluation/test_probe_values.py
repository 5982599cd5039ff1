"""Tests probes of transfer against transformers, against an exact model, and their refusals."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_text import made_up_sentences

from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.evaluate import format_results
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.probes import (
    FewShotProbe,
    Probe,
    _ratio,
    evaluate_probe,
    parse_probe,
    parse_probes,
)
from megatron_chatflow.evaluation.scoring import score_rows
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.base import Tokenizer

QUESTIONS = [
    {"instruction": f"bana {k} kifu", "output": f"sodo {7 * k % 10} 今"} for k in range(12)
]
PAIRS = [{"en": f"bana {k} kifu", "zh": f"今{k}天一共"} for k in range(9)]
MINIMAL = [
    {"good": "bana kifu sodo", "bad": "kifu bana sodo", "kind": "order"},
    {"good": "今天一", "bad": "天今一", "kind": "order"},
    {"good": "sodo 4", "bad": "sodo 5", "kind": "number"},
]


@pytest.fixture(scope="module")
def model(random_llama: Path) -> LanguageModel:
    return LanguageModel(random_llama)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes")
    texts = [{"text": text} for text in made_up_sentences(50)]
    for name, records in (
        ("questions", QUESTIONS),
        ("pairs", PAIRS),
        ("minimal", MINIMAL),
        ("texts", texts),
    ):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def reference_bits(model: LanguageModel, ids: list[int], begin: int, end: int) -> float:
    """Computes bits of ids[begin:end] with transformers, without batching or packing."""
    with torch.no_grad():
        logits = model.hf_model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[k - 1, ids[k]]) for k in range(begin, end)) / math.log(2)


def mean_and_error(values: list[float], counts: list[float]) -> tuple[float, float]:
    """Computes a ratio and its standard error as the linearized estimator defines them."""
    x, y = np.array(values), np.array(counts, dtype=float)
    ratio = x.sum() / y.sum()
    deviations = (x - ratio * y) / y.mean()
    return ratio, deviations.std(ddof=1) / math.sqrt(len(x))


def check(result: dict[str, float], name: str, values: list[float], counts: list[float]) -> None:
    value, error = mean_and_error(values, counts)
    assert result[name] == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert result[f"{name}_stderr"] == pytest.approx(error, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("source", ["", "texts"])
def test_copy(model: LanguageModel, files: Path, source: str) -> None:
    file = f":{files / source}.jsonl" if source else ""
    probe = parse_probe(f"copy,length=9,strings=4,repeats=3,tokens=30{file}")
    prepared = probe.prepare(model.tokenizer, model.prefix_ids, 96)
    rows = [list(row.ids) for row in prepared.rows]
    assert len({tuple(row) for row in rows}) == 4
    for row in rows:
        assert row[:9] == row[9:18] == row[18:] and len(set(row)) == 9
        assert min(row) > 2 and all(model.tokenizer.decode([i]) for i in row)
    if source:
        counts = np.bincount(
            np.concatenate(model.tokenizer.encode_batch(made_up_sentences(50))), minlength=512
        )
        assert counts[np.unique(rows)].min() >= np.sort(counts)[-40]
    again = parse_probe(f"copy,length=9,strings=4,repeats=3,tokens=30{file}")
    assert [row.ids for row in again.prepare(model.tokenizer, [], 96).rows] == rows
    result = evaluate_probe(model, probe)
    bits = [[reference_bits(model, row, 9 * k + 1, 9 * k + 9) for k in range(3)] for row in rows]
    num_bytes = [int(model.tokenizer.num_bytes_per_id[row[1:9]].sum()) for row in rows]
    for k, which in enumerate(("first", "second", "last")):
        check(result, f"{which}_bits_per_token", [b[k] for b in bits], [8] * 4)
        check(result, f"{which}_bits_per_byte", [b[k] for b in bits], num_bytes)
    check(result, "gain_bits_per_token", [b[0] - b[1] for b in bits], [8] * 4)


class InductionModel:
    """Expects what followed the last occurrence of a token with probability 3/4."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def log_probs(self, rows: list[list[int]]) -> list[np.ndarray]:
        return [
            np.log([self._probability(row[:k], row[k]) for k in range(1, len(row))]) for row in rows
        ]

    def _probability(self, before: list[int], token: int) -> float:
        followers = [b for a, b in zip(before, before[1:], strict=False) if a == before[-1]]
        even = 1 / self.vocab_size
        return 0.75 * (followers[-1] == token) + 0.25 * even if followers else even


def test_a_model_that_copies_gains(model: LanguageModel) -> None:
    probe = parse_probe("copy,length=20,strings=3")
    prepared = probe.prepare(model.tokenizer, [model.tokenizer.bos_id], 96)
    result = prepared.summarize(score_rows(InductionModel(512), prepared.rows))  # type: ignore[arg-type]
    assert result["first_bits_per_token"] == pytest.approx(9)
    assert result["second_bits_per_token"] == pytest.approx(-math.log2(0.75 + 0.25 / 512))
    assert result["gain_bits_per_token"] == pytest.approx(9 + math.log2(0.75 + 0.25 / 512))
    assert result["gain_bits_per_token_stderr"] == pytest.approx(0, abs=1e-9)


def test_fewshot(model: LanguageModel, files: Path, byte_level_model: Path) -> None:
    probe = parse_probe(f"fewshot,shots=2,questions=5,label=zh:{files / 'questions.jsonl'}")
    assert isinstance(probe, FewShotProbe) and probe.label == "zh" and len(probe.items) == 5
    bits: tuple[list[float], list[float]] = ([], [])
    for (question, answer), examples in probe.items:
        assert len(examples) == 2 and question not in dict(examples)
        for shown, values in zip(([], examples), bits, strict=True):
            prompt = "".join(f"{q}\n{a}\n\n" for q, a in shown) + f"{question}\n"
            ids = model.tokenizer.encode(prompt)
            whole = ids + model.tokenizer.encode_continuation(answer)
            values.append(reference_bits(model, whole, len(ids), len(whole)))
    result = evaluate_probe(model, probe)
    num_bytes: list[float] = [len(answer.encode()) for (_, answer), _ in probe.items]
    check(result, "0_shot_bits_per_byte", bits[0], num_bytes)
    check(result, "2_shot_bits_per_byte", bits[1], num_bytes)
    check(result, "gain_bits_per_byte", [a - b for a, b in zip(*bits, strict=True)], num_bytes)
    assert result["num_questions"] == 5 and result["num_too_long"] == 0
    # Another vocabulary receives the same texts.
    other = load_tokenizer(byte_level_model)

    def texts(tokenizer: Tokenizer) -> list[str]:
        rows = probe.prepare(tokenizer, [], 500).rows
        return [tokenizer.decode(row.ids) for row in rows]

    assert texts(other) == texts(model.tokenizer)
    longest = max(len(row.ids) for row in probe.prepare(model.tokenizer, [], 96).rows) - 2
    few = probe.prepare(model.tokenizer, [], longest)
    assert 0 < len(few.rows) < 10
    assert few.summarize(np.zeros(len(few.rows)))["num_too_long"] == 5 - len(few.rows) // 2


def test_fewshot_with_a_chat_template(model: LanguageModel, files: Path) -> None:
    for template, text in (
        ("chatflow", "### Instruction:\n{}\n\n### Response:\n{}"),
        ("llama2", "[INST] {} [/INST] {}"),
    ):
        path = files / "questions.jsonl"
        probe = parse_probe(f"fewshot,shots=1,questions=3,template={template}:{path}")
        assert isinstance(probe, FewShotProbe)
        rows = probe.prepare(model.tokenizer, [], 96).rows
        for (question, ((one, two),)), row in zip(probe.items, rows[1::2], strict=True):
            ids = list(row.ids)
            end = ids.index(model.tokenizer.eos_id)
            assert model.tokenizer.decode(ids[:end]).rstrip() == text.format(one, two)
            assert model.tokenizer.decode(ids[end + 1 :]).rstrip() == text.format(*question)
            ((begin, last),) = row.spans
            answer = f" {question[1]} " if template == "llama2" else question[1]
            assert ids[begin:last] == model.tokenizer.encode_continuation(answer)
            assert last == len(ids)


def test_translation(model: LanguageModel, files: Path) -> None:
    path = files / "pairs.jsonl"
    probe = parse_probe(rf"translation,pairs=6,prompt=<{{source_language}}\: {{source}}>:{path}")
    result = evaluate_probe(model, probe)
    assert result["num_pairs"] == 6
    eos = model.tokenizer.eos_id
    encode, more = model.tokenizer.encode, model.tokenizer.encode_continuation
    for side, (source, target) in enumerate((("zh", "en"), ("en", "zh"))):
        bits: list[list[float]] = []
        num_bytes: list[float] = []
        for pair in probe.items:  # type: ignore[attr-defined]
            given = [[eos, *encode(f"<{source}: ")], more(pair[1 - side]), more(">")]
            goal = more(pair[side])
            bits.append([])
            num_bytes.append(len(pair[side].encode()))
            for context in ([given[0], given[2]], given):
                ids = [token for part in context for token in part]
                whole = [*ids, *goal]
                bits[-1].append(reference_bits(model, whole, len(ids), len(whole)))
        gains = [a - b for a, b in bits]
        check(result, f"{target}_bits_per_byte", [b[0] for b in bits], num_bytes)
        check(result, f"{target}_given_{source}_bits_per_byte", [b[1] for b in bits], num_bytes)
        check(result, f"{target}_gain_from_{source}_bits_per_byte", gains, num_bytes)
        check(result, f"{target}_gain_from_{source}_bits_per_pair", gains, [1] * 6)


def test_minimal_pairs(model: LanguageModel, files: Path) -> None:
    result = evaluate_probe(model, parse_probe(f"pairs:{files / 'minimal.jsonl'}"))
    differences: dict[str, list[float]] = {"": [], "order": [], "number": []}
    for record in MINIMAL:
        bits = []
        for text in (record["bad"], record["good"]):
            ids = [model.tokenizer.eos_id, *model.tokenizer.encode(text)]
            bits.append(reference_bits(model, ids, 1, len(ids)))
        for kind in ("", record["kind"]):
            differences[kind].append(bits[0] - bits[1])
    check(result, "difference_bits", differences[""], [1] * 3)
    check(result, "order_difference_bits", differences["order"], [1] * 2)
    assert result["number_difference_bits"] == pytest.approx(differences["number"][0], rel=1e-4)
    assert "number_difference_bits_stderr" not in result
    accuracy = np.mean(np.array(differences[""]) > 0)
    assert result["accuracy"] == pytest.approx(accuracy)
    assert result["accuracy_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 3))


def test_a_ratio_of_equal_counts_is_a_mean() -> None:
    values = np.array([1.0, 4.0, 2.5, 0.0])
    found = _ratio("x", values, np.full(4, 2))
    assert found["x"] == pytest.approx(values.mean() / 2)
    assert found["x_stderr"] == pytest.approx(values.std(ddof=1) / 2 / 2)
    assert "x_stderr" not in _ratio("x", values[:1], np.ones(1))


def test_results_are_printed_with_standard_errors() -> None:
    def result(value: float) -> dict[str, Any]:
        return {"model": "m", "probes": {"copy": {"gain": value, "gain_stderr": 0.25, "num_x": 3}}}

    text = format_results([result(1.5), result(1.0)])
    assert "copy gain" in text and "1.5000 ± 0.2500" in text and text.endswith("-0.5000")
    assert "num_x" not in text and "stderr" not in text


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        ("cpoy", None, "'cpoy' is not NAME"),
        ("", None, "NAME is one of copy, fewshot"),
        ("copy,size=3", None, "'size=3' is not KEY=VALUE; KEY is one of label, seed, length"),
        ("copy,length=x", None, "length must be a whole number, not 'x'"),
        ("copy,length=1", None, "length must be at least 2, not 1"),
        ("copy,strings=0", None, "strings must be at least 1, not 0"),
        ("pairs", None, "pairs: needs a file; write pairs:FILE"),
        ("pairs:FILE", None, "cannot be read"),
        ("pairs:FILE", "\n", "contains no pairs"),
        ("pairs:FILE", '{"good": "a"}', "line 1 is not a pair .KeyError"),
        ("pairs:FILE", '{"good": "a", "bad": "b"}\n{"good": "a", "bad": "a"}', "line 2 is not"),
        ("pairs:FILE", '{"good": "a", "bad": 3}', "line 1 is not a pair"),
        ("pairs:FILE", "[1]", "line 1 is not a pair"),
        ("pairs:FILE", '{"good": "a", "bad": "\\ud800"}', "line 1 is not a pair"),
        ("fewshot:FILE", None, "no such file"),
        ("fewshot,template=x:FILE", "", "template 'x' is not one of plain, chatflow"),
        ("fewshot:FILE", '{"text": "a"}', "contains no chats .*dropped: 1 no_chat_key"),
        ("fewshot:FILE", '{"prompt": "a", "completion": "b"}', "has 1 questions .* too few for 4"),
        ("translation:FILE", '{"en": "a"}', "contains no pairs .*dropped: 1 no_key_zh"),
        ("translation,prompt=x:FILE", "", "prompt must contain {source} once"),
        ("copy:FILE", "", "contains no text"),
    ],
)
def test_refusals(tmp_path: Path, text: str, content: str | None, message: str) -> None:
    path = tmp_path / "file.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        parse_probes([text.replace("FILE", str(path))], "--probe")
    assert str(error.value).startswith("--probe: ") and "\n" not in str(error.value)


def test_what_does_not_fit_is_refused(model: LanguageModel, files: Path) -> None:
    def prepare(text: str, max_length: int) -> Probe:
        probe = parse_probe(text.format(files))
        probe.prepare(model.tokenizer, [], max_length)
        return probe

    prepare("copy,length=10", 19)
    for text, length, message in (
        ("copy,length=10", 18, "copy: 2 occurrences of 10 tokens do not fit into 18 tokens"),
        ("copy,length=400", 999, "copy: only [0-9]+ tokens to draw strings of 400 from"),
        ("pairs:{}/minimal.jsonl", 1, "pairs minimal: no text fits into 1 tokens"),
        ("fewshot:{}/questions.jsonl", 9, "no text fits into 9 tokens"),
        ("translation:{}/pairs.jsonl", 3, "no text fits into 3 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(text, length)
    with pytest.raises(UserError, match="2 probes are called 'copy'; add label=NAME"):
        parse_probes(["copy", "copy,length=3"], "--probe")
