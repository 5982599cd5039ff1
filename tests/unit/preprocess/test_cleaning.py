"""Tests cleaning jobs in this process: changes, filters, decontamination and deduplication."""

import json
import random
import re
import shlex
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import zstandard
from tool_calls import call_tool

pytest.importorskip("datatrove")
pytest.importorskip("py3langid")

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.cleaning.decontaminate import (
    EvaluationIndex,
    read_evaluation_files,
)
from megatron_chatflow.preprocess.cleaning.job import (
    COUNTS_FILE,
    REMOVED_FILE,
    CleanSettings,
    Counts,
    MinHashSettings,
    clean,
)
from megatron_chatflow.preprocess.cleaning.texts import (
    language_identifier,
    limit_punctuation,
    normalized_words_of,
    sentence_spans_of,
    without_boilerplate,
    words_of,
)

ENGLISH = (
    "The river rises in the hills north of the town and reaches the sea after ninety miles. "
    "Boats carried grain and wool along it until the railway came to the valley. "
    "Today people walk on its banks, and have built houses with a view of the water. "
    "In the winter it often floods the meadows, which is why the old road is on the hill. "
    "The bridge was built by a miller, who wanted to be able to reach his fields."
)
CHINESE = (
    "长江发源于青藏高原，流经十一个省份，最后注入东海。它是亚洲最长的河流，两岸有许多城市，"
    "历史上一直是重要的水路。在铁路出现之前，粮食和布匹都是用船运到下游的。现在人们在江上修建了大坝，"
    "也在岸边修了公园，夏天的晚上有很多人来这里散步。江水在冬天很浅，到了夏天就会涨起来。"
)
OTHER_CHINESE = (
    "这座城市的老街在河的北边。街上有很多卖茶和布的小店，店主都是本地人。早晨的时候，老人们在桥头下棋，"
    "孩子们背着书包去上学。到了晚上，灯笼亮起来，游客也多了。我们在这里住了三天，每天都去同一家面馆吃早饭。"
)
SPANISH = (
    "El río nace en las montañas del norte y llega al mar después de noventa millas de recorrido "
    "por campos y aldeas. Los barcos llevaban trigo y lana hasta que llegó el ferrocarril."
)


