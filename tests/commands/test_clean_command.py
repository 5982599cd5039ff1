"""Tests cleaning with several processes: the same bytes, and a mistake as one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove")

TOOL = Path(__file__).parents[2] / "tools" / "clean_corpus.py"
TEXT = "The river rises in the hills north of the town and reaches the sea after ninety miles."


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for k in range(4):
        texts = [f"{TEXT} {word} {k % 2}" for word in ("Ships", "Trains", "Roads")]
        lines = [json.dumps({"text": text, "file": k}) + "\n" for text in texts]
        (tmp_path / "in" / f"{k}.jsonl").write_text("".join(lines) if k < 3 else "")
    for workers in (1, 2):
        done = run(
            *("run", "--input", tmp_path / "in", "--output", tmp_path / f"out{workers}"),
            *("--minhash", "--workers", workers),
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    names = sorted(path.name for path in (tmp_path / "out1").iterdir())
    assert sorted(path.name for path in (tmp_path / "out2").iterdir()) == names
    assert len(names) > 1
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "a"}\n')
    done = run("run", "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no document left: read 0")
