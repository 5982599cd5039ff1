"""Tests the commands inspect and merge."""

from pathlib import Path

import pytest
from fork_server import run_tool
from preprocess_jobs import make_chats

from megatron_chatflow.data.indexed import IndexedDataset


def run(tool: str, *arguments: object) -> tuple[int, str, str]:
    done = run_tool(tool, *arguments)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def chats(tmp_path: Path, tiny_sentencepiece_model: Path) -> Path:
    return make_chats(tmp_path, tiny_sentencepiece_model)


def test_compares_two(chats: Path, tmp_path: Path) -> None:
    merged = tmp_path / "twice_messages_document"
    status, output, _ = run("merge_datasets.py", "--input", chats, chats, "--output-prefix", merged)
    assert (status, output) == (0, f"{merged}: 6 documents of 2 datasets\n")
    assert len(IndexedDataset(merged)) == 6
    status, output, _ = run("inspect_dataset.py", chats, merged)
    assert status == 1
    assert "first difference: number of sequences: 3 and 6" in output
    status, output, _ = run("inspect_dataset.py", chats, chats)
    assert status == 0 and "the datasets are equal" in output
