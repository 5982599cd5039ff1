"""Tests that text other than UTF-8 is refused, or read if its encoding is named."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import pytest
import zstandard

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import readers
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings, TxtDocuments
from megatron_chatflow.tokenizer.text_encoding import canonical_encoding

SENTENCE = "\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002"
TRADITIONAL = "\u5929\u6c23\u5f88\u597d\uff0c\u6211\u5011\u53bb\u516c\u5712\u3002"
LINES = [f"{SENTENCE}{k}" for k in range(200)]
TEXT = "\n".join(LINES)


def texts_of(
    path: Path, encoding: str = "utf-8", txt_documents: TxtDocuments = "line"
) -> list[object]:
    settings = CorpusSettings(txt_documents=txt_documents, encoding=canonical_encoding(encoding))
    reader = CorpusReader(find_inputs([str(path)]), settings)
    texts: list[object] = []
    for chunk in reader.chunks():
        texts += parse_chunk(chunk, settings).documents["text"]
    return texts


@pytest.mark.parametrize("txt_documents", ["file", "line"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("gb18030"), r"not UTF-8: a.txt:1: .*--encoding \(it may be gb18030 or"),
        (TRADITIONAL.encode("big5") * 20, "not UTF-8: a.txt:1: .*--encoding .*big5"),
        (("d\u00e9j\u00e0 vu, " * 90).encode("cp1252"), "--encoding .*cp1252"),
        (("x" * 80 + "\n").encode() * 50 + TEXT.encode("gb18030"), r"not UTF-8: a.txt:51: "),
        (SENTENCE[:2].encode("gb18030"), "not UTF-8: a.txt:1: "),
        (TEXT.encode("utf-16"), "begins with the byte-order mark of utf-16: .*--encoding utf-16"),
        (TEXT.encode("utf-32"), "begins with the byte-order mark of utf-32"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "begins with the byte-order mark of utf-16"),
        (
            "plain text".encode("utf-16-le"),
            "NUL, so it is binary or UTF-16 without a byte-order mark",
        ),
        (b"plain text\n" * 99 + b"a\0b", "not text: a.txt:100: contains a NUL"),
        (gzip.compress(lzma.compress(TEXT.encode())), "not text: a.txt: it is xz"),
        (gzip.compress(bz2.compress(TEXT.encode())), "it is bzip2"),
        (zstandard.compress(gzip.compress(TEXT.encode())), "it is gzip"),
    ],
)
def test_text_that_is_not_utf8_is_refused(
    tmp_path: Path, txt_documents: TxtDocuments, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / "a.txt", txt_documents=txt_documents)


def test_an_archive_under_the_name_of_a_text_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.txt", "w") as archive:
        archive.writestr("b.txt", TEXT)
    with pytest.raises(UserError, match="it is zip"):
        texts_of(tmp_path / "a.txt")


def test_text_that_only_looks_like_a_magic_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("BZhang ORC\nORCHID\n")
    assert texts_of(tmp_path / "a.txt") == ["BZhang ORC", "ORCHID"]


def test_a_few_invalid_characters_are_mended(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\xff\n" + TEXT.encode() + b"\ntwo\xe4\xb8")
    assert texts_of(tmp_path / "a.txt") == ["one\ufffd", *LINES, "two\ufffd"]


@pytest.mark.parametrize(
    "encoding",
    ["gb18030", "GBK", "big5hkscs", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf8"],
)
def test_named_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    """Covers every kind of file, compressed or not, with characters that cross block boundaries."""
    monkeypatch.setattr(readers, "CHUNK_BYTES", 701)
    lines = [line.translate({0x6C14: 0x6C23, 0x4EEC: 0x5011, 0x56ED: 0x5712}) for line in LINES]
    records = [{"text": line} for line in lines]
    contents = {
        "a.txt": "\r\n".join(lines),
        "a.jsonl": "\n".join(json.dumps(record, ensure_ascii=False) for record in records),
        "a.json": json.dumps(records, ensure_ascii=False, indent=1),
    }
    for name, content in contents.items():
        data = content.encode(encoding)
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"z{name}.zst").write_bytes(zstandard.compress(data))
        assert texts_of(tmp_path / name, encoding) == lines
        assert texts_of(tmp_path / f"z{name}.zst", encoding) == lines


def test_json_lines_in_utf16_are_refused_by_their_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match="mark of utf-16: set --encoding utf-16"):
        texts_of(tmp_path / "a.jsonl")


def test_a_json_array_in_another_encoding_is_named_as_such(tmp_path: Path) -> None:
    content = json.dumps([{"text": line} for line in LINES], ensure_ascii=False, indent=1)
    (tmp_path / "a.json").write_bytes(content.encode("gb18030"))
    with pytest.raises(UserError, match=r"not UTF-8: a.json:3: .*gb18030"):
        texts_of(tmp_path / "a.json")


def test_what_a_named_encoding_cannot_read_stays_invalid(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(SENTENCE.encode("gb18030") * 50 + b"\xff")
    assert texts_of(tmp_path / "a.txt", "gb18030") == [SENTENCE * 50 + "\ufffd"]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\xff"}\n{"text": "b"}')
    assert texts_of(tmp_path / "a.jsonl", "gb18030") == ["b"]


@pytest.mark.parametrize(
    ("encoding", "content", "message"),
    [
        ("gb18030", TEXT.encode(), "is UTF-8: remove --encoding"),
        ("big5", b"\xef\xbb\xbf" + TEXT.encode(), "begins with the byte-order mark of utf-8"),
        ("utf-16", TEXT.encode("utf-16-be"), "has no byte-order mark"),
        ("utf-16-le", TEXT.encode(), "is UTF-8: remove --encoding"),
        (
            "utf-16-le",
            b"\xfe\xff" + TEXT.encode("utf-16-be"),
            "begins with the byte-order mark of utf-16",
        ),
        ("gb18030", TEXT.encode("utf-16"), "begins with the byte-order mark of utf-16"),
    ],
)
def test_the_wrong_encoding_is_refused(
    tmp_path: Path, encoding: str, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        texts_of(tmp_path / "a.txt", encoding)


@pytest.mark.parametrize("name", ["klingon", "hex", ""])
def test_encodings_that_there_are_not(name: str) -> None:
    with pytest.raises(UserError, match="--encoding: "):
        canonical_encoding(name)


def test_lines_that_are_replaced_are_refused_when_many(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in LINES)
    (tmp_path / "a.jsonl").write_bytes(lines.encode("gb18030"))
    settings = CorpusSettings(invalid_utf8="replace")
    (chunk,) = CorpusReader(find_inputs([str(tmp_path / "a.jsonl")]), settings).chunks()
    with pytest.raises(UserError, match=r"not UTF-8: a.jsonl:1: .*gb18030"):
        parse_chunk(chunk, settings)