def write(folder: Path, name: str, records: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(r, ensure_ascii=False) if isinstance(r, dict) else r for r in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def read(folder: Path) -> list[dict[str, Any]]:
    records = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            records += [json.loads(line) for line in lines]
    return records


def run(folder: Path, **options: Any) -> Counts:
    settings = CleanSettings((str(folder / "in"),), str(folder / "out"), **options)
    counts = clean(settings)
    assert counts is not None
    return counts


def test_words_of_any_script() -> None:
    assert words_of("Don't stop, 小猫 42!") == ["Don't", "stop", ",", "小", "猫", "42", "!"]
    assert words_of("スーパー") == list("スーパー")
    assert normalized_words_of("Don't STOP, 小猫。") == ["don't", "stop", "小", "猫"]
    text = "One. Two?\n三。四！"
    sentences = [text[a:b].strip() for a, b in sentence_spans_of(text)]
    assert sentences == ["One.", "Two?", "三。", "四！"]


def test_changes_of_texts() -> None:
    assert limit_punctuation("好！！！！！ ... aaa ——————", 2) == "好！！ .. aaa ——"
    text = "正文第一行。\n责任编辑：张三\nAll Rights Reserved.\n" + "版权所有" * 30
    lines = ["责任编辑：张三", "All Rights Reserved."]
    assert without_boilerplate(text) == ("正文第一行。\n" + "版权所有" * 30, lines)
    assert without_boilerplate("a\n\nb\n") == ("a\n\nb\n", [])


@pytest.mark.parametrize(
    "line",
    [
        "Read more",
        "» Read more...",
        "Read more: The river in winter",
        "Privacy Policy | Terms of Use | Back to top",
        "© 2020 The Mill Ltd. All rights reserved.",
        "Copyright 2020 by the author, all rights reserved",
        "We use cookies to improve your experience.",
        "This website uses cookies.",
        "Please enable JavaScript in your browser.",
        "Subscribe to our newsletter!",
        "Click here to download the file",
        "Log in to comment",
        "上一篇：长江",
        "登录后查看更多",
        "本网站版权所有",
        "未经授权，请勿转载。",
    ],
)
def test_boilerplate(line: str) -> None:
    assert without_boilerplate(f"a\n{line}\nb") == ("a\nb", [line])


@pytest.mark.parametrize(
    "line",
    [
        "I read more than you do.",
        "Read more than one book on it.",
        "Please share this with your neighbours.",
        "A privacy policy is a text on how data are used.",
        "The new terms of use are hard to read.",
        "We use cookies as a snack in the afternoon.",
        "She had to log in to the machine in the next room.",
        "Log in to the server and restart it.",
        "He asked her to click here to see it.",
        "They sign up sooner than we do.",
        "他登录后发现密码错了。",
        "她在微信公众号上写文章。",
        "未经许可不得入内。",
    ],
)
def test_ordinary_sentences_are_no_boilerplate(line: str) -> None:
    assert without_boilerplate(f"a\n{line}\nb") == (f"a\n{line}\nb", [])


def test_languages_are_identified_without_a_download() -> None:
    identify = language_identifier()
    for text, language in ((ENGLISH, "en"), (CHINESE, "zh"), (SPANISH, "es")):
        found, probability = identify(text)
        assert found == language and 0.9 < probability <= 1.001
    found, probability = identify(
        "長江發源於青藏高原，流經十一個省份，最後注入東海。"
    )  # or Cantonese
    assert found == "zh" and probability > 0.9


def test_a_job_of_all_steps(tmp_path: Path) -> None:
    pytest.importorskip("opencc")
    spam = "\n".join([ENGLISH[:86]] * 40)
    traditional = "長江發源於青藏高原！！！！！"
    records = [
        {"text": ENGLISH, "url": "a", "n": 1},
        {"text": SPANISH},
        {"text": spam},
        {"text": ENGLISH.replace("ninety miles", "ninety-one miles")},
        "not JSON",
        {"text": CHINESE},
        {"text": f"{CHINESE}\n上一篇：{traditional}"},
        {"text": "上一篇：登录后查看"},
    ]
    write(tmp_path / "in", "a.jsonl", records)
    write(tmp_path / "in", "b.jsonl", [{"text": traditional + OTHER_CHINESE, "url": "b"}])
    counts = run(
        tmp_path,
        chinese="simplified",
        max_repeated_punctuation=2,
        remove_boilerplate=True,
        languages=("en", "zh"),
        filters=("gopher-quality", "gopher-repetition", "c4", "fineweb"),
        minhash=MinHashSettings(),
        removed=str(tmp_path / "removed"),
    )
    dropped = {step.name: step.dropped for step in counts.steps}
    assert dropped["boilerplate"] == {"no text left": 1}
    assert dropped["language"] == {"es": 1}
    assert dropped["gopher-repetition"] == {"dup_line_frac": 1}
    assert dropped["gopher-quality"] == dropped["c4"] == dropped["fineweb"] == {}
    assert dropped["minhash"] == {"": 2}
    assert counts.bad_lines == {"malformed_json": 1}
    assert counts.first_bad == "a.jsonl:5: malformed_json"
    assert (counts.num_read, counts.num_written) == (8, 3)
    written = read(tmp_path / "out")
    assert {record.get("url") for record in written} >= {"b"}
    assert sum(record["text"].startswith("The river") for record in written) == 1
    assert sum(record["text"].startswith("长江发源于青藏高原！！") for record in written) == 1
    names = {path.relative_to(tmp_path / "removed").as_posix()
             for path in (tmp_path / "removed").rglob("*.zst")}  # fmt: skip
    assert {"language/00000.jsonl.zst", "minhash/00000.jsonl.zst"} <= names
    (removed,) = read(tmp_path / "removed" / "language")
    assert removed["where"] == "a.jsonl:2" and removed["language"] == "es"
    assert removed["record"] == {"text": SPANISH}
    lines = [(part["where"], part["lines"]) for part in read(tmp_path / "removed" / "boilerplate")]
    assert lines == [
        ("a.jsonl:7", ["上一篇：长江发源于青藏高原！！"]),
        ("a.jsonl:8", ["上一篇：登录后查看"]),
    ]
    assert json.loads((tmp_path / "out" / COUNTS_FILE).read_text())["num_written"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "removed"]


def test_files_of_other_formats_and_empty_files(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.txt", [ENGLISH, SPANISH])
    (tmp_path / "in" / "b.jsonl").write_bytes(b"")
    (tmp_path / "in" / "c.json").write_text(json.dumps([{"text": CHINESE, "more": [1, None]}]))
    from megatron_chatflow.preprocess.settings import CorpusSettings

    corpus = CorpusSettings(txt_documents="line")
    counts = run(tmp_path, corpus=corpus, minhash=MinHashSettings())
    assert (counts.num_read, counts.num_written) == (3, 3)
    assert [r["text"] for r in read(tmp_path / "out")] == [ENGLISH, SPANISH, CHINESE]
    assert read(tmp_path / "out")[2]["more"] == [1, None]


def test_headers_are_not_bad_lines(tmp_path: Path) -> None:
    from megatron_chatflow.preprocess.settings import CorpusSettings
    from megatron_chatflow.report.corpus import measure_corpus

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text(f'text,n\n"{ENGLISH}",1\n')
    assert run(tmp_path, max_bad_lines=0).bad_lines == {}
    assert measure_corpus([str(tmp_path / "in")], CorpusSettings()).bad_lines == {}


def test_only_the_first_bad_line_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_chatflow.preprocess import readers
    from megatron_chatflow.preprocess.cleaning import job

    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}, *["{"] * 9, {"text": SPANISH}])
    monkeypatch.setattr(readers, "CHUNK_BYTES", 4)
    monkeypatch.setattr(job.shutil, "rmtree", lambda *_, **__: None)
    counts = run(tmp_path)
    assert counts.bad_lines == {"malformed_json": 9} and counts.first_bad is not None
    (path,) = (tmp_path / "out.partial" / "logs" / "filter" / "stats").glob("*.json")
    assert path.read_text().count("first bad line") == 1


