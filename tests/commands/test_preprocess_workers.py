"""Tests preprocessing jobs whose workers are processes, and their end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from preprocess_jobs import Jobs

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import readers
from megatron_chatflow.preprocess.pairs import PairSettings
from megatron_chatflow.preprocess.settings import CorpusSettings

TEXTS = ["Bana kedo.", "  luno <s>x</s>\n\n", "\u4e00\u4e25 sanka", "ban\x00 \U0001f9ff", "rasen"]


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


def test_a_killed_job_leaves_nothing_under_a_final_name(jobs: Jobs) -> None:
    pipe = jobs.folder / "pipe.jsonl"
    os.mkfifo(pipe)
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    command = [sys.executable, str(tool), "--input", str(pipe), "--workers", "2"]
    command += ["--format", "pairs"]  # its workers are processes
    command += ["--output-prefix", str(jobs.prefix), "--tokenizer-model", str(jobs.model)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    with pipe.open("wb") as stream:
        for _ in range(100):
            stream.write((json.dumps({"en": "kedo " * 5000, "zh": "x " * 5000}) + "\n").encode())
        stream.flush()
        process.send_signal(signal.SIGKILL)
        process.wait()
    names = {path.name for path in jobs.folder.iterdir()} - {"pipe.jsonl"}
    assert all(name.endswith(".partial") for name in names)
    deadline = time.monotonic() + 120  # for a busy machine
    while _group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_is_alive(process.pid)  # the workers end with their parent
    path = jobs.lines("a.jsonl", [{"en": "bana", "zh": "kedo"}])
    corpus = CorpusSettings(format="pairs")
    assert jobs.run(path, overwrite=False, corpus=corpus)["num_documents"] == 1
    assert not list(jobs.folder.glob("*.partial"))


def _group_is_alive(group: int) -> bool:
    """Returns whether a process of the group runs; ended ones may wait for init to reap them."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


def test_a_worker_that_dies_is_an_error(jobs: Jobs) -> None:
    """The system may kill a worker for its memory. Here the worker kills itself."""
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path\n"
        "from preprocess_jobs import Jobs\n"
        "from megatron_chatflow.preprocess.settings import CorpusSettings\n"
        "from megatron_chatflow.preprocess import job\n"
        "from megatron_chatflow.errors import run_main\n"
        "def start(settings):\n"
        "    import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
        "job.start_worker = start\n"
        "if __name__ == '__main__':\n"
        "    jobs = Jobs(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "    corpus = CorpusSettings(format='pairs')\n"
        "    run_main(lambda: jobs.run(sys.argv[3], num_workers=2, corpus=corpus))\n"
    )
    (jobs.folder / "script.py").write_text(script)
    path = jobs.lines("a.jsonl", [{"en": "bana", "zh": "kedo"}])
    done = subprocess.run(
        [sys.executable, str(jobs.folder / "script.py"), str(jobs.folder), str(jobs.model), path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: a worker process died" in done.stderr
    assert not list(jobs.folder.glob("out_*"))


def test_any_number_of_processes_writes_the_same_bytes(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    records = [
        {"instruction": f"{text} {k}", "output": text * 3} for k in range(40) for text in TEXTS
    ]
    path = jobs.lines("a.jsonl", [*records, b"{", b'{"text": "\\ud800"}'])
    corpus = CorpusSettings(format="chat", json_keys=("messages",))
    written = []
    for num_workers in (1, 3):
        jobs.run(path, corpus=corpus, num_workers=num_workers)
        files = sorted(jobs.folder.glob("out_*"))
        assert len(files) == 5
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]


def test_what_processes_drop_is_counted_together(jobs: Jobs) -> None:
    good, dropped = {"en": "bana", "zh": "kedo"}, {"en": "bana", "zh": ""}
    records = [good] * 30 + [dropped] * 27 + [{"en": "x", "zh": "x"}, b"{", b"{", b"{"]
    path = jobs.lines("a.jsonl", records)
    corpus = CorpusSettings(format="pairs", pairs=PairSettings(direction="both"))
    options = {"corpus": corpus, "num_workers": 2}
    with pytest.raises(UserError, match=r"31 of 61, 27 of them empty_side: .*--max-dropped-share"):
        jobs.run(path, **options)
    assert [file.name for file in jobs.folder.iterdir()] == ["a.jsonl"]
    again = jobs.lines("b.jsonl", [good])
    content = jobs.run(path, again, dedup=True, max_dropped_share=0.51, **options)
    assert content["dropped"]["duplicate"] == 30 * 2
    assert sum(content["dropped"].values()) == 31 + 30 * 2
