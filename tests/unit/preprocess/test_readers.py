"""Tests inputs: every kind of file gives the same records, and errors locate the damage."""

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import compressed, readers
from megatron_chatflow.preprocess.readers import (
    CorpusReader,
    InputFile,
    find_inputs,
    read_chunks,
)
from megatron_chatflow.preprocess.settings import CorpusSettings

RECORDS = [{"text": f"document {k} " + "x" * (k % 50)} for k in range(500)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 700)
    monkeypatch.setattr(compressed, "INPUT_BLOCK_BYTES", 64)
    monkeypatch.setattr(compressed, "ZSTD_BITE_BYTES", 48)
    monkeypatch.setattr(compressed, "MAX_OUTPUT_BYTES", 500)


def records_of(path: Path) -> list[dict[str, str]]:
    """Returns all records, and checks the positions that chunks report."""
    (file,) = find_inputs([str(path)])
    records = []
    for chunk in read_chunks(file, CorpusSettings(format="chat")):
        assert chunk.first_line == len(records) + 1
        if chunk.kind == "objects":
            records += chunk.data
        else:
            assert chunk.kind == "lines"
            records += [json.loads(line) for line in chunk.data.splitlines() if line.strip()]
    return records


def skippable(data: bytes, kind: int = 14) -> bytes:
    """Returns a skippable frame of zstd, such as the seek table of the seekable format."""
    return bytes([0x50 + kind]) + b"\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.zst", skippable(b"x" * 3000, 0) + zstandard.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES) + skippable(b"\x8f\x92\xea\xb1")),
        (
            "a.jsonl.zst",
            b"".join(
                zstandard.compress(LINES[k : k + 7]) + skippable(b"y" * (k % 3))
                for k in range(0, len(LINES), 7)
            ),
        ),
        (
            "a.jsonl.gz",
            b"".join(gzip.compress(LINES[k : k + 7]) for k in range(0, len(LINES), 7)),
        ),
        ("a.jsonl.gz", gzip.compress(LINES) + b"\0" * 1500),
        ("a.jsonl.gz", gzip.compress(LINES[:7000]) + b"\0" * 9 + gzip.compress(LINES[7000:])),
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.removesuffix(b"\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.gz", gzip.compress(LINES[:7000]) + gzip.compress(LINES[7000:])),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES[:50]) + zstandard.compress(LINES[50:])),
        ("a.jsonl", zstandard.compress(LINES)),  # detected by its first bytes, not by its name
        ("a.json", LINES),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
        ("a.json.gz", gzip.compress(b" \n" * 900 + json.dumps(RECORDS).encode())),
    ],
)
def test_records_of_every_kind(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert records_of(tmp_path / name) == RECORDS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": range(500), "text": [record["text"] for record in RECORDS]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert [r["text"] for r in records_of(tmp_path / "a.parquet")] == [r["text"] for r in RECORDS]
    (file,) = find_inputs([str(tmp_path / "a.parquet")])
    chunk = next(read_chunks(file, CorpusSettings(json_keys=("text", "absent"))))
    assert set(chunk.data[0]) == {"text"}
    with pytest.raises(UserError, match=r"a.parquet: has id, text, but none of content"):
        next(read_chunks(file, CorpusSettings(json_keys=("content",))))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"cannot read: a.parquet"):
        next(read_chunks(file, CorpusSettings(format="chat")))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        records_of(tmp_path / "a.parquet")


def test_txt_is_one_document_or_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"first\n\nsecond\n" * 100)
    (file,) = find_inputs([str(tmp_path / "a.txt")])
    (whole,) = read_chunks(file, CorpusSettings())
    assert (whole.kind, whole.data) == ("text", b"first\n\nsecond\n" * 100)
    by_line = list(read_chunks(file, CorpusSettings(txt_documents="line")))
    assert {chunk.kind for chunk in by_line} == {"text_lines"}
    assert b"".join(chunk.data for chunk in by_line) == whole.data
    assert {chunk.kind for chunk in read_chunks(file, CorpusSettings(format="chat"))} == {"lines"}