def test_all_columns_of_a_table_are_written(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    record = {"text": ENGLISH, "url": "https://example.org", "tags": ["a", None]}
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "in" / "a.parquet")
    run(tmp_path)
    assert read(tmp_path / "out") == [record]


QUESTION = "Which of the following rivers is the longest one in the whole of Asia?"


def test_decontamination_finds_runs_of_words_and_whole_texts(tmp_path: Path) -> None:
    records = [
        {"question": QUESTION, "choices": ["Yangtze", "Ganges"], "answer": "A"},
        {"question": "Why is the sky blue in the daytime?"},
        {"question": "下列关于长江的说法中，哪一项是正确的？", "more": {"note": "Too short."}},
    ]
    write(tmp_path / "eval", "test.jsonl", records)
    index = read_evaluation_files([str(tmp_path / "eval")], 13)
    assert (index.num_texts, index.num_short) == (3, 4)
    found = index.find(f"A quiz. {QUESTION.upper().replace(' one', '')} {QUESTION}")
    assert found is not None and (found.file, found.record) == ("test.jsonl", 1)
    assert len(found.words.split()) == 13
    assert index.find("which of the following rivers is the longest one in the") is None
    found = index.find("I ask: why is the SKY blue, in the daytime")
    assert found is not None and found.record == 2
    found = index.find("题目：下列关于长江的说法中哪一项是正确的")
    assert found is not None and found.record == 3
    only_exact = EvaluationIndex(13, ("exact",))
    only_exact.add(QUESTION, "f", 1)
    assert only_exact.find(QUESTION[5:]) is None and only_exact.find(f"x {QUESTION} y")
    only_ngram = EvaluationIndex(13, ("ngram",))
    only_ngram.add("Why is the sky blue in the daytime?", "f", 1)
    assert only_ngram.find("Why is the sky blue in the daytime?") is None
    assert (only_ngram.num_texts, only_ngram.num_short) == (0, 1)


