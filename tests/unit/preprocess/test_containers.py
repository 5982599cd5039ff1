"""Tests containers of records: compressed files, CSV, Arrow, saved data sets, nested keys."""

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preprocess_jobs import Jobs

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import compressed, readers
from megatron_chatflow.preprocess.arrow import arrow_batches
from megatron_chatflow.preprocess.merge import merge_datasets
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings

TEXTS = [f"document {k} \u6587 " + "x" * (k % 50) for k in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 700)
    monkeypatch.setattr(compressed, "INPUT_BLOCK_BYTES", 64)
    monkeypatch.setattr(compressed, "MAX_OUTPUT_BYTES", 500)


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


def texts_of(*inputs: Path, **options: Any) -> tuple[list[str], dict[str, int]]:
    settings = CorpusSettings(**options)
    texts: list[str] = []
    dropped: dict[str, int] = {}
    for chunk in CorpusReader(find_inputs([str(path) for path in inputs]), settings).chunks():
        result = parse_chunk(chunk, settings)
        for document in result.documents[settings.json_keys[0]]:
            assert isinstance(document, str)
            texts.append(document)
        for reason, number in result.num_dropped.items():
            dropped[reason] = dropped.get(reason, 0) + number
    return texts, dropped


def compress_lz4(data: bytes) -> bytes:
    lz4 = pytest.importorskip("lz4.frame")
    return bytes(lz4.compress(data, block_linked=False, content_checksum=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".lz4": compress_lz4,
}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files(tmp_path: Path, ending: str) -> None:
    compress = COMPRESS[ending]
    path = tmp_path / f"a.jsonl{ending}"
    several = [LINES[k : k + 2000] for k in range(0, len(LINES), 2000)]
    for content in (compress(LINES), b"".join(map(compress, several)), compress(b"") * 2):
        path.write_bytes(content)
        assert texts_of(path) == (TEXTS if len(content) > 200 else [], {})
    path.write_bytes(compress(LINES))
    assert [file.name for file in find_inputs([str(tmp_path)])] == [path.name]
    (tmp_path / "b.jsonl").write_bytes(path.read_bytes())  # the name does not matter
    assert texts_of(tmp_path / "b.jsonl") == (TEXTS, {})


def test_padding_of_xz_and_skippable_frames_of_lz4(tmp_path: Path) -> None:
    content = lzma.compress(LINES[:5000]) + b"\0" * 8 + lzma.compress(LINES[5000:]) + b"\0" * 4
    (tmp_path / "a.jsonl.xz").write_bytes(content)
    assert texts_of(tmp_path / "a.jsonl.xz") == (TEXTS, {})
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    (tmp_path / "a.jsonl.lz4").write_bytes(skippable + compress_lz4(LINES) + skippable)
    assert texts_of(tmp_path / "a.jsonl.lz4") == (TEXTS, {})


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-20], "truncated"),
        (lambda content: content + b"tail", "invalid data after the end"),
        (lambda content: content[:60] + b"\xff" * 80 + content[140:], "cannot read: a.jsonl"),
    ],
)
def test_damaged_compressed_files(
    tmp_path: Path, ending: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(damage(COMPRESS[ending](LINES)))
    with pytest.raises(UserError, match=message):
        texts_of(path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_what_expands_a_lot_comes_in_small_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.undo()
    content = COMPRESS[ending](b"\n" * (1 << 24))
    sizes = [len(block) for block in compressed.decompress(iter([content]), "bomb")]
    assert sum(sizes) == 1 << 24 and max(sizes) <= 1 << 20
    monkeypatch.setattr(readers, "FREE_EXPANSION_BYTES", 1 << 20)
    (tmp_path / f"a.jsonl{ending}").write_bytes(content)
    with pytest.raises(UserError, match="expand to more than .*--max-expansion"):
        texts_of(tmp_path / f"a.jsonl{ending}", max_expansion=10)


def test_lz4_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.lz4").write_bytes(compress_lz4(LINES))
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    with pytest.raises(UserError, match="pip install lz4"):
        texts_of(tmp_path / "a.jsonl.lz4")


def test_csv_of_texts_and_chats(jobs: Jobs) -> None:
    rows = 'id,text\n1,"two\nlines, ""quoted"""\n\n2,\u6587\u5b57\u5f88\u591a\n3\n4,\n'
    (jobs.folder / "a.csv").write_text(rows, encoding="utf-8")
    expected = (
        ['two\nlines, "quoted"', "\u6587\u5b57\u5f88\u591a", ""],
        {"header": 1, "wrong_number_of_columns": 1},
    )
    assert texts_of(jobs.folder / "a.csv") == expected
    (jobs.folder / "a.csv").write_bytes(gzip.compress(rows.encode("gb18030")))
    assert texts_of(jobs.folder / "a.csv", encoding="gb18030") == expected
    with pytest.raises(UserError, match="not UTF-8: a.csv:4: .*gb18030"):
        texts_of(jobs.folder / "a.csv", invalid_utf8="replace")
    assert texts_of(jobs.folder / "a.csv")[1]["not_utf8"] == 1
    with pytest.raises(UserError, match="no such column: a.csv: .*id, text, but none of content"):
        texts_of(jobs.folder / "a.csv", json_keys=("content",))
    (jobs.folder / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(UserError, match="two columns of one name: a.csv"):
        texts_of(jobs.folder / "a.csv")
    (jobs.folder / "b.csv").write_text("instruction,input,output\nbana?,,kedo\nluno?,x,sanka\n")
    chats = CorpusSettings(format="chat", json_keys=("messages",))
    content = jobs.run(str(jobs.folder / "b.csv"), corpus=chats)
    assert content["num_documents"] == 2 and content["dropped"] == {"header": 1}


def write_arrow(path: Path, table: Any, *, is_stream: bool, num_rows: int = 100) -> None:
    from pyarrow import OSFile, ipc

    new = ipc.new_stream if is_stream else ipc.new_file
    with OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=num_rows)


def make_table() -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table(
        {
            "id": range(len(TEXTS)),
            "text": TEXTS,
            "doc": [{"text": text, "n": 1} for text in TEXTS],
            "word": pyarrow.array(["a", "b", None] * 100).dictionary_encode(),
        }
    )


@pytest.mark.parametrize("form", ["stream", "file", "feather", "parquet"])
def test_arrow_files(tmp_path: Path, form: str) -> None:
    table = make_table()
    if form == "feather":
        from pyarrow import feather

        feather.write_feather(table, str(tmp_path / "a.feather"), compression="lz4")
    elif form == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, tmp_path / "a.parquet")
    else:
        write_arrow(tmp_path / "a.arrow", table, is_stream=form == "stream")
    (path,) = tmp_path.iterdir()
    assert texts_of(tmp_path) == (TEXTS, {})
    assert texts_of(path, json_keys=("doc.text",)) == (TEXTS, {})
    assert texts_of(path, json_keys=("word",)) == (["a", "b"] * 100, {"not_text_word": 100})
    with pytest.raises(UserError, match="no such column: a.*: has id, text, doc, word, but none"):
        texts_of(path, json_keys=("content",))
    chunks = list(CorpusReader(find_inputs([str(path)]), CorpusSettings()).chunks())
    assert [chunk.first_line for chunk in chunks] == sorted({chunk.first_line for chunk in chunks})
    assert chunks[-1].num_bytes_read <= path.stat().st_size


def test_damaged_arrow_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.arrow"
    for is_stream in (True, False):
        write_arrow(path, make_table(), is_stream=is_stream)
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"x" * 99, b""):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match="cannot read: a.arrow"):
                texts_of(path)
    path.write_bytes(b"FEA1" + b"\0" * 40)
    with pytest.raises(UserError, match="version 1 of feather"):
        texts_of(path)
    write_arrow(path, make_table(), is_stream=True)
    path.write_bytes(path.read_bytes()[:-8])
    assert texts_of(path) == (TEXTS, {})
    assert "a.arrow has no end mark, so it may be truncated" in caplog.messages


