"""Tests that small files whose records expand to gigabytes are read within memory bounds."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

CHAT = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]})

PROGRAM = """
import json, re, sys
from megatron_chatflow.preprocess.readers import find_inputs
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.preprocess.readers import read_chunks
from megatron_chatflow.errors import UserError
path, settings = sys.argv[1], CorpusSettings(**json.loads(sys.argv[2]))
num_documents, num_dropped, error = 0, {}, None
try:
    for chunk in read_chunks(find_inputs([path])[0], settings):
        parsed = parse_chunk(chunk, settings)
        num_documents += sum(map(len, parsed.documents.values()))
        for reason, number in parsed.num_dropped.items():
            num_dropped[reason] = num_dropped.get(reason, 0) + number
except UserError as caught:
    error = str(caught)
# Not ru_maxrss, which a child takes over from its parent.
max_kib = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps([num_documents, num_dropped, error, max_kib]))
"""


def read_bounded(path: Path, limit: int, **settings: Any) -> tuple[int, dict[str, int], str | None]:
    """Reads a file in a process with a peak resident memory of less than ``limit`` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), json.dumps(settings)],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "MALLOC_ARENA_MAX": "1",
             "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_documents, num_dropped, error, max_kib = json.loads(done.stdout)
    assert max_kib << 10 < limit
    return num_documents, num_dropped, error


def write_zst(path: Path, unit: bytes, number: int) -> Path:
    path.write_bytes(zstandard.compress(unit * number, 3))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["chat", "pairs", "text"])
def test_newlines_take_no_memory(tmp_path: Path, file_format: str) -> None:
    path = write_zst(tmp_path / "a.jsonl.zst", b"\n" * (1 << 20), 200)
    assert path.stat().st_size < 20_000
    assert read_bounded(path, 300 << 20, format=file_format) == (0, {}, None)


def test_lines_of_many_values_are_dropped(tmp_path: Path) -> None:
    many = b"[" + b"[]," * (1 << 20) * 16 + b"[]]"
    path = tmp_path / "a.jsonl.zst"
    lines = [CHAT.encode(), b'{"messages": ' + many + b"}", b"{}," * (1 << 24), CHAT.encode()]
    path.write_bytes(zstandard.compress(b"\n".join(lines), 3))
    done = read_bounded(path, 700 << 20, format="chat", json_keys=["messages"])
    assert done == (2, {"record_too_large": 2}, None)


def test_arrays_of_many_values_are_refused(tmp_path: Path) -> None:
    path = write_zst(tmp_path / "a.json.zst", b"[" + b"[]," * (1 << 20), 20)
    documents, _, error = read_bounded(path, 500 << 20)
    assert documents == 0 and "JSON array too large: a.json.zst: more than 16777216 values" in str(
        error
    )


def test_a_parquet_dictionary_is_not_multiplied(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    big = pa.DictionaryArray.from_arrays(pa.array([0] * 300), pa.array(["a" * (32 << 20)]))
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": big}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    done = read_bounded(path, 1200 << 20, max_record_bytes=1 << 20, max_expansion=0)
    assert done == (0, {"record_too_large": 300}, None)
    _, _, error = read_bounded(path, 1200 << 20, max_record_bytes=1 << 20)
    assert error is not None and "--max-expansion" in error


def test_a_parquet_list_does_not_multiply_its_dictionary(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pa.array(["a" * (32 << 20), "q", "a"])
    contents = pa.DictionaryArray.from_arrays(pa.array([0] * 1000 + [1, 2]), texts)
    roles = pa.array(["user"] * 1001 + ["assistant"])
    messages = pa.StructArray.from_arrays([roles, contents], ["role", "content"])
    rows = pa.ListArray.from_arrays(pa.array([0, 1000, 1002]), messages)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"messages": rows}), path, compression="zstd")
    done = read_bounded(path, 1200 << 20, format="chat", json_keys=["messages"], max_expansion=0)
    assert done == (1, {"record_too_large": 1}, None)