def test_evaluation_files_of_all_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "eval").mkdir()
    columns = {"question": [QUESTION], "choices": [["Why is the sky blue in the daytime?"]]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "eval" / "a.parquet")
    other = "What did the miller who built the old bridge want to be able to reach?"
    (tmp_path / "eval" / "b.csv").write_text(f'id,question\n1,"{other}"\n')
    index = read_evaluation_files([str(tmp_path / "eval")], 13)
    for text, file in (
        (QUESTION, "a.parquet"),
        (columns["choices"][0][0], "a.parquet"),
        (other, "b.csv"),
    ):
        found = index.find(text)
        assert found is not None and found.file == file
    assert (index.num_texts, index.num_short) == (3, 1)


def test_evaluation_files_that_cannot_be_searched(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}])
    write(tmp_path / "eval", "test.jsonl", [{"question": "Why is the sky blue in the daytime?"}])
    options: dict[str, Any] = {"decontaminate": (str(tmp_path / "eval" / "test.jsonl"),)}
    with pytest.raises(UserError, match="none of 1 texts has 13 words: check the files"):
        run(tmp_path, **options, decontaminate_match=("ngram",))
    lines = run(tmp_path, **options).describe()
    assert "searched 1 evaluation texts; 0 are too short" in lines
    write(tmp_path / "eval", "test.jsonl", [{"question": QUESTION}, "{"])
    with pytest.raises(UserError, match="--decontaminate: test.jsonl:2: malformed_json"):
        run(tmp_path, **options, overwrite=True)


def test_decontamination_reports_what_it_removed(tmp_path: Path) -> None:
    write(tmp_path / "eval", "test.jsonl", [{"question": QUESTION}])
    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}, {"text": f"{ENGLISH} {QUESTION}"}])
    counts = run(
        tmp_path, decontaminate=(str(tmp_path / "eval"),), removed=str(tmp_path / "removed")
    )
    assert [(step.name, step.dropped) for step in counts.steps] == [
        ("decontamination", {"test.jsonl": 1})
    ]
    (removed,) = read(tmp_path / "removed" / "decontamination")
    assert removed["where"] == "a.jsonl:2"
    assert removed["contamination"]["file"] == "test.jsonl"
    assert removed["contamination"]["words"].startswith("which of the following")
    write(tmp_path / "short", "test.jsonl", [{"question": "Why?"}])
    with pytest.raises(UserError, match="none of 1 texts has 8 words"):
        run(tmp_path, decontaminate=(str(tmp_path / "short"),), overwrite=True)


def word(draw: random.Random) -> str:
    return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=4))  # MinHash ignores digits


