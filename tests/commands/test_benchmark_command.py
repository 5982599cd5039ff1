"""Tests the command line of the benchmarks."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import run_tool
from made_up_text import made_up_sentences

from benchmarks import preprocess
from benchmarks.contenders import (
    OURS,
    SENTENCEPIECE,
    measure_job,
    megatron_fast_tool,
)
from benchmarks.corpora import (
    read_texts,
)
from benchmarks.harness import commit
from megatron_chatflow.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


def test_the_commit_is_that_of_the_working_tree() -> None:
    root = TOOL.parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a working tree")
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert (commit() or "").rstrip("+") == head.stdout.strip()


def test_the_tool_lists_the_benchmarks_that_are_there() -> None:
    done = run_tool("benchmark.py", "--help")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("subjects:")[1].split("positional")[0].splitlines()
    listed = {line.split()[0] for line in lines if line.strip()}
    assert {"blend", "loader", "train"} <= listed
    assert all((TOOL.parent / "benchmarks" / f"{name}.py").exists() for name in listed)
    assert "examples:" in done.stdout


def test_the_tool_refuses_other_subjects() -> None:
    done = run_tool("benchmark.py", "nothing")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


TEXTS = [" ".join(made_up_sentences(9, seed)) + "\n\n“四。”五！" for seed in range(40)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": text}) for text in [*TEXTS, TEXTS[0], ""]]
    (tmp_path / "english.train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


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
