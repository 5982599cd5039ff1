"""Tests the preprocessing benchmark: its generated text, measured costs and rows."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from made_up_text import made_up_sentences

from benchmarks import preprocess
from benchmarks.contenders import (
    OURS,
    SENTENCEPIECE,
    Usage,
    measure_job,
    megatron_fast_tool,
)
from benchmarks.corpora import (
    read_texts,
    split_sentences,
    write_recombined,
)
from megatron_chatflow.errors import UserError

TEXTS = [" ".join(made_up_sentences(9, seed)) + "\n\n“四。”五！" for seed in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text}) for text in [*TEXTS, TEXTS[0], ""]]
    (tmp_path / "english.train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


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


def test_every_contender_and_every_roof_has_a_row(
    corpus: Path, tiny_sentencepiece_model: Path
) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", action="store_true")
    preprocess.add_arguments(parser)
    flags = ["--peers", "--corpus", str(corpus), "--languages", "english", "--megabytes", "1"]
    flags += ["--tokenizer-model", str(tiny_sentencepiece_model), "--workers", "1"]
    rows = preprocess.run(parser.parse_args([*flags, "--rounds", "1", "--scratch", str(corpus)]))
    for kind in ("as it is", "recombined"):
        of_kind = {row["by"]: row for row in rows if row["what"] == f"english, {kind}"}
        assert {"input", OURS, SENTENCEPIECE} <= of_kind.keys()
        ours, peer = of_kind[OURS], of_kind[SENTENCEPIECE]
        assert peer["num_different_documents"] == 0
        assert 0 < ours["start_cpu_seconds"] and 0 < ours["start_seconds"]
        assert "target" not in peer
        assert 10_000_000 < ours["pss_bytes"] <= ours["rss_bytes"]
    assert of_kind["input"]["num_documents"] > 40
    assert {row["by"] for row in rows if row["what"] == "disk"} == {
        *("roof: write, direct", "roof: read, direct", "roof: write and fsync", "roof: read")
    }
    [merge] = [row for row in rows if row["by"] == "merge_datasets"]
    assert merge["mb_per_second"] > 0 and merge["share_of_roof"] > 0
    assert [path.name for path in corpus.iterdir()] == ["english.train.jsonl"]


def test_a_job_is_measured_with_its_children() -> None:
    child = "import time; b = bytearray(60_000_000); t = time.process_time()\n"
    child += "while time.process_time() - t < 0.4: pass"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    usage = measure_job([sys.executable, "-c", parent, child], {})
    assert usage.cpu_seconds >= 0.4
    assert usage.rss_bytes > 60_000_000


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


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="failed with exit code 3: because"):
        measure_job(
            [sys.executable, "-c", "import sys; print('because', file=sys.stderr); exit(3)"], {}
        )
    with pytest.raises(UserError, match="cannot be started"):
        measure_job([str(tmp_path / "absent")], {})
    with pytest.raises(UserError, match="has no tools/preprocess_data_fast.py"):
        megatron_fast_tool(tmp_path, sys.executable, tmp_path)
    with pytest.raises(UserError, match="create the demo corpus"):
        read_texts(tmp_path / "absent.jsonl")
