"""Tests the command extend-vocab."""

import json
import random
from pathlib import Path

import pytest
from fork_server import run_tool

from megatron_chatflow.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]

NEW = [chr(0x6000 + 13 * k) for k in range(40)]  # characters that the tiny model lacks


def new_language(num_lines: int) -> list[str]:
    """Returns lines of words of two new characters. The first characters are the most frequent."""
    generator = random.Random(5)
    words = [NEW[k] + NEW[(3 * k + 1) % 40] for k in range(40)]
    weights = [40 - k for k in range(40)]
    return ["".join(generator.choices(words, weights, k=12)) + "。ab " for _ in range(num_lines)]


@pytest.mark.parametrize("name", ["zh.txt", "zh.jsonl"])
def test_text_in_another_encoding(
    name: str, tiny_sentencepiece_model: Path, tmp_path: Path
) -> None:
    lines = [line.strip() for line in new_language(50)]
    if name.endswith("jsonl"):
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    (tmp_path / name).write_bytes("\n".join(lines).encode("gb18030"))
    command = ["extend_vocab.py", "--num-new", "20"]
    command += ["--corpus", str(tmp_path / name), "--output-dir", str(tmp_path / "out")]
    command += ["--tokenizer-model", str(tiny_sentencepiece_model)]
    done = run_tool(*command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--encoding" in done.stderr and not (tmp_path / "out").exists()
    done = run_tool(*command, "--encoding", "gb18030")
    assert "added 20 pieces: 512 -> 532" in done.stdout, done.stderr


def test_command_line(tiny_sentencepiece_model: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "zh.jsonl"
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in new_language(50)))
    command = [
        *("extend_vocab.py", "--corpus", str(corpus)),
        *("--tokenizer-model", str(tiny_sentencepiece_model), "--num-new", "20"),
        *("--output-dir", str(tmp_path / "zh")),
    ]
    done = run_tool(*command)
    assert "added 20 pieces: 512 -> 532" in done.stdout
    assert "tokens per character, corpus, held out (2 documents): " in done.stdout
    assert "a new piece replaces 3.00 old ones" in done.stdout
    assert load_tokenizer(tmp_path / "zh").vocab_size == 532
    again = run_tool(*command)
    assert again.returncode == 2 and "use --overwrite" in again.stderr
    (tmp_path / "pieces.txt").write_text("龍\n鳳\n")
    command[1:3] = ["--list", str(tmp_path / "pieces.txt"), "--held-out", str(corpus)]
    done = run_tool(*command, "--overwrite")
    assert "added 2 pieces: 512 -> 514" in done.stdout
    assert "tokens per character, zh.jsonl (50 documents): " in done.stdout
