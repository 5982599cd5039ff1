"""Tests that small files whose records expand to gigabytes are read within memory bounds.

Records beyond the bounds are dropped and counted.
"""

import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.parse import CorpusSettings, parse_chunk
from megatron_chatflow.preprocess.readers import (
    MAX_RECORD_BYTES,
    RECORD_BYTES_PER_VALUE,
    OversizedRecord,
    ReadOptions,
    find_inputs,
    num_json_values,
    read_chunks,
)

CHAT = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]})
PROGRAM = """
import json, re, sys
from megatron_chatflow.preprocess.readers import find_inputs
from megatron_chatflow.preprocess.parse import CorpusSettings, parse_chunk
from megatron_chatflow.preprocess.readers import read_chunks
from megatron_chatflow.errors import UserError
path, settings = sys.argv[1], CorpusSettings(**json.loads(sys.argv[2]))
num_documents, num_dropped, error = 0, {}, None
try:
    for chunk in read_chunks(find_inputs([path])[0], settings.read_options):
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


def test_values_are_counted_outside_of_texts() -> None:
    assert num_json_values(b'{"a": [1, 2, {"b": "c"}]}') == 8
    text = json.dumps({"text": 'a, "b": [c], {' * 1000}).encode()
    assert num_json_values(text) == 3
    assert num_json_values(b'{"a": "\\\\", "b": "\\",,,,"}') == 5
    assert num_json_values(b'"' + b"," * 1000) == 1
    assert num_json_values(b"") == 1


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_counts_do_not_depend_on_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_chatflow.preprocess.readers._COUNT_BYTES", block)
    texts = ["\\", '",', ',\\"', "[{:,", '\\\\",', "", "\n,", "é,,,"]
    rng = random.Random(1)
    for _ in range(50):
        some = rng.choices(texts, k=rng.randrange(6))
        record = {str(k): [text, k] for k, text in enumerate(some)}
        # One separator for the object. For each entry its colon, bracket and comma. One comma
        # between entries.
        expected = 1 + 1 + 3 * len(some) + max(len(some) - 1, 0)
        data = json.dumps({"x": ",,,,", **record}, separators=(",", ":")).encode()
        assert num_json_values(data) == expected + 1 + min(len(some), 1)


def test_an_empty_row_group_does_not_slow_down_the_others(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"text": [f"text {n}" for n in range(500)]})
    with parquet.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table[:300], table[:0], table[300:]):
            writer.write_table(part)
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    (file,) = find_inputs([str(tmp_path / "a.parquet")])
    chunks = list(read_chunks(file))
    assert [row for chunk in chunks for row in chunk.data] == table.to_pylist()
    assert len(chunks) <= 4


@pytest.mark.parametrize("kind", ["large_binary", "pairs"])
def test_rows_of_every_type_have_a_size(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values, of = [b"x" * 9000, None, b"y"], pa.large_binary()
    if kind == "pairs":
        values, of = [["x" * 4500, "y" * 4500], None, ["a", "b"]], pa.list_(pa.string(), 2)
    parquet.write_table(pa.table({"a": pa.array(values, of)}), tmp_path / "a.parquet")
    (file,) = find_inputs([str(tmp_path / "a.parquet")])
    chunks = list(read_chunks(file, ReadOptions(max_record_bytes=5000)))
    assert [type(row) for chunk in chunks for row in chunk.data] == [OversizedRecord, dict, dict]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_lines_beyond_the_bound_are_counted_and_the_others_kept(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_chatflow.preprocess.readers.CHUNK_BYTES", block)
    lines = [json.dumps({"text": "x" * n}) for n in (5, 5000, 7, 100_000, 8, 9000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    settings = CorpusSettings(max_record_bytes=2000)
    lengths: list[int] = []
    bad: list[str] = []
    for chunk in read_chunks(find_inputs([str(tmp_path / "a.jsonl")])[0], settings.read_options):
        parsed = parse_chunk(chunk, settings)
        lengths += [len(str(text)) for text in parsed.documents["text"]]
        bad += ["record_too_large"] * parsed.num_dropped.get("record_too_large", 0)
        if parsed.first_bad is not None and len(bad) == 1:
            assert parsed.first_bad.startswith("a.jsonl:2: record_too_large: more than 2000 bytes")
    assert lengths == [5, 7, 8] and len(bad) == 3


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


def test_rows_are_those_of_the_file(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"text": None if n % 7 == 0 else "é" * (n * 400), "map": {"k": n}, "n": n,
         "messages": [{"role": "user", "n": n}] * (n % 3)}
        for n in range(600)
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=250)
    (file,) = find_inputs([str(tmp_path / "a.parquet")])
    chunks = list(read_chunks(file))
    read = [row for chunk in chunks for row in chunk.data]
    assert read == parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(chunks) > 100  # of about 1 MiB
    starts = [chunk.first_line for chunk in chunks]
    assert starts == [1 + sum(len(c.data) for c in chunks[:k]) for k in range(len(chunks))]


def test_the_bound_is_a_setting(tmp_path: Path) -> None:
    assert MAX_RECORD_BYTES // RECORD_BYTES_PER_VALUE == 1 << 22
    (tmp_path / "a.txt").write_text("word " * 300)
    (file,) = find_inputs([str(tmp_path / "a.txt")])
    with pytest.raises(UserError, match="text file too large: .*--max-record-bytes"):
        list(read_chunks(file, CorpusSettings(max_record_bytes=1000).read_options))


def expanding_files(folder: Path) -> list[Path]:
    """Creates files of kilobytes that hold 300 MiB of text each, in small records."""
    import pyarrow as pa
    import zstandard
    from pyarrow import parquet

    table = pa.table({"text": pa.array(["x" * 2048] * 150_000).dictionary_encode()})
    parquet.write_table(table, folder / "a.parquet", compression="zstd")
    lines = (b'{"text": "' + b"x" * 2000 + b'"}\n') * 500
    compressed = zstandard.ZstdCompressor().compressobj()
    with (folder / "a.jsonl.zst").open("wb") as stream:
        for _ in range(320):
            stream.write(compressed.compress(lines))
        stream.write(compressed.flush())
    return [folder / "a.parquet", folder / "a.jsonl.zst"]


def test_a_file_that_expands_out_of_proportion_is_refused(tmp_path: Path) -> None:
    for path in expanding_files(tmp_path):
        assert path.stat().st_size < 250_000
        (file,) = find_inputs([str(path)])
        with pytest.raises(
            UserError, match=f"{path.name}: .* expand to more .* --max-expansion"
        ) as said:
            for _ in read_chunks(file, ReadOptions()):
                pass
        assert "\n" not in str(said.value)
        assert sum(1 for _ in read_chunks(file, ReadOptions(max_expansion=0))) > 100
