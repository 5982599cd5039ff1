"""Tests the split and the files of the demo corpus, on made-up packages."""

import pytest

from examples.corpus import build, write
from examples.corpus.build import Extractor, extract_corpus, num_characters, split
from examples.corpus.pins import PINS, SMALL, SOURCES, select_pins
from examples.corpus.text import Document
from megatron_chatflow.errors import UserError


def documents(prefix, count, **others):
    return [Document(f"{prefix} {i}", {"text": f"{prefix} {i}"}, **others) for i in range(count)]


def extractor(source, package):
    return Extractor(source, (package,), lambda archives: iter(()))


def texts(corpus, name):
    return [record["text"] for record in corpus.records.get(name, [])]


def test_every_fiftieth_document_of_each_package_is_held_out():
    corpus = split(
        [
            (extractor("english", "a"), documents("a", 130)),
            (extractor("english", "b"), documents("b", 30)),
        ]
    )
    assert texts(corpus, "english.valid") == ["a 25", "a 75", "a 125", "b 25"]
    assert len(texts(corpus, "english.train")) == 156
    assert corpus.taken["a"]["english"].num_documents == 130
    assert corpus.taken["b"]["english"].num_characters == sum(len(f"b {i}") for i in range(30))


def test_page_is_held_out_of_every_source_that_it_feeds():
    pages = documents("page", 60)
    translated = [Document(page.group, {"text": f"译 {page.group}"}) for page in pages[10:]]
    corpus = split(
        [(extractor("english", "site"), pages), (extractor("chinese", "site"), translated)]
    )
    assert texts(corpus, "english.valid") == ["page 25"]
    assert texts(corpus, "chinese.valid") == ["译 page 25"]


def test_documents_of_a_group_stay_together_and_count_once():
    pairs = [
        Document(f"class {i // 3}", {"en": f"field {i}", "zh": f"字段 {i}"}) for i in range(90)
    ]
    corpus = split([(extractor("parallel", "sdk"), pairs)])
    assert [pair["en"] for pair in corpus.records["parallel.valid"]] == [
        "field 75",
        "field 76",
        "field 77",
    ]


def test_train_only_documents_are_neither_held_out_nor_counted():
    shared = documents("shared", 40, is_train_only=True)
    corpus = split([(extractor("english", "a"), [*shared, *documents("own", 26)])])
    assert texts(corpus, "english.valid") == ["own 25"]


def test_a_question_lies_on_one_side_whatever_its_package():
    def talk(question, answer):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return Document(question, {"messages": messages})

    first = [talk(f"q{i}", "yes") for i in range(30)]
    second = [talk("q25", "no"), talk("q1", "no")]
    corpus = split(
        [(extractor("instruction", "a"), first), (extractor("instruction", "b"), second)]
    )
    held = [record["messages"][0]["content"] for record in corpus.records["instruction.valid"]]
    assert held == ["q25", "q25"]


def test_repeats_are_dropped_within_a_source():
    again = [Document("other", {"text": "a  3"})]
    corpus = split(
        [(extractor("english", "a"), documents("a", 5)), (extractor("english", "b"), again)]
    )
    assert len(texts(corpus, "english.train")) == 5
    pairs = [("one", "一"), ("One ", "壹"), ("uno", "一"), ("two", "二")]
    found = split(
        [
            (
                extractor("parallel", "a"),
                [Document(en, {"en": en, "zh": zh}) for en, zh in pairs],
            )
        ]
    )
    assert [pair["en"] for pair in found.records["parallel.train"]] == ["one", "two"]


def test_characters_count_texts_only():
    record = {"messages": [{"role": "user", "content": "abc"}], "choices": ["de"], "answer": 1}
    assert num_characters(record) == 5


def test_sources_without_their_packages_are_left_out(tmp_path):
    found = Extractor("english", ("gensim",), lambda archives: iter(documents("a", 1)))
    assert extract_corpus({"django": tmp_path}, [found], num_workers=0).records == {}
    assert extract_corpus({"gensim": tmp_path}, [found], num_workers=0).records != {}


def test_every_pinned_package_feeds_what_it_says():
    fed = {pin.package: set() for pin in PINS}
    for item in build.EXTRACTORS:
        for package in item.packages:
            fed[package].add(item.source)
    assert fed == {pin.package: set(pin.yields) - {"tokenizer"} for pin in PINS}
    assert {source for package in SMALL for source in fed[package]} == set(SOURCES)
    assert len({pin.file_name for pin in PINS}) == len(PINS)
    assert all(len(bytes.fromhex(pin.sha256)) == 32 for pin in PINS)


def test_select_pins():
    names = [pin.package for pin in select_pins(only=["Lm_Eval", "tencentcloud.sdk.python"])]
    assert names == [
        "mistral-common",
        "tencentcloud-sdk-python",
        "tencentcloud-sdk-python-intl-en",
        "lm-eval",
    ]
    small = {pin.package for pin in select_pins(small=True, exclude=["jionlp"])}
    assert small == set(SMALL) - {"jionlp"}
    assert len(select_pins(exclude=["tencentcloud-sdk-python"])) == len(PINS) - 2
    with pytest.raises(UserError, match="pandas: not a package of the demo"):
        select_pins(only=["pandas"])
    with pytest.raises(UserError, match="tokenizer"):
        select_pins(exclude=["mistral-common"])
    with pytest.raises(UserError, match="no package"):
        select_pins(only=["lm-eval"], exclude=["lm-eval"])


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_runs_again_only_when_something_changed(packages, tmp_path, monkeypatch, capsys):
    upstream, pins = packages
    monkeypatch.setattr(
        write, "extract_corpus", lambda archives: extract_corpus(archives, num_workers=0)
    )
    folder = tmp_path / "out"

    def run(chosen):
        write.make_demo_corpus(chosen, folder, archive_folders=[upstream])
        return capsys.readouterr().out

    run(pins)
    first = files_of(folder)
    assert "nothing to do" in run(pins)
    (folder / "parallel.train.jsonl").write_text("cut off")
    assert "nothing to do" not in run(pins)
    assert files_of(folder) == first
    run(pins[:2])
    assert "instruction.train.jsonl" not in files_of(folder)


def test_missing_archive_folder_is_named(packages, tmp_path):
    with pytest.raises(UserError, match="folder not found"):
        write.make_demo_corpus(packages[1], tmp_path / "out", archive_folders=[tmp_path / "none"])