def made_up_texts(seed: int) -> Iterator[list[str]]:
    """Yields groups of an original and copies in which some words differ."""
    draw = random.Random(seed)
    for _ in range(60):
        original = [word(draw) for _ in range(draw.randrange(60, 200))]
        yield original
        for _ in range(3):
            copy = list(original)
            for _ in range(draw.randrange(1, max(2, len(original) // 25))):
                copy[draw.randrange(len(copy))] = word(draw)
            yield copy


def test_minhash_finds_95_percent_of_near_duplicates(tmp_path: Path) -> None:
    groups = list(made_up_texts(7))
    draw = random.Random(8)
    others = [[word(draw) for _ in range(100)] for _ in range(40)]
    words = [*groups, *others]
    write(tmp_path / "in", "a.jsonl", [{"text": " ".join(w), "id": k} for k, w in enumerate(words)])
    run(tmp_path, minhash=MinHashSettings())
    kept = {record["id"] for record in read(tmp_path / "out")}
    grams = [{tuple(w[k : k + 5]) for k in range(len(w) - 4)} for w in words]
    similar = [
        (a, b)
        for a, b in combinations(range(len(words)), 2)
        if len(grams[a] & grams[b]) >= 0.8 * len(grams[a] | grams[b])
    ]
    assert len(similar) > 100
    # Both documents of a pair that was not found are kept.
    num_missed = sum(a in kept and b in kept for a, b in similar)
    assert num_missed <= 0.05 * len(similar)
    assert set(range(len(groups), len(words))) <= kept
    assert len(kept) < len(words) - 100


def test_a_killed_job_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(3):
        write(tmp_path / "in", f"{k}.jsonl", [{"text": f"{ENGLISH} {k}"}])
    from megatron_chatflow.preprocess.cleaning import job, steps

    whole = CleanSettings((str(tmp_path / "in"),), str(tmp_path / "whole"), minhash=None)
    clean(whole)
    original = steps.ReadCorpus.run

    def killed(self: Any, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        if rank == 2:
            raise KeyboardInterrupt
        return original(self, data, rank, world_size)

    monkeypatch.setattr(steps.ReadCorpus, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    ranks = []

    def counted(self: Any, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        ranks.append(rank)
        return original(self, data, rank, world_size)

    monkeypatch.setattr(steps.ReadCorpus, "run", counted)
    with pytest.raises(UserError, match="belongs to another job"):
        run(tmp_path, max_repeated_punctuation=3)
    counts = run(tmp_path)
    assert ranks == [2] and counts.num_written == counts.num_read == 3
    for path in (tmp_path / "whole").glob("*.zst"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert job.COUNTS_FILE in {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": ("gopher",)}, "--filters gopher: give some of gopher-quality"),
        ({"language_threshold": 2.0}, "--language-threshold 2.0: must be from 0 to 1"),
        ({"decontaminate_ngram": 5}, "--decontaminate-ngram 5: must be at least 8"),
        ({"max_repeated_punctuation": -1}, "--max-repeated-punctuation -1: must be at least 1"),
        ({"languages": ("xx",)}, "no document left: read 1, dropped: language 1"),
        ({"max_bad_lines": 0}, "too many bad lines: 1 .1 malformed_json.; the first is a.jsonl:2"),
        ({"ray": "auto", "slurm_partition": "x"}, "give only one of them"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}, "{"])
    with pytest.raises(UserError, match=message):
        run(tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_existing_folders_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}])
    (tmp_path / "out").mkdir()
    run(tmp_path)  # an empty folder is none of the user's
    with pytest.raises(UserError, match="out: exists: choose another --output, or use --overwrite"):
        run(tmp_path)
    assert run(tmp_path, overwrite=True).num_written == 1
    (tmp_path / "out" / COUNTS_FILE).unlink()
    with pytest.raises(UserError, match="was not written by this command"):
        run(tmp_path, overwrite=True)
    assert len(read(tmp_path / "out")) == 1


def test_only_folders_of_this_command_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}])
    write(tmp_path / "mine", "b.jsonl", [{"text": ENGLISH}])
    mine = str(tmp_path / "mine")
    with pytest.raises(UserError, match="mine: was not written by this command .* --removed"):
        run(tmp_path, removed=mine, overwrite=True)
    assert (tmp_path / "mine" / "b.jsonl").exists() and not (tmp_path / "out").exists()
    removed = tmp_path / "new" / "removed"
    run(tmp_path, removed=str(removed))
    assert (removed / REMOVED_FILE).exists()
    with pytest.raises(UserError, match="removed: exists: choose another --removed, or use --over"):
        run(tmp_path, removed=str(removed))
    (removed / "old").write_text("")
    run(tmp_path, removed=str(removed), overwrite=True)
    assert [path.name for path in removed.iterdir()] == [REMOVED_FILE]
    assert not list(tmp_path.rglob("*.old"))


@pytest.mark.parametrize(
    ("output", "removed", "message"),
    [
        ("in", None, "in: contains the input .*a.jsonl: choose another --output"),
        (".", None, "contains the input"),
        ("in/out", None, "in/out: is in the input folder .*in: choose another --output"),
        ("eval", None, "eval: contains the input .*test.jsonl: choose another --output"),
        ("out", "in", "in: contains the input .*a.jsonl: choose another --removed"),
        ("out", "in/removed", "in/removed: is in the input folder .* choose another --removed"),
        ("out", "out", "out: overlaps .*out: choose another --removed"),
        ("out", "out/removed", "out/removed: overlaps"),
        ("a/out", "a", "a: overlaps .*a/out: choose another --removed"),
        ("out", "out.partial/x", "out.partial/x: overlaps"),
    ],
)
def test_folders_that_contain_each_other_are_refused(
    output: str, removed: str | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}])
    write(tmp_path / "eval", "test.jsonl", [{"question": QUESTION}])
    settings = CleanSettings(
        (str(tmp_path / "in"),),
        str(tmp_path / output),
        decontaminate=(str(tmp_path / "eval" / "test.jsonl"),),
        removed=removed and str(tmp_path / removed),
        overwrite=True,
    )
    with pytest.raises(UserError, match=message):
        clean(settings)
    assert sorted(path.name for path in tmp_path.rglob("*.jsonl")) == ["a.jsonl", "test.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval", "in"]


