"""Tests the preprocessing benchmark: its generated text, measured costs and rows."""

from pathlib import Path

from made_up_text import made_up_sentences

from benchmarks import preprocess
from benchmarks.contenders import (
    Usage,
)
from benchmarks.corpora import (
    read_texts,
    split_sentences,
    write_recombined,
)

TEXTS = [" ".join(made_up_sentences(9, seed)) + "\n\n“四。”五！" for seed in range(40)]


def test_sentences_joined_are_the_text() -> None:
    for text in [*TEXTS, "", "\n\n", "a. b! 'c?' d", "。。x\n", "1.5 and e.g. this"]:
        assert "".join(split_sentences(text)) == text
    assert split_sentences("One. Two!  三。四") == ["One. ", "Two!  ", "三。", "四"]


def test_recombined_text_repeats_no_document_and_no_run_differs(tmp_path: Path) -> None:
    made = write_recombined(TEXTS, tmp_path / "a.jsonl", 200_000, seed=3)
    write_recombined(TEXTS, tmp_path / "b.jsonl", 200_000, seed=3)
    write_recombined(TEXTS, tmp_path / "c.jsonl", 200_000, seed=4)
    first, again, other = ((tmp_path / f"{n}.jsonl").read_bytes() for n in "abc")
    assert first == again != other
    texts = read_texts(tmp_path / "a.jsonl")
    assert len(set(texts)) == len(texts) == made.num_documents > len(TEXTS)
    assert sum(len(text.encode()) for text in texts) == made.num_text_bytes
    assert 200_000 <= made.num_text_bytes < 210_000
    known = {sentence for text in TEXTS for sentence in split_sentences(text)}
    assert len(known) == made.num_distinct_sentences
    assert all(any(s in text for s in known) for text in texts)


def test_start_up_is_deducted_and_what_is_lost_in_it_has_no_speed() -> None:
    def cost(seconds: float) -> dict[str, object]:
        starts = [Usage(2.0, 1.0, 5, 4), Usage(2.5, 1.5, 5, 4)]
        usages = [Usage(seconds + 1, 9.0, 7, 6), Usage(seconds, 11.0, 8, 3)]
        return dict(preprocess._cost(starts, usages, 16_000_000))

    found = cost(6.0)
    assert (found["seconds"], found["start_seconds"], found["mb_per_second"]) == (4.0, 2.0, 4.0)
    assert (found["cpu_seconds"], found["mb_per_cpu_second"]) == (8.0, 2.0)
    assert (found["rss_bytes"], found["pss_bytes"]) == (8, 6)
    assert cost(2.1)["seconds"] is None and cost(2.1)["mb_per_second"] is None
    ours = {"seconds": 1.0, "cpu_seconds": 1.0}
    peer = preprocess._ratios(found, ours, "preprocess_data.py", "english")
    assert peer == {
        "times_our_seconds": 4.0,
        "times_our_cpu_seconds": 8.0,
        "target": "8 times our cpu_seconds",
        "met": True,
    }
    missed = preprocess._ratios(cost(2.1), ours, "preprocess_data_fast.py", "english")
    assert missed["met"] is False and "times_our_seconds" not in missed
