"""Tests damaged tokenizers in separate processes: mutations of every file, and preprocessing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chatflow.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("tokenizer_mutation_worker.py")
NUM_MUTATIONS = 150
SEED = 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("byte-level", "tokenizer.json"),
        ("converted", "tokenizer.json"),
        ("converted", "tokenizer_config.json"),
        ("sentencepiece", "tokenizer.model"),
        ("sentencepiece", "tokenizer_config.json"),
    ],
)
def test_mutated_tokenizers_work_or_are_refused(
    tmp_path: Path, tiny_sentencepiece_model: Path, byte_level_model: Path, kind: str, name: str
) -> None:
    folder = tmp_path / "original"
    load_tokenizer(
        byte_level_model if kind == "byte-level" else tiny_sentencepiece_model
    ).save_pretrained(folder)
    if kind == "converted":
        (folder / "tokenizer.model").unlink()
    command = [sys.executable, str(WORKER), str(folder), name, str(SEED), str(NUM_MUTATIONS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    counts = {int(k): v for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    assert set(counts) <= {0, 2}, done.stdout
    assert sum(counts.values()) == NUM_MUTATIONS
    assert counts[0] > 0  # Otherwise nothing beyond loading was tested.
    assert counts[2] > 0


def test_a_panic_in_a_preprocessing_worker_is_one_line(
    tmp_path: Path, byte_level_model: Path
) -> None:
    content = json.loads(byte_level_model.read_bytes())
    split = {"type": "Split", "pattern": {"Regex": "(a|a|aa)+$"}, "behavior": "Isolated"}
    content["pre_tokenizer"] = {**split, "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for text in ("bana", "a" * 100 + "!", "kedo"):
            file.write(json.dumps({"text": text}) + "\n")
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py")]
    command += ["--input", str(tmp_path / "corpus.jsonl"), "--output-prefix", str(tmp_path / "out")]
    command += ["--tokenizer-model", str(tmp_path / "tokenizer.json"), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "cannot encode text" in errors[0]
    assert "Traceback" not in done.stderr and "panicked" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_chain_of_normalizers_does_not_end_the_process(
    tmp_path: Path, byte_level_model: Path
) -> None:
    """The library requested 10**24 bytes while loading. Rust aborted the process with SIGABRT."""
    content = json.loads(byte_level_model.read_bytes())
    step = {"type": "Replace", "pattern": {"String": "b"}, "content": "b" * 1000}
    content["normalizer"] = {"type": "Sequence", "normalizers": [step] * 8}
    token = {"id": 500, "content": "b", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append({**token, "normalized": True, "special": False})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    command = [sys.executable, str(ROOT / "tools" / "extend_vocab.py"), "--num-new", "1"]
    command += ["--tokenizer-model", str(tmp_path / "model"), "--list", str(tmp_path / "list")]
    (tmp_path / "list").write_text("\u4e00\n")
    command += ["--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "times longer" in done.stderr
