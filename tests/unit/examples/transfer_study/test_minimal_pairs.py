"""Tests the generator of Chinese minimal pairs on made-up sentences."""

import json
from collections import Counter
from pathlib import Path

import pytest

from examples.transfer_study.minimal_pairs import (
    KINDS,
    bad_sentence,
    minimal_pairs,
    sentences,
    write_minimal_pairs,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.probes import parse_probe

EXAMPLES = {
    "classifier": ("我们买了一辆红色汽车。", "我们买了一位红色汽车。"),
    "classifier_order": ("他提出两个问题给老师。", "他提出两问题个给老师。"),
    "le": ("昨天下午他发现了秘密。", "昨天下午他发了现秘密。"),
    "de": ("这里是我们的新房子。", "这里是我的们新房子。"),
    "negation": ("她从来不喜欢下雨天。", "她从来喜不欢下雨天。"),
    "degree": ("学会游泳非常重要。", "学会游泳重要非常。"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    good, bad = EXAMPLES[kind]
    assert bad_sentence(good, kind) == bad
    # An erroneous sentence is not the good one of a pair of another kind.
    assert [other for other in KINDS if bad_sentence(good, other)] in ([kind], [kind, "le"])


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("他在比赛中得了第一名选手。", "classifier"),
        ("这是一家人的照片和信件。", "classifier"),
        ("我们为了孩子努力工作。", "le"),
        ("他了解这里的情况。", "le"),
        ("我吃过饭了。", "le"),
        ("很大程度上取决于天气。", "degree"),
        ("不知道他去哪里。", "negation"),
    ],
)
def test_places_that_would_stay_grammatical_are_left_out(sentence: str, kind: str) -> None:
    assert bad_sentence(sentence, kind) is None


def test_sentences_are_of_medium_length_and_chinese() -> None:
    text = "短句。这是一句足够长的话。\nthis 是 a sentence in English 吗？" + "长" * 60 + "。"
    assert list(sentences(text)) == ["这是一句足够长的话。"]


def test_pairs_are_deterministic_and_counted(tmp_path: Path) -> None:
    texts = ["".join(good for good, _ in EXAMPLES.values())]
    texts += [f"我们买了{n}辆{c}色汽车。" for n in "两三四五" for c in "红黄蓝白"]
    pairs = minimal_pairs(texts, 5)
    assert minimal_pairs(texts[::-1] + texts, 5) == pairs
    counts = Counter(pair["kind"] for pair in pairs)
    assert set(counts) == set(KINDS) and max(counts.values()) == 5
    assert len({pair["good"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert len(pair["good"]) == len(pair["bad"]) and pair["good"] != pair["bad"]
        if pair["kind"] != "classifier":
            assert sorted(pair["good"]) == sorted(pair["bad"])
    path, output = tmp_path / "zh.jsonl", tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert write_minimal_pairs([path], output, 5) == counts
    probe = parse_probe(f"pairs:{output}")
    assert len(probe.items) == len(pairs)  # type: ignore[attr-defined]
    path.write_text('{"text": "no Chinese"}\n')
    with pytest.raises(UserError, match="has no sentence for a minimal pair"):
        write_minimal_pairs([path], output, 5)
    path.write_text('{"text": "a"}\n[]')
    with pytest.raises(UserError, match="line 2 is not a text"):
        write_minimal_pairs([path], output, 5)
