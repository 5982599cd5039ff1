"""Tests that parts made by two workers of a Ray cluster equal the bytes made by one process."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts a cluster of two CPUs on this machine and returns its address."""
    pytest.importorskip("ray", reason="ray has no wheel for this Python")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--port=0", "--num-cpus=2", "--include-dashboard=false"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("ray") / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)
    deadline = time.monotonic() + 240
    found = None
    while found is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        found = re.search(r"address='([\d.]+:\d+)'", log.read_text(errors="replace"))
    assert found, log.read_text(errors="replace")
    yield found[1]
    process.terminate()
    process.wait(timeout=120)


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def _inputs(folder: Path, model: Path) -> list[object]:
    (folder / "in").mkdir()
    for name in "abc":
        lines = [json.dumps({"text": f"{name} {k % 40} the same"}) for k in range(60)]
        (folder / "in" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--input", folder / "in", "--tokenizer-model", model, "--append-eod", "--dedup"]


def test_a_cluster_writes_the_same_bytes(
    cluster: str, tmp_path: Path, tiny_sentencepiece_model: Path
) -> None:
    job = [*_inputs(tmp_path, tiny_sentencepiece_model), "--workers", 1]
    here = _run(*job, "--output-prefix", tmp_path / "here")
    assert here.returncode == 0, here.stderr
    there = _run(*job, "--output-prefix", tmp_path / "there", "--ray", cluster)
    assert there.returncode == 0, there.stderr
    assert "3 of 3 partitions are finished" in there.stderr
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"there_text_document{suffix}").read_bytes()
        assert ours == (tmp_path / f"here_text_document{suffix}").read_bytes()
    assert len(list(tmp_path.glob("there*"))) == 3, "the parts are removed"
    sidecar = json.loads((tmp_path / "there_text_document.json").read_text())
    assert sidecar["dropped"] == {"duplicate": 60}


def test_errors_of_a_part_are_one_line(
    cluster: str, tmp_path: Path, tiny_sentencepiece_model: Path
) -> None:
    job = [*_inputs(tmp_path, tiny_sentencepiece_model), "--output-prefix", tmp_path / "out"]
    (tmp_path / "in" / "b.jsonl").write_text("{not json\n" * 300, encoding="utf-8")
    failed = _run(*job, "--workers", 1, "--ray", cluster)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in failed.stderr
    too_many = _run(*job, "--workers", 64, "--ray", cluster)
    assert too_many.returncode == 2
    assert "--workers 64: a partition needs that many CPUs" in too_many.stderr


def test_a_cluster_cleans_to_the_same_bytes(cluster: str, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    (tmp_path / "in").mkdir()
    for name in "abc":
        text = f"The river {name} rises in the hills and reaches the sea after ninety miles."
        (tmp_path / "in" / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    tool = TOOL.with_name("clean_corpus.py")
    for name, options in (("here", ["--workers", "1"]), ("there", ["--ray", cluster])):
        command = [sys.executable, str(tool), "run", "--input", str(tmp_path / "in")]
        done = subprocess.run(
            [*command, "--output", str(tmp_path / name), *options],
            env={**ENVIRONMENT, "PYTHONPATH": str(TOOL.parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "wrote 3 documents" in done.stdout and done.stderr == ""
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == names
    for name in names:
        ours = (tmp_path / "there" / name).read_bytes()
        assert ours == (tmp_path / "here" / name).read_bytes()
