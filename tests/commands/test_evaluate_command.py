"""Tests the command evaluate: table, results file and refusal."""

import json
import subprocess
from pathlib import Path

from fork_server import run_tool
from made_up_text import made_up_sentences

from megatron_chatflow.evaluation.choice import (
    Question,
)

QUESTIONS = [
    Question("rivers", "Which is wet?", ("sand", "water", "salt"), 1),
    Question("rivers", "Which flows?", ("river", "stone"), 0),
    Question("bridges", "Which stands?", ("bridge", "rain", "wind", "fog"), 0),
]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_command_line(random_llama: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return run_tool("evaluate.py", *arguments)

    texts = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in made_up_sentences(4)])
    questions = tmp_path / "quiz.jsonl"
    write_lines(
        questions,
        [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in QUESTIONS],
    )
    output = tmp_path / "results.json"
    done = run(
        *(random_llama, "--baseline", random_llama, "--source", f"plain={texts}"),
        *("--choice", questions, "--output", output),
    )
    assert done.returncode == 0, done.stderr
    assert "plain bits_per_byte" in done.stdout and "+0.0%" in done.stdout
    base, ours = json.loads(output.read_text())
    assert base == ours and set(ours["choice"]) == {"quiz"}
    failed = run(random_llama)
    assert failed.returncode == 2 and "nothing to evaluate;" in failed.stderr
