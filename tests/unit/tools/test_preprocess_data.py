"""Tests the command preprocess, called in this process."""

import subprocess
from pathlib import Path

from tool_calls import call_tool

from megatron_chatflow.data.indexed import IndexedDataset


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return call_tool("preprocess_data.py", *arguments)


def test_pairs_and_chats(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    (tmp_path / "a.tsv").write_text("bana\tkedo\n")
    (tmp_path / "b.json").write_text('[{"instruction": "bana", "output": "kedo"}]')
    common = ("--tokenizer-model", tiny_sentencepiece_model, "--workers", 1)
    common += ("--output-prefix", tmp_path / "out")
    options = ("--pair-template", "translate", "--pair-direction", "both", "--pair-keys", "a", "b")
    done = run("--input", tmp_path / "a.tsv", "--format", "pairs", *options, *common)
    assert done.returncode == 0, done.stderr
    assert len(IndexedDataset(tmp_path / "out_text_loss_mask")) == 2
    done = run("--input", tmp_path / "b.json", "--format", "chat", "--template", "llama2", *common)
    assert done.returncode == 0, done.stderr
    assert len(IndexedDataset(tmp_path / "out_messages_loss_mask")) == 1


def test_a_mistake_is_one_line(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    done = run(
        *("--input", tmp_path / "absent.jsonl", "--output-prefix", tmp_path / "out"),
        *("--tokenizer-model", tiny_sentencepiece_model),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: no input: {tmp_path}/absent.jsonl: no such file or folder"
    ]
    assert list(tmp_path.iterdir()) == []


def test_shards(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "bana"}\n')
    common = ("--input", tmp_path, "--tokenizer-model", tiny_sentencepiece_model)
    common += ("--output-prefix", tmp_path / "out")
    done = run(*common, "--shard", "1/2")
    assert done.returncode == 0, done.stderr
    assert len(IndexedDataset(tmp_path / "out_part00001of00002_text_document")) == 1
    for text in ("2/2", "1", "a/b"):
        done = run(*common, "--shard", text)
        assert done.returncode == 2 and "Traceback" not in done.stderr