@pytest.mark.parametrize("num_published", [1, 2])
def test_a_job_that_was_killed_while_it_published_is_finished(
    num_published: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}, {"text": SPANISH}])
    from megatron_chatflow.preprocess.cleaning import job

    replace_folder = job.replace_folder
    published = []

    def killed(*paths: Path) -> None:
        replace_folder(*paths)
        published.append(paths[0].name)
        if len(published) == num_published:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"languages": ("en",), "removed": str(tmp_path / "removed")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "replace_folder", killed)
        run(tmp_path, **options)
    assert published == ["removed", "out"][:num_published]
    counts = run(tmp_path, **options)
    assert (counts.num_read, counts.num_written) == (2, 1)
    assert [step.dropped for step in counts.steps] == [{"es": 1}]
    assert [r["text"] for r in read(tmp_path / "out")] == [ENGLISH]
    assert [r["language"] for r in read(tmp_path / "removed" / "language")] == ["es"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "removed"]
    with pytest.raises(UserError, match="exists"):
        run(tmp_path, **options)


def test_a_job_does_not_continue_with_other_evaluation_texts_or_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in", "a.jsonl", [{"text": ENGLISH}])
    write(tmp_path / "eval", "test.jsonl", [{"question": QUESTION}])
    from megatron_chatflow.preprocess.cleaning import job

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    options: dict[str, Any] = {
        "languages": ("en",),
        "decontaminate": (str(tmp_path / "eval" / "test.jsonl"),),
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "publish", killed)
        run(tmp_path, **options)
    write(tmp_path / "eval", "test.jsonl", [{"question": QUESTION.replace("Asia", "Peru")}])
    with pytest.raises(UserError, match="belongs to another job"):
        run(tmp_path, **options)
    write(tmp_path / "eval", "test.jsonl", [{"question": QUESTION}])
    with monkeypatch.context() as patch:
        patch.setattr(job, "version", lambda name: f"{name} of tomorrow")
        with pytest.raises(UserError, match="belongs to another job"):
            run(tmp_path, **options)
    run(tmp_path, **options)
    recorded = json.loads((tmp_path / "out" / COUNTS_FILE).read_text())["settings"]
    assert set(recorded["versions"]) == {"datatrove", "py3langid"}
    assert recorded["evaluation_files"][0][0] == "test.jsonl"