def test_txt_too_large_for_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"word " * 300)
    (file,) = find_inputs([str(tmp_path / "a.txt")])
    with pytest.raises(UserError, match="--txt-documents line"):
        list(read_chunks(file, CorpusSettings(max_record_bytes=1000)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)[:-20], "truncated"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-5], "truncated"),
        ("a.jsonl.gz", gzip.compress(LINES) + b"tail", "invalid data after"),
        ("a.jsonl.gz", gzip.compress(LINES) + b"\0\0\0tail", "invalid data after"),
        ("a.jsonl.gz", gzip.compress(LINES) + b"\x1f", "truncated"),
        ("a.jsonl.zst", zstandard.compress(LINES) + skippable(b"x" * 900)[:-1], "truncated"),
        ("a.jsonl.zst", zstandard.compress(LINES) + skippable(b"")[:6], "truncated"),
        ("a.jsonl.zst", zstandard.compress(LINES) + b"\0", "invalid data after"),
        ("a.jsonl.gz", gzip.compress(LINES)[:40] + b"\xff" * 400, "a.jsonl.gz"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:20] + b"\xff" * 400, "a.jsonl.zst"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', r"a.json:2"),
        (
            "a.jsonl",
            b'\n [\n{"text": "a"}\n]',
            r"not JSON lines: a.jsonl:1: .* rename the file to .json",
        ),
        ("a.tsv", b"bana\tkedo\n", r"tab-separated lines are pairs: a.tsv"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        records_of(tmp_path / name)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_what_expands_a_lot_comes_in_small_blocks(
    monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    monkeypatch.undo()
    content = compress(b"\n" * (1 << 28))
    sizes = [len(block) for block in compressed.decompress(iter([content]), "bomb")]
    assert sum(sizes) == 1 << 28
    assert max(sizes) <= 1 << 20


def test_empty_files_have_no_records(tmp_path: Path) -> None:
    for name, content in [
        ("a.jsonl", b""),
        ("a.json", b" \n"),
        ("a.jsonl.gz", gzip.compress(b"")),
        ("b.json", b"[]"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert records_of(tmp_path / name) == []


def test_standard_input_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    stream = io.TextIOWrapper(io.BytesIO(gzip.compress(LINES)))
    monkeypatch.setattr(sys, "stdin", stream)
    files = find_inputs([str(tmp_path / "a.jsonl"), "-"])
    reader = CorpusReader(files, CorpusSettings())
    positions = [chunk.num_bytes_read for chunk in reader.chunks()]
    assert positions == sorted(positions)
    assert reader.num_bytes == [len(LINES), len(gzip.compress(LINES))]
    assert positions[-1] == sum(reader.num_bytes)


def test_folders_and_globs_in_a_fixed_order(tmp_path: Path) -> None:
    for name in [
        "b.jsonl",
        "a.jsonl.gz",
        "sub/c.parquet",
        "sub/.hidden.jsonl",
        ".git/x.jsonl",
        "n.md",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [file.name for file in find_inputs([str(tmp_path)])]
    assert names == ["a.jsonl.gz", "b.jsonl", "sub/c.parquet"]
    names = [file.name for file in find_inputs([str(tmp_path / "**" / "*.[pj]*")])]
    assert names == ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    assert find_inputs(["-"]) == [InputFile(None, "<stdin>", "lines", 0)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "no such file"),
        ("*.nothing", "matches no file"),
        ("empty", "none of its files has an extension"),
        ("notes.md", "unknown kind of input"),
    ],
)
def test_inputs_that_are_not_there(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").touch()
    with pytest.raises(UserError, match=message):
        find_inputs([str(tmp_path / name)])
    with pytest.raises(UserError, match="no input"):
        find_inputs([])
