"""Tests preprocessing jobs: correct ids, no partial output, equal bytes for any thread count."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from preprocess_jobs import Jobs

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.sidecar import read_sidecar
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import readers
from megatron_chatflow.preprocess.pairs import PairDirection, PairSettings
from megatron_chatflow.preprocess.settings import CorpusSettings

TEXTS = ["Bana kedo.", "  luno <s>x</s>\n\n", "\u4e00\u4e25 sanka", "ban\x00 \U0001f9ff", "rasen"]


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


def test_ids_are_sentencepieces_and_megatron_reads_them(jobs: Jobs) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(jobs.model))
    path = jobs.lines("a.jsonl", [{"text": text} for text in TEXTS])
    content = jobs.run(path, append_eod=True)
    expected = [[*reference.encode(text), 2] for text in TEXTS]
    assert jobs.documents() == expected
    theirs = MegatronDataset(f"{jobs.prefix}_text_document")
    assert [theirs[i].tolist() for i in range(len(theirs))] == expected
    assert theirs.index.dtype == np.uint16
    assert content["num_tokens"] == content["num_loss_tokens"] == sum(map(len, expected))
    jobs.run(path)
    assert jobs.documents() == [reference.encode(text) for text in TEXTS]


def test_sidecar_says_what_was_done(jobs: Jobs) -> None:
    records = [{"text": text} for text in TEXTS] + [{"text": ""}, b"{", b'{"text": "\xff"}']
    path = jobs.lines("a.jsonl", records)
    content = jobs.run(path)
    assert read_sidecar(f"{jobs.prefix}_text_document") == content
    assert content["inputs"] == [{"name": "a.jsonl", "num_bytes": os.path.getsize(path)}]
    assert content["num_documents"] == 5
    assert content["num_text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert content["dropped"] == {"empty": 1, "malformed_json": 1, "not_utf8": 1}
    assert content["tokenizer"] == {
        "type": "Llama2Tokenizer",
        "sha256": hashlib.sha256(jobs.model.read_bytes()).hexdigest(),
        "vocab_size": 512,
    }
    for name, digest in content["sha256"].items():
        data = Path(f"{jobs.prefix}_text_document.{name}").read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
    assert read_sidecar(jobs.folder / "absent") is None


def test_several_keys(jobs: Jobs) -> None:
    path = jobs.lines("a.jsonl", [{"text": "bana", "title": "kedo"}, {"text": "x", "title": ""}])
    jobs.run(path, corpus=CorpusSettings(json_keys=("text", "title")))
    assert len(jobs.documents("text")) == 2
    assert len(jobs.documents("title")) == 1


def test_any_number_of_threads_writes_the_same_bytes(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    records = [{"text": text * (k % 7)} for k in range(40) for text in TEXTS]
    path = jobs.lines("a.jsonl", [*records, b"{", b'{"text": "\\ud800"}'])
    written = []
    for num_workers in (1, 3):
        jobs.run(path, num_workers=num_workers)
        files = sorted(jobs.folder.glob("out_*"))
        assert len(files) == 3
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_too_many_bad_lines(jobs: Jobs, num_workers: int) -> None:
    good = jobs.lines("good.jsonl", [{"text": "bana"}] * 5)
    bad = jobs.lines("bad.jsonl", [{"text": "bana"}, b"{", b"{", {"text": "kedo"}])
    content = jobs.run(good, bad, max_bad_lines=2, num_workers=num_workers, overwrite=False)
    assert content["dropped"] == {"malformed_json": 2}
    before = {path: path.read_bytes() for path in jobs.folder.iterdir()}
    with pytest.raises(
        UserError, match=r"bad.jsonl:2: malformed_json: this is the first of more than 1"
    ):
        jobs.run(good, bad, max_bad_lines=1, num_workers=num_workers)
    assert {path: path.read_bytes() for path in jobs.folder.iterdir()} == before


def test_output_that_exists_is_kept(jobs: Jobs) -> None:
    path = jobs.lines("a.jsonl", [{"text": "bana"}])
    jobs.run(path)
    other = jobs.lines("b.jsonl", [{"text": "kedo luno"}])
    with pytest.raises(UserError, match=r"output exists: .*out_text_document.idx.*--overwrite"):
        jobs.run(other, overwrite=False)
    first = jobs.documents()
    jobs.run(other)
    assert jobs.documents() != first


def test_overwriting_leaves_no_mask_of_before(jobs: Jobs) -> None:
    path = jobs.lines("a.jsonl", [{"en": "bana", "zh": "\u4e00\u4e25", "text": "bana"}])
    jobs.run(path, corpus=CorpusSettings(format="pairs"))
    assert len(list(jobs.folder.glob("out_*"))) == 5
    jobs.run(path)
    assert len(list(jobs.folder.glob("out_*"))) == 3


def test_txt_files_and_lines(jobs: Jobs) -> None:
    (jobs.folder / "a.txt").write_text("bana\n\nkedo\n")
    (jobs.folder / "b.txt").write_text("luno")
    inputs = [str(jobs.folder / name) for name in ("a.txt", "b.txt")]
    assert jobs.run(*inputs)["num_documents"] == 2
    assert jobs.run(*inputs, corpus=CorpusSettings(txt_documents="line"))["num_documents"] == 3
    with pytest.raises(UserError, match="have no keys"):
        jobs.run(*inputs, corpus=CorpusSettings(json_keys=("a", "b")))


def test_parquet_rows_that_are_not_utf8_are_counted(jobs: Jobs) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [b"river rose", b"bridge \xbf\xff fell", b"water"]
    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), jobs.folder / "a.parquet")
    sidecar = jobs.run(str(jobs.folder / "a.parquet"), max_bad_lines=1)
    assert len(jobs.documents()) == 2
    assert sidecar["num_bad_lines"] == 1
    with pytest.raises(UserError, match="not_utf8"):
        jobs.run(str(jobs.folder / "a.parquet"), max_bad_lines=0)


def test_parquet_and_compressed_inputs_together(jobs: Jobs) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": TEXTS, "id": range(5)})
    parquet.write_table(table, jobs.folder / "a.parquet")
    path = jobs.lines("b.jsonl", [{"text": text} for text in TEXTS])
    jobs.run(str(jobs.folder / "a.parquet"), path)
    documents = jobs.documents()
    assert documents[:5] == documents[5:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "num_workers: 0"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_bad_lines": -1}, "max_bad_lines: -1"),
        ({"corpus": CorpusSettings(json_keys=("text", "text"))}, "list each key only once"),
        ({"corpus": CorpusSettings(format="chat", json_keys=("a", "b"))}, "only one key"),
        ({"corpus": CorpusSettings(json_keys=("content",))}, "no document left.*no_key_content"),
    ],
)
def test_mistakes_are_named(jobs: Jobs, options: dict[str, object], message: str) -> None:
    path = jobs.lines("a.jsonl", [{"text": "bana"}])
    with pytest.raises(UserError, match=message):
        jobs.run(path, **options)
    assert [p.name for p in jobs.folder.iterdir()] == ["a.jsonl"]


def test_documents_longer_than_a_chunk(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    texts = ["bana " * 100, "kedo", "luno " * 200]
    jobs.run(jobs.lines("a.jsonl", [{"text": text} for text in texts]))
    dataset = IndexedDataset(f"{jobs.prefix}_text_document")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(jobs.model))
    assert [dataset[i].tolist() for i in range(3)] == [reference.encode(text) for text in texts]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_named_encoding_gives_the_bytes_of_utf8(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    lines = "".join(
        json.dumps({"text": f"\u4e00\u4e25 bana {k}"}, ensure_ascii=False) + "\n" for k in range(99)
    )
    written = []
    for name, encoding in (("a.jsonl", "utf-8"), ("b.jsonl", "gb18030"), ("c.jsonl", "utf-16")):
        (jobs.folder / name).write_bytes(lines.encode(encoding))
        corpus = CorpusSettings(encoding=encoding)
        content = jobs.run(str(jobs.folder / name), corpus=corpus, num_workers=num_workers)
        assert content["settings"].get("encoding", "utf-8") == encoding
        written.append(Path(f"{jobs.prefix}_text_document.bin").read_bytes())
    assert written[0] == written[1] == written[2]


GOOD, DROPPED = {"en": "bana", "zh": "kedo"}, {"en": "bana", "zh": ""}


@pytest.mark.parametrize("direction", ["hash", "both"])
def test_most_records_dropped(jobs: Jobs, direction: PairDirection) -> None:
    """Reasons that no one asked for count. Documents of one record count once."""
    records = [GOOD] * 30 + [DROPPED] * 27 + [{"en": "x", "zh": "x"}, b"{", b"{", b"{"]
    path = jobs.lines("a.jsonl", records)
    corpus = CorpusSettings(format="pairs", pairs=PairSettings(direction=direction))
    options = {"corpus": corpus}
    with pytest.raises(UserError, match=r"31 of 61, 27 of them empty_side: .*--max-dropped-share"):
        jobs.run(path, **options)
    assert [file.name for file in jobs.folder.iterdir()] == ["a.jsonl"]
    content = jobs.run(path, max_dropped_share=0.51, **options)
    assert content["max_dropped_share"] == 0.51
    assert sum(content["dropped"].values()) == 31
    content = jobs.run(path, jobs.lines("b.jsonl", [GOOD]), dedup=True, **options)
    assert content["dropped"]["duplicate"] == 30 * (2 if direction == "both" else 1)
    with pytest.raises(UserError, match=r"max_dropped_share: 1.5: must be from 0 to 1"):
        jobs.run(path, max_dropped_share=1.5, **options)


def test_most_records_of_a_part_may_be_dropped(jobs: Jobs) -> None:
    """The parts of a job are counted together, as in the undivided job."""
    (jobs.folder / "in").mkdir()
    jobs.lines("in/0.jsonl", [GOOD] * 40)
    jobs.lines("in/1.jsonl", [DROPPED] * 60)
    corpus = CorpusSettings(format="pairs")
    for num_partitions in (1, 3):
        with pytest.raises(UserError, match=r"60 of 100, 60 of them empty_side"):
            jobs.run(str(jobs.folder / "in"), corpus=corpus, num_partitions=num_partitions)
    contents = [
        jobs.run(
            str(jobs.folder / "in"),
            corpus=corpus,
            num_partitions=num_partitions,
            max_dropped_share=0.6,
        )
        for num_partitions in (1, 3)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'[\n {"text": "bana"},\n {"text": "kedo"}\n]', r"a JSON array: rename the file to .json"),
        (b'{\n"text": "bana"\n}\n' * 60, r"a.jsonl:1: malformed_json: .*rename a JSON array"),
        (
            b'{"content": "bana", "id": 1}\n' * 200,
            r"no_key_text \(has content, id\): .*--json-keys",
        ),
        (b'{"content": "bana"}\n' * 50, r"no document left: .*50 no_key_text \(.*--json-keys"),
        ('{"text": "\u5929\u6c14"}\n'.encode("gbk") * 200, r"a.jsonl:1: not_utf8: .*--encoding"),
    ],
)
def test_advice_about_what_is_dropped(jobs: Jobs, lines: bytes, message: str) -> None:
    (jobs.folder / "a.jsonl").write_bytes(lines)
    with pytest.raises(UserError, match=message):
        jobs.run(str(jobs.folder / "a.jsonl"))
