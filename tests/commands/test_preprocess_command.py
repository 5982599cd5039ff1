"""Tests the command preprocess: standard input, full disks and help."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from preprocess_jobs import write_lines

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.sidecar import read_sidecar
from megatron_chatflow.preprocess.readers import find_inputs
from megatron_chatflow.tokenizer import load_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


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


LINE = b'{"text": "a"}\n'

Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files of one line each."""
    return partial(write_lines, tmp_path)


def names(*inputs: Path | str) -> list[str]:
    return [file.name for file in find_inputs([str(name) for name in inputs])]


def test_redirected_descriptors(tmp_path: Path, write: Write) -> None:
    """`tool --input /dev/fd/5 5< file`: the name has no ending that tells the file format."""
    write("a.jsonl")
    program = (
        "from megatron_chatflow.preprocess.readers import find_inputs\n"
        "from megatron_chatflow.preprocess.readers import read_chunks\n"
        "from megatron_chatflow.preprocess.settings import CorpusSettings\n"
        "(file,) = find_inputs(['/dev/fd/5'])\n"
        "print(next(read_chunks(file, CorpusSettings())).data.decode(), end='')"
    )
    command = ["bash", "-c", 'exec "$0" -c "$1" 5< "$2"', sys.executable, program]
    done = subprocess.run([*command, str(tmp_path / "a.jsonl")], capture_output=True)
    assert json.loads(done.stdout) == {"text": "a"}, done.stderr