def test_the_example_of_the_page(
    tmp_path: Path, tiny_sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opencc")
    pytest.importorskip("plotly")
    page = (Path(__file__).parents[3] / "docs" / "cleaning.md").read_text(encoding="utf-8")
    section = page.split("\n## A first run")[1]
    (records,) = re.findall(r"```json\n(.*?)```", section, re.S)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.S)
    (expected,) = re.findall(r"```text\n(.*?)```", section, re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "web.jsonl").write_text(records, encoding="utf-8")
    (tmp_path / ".demo" / "out").mkdir(parents=True)
    commands = commands.replace(".demo/corpus/tokenizer.model", str(tiny_sentencepiece_model))
    outputs = []
    for line in commands.replace("\\\n", " ").splitlines():
        _, tool, *words = shlex.split(line)
        workers = [] if "report" in words else ["--workers", 1]
        done = call_tool(Path(tool).name, *words, *workers)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == expected
    assert len(IndexedDataset(tmp_path / ".demo" / "out" / "clean_text_document")) == 2
    assert (tmp_path / "clean.html").stat().st_size > 10_000


def test_the_report_of_a_corpus(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    from datetime import datetime, timezone

    from megatron_chatflow.preprocess.settings import CorpusSettings
    from megatron_chatflow.report.corpus import build_corpus_page, measure_corpus

    near = ENGLISH.replace("ninety miles", "ninety-one miles")
    texts = [ENGLISH, ENGLISH, near, CHINESE, f"{SPANISH}\nRead more »\n<b>más</b>!!!!"]
    write(tmp_path / "in", "a.jsonl", [*({"text": text} for text in texts), "{"])
    statistics = measure_corpus([str(tmp_path / "in")], CorpusSettings())
    assert (statistics.num_documents, statistics.num_duplicates) == (5, 1)
    assert (statistics.num_sampled, statistics.num_near_duplicates) == (4, 1)
    assert statistics.languages == {"en": 2, "zh": 1, "es": 1}
    assert sum(statistics.lengths.values()) == 5 and statistics.bad_lines == {"malformed_json": 1}
    assert statistics.num_bytes == sum(len(text.encode()) for text in texts)
    number, (example,) = statistics.filters["boilerplate", "has lines that are removed"]
    assert number == 1 and example.startswith("El río")
    assert ("gopher-quality", "gopher_short_doc") in statistics.filters
    smaller = measure_corpus([str(tmp_path / "in")], CorpusSettings(), num_sampled=2)
    assert smaller.num_sampled == 2 and smaller.num_documents == 5
    page = build_corpus_page(statistics, "<corpus>", datetime.now(timezone.utc))
    assert "<h1>&lt;corpus&gt;</h1>" in page and "<b>más</b>" not in page
    assert not re.search(r'<(script|img|link)[^>]+(src|href)="(?!data:)', page)


def test_a_text_inside_an_object(tmp_path: Path) -> None:
    from megatron_chatflow.preprocess.settings import CorpusSettings

    write(tmp_path / "in", "a.jsonl", [{"doc": {"text": f"{ENGLISH}!!!!"}, "url": "a"}])
    corpus = CorpusSettings(json_keys=("doc.text",))
    run(tmp_path, corpus=corpus, max_repeated_punctuation=1, minhash=MinHashSettings())
    (record,) = read(tmp_path / "out")
    assert record == {"doc": {"text": f"{ENGLISH}!"}, "url": "a"}
    again = CleanSettings((str(tmp_path / "out"),), str(tmp_path / "again"), corpus=corpus)
    assert clean(again) is not None and read(tmp_path / "again") == [record]
