"""Tests the command line of tools/preprocess_data.py."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.sidecar import read_sidecar
from megatron_chatflow.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"


def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True)


def test_megatrons_flags_and_standard_input(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("bana", "kedo luno"))
    done = run(
        *("--input", "-", "--output-prefix", tmp_path / "deep" / "en", "--json-keys", "text"),
        *("--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", tiny_sentencepiece_model),
        *("--append-eod", "--workers", 1),
        stdin=lines,
    )
    assert done.returncode == 0, done.stderr
    assert b"text: 2 documents" in done.stdout
    tokenizer = load_tokenizer(tiny_sentencepiece_model)
    dataset = IndexedDataset(tmp_path / "deep" / "en_text_document")
    assert dataset[1].tolist() == [*tokenizer.encode("kedo luno"), 2]
    content = read_sidecar(tmp_path / "deep" / "en_text_document")
    assert content is not None
    assert content["inputs"] == [{"name": "<stdin>", "num_bytes": len(lines)}]


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
    assert done.stderr.decode().splitlines() == [
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
        assert done.returncode == 2 and b"Traceback" not in done.stderr


@pytest.mark.parametrize("limit", [0, 4000, 100_000, 700_000])
def test_a_full_disk_is_one_line(
    tmp_path: Path, tiny_sentencepiece_model: Path, limit: int
) -> None:
    """No file may grow beyond the limit: writing the `.bin` or the index fails, early or late."""
    (tmp_path / "a.jsonl").write_text('{"text": "bana kedo luno"}\n' * 50_000)
    command = [sys.executable, str(TOOL), "--input", str(tmp_path / "a.jsonl"), "--workers", "1"]
    command += ["--output-prefix", str(tmp_path / "out")]
    command += ["--tokenizer-model", str(tiny_sentencepiece_model)]
    done = subprocess.run(
        command,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert b"error: cannot write" in done.stderr and b"Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_help_has_examples() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert b"examples:" in done.stdout