@pytest.mark.parametrize("is_stream", [True, False])
def test_batches_that_are_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    path = tmp_path / "a.arrow"
    write_arrow(path, make_table(), is_stream=is_stream)
    size = make_table().select(["text"]).slice(0, 100).combine_chunks().nbytes
    monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", 2 * size)
    assert texts_of(path) == (TEXTS, {})
    monkeypatch.setattr(readers, "MAX_ROW_GROUP_BYTES", size // 2)
    with pytest.raises(UserError, match=r"batch too large: a.arrow: the batch from row 1 on has"):
        texts_of(path)


def test_local_arrow_files_are_not_copied_to_memory(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.arrow"
    table = pyarrow.table({"text": ["x" * (1 << 20)] * 64})
    write_arrow(path, table, is_stream=True)
    del table
    before = pyarrow.total_allocated_bytes()
    with path.open("rb") as stream:
        for batch, _ in arrow_batches(stream, path, path.name, None):
            assert batch.nbytes >= 1 << 26
            assert pyarrow.total_allocated_bytes() - before < 1 << 20


def save(folder: Path, *, num_files: int = 2) -> None:
    """Writes a data set as `datasets.Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    table = make_table()
    names = [f"data-{k:05d}-of-{num_files:05d}.arrow" for k in range(num_files)]
    step = len(TEXTS) // num_files
    for k, name in enumerate(names):
        write_arrow(folder / name, table.slice(k * step, step), is_stream=True)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_data_sets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "saved"
    save(folder)
    write_arrow(folder / "cache-1a2b.arrow", make_table(), is_stream=True)
    assert texts_of(folder) == (TEXTS, {})
    assert texts_of(tmp_path) == (TEXTS, {})
    assert "1 cached .arrow, 1 dataset_info.json, 1 state.json" in caplog.messages[0]
    caplog.clear()
    assert texts_of(folder / "*.arrow") == (TEXTS, {})
    assert caplog.messages == [f"ignored in {folder}/*.arrow: 1 cached .arrow"]
    assert texts_of(folder / "cache-1a2b.arrow") == (TEXTS, {})
    last = folder / "data-00001-of-00002.arrow"
    whole = last.read_bytes()
    last.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="saved/data-00001-of-00002.arrow: it is truncated: copy"):
        texts_of(tmp_path)
    last.write_bytes(whole)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"incomplete data set: .*data-00001-of-00002.arrow is"):
        texts_of(folder)
    (folder / "state.json").write_text('{"_data_files": [1]}')
    with pytest.raises(UserError, match=r"damaged data set: .*state.json"):
        texts_of(folder)


def test_saved_data_sets_with_splits(tmp_path: Path) -> None:
    save(tmp_path / "d" / "train")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert texts_of(tmp_path / "d") == (TEXTS, {})
    save(tmp_path / "d" / "test")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"several splits: .*has train, test: give .*d/train"):
        texts_of(tmp_path)
    assert texts_of(tmp_path / "d" / "train") == (TEXTS, {})


def test_what_the_library_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = {"text": TEXTS, "doc": [{"text": text} for text in TEXTS]}
    data = datasets.Dataset.from_dict(table)
    data.select(range(0, 300, 2)).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "split"))
    assert texts_of(tmp_path / "one") == (TEXTS[::2], {})
    assert texts_of(tmp_path / "split", json_keys=("doc.text",)) == (TEXTS, {})


def test_nested_keys(jobs: Jobs) -> None:
    records: list[Any] = [
        {"doc": {"text": "bana"}},
        {"doc.text": "kedo", "doc": {"text": "not this"}},
        {"doc": "luno"},
        {"doc": {"text": 1}},
        {"text": "sanka"},
    ]
    path = jobs.lines("a.jsonl", records)
    corpus = CorpusSettings(json_keys=("doc.text",))
    content = jobs.run(path, corpus=corpus, max_dropped_share=1.0)
    assert content["dropped"] == {"no_key_doc.text": 2, "not_text_doc.text": 1}
    nested = jobs.documents("doc.text")
    assert jobs.run(jobs.lines("b.jsonl", [{"text": "bana"}, {"text": "kedo"}]))
    assert jobs.documents() == nested
    merged = jobs.folder / "m_doc.text_document"
    assert merge_datasets([jobs.folder / "out_doc.text_document"] * 2, merged) == 4
    assert merged.with_name("m_doc.text_document.json").exists()
    chat = {
        "data": {
            "messages": [
                {"role": "user", "content": "bana?"},
                {"role": "assistant", "content": "kedo"},
            ]
        }
    }
    path = jobs.lines("c.jsonl", [chat, {"instruction": "bana?", "output": "kedo"}])
    chats = CorpusSettings(format="chat", json_keys=("data.messages",))
    assert jobs.run(path, corpus=chats)["num_documents"] == 2


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_container_gives_the_same_bytes(jobs: Jobs, num_workers: int) -> None:
    written = set()
    for name, content in {
        "a.jsonl": LINES,
        "a.jsonl.xz": lzma.compress(LINES),
        "a.jsonl.bz2": bz2.compress(LINES),
        "a.csv": ("text\n" + "".join(f"{text}\n" for text in TEXTS)).encode(),
    }.items():
        (jobs.folder / name).write_bytes(content)
        jobs.run(str(jobs.folder / name), num_workers=num_workers)
        written.add((jobs.folder / "out_text_document.bin").read_bytes())
    assert len(written) == 1
