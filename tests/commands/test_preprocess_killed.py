"""Tests that a job in parts, killed repeatedly, writes the same bytes as an undisturbed one."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from killed_job import TOOL
from made_up_text import made_up_sentences

from megatron_chatflow.data.indexed import idx_path
from megatron_chatflow.preprocess.output import document_prefix, output_paths

pytestmark = pytest.mark.slow

NUM_PARTS = 13
JOBS = {
    "text": (["text", "title"], ["--dedup", "--append-eod"]),
    "chats": (["messages"], ["--format", "chat", "--max-tokens", "40", "--max-dropped-share", "1"]),
}


def _write_inputs(folder: Path) -> None:
    folder.mkdir()
    sentences = made_up_sentences(NUM_PARTS * 40)
    for number in range(NUM_PARTS + 2):
        lines = []
        for k in range(number * 7 % 40):
            text = sentences[(number * 40 + k) % len(sentences)]
            chat = [{"role": "user", "content": f"{k}"}, {"role": "assistant", "content": text}]
            lines.append(json.dumps({"text": text, "title": text[: k % 9], "messages": chat}))
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines) + "\n")


def _moments(keys: list[str], generator: random.Random) -> list[tuple[str, int]]:
    """Returns moments to kill at: random ones in every stage, and one in the last removal."""
    num_per_part = len(keys) * len(output_paths("", ""))
    num_removed = NUM_PARTS * num_per_part
    removing = [generator.randint(1, num_removed) for _ in range(3)]
    removing += [generator.randint(num_removed - num_per_part + 2, num_removed)]
    making = [generator.randint(1, 60) for _ in range(5)]
    merging = sorted(generator.randint(1, 6 * len(keys)) for _ in range(4))
    stages = (("making", making), ("merging", merging), ("removing", sorted(removing)))
    return [(stage, number) for stage, numbers in stages for number in numbers]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", JOBS)
def test_killed_a_dozen_times(name: str, tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    keys, options = JOBS[name]
    _write_inputs(tmp_path / "in")
    job = ["--input", str(tmp_path / "in"), "--tokenizer-model", str(tiny_sentencepiece_model)]
    job += ["--json-keys", *keys, *options, "--workers", "1", "--partitions", str(NUM_PARTS)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = [sys.executable, str(TOOL), *job, "--output-prefix"]
    subprocess.run([*undisturbed, str(whole / "out")], check=True, capture_output=True)

    prefix = str(killed / "out")
    last_index = idx_path(document_prefix(prefix, keys[-1]))
    moments = _moments(keys, random.Random(4))
    assert len(moments) > 12
    seen = set()
    for stage, number in moments:
        script = [sys.executable, str(Path(__file__).with_name("killed_job.py"))]
        done = subprocess.run(
            [*script, stage, str(number), str(last_index), *job, "--output-prefix", prefix],
            start_new_session=True,
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, (stage, number, done.stderr)
        seen.add(frozenset(_files(killed)))
    assert len(seen) > 6  # the files on disk differ between the moments
    done = subprocess.run([*undisturbed, prefix], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _files(killed) == _files(whole)
