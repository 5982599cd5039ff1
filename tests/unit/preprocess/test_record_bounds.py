"""Tests that oversized records are dropped and counted, whatever the file format."""

import json
import random
from pathlib import Path

import pytest
import zstandard

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import (
    RECORD_BYTES_PER_VALUE,
    OversizedRecord,
    find_inputs,
    num_json_values,
    read_chunks,
)
from megatron_chatflow.preprocess.settings import MAX_RECORD_BYTES, CorpusSettings


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
    chunks = list(read_chunks(file, CorpusSettings(format="chat")))
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
    chunks = list(read_chunks(file, CorpusSettings(format="chat", max_record_bytes=5000)))
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
    for chunk in read_chunks(find_inputs([str(tmp_path / "a.jsonl")])[0], settings):
        parsed = parse_chunk(chunk, settings)
        lengths += [len(str(text)) for text in parsed.documents["text"]]
        bad += ["record_too_large"] * parsed.num_dropped.get("record_too_large", 0)
        if parsed.first_bad is not None and len(bad) == 1:
            assert parsed.first_bad.startswith("a.jsonl:2: record_too_large: more than 2000 bytes")
    assert lengths == [5, 7, 8] and len(bad) == 3


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
    chunks = list(read_chunks(file, CorpusSettings(format="chat")))
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
        list(read_chunks(file, CorpusSettings(max_record_bytes=1000)))


def expanding_files(folder: Path) -> list[Path]:
    """Creates files of kilobytes that hold 300 MiB of text each, in small records."""
    import pyarrow as pa
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
            for _ in read_chunks(file, CorpusSettings()):
                pass
        assert "\n" not in str(said.value)
        assert sum(1 for _ in read_chunks(file, CorpusSettings(max_expansion=0))) > 100
