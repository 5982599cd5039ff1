"""Tests user-defined pair templates and the filter of writing systems."""

from pathlib import Path

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.pair_filters import SCRIPTS, is_mostly
from megatron_chatflow.preprocess.pairs import (
    PairSettings,
    PairText,
    documents_of_pair,
    read_pair_templates,
)
from megatron_chatflow.tokenizer.documents import DroppedError, Segment


def write(folder: Path, text: str) -> Path:
    (folder / "t.yaml").write_text(text, encoding="utf-8")
    return folder / "t.yaml"


def test_reads_templates(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "templates:\n"
        '  - {prompt: "{source}\\nto {target_language}: ", response: "{target}"}\n'
        '  - text: "{{{source}}} = {target}"\n',
    )
    assert read_pair_templates(path) == (
        PairText("{source}\nto {target_language}: ", "{target}"),
        PairText("", "{{{source}}} = {target}"),
    )


def test_documents() -> None:
    texts = (
        PairText("{source} ({source_language}): ", "{target}"),
        PairText("", "{source}={target}"),
    )
    settings = PairSettings(texts=texts, direction="both")
    seen = set()
    for k in range(20):
        pair = (f"a {{x}} {k}", f"\u4e00 {k}")
        forward, backward = documents_of_pair(*pair, settings, "chatflow", "response")
        seen.add(len(forward.segments))
        assert len(forward.segments) == len(backward.segments)
        if len(forward.segments) == 1:
            assert forward.segments == (Segment(f"a {{x}} {k}=\u4e00 {k}", True),)
        else:
            assert forward.segments == (
                Segment(f"a {{x}} {k} (English): ", False),
                Segment(f"\u4e00 {k}", True),
                Segment("", True, "end"),
            )
            assert backward.segments[0].text == f"\u4e00 {k} (Chinese): "
    assert seen == {1, 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("templates: []", "list called templates"),
        ("- a", "must be a mapping of keys"),
        ("templates: [{prompt: a}]", r"templates\[0\]: must contain either text"),
        ("templates: [{text: '{target}', prompt: a, response: b}]", "must contain either text"),
        ("templates: [{text: '{target} {sauce}'}]", "unknown placeholder sauce"),
        ("templates: [{text: '{target'}]", r"templates\[0\].text: .*brace"),
        ("templates: [{text: 5}]", r"templates\[0\].text"),
        ("templates: [{prompt: '{target}', response: '{source}'}]", "no target text"),
        ("a: [", r"\.yaml: line 1 "),
        ('templates: [{text: "{target}\\ud800"}]', "line 1 .ud800 is half of a character"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pair_templates(write(tmp_path, text))
    with pytest.raises(UserError, match="absent.yaml: No such file"):
        read_pair_templates(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("A cat, 12.", "latin"),
        ("\u732b\u3002 12 ok", "han"),
        ("caf\u00e9 \u00fcber \u1e9e", "latin"),
        ("\u043a\u043e\u0442", "cyrillic"),
        ("\u306d\u3053\u30cd\u30b3", "kana"),
        ("\uace0\uc591\uc774", "hangul"),
        ("12 + 13", "han"),
        ("", "latin"),
    ],
)
def test_scripts(text: str, script: str) -> None:
    assert is_mostly(text, script)
    assert is_mostly(text, "any")
    if any(character.isalpha() for character in text):
        assert [other for other in SCRIPTS if is_mostly(text, other)] == [script]


def test_pairs_in_the_wrong_script_are_dropped() -> None:
    settings = PairSettings(scripts=("latin", "han"), max_length_ratio=0)
    assert documents_of_pair("A cat", "\u4e00\u53ea\u732b", settings, "chatflow", "all")
    for pair in (("\u732b", "\u732b\u732b"), ("A cat", "Un chat"), ("A cat", "\u4e00 is a cat")):
        with pytest.raises(DroppedError, match="wrong_script"):
            documents_of_pair(*pair, settings, "chatflow", "all")
