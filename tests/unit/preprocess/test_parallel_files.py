"""Tests parallel text in the forms in which it is published: aligned files, TMX, tables, OPUS."""

import bz2
import copy
import gzip
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from parallel_files import PAIRS, aligned_text, read_pairs, tmx, unit, write_opus_archive

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import aligned, comma_separated, readers


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 200)
    monkeypatch.setattr(aligned, "NUM_ROWS_PER_CHUNK", 7)


@pytest.mark.parametrize(
    ("names", "compress"),
    [
        (("corpus.en", "corpus.zh"), bytes),
        (("corpus.zh", "corpus.en"), bytes),
        (("News.en-zh.en", "News.en-zh.zh-CN"), bytes),
        (("corpus.EN", "corpus.zh_Hans"), bytes),
        (("corpus.en.txt", "corpus.zh.txt"), bytes),
        (("corpus.en.gz", "corpus.zh.gz"), gzip.compress),
        (("corpus.en.xz", "corpus.zh.xz"), lzma.compress),
        (("corpus.en.txt.bz2", "corpus.zh.txt.bz2"), bz2.compress),
    ],
)
def test_files_aligned_by_line(
    tmp_path: Path, names: tuple[str, str], compress: Callable[[bytes], bytes]
) -> None:
    for name in names:
        side = int(".zh" in name.lower().removeprefix("news.en-zh"))
        (tmp_path / name).write_bytes(compress(aligned_text(PAIRS, side)))
    assert read_pairs(*(tmp_path / name for name in names)) == (PAIRS, {})
    assert read_pairs(tmp_path) == (PAIRS, {})
    assert read_pairs(tmp_path / "*") == (PAIRS, {})
    if not names[0].endswith("txt"):
        languages = ("zh", "en") if "Hans" not in names[1] else ("zh-Hans", "en")
        assert read_pairs(tmp_path, keys=languages) == ([pair[::-1] for pair in PAIRS], {})


@pytest.mark.parametrize(
    ("first", "second", "expected", "dropped"),
    [
        (b"a\r\nb\r\n", b"c\nd", [("a", "c"), ("b", "d")], {}),
        (b"\xef\xbb\xbfa\n\nb\n", b"c\nx\nd\n", [("a", "c"), ("b", "d")], {"empty_side": 1}),
        (b"a\n\xff\xfeb\n", b"c\nd\n", [("a", "c")], {"not_utf8": 1}),
        ("a \u2028 b\x0bc\n".encode(), b"d\n", [("a \u2028 b\x0bc", "d")], {}),
        (b"x" * 5000 + b"\na\n", b"c\nd\n", [("a", "d")], {"record_too_large": 1}),
        (b"x" * 900 + b"\na\n", b"c\nd\n", [("a", "d")], {"record_too_large": 1}),
        (b"one", b"line\n", [("one", "line")], {}),
        (b"", b"", [], {}),
    ],
)
def test_lines_keep_their_partners(
    tmp_path: Path,
    first: bytes,
    second: bytes,
    expected: list[tuple[str, str]],
    dropped: dict[str, int],
) -> None:
    (tmp_path / "a.en").write_bytes(first)
    (tmp_path / "a.zh").write_bytes(second)
    found, counts = read_pairs(tmp_path / "a.en", tmp_path / "a.zh", max_record_bytes=800)
    assert (found, counts) == (expected, dropped)


def test_invalid_bytes_may_be_replaced_and_other_encodings_read(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes(b"good line here\n" * 100 + b"a\xffb\n")
    (tmp_path / "a.zh").write_bytes("\u53e5\n".encode() * 101)
    found, _ = read_pairs(tmp_path, invalid_utf8="replace")
    assert found[-1] == ("a\ufffdb", "\u53e5")
    (tmp_path / "a.en").write_bytes(aligned_text(PAIRS, 0))
    (tmp_path / "a.zh").write_bytes(aligned_text(PAIRS, 1).decode().encode("gb18030"))
    assert read_pairs(tmp_path, encoding="gb18030") == (PAIRS, {})
    with pytest.raises(UserError, match=r"not UTF-8: a.en \+ a.zh:.*gb18030"):
        read_pairs(tmp_path, invalid_utf8="replace")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.en": b"x\n" * 9, "a.zh": b"y\n" * 11}, {}, "a.en has 9 lines, a.zh has 11 lines"),
        ({"a.en": b"x\n" * 900, "a.zh": b""}, {}, "not aligned by line: a.en has 900 lines, a.zh"),
        ({"a.en": b"x\n"}, {}, "one side of a pair: a.en: there is no zh side"),
        ({"a.zh": b"x\n", "b.en": b"x\n"}, {}, "one side of a pair: a.zh: there is no en side"),
        ({"a.en": b"x\n", "a.zh": b"", "a.zh-TW": b""}, {}, "two files for one side: a.zh and"),
        (
            {"c.en.txt": b"x\n", "c.zh-CN.txt": b"y\n", "c.zh-TW.txt": b"z\n"},
            {},
            "two files for one side: c.zh-CN.txt and c.zh-TW.txt",
        ),
        (
            {"e.en": b"x\n", "e.zh": b"y\n", "e.en.txt": b"z\n"},
            {},
            "two files for one side: e.en and e.en.txt",
        ),
        (
            {"e.en": b"", "e.zh": b"", "e.scores": b"", "e.scores.gz": b""},
            {},
            "two files for one side: e.scores and e.scores.gz",
        ),
        ({"a.en": b"x\n", "a.zh": b"y\n"}, {"min_score": 0.5}, "no scores: a.en and a.zh"),
        ({"a.en": b"\xff\xfex\0", "a.zh": b"y\n"}, {}, "not utf-8: a.en: begins with the byte"),
        ({"a.en.gz": gzip.compress(b"x\n")[:-9], "a.zh": b"y\n"}, {}, "a.en.gz: .* truncated"),
    ],
)
def test_aligned_files_that_are_refused(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, float], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path, **options)


def test_no_file_falls_through(tmp_path: Path) -> None:
    """Files of one side without another side are read as what they are without it."""
    for name in ("c.en.txt", "c.en-US.txt", "d.zh.txt"):
        (tmp_path / name).write_text(f"{name}\txxx\n")
    found, dropped = read_pairs(tmp_path)
    assert (found, dropped) == (
        [("c.en-US.txt", "xxx"), ("c.en.txt", "xxx"), ("d.zh.txt", "xxx")],
        {},
    )


def test_a_tag_belongs_to_the_longest_code(tmp_path: Path) -> None:
    keys = ("zh", "zh-TW")
    (tmp_path / "a.zh-TW").write_bytes(aligned_text(PAIRS, 1))
    (tmp_path / "a.zh").write_bytes(aligned_text(PAIRS, 0))
    assert read_pairs(tmp_path, keys=keys) == (PAIRS, {})
    (tmp_path / "b.tmx").write_text(tmx([unit(zh_TW="a", zh_CN="b"), unit(zh_TW="a", zh_HK="a")]))
    assert read_pairs(tmp_path / "b.tmx", keys=keys) == ([("b", "a")], {"identical_sides": 1})
    (tmp_path / "b.tmx").write_text(tmx([unit(zh_TW="a", zh_Hant_TW="b")]))
    assert read_pairs(tmp_path / "b.tmx", keys=keys[::-1]) == ([("a", "b")], {})
    (tmp_path / "b.tmx").write_text(tmx([unit(zh_TW="a", zh_TW_x="b")]))
    dropped = {"no_language_zh": 1}
    assert read_pairs(tmp_path / "b.tmx", keys=keys, max_record_bytes=800) == ([], dropped)


def test_a_lone_text_file_keeps_its_meaning(tmp_path: Path) -> None:
    """`x.en.txt` has tab-separated pairs unless there is another side."""
    (tmp_path / "x.en.txt").write_text("a\tb\n")
    assert read_pairs(tmp_path / "x.en.txt") == ([("a", "b")], {})


def test_scores_beside_aligned_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.en").write_bytes(aligned_text(PAIRS[:4], 0))
    (tmp_path / "a.zh").write_bytes(aligned_text(PAIRS[:4], 1))
    (tmp_path / "a.scores").write_text("1.2\n0.3\nnone\nnan\n")
    names = [tmp_path / f"a.{ending}" for ending in ("scores", "en", "zh")]
    expected = ([PAIRS[0]], {"low_score": 2, "score_not_a_number": 1})
    assert read_pairs(*names, min_score=0.5) == expected
    assert not caplog.messages
    assert read_pairs(*names) == (PAIRS[:4], {})
    assert caplog.messages == ["ignored 1 files of scores: see --pair-min-score"]
    (tmp_path / "a.scores").write_text("1.2\n0.3\n")
    with pytest.raises(UserError, match=r"a.zh has 4 lines, a.scores has 2 lines"):
        read_pairs(*names, min_score=0.5)


def test_archives_of_opus(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_opus_archive(tmp_path / "en-zh.txt.zip", PAIRS)
    assert read_pairs(path) == (PAIRS, {})
    assert caplog.messages == [f"ignored in {path}: 1 .xml, 1 LICENSE, 1 README"]
    assert read_pairs(tmp_path) == (PAIRS, {})
    assert read_pairs(path, keys=("zh", "en"))[0] == [pair[::-1] for pair in PAIRS]
    assert read_pairs(path, languages=("zh", "en"))[0] == [pair[::-1] for pair in PAIRS]
    scores = [k / 60 for k in range(60)]
    write_opus_archive(path, PAIRS, scores=scores)
    assert read_pairs(path) == (PAIRS, {})
    assert read_pairs(path, min_score=0.5) == (PAIRS[30:], {"low_score": 30})
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert read_pairs(tmp_path / "unpacked", min_score=0.5)[0] == PAIRS[30:]


def test_archives_with_other_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("d/b.tsv", "".join(f"{a}\t{b}\n" for a, b in PAIRS[:30]))
        archive.writestr("d/c.jsonl.gz", gzip.compress(b'{"en": "bana", "zh": "x"}\n'))
        archive.writestr("__MACOSX/d/._b.tsv", "junk")
        archive.writestr(".hidden.tsv", "junk")
    assert read_pairs(tmp_path / "a.zip") == ([*PAIRS[:30], ("bana", "x")], {})
    assert caplog.messages == [f"ignored in {tmp_path / 'a.zip'}: 2 hidden"]


def test_an_archive_is_opened_once_for_all_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for k in range(0, 60, 10):
                archive.writestr(f"{k}.tsv", "".join(f"{a}\t{b}\n" for a, b in PAIRS[k : k + 10]))
                archive.writestr(f"{k}.en", aligned_text(PAIRS[k : k + 10], 0))
                archive.writestr(f"{k}.zh", aligned_text(PAIRS[k : k + 10], 1))
    opened: list[tuple[Path, IO[bytes]]] = []
    open_file = readers._open_file

    def record(path: Path) -> IO[bytes]:
        opened.append((path, open_file(path)))
        return opened[-1][1]

    monkeypatch.setattr(readers, "_open_file", record)
    found, _ = read_pairs(tmp_path)
    assert sorted(found) == sorted(PAIRS * 4)
    names = [path.name for path, _ in opened]
    # Once for the list of files, and a stream for each side.
    assert names == ["a.zip", "b.zip", "a.zip", "a.zip", "b.zip", "b.zip"]
    assert all(stream.closed for _, stream in opened)


def damaged_archive(path: Path) -> None:
    write_opus_archive(path, PAIRS)
    content = bytearray(path.read_bytes())
    begin = content.index(b"Made-up.en-zh.zh") + 30
    content[begin : begin + 8] = b"\xff" * 8
    path.write_bytes(content)


def truncated_archive(path: Path) -> None:
    write_opus_archive(path, PAIRS)
    path.write_bytes(path.read_bytes()[:-40])


def expanding_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.tsv", b"\n" * (1 << 20))


def overlapping_archive(path: Path) -> None:
    """Writes an archive whose files share their compressed bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.tsv", b"a\tb\n" * 5000)
        for k in range(1, 30):
            info = copy.copy(archive.filelist[0])
            info.filename = f"{k}.tsv"
            archive.filelist.append(info)


def lzma_in_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.tsv", b"a\tb\n")


def bzip2_in_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.tsv", b"a\tb\n")


def archive_in_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.tsv", b"a\tb\n")
        archive.writestr("b.zip", b"PK")


def table_in_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.parquet", b"PAR1")


def documentation_only(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README", "nothing")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damaged_archive, r"cannot read: a.zip/Made-up.en-zh.zh"),
        (truncated_archive, r"cannot read: a.zip: not a complete zip archive .*download it again"),
        (expanding_archive, r"a.zip: .* expand to more than .*--max-expansion"),
        (overlapping_archive, r"a.zip: .* expand to more than .*--max-expansion"),
        (lzma_in_archive, r"a.zip: a.tsv is not compressed by deflate: unpack the archive"),
        (bzip2_in_archive, r"a.zip: a.tsv is not compressed by deflate: unpack the archive"),
        (archive_in_archive, r"a.zip: b.zip in it: unpack the archive"),
        (table_in_archive, r"a.zip: a.parquet in it: unpack the archive"),
        (documentation_only, r"no input in archive: .*a.zip"),
    ],
)
def test_archives_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setattr(readers, "FREE_EXPANSION_BYTES", 1 << 16)
    write(tmp_path / "a.zip")
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "a.zip", max_expansion=100)


UNITS = [unit(en=en, zh=zh) for en, zh in PAIRS]


@pytest.mark.parametrize(
    ("units", "options", "expected", "dropped"),
    [
        (UNITS, {}, PAIRS, {}),
        (UNITS, {"languages": ("zh", "en")}, [pair[::-1] for pair in PAIRS], {}),
        ([unit(en_US="a", zh_CN="b")], {}, [("a", "b")], {}),
        ([unit(EN="a", zh_TW="c", zh="b")], {}, [("a", "b")], {}),
        ([unit(en="a", zh_TW="c", zh_CN="b")], {"keys": ("en", "zh-CN")}, [("a", "b")], {}),
        ([unit(en="a", zh_TW="c", zh_CN="b")], {"languages": ("en", "zh")}, [("a", "c")], {}),
        ([unit(en="a", fr="b"), *UNITS[:1]], {}, PAIRS[:1], {"no_language_zh": 1}),
        ([unit(en="x &lt;b&gt; &amp; &#x4e00;", zh="yy")], {}, [("x <b> & \u4e00", "yy")], {}),
        (
            [unit(en='a <bpt i="1">&lt;i&gt;<sub>s</sub></bpt>b<ept i="1"/> <hi>c</hi>', zh="d")],
            {},
            [("a b c", "d")],
            {},
        ),
        (
            [
                unit('<prop type="score">0.9</prop>', en="a", zh="b"),
                unit('<prop type="score">0.1</prop>', en="c", zh="d"),
                unit(en="e", zh="f"),
            ],
            {"min_score": 0.5},
            [("a", "b")],
            {"low_score": 1, "no_key_score": 1},
        ),
        ([unit(en="x" * 900, zh="b"), *UNITS[:1]], {}, PAIRS[:1], {"record_too_large": 1}),
        ([unit(en="", zh="b")], {}, [], {"empty_side": 1}),
        (
            [
                '<TU><PROP TYPE="score">1</PROP><TUV XML:LANG="EN"><SEG>a <BPT>x</BPT>b</SEG></TUV>'
                '<Tuv Lang="zh"><Seg>c</Seg></Tuv></TU>'
            ],
            {"min_score": 0.5},
            [("a b", "c")],
            {},
        ),
        ([f"<!--{'x' * 700}-->{UNITS[0]}"], {}, PAIRS[:1], {}),
        (
            [f"<tu>{'<tuv><seg/></tuv>' * 99}{unit(en='a', zh='b')[4:]}", UNITS[0]],
            {},
            PAIRS[:1],
            {"record_too_large": 1},
        ),
        ([unit(en=f"{'<hi>' * 50}a{'</hi>' * 50}", zh="b")], {}, [("a", "b")], {}),
        ([], {}, [], {}),
    ],
)
@pytest.mark.parametrize("compress", [None, gzip.compress])
def test_tmx(
    tmp_path: Path,
    units: list[str],
    options: dict[str, object],
    expected: list[tuple[str, str]],
    dropped: dict[str, int],
    compress: Callable[[bytes], bytes] | None,
) -> None:
    path = tmp_path / ("a.tmx.gz" if compress else "a.tmx")
    content = tmx(units).encode()
    path.write_bytes(compress(content) if compress else content)
    assert read_pairs(path, max_record_bytes=800, **options) == (expected, dropped)


@pytest.mark.parametrize(
    ("encoding", "declared", "option"),
    [
        ("utf-16", "UTF-16", "utf-8"),
        ("utf-8-sig", "UTF-8", "utf-8"),
        ("gb18030", "GB18030", "gb18030"),
        ("utf-16", "UTF-16", "utf-16"),
        ("iso-8859-1", "ISO-8859-1", "utf-8"),
    ],
)
def test_encodings_of_tmx(tmp_path: Path, encoding: str, declared: str, option: str) -> None:
    pair = ("d\u00e9j\u00e0", "vu") if encoding == "iso-8859-1" else PAIRS[1]
    text = tmx([unit(en=pair[0], zh=pair[1])], f'<?xml version="1.0" encoding="{declared}"?>')
    (tmp_path / "a.tmx").write_bytes(text.encode(encoding))
    assert read_pairs(tmp_path, encoding=option) == ([pair], {})


BOMB = '<!DOCTYPE tmx [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>'
EXTERNAL = '<!DOCTYPE tmx [<!ENTITY x SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (tmx(UNITS)[:-30], "malformed XML: a.tmx:6[0-9]: "),
        (tmx([unit(en="a < b", zh="c")]), "malformed XML: a.tmx:5: "),
        (tmx([unit(en="&b;", zh="c")], BOMB), "refused: a.tmx: declares the XML entity a"),
        (tmx([unit(en="&x;", zh="c")], EXTERNAL), "declares the XML entity x"),
        (
            tmx([unit(en="a&nbsp;b", zh="c")], '<!DOCTYPE tmx SYSTEM "tmx14.dtd">'),
            "refused: a.tmx:5: the XML entity nbsp is not declared: replace it by its text",
        ),
        (tmx([unit(en="a&nbsp;b", zh="c")]), "malformed XML: a.tmx:5: undefined entity"),
        (
            tmx([f"<!--{'x' * 3000}-->"]),
            r"a.tmx:\d: a tag or comment is larger than --max-record-b",
        ),
        (
            tmx([f'<tu a="{"x" * 3000}"></tu>']),
            "a tag or comment is larger than --max-record-bytes",
        ),
        (tmx([unit(en="<hi>" * 200 + "a")]), "a.tmx:5: more than 100 elements in each other"),
        (f"<!--{'x' * 3000}-->{tmx([])}", "a tag or comment is larger than --max-record-bytes"),
        ("<xliff><file/></xliff>", "not TMX: a.tmx: its first element is xliff"),
        ("", "malformed XML: a.tmx:1: no element found"),
        ("en\tzh\n", "malformed XML: a.tmx:1: "),
        (
            tmx(UNITS, '<?xml version="1.0" encoding="GB18030"?>'),
            "a.tmx.*set --encoding",
        ),
    ],
)
def test_tmx_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.tmx").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "a.tmx", max_record_bytes=800)


def test_capitals_in_tmx(tmp_path: Path) -> None:
    text = tmx(UNITS).replace("tmx", "TMX").replace("body", "BODY")
    (tmp_path / "a.tmx").write_text(text, encoding="utf-8")
    assert read_pairs(tmp_path / "a.tmx") == (PAIRS, {})


def test_a_document_type_that_names_a_file_is_harmless(tmp_path: Path) -> None:
    """Translation memories often name the DTD, which is not read."""
    text = tmx(UNITS, '<?xml version="1.0"?>\n<!DOCTYPE tmx SYSTEM "tmx14.dtd">')
    (tmp_path / "a.tmx").write_text(text, encoding="utf-8")
    assert read_pairs(tmp_path / "a.tmx") == (PAIRS, {})


BARS = [f"{en} ||| {zh}" for en, zh in PAIRS]


@pytest.mark.parametrize(
    ("lines", "options", "expected", "dropped"),
    [
        (BARS, {}, PAIRS, {}),
        ([f"{line} ||| 0-0 1-1" for line in BARS], {"columns": ("1", "2")}, PAIRS, {}),
        ([f"{line} ||| 0.9" for line in BARS], {"min_score": 0.5, "score": "3"}, PAIRS, {}),
        (
            [*BARS, "alone", "a ||| b ||| c"],
            {},
            PAIRS,
            {"no_separator": 1, "wrong_number_of_columns": 1},
        ),
        (["a ||| b\tc ||| d"], {}, [("a ||| b", "c ||| d")], {}),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.txt.bz2"])
def test_lines_with_bars(
    tmp_path: Path,
    name: str,
    lines: list[str],
    options: dict[str, object],
    expected: list[tuple[str, str]],
    dropped: dict[str, int],
) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    (tmp_path / name).write_bytes(bz2.compress(content) if name.endswith("bz2") else content)
    assert read_pairs(tmp_path / name, **options) == (expected, dropped)


@pytest.mark.parametrize(
    ("text", "options", "expected", "dropped"),
    [
        ('en,zh\n"a, b",c\n"d\ne",f\n', {}, [("a, b", "c"), ("d\ne", "f")], {"header": 1}),
        ('"x ""y""",z\n', {}, [('x "y"', "z")], {}),
        ("id,zh,en\n1,b,a\n", {}, [("a", "b")], {"header": 1}),
        ("id;zh;en\n1;b, c;a\n", {}, [("a", "b, c")], {"header": 1}),
        ("1,a,b\n2,c,d\n", {"columns": ("2", "3")}, [("a", "b"), ("c", "d")], {}),
        ("one,other\r\na,b\r\n", {"columns": ("one", "other")}, [("a", "b")], {"header": 1}),
        (
            "en,zh,score\na,b,0.9\nc,d,0.1\n",
            {"min_score": 0.5},
            [("a", "b")],
            {"header": 1, "low_score": 1},
        ),
        (
            'a,b\n"c"d,e\nf,g,h\n\ni,j\n',
            {},
            [("a", "b"), ("i", "j")],
            {"malformed_csv": 1, "wrong_number_of_columns": 1},
        ),
        (f"a,{'x' * 900}\nc,d\n", {}, [("c", "d")], {"record_too_large": 1}),
        (f'a,"{"x" * 900}"\nc,d\n', {}, [("c", "d")], {"record_too_large": 1}),
        (f"a,{chr(0x6587) * 270}\nc,d\n", {}, [("c", "d")], {"record_too_large": 1}),
        (f'"{"x" * 500}\n","{"y" * 500}"\nc,d\n', {}, [("c", "d")], {"record_too_large": 1}),
        ('a 5" pipe,x\n"5"" pipe",y\nz, "b"\n', {}, [('5" pipe', "y")], {"malformed_csv": 2}),
        ('x,"y\n\n""z"""\n', {}, [("x", 'y\n\n"z"')], {}),
        ("\n\na;b, c\nd;e\n", {}, [("a", "b, c"), ("d", "e")], {}),
        ('"a;b;c",x\n"d;e",y\n', {}, [("a;b;c", "x"), ("d;e", "y")], {}),
        ("a, b, c\td\ne\tf\n", {}, [("a, b, c", "d"), ("e", "f")], {}),
        (
            "english_text,chinese_text,score\na,b,0.9\n",
            {"min_score": 0.5},
            [("a", "b")],
            {"header": 1},
        ),
        ("\ufeffen,zh\na,b", {}, [("a", "b")], {"header": 1}),
        ("", {}, [], {}),
    ],
)
def test_csv(
    tmp_path: Path,
    text: str,
    options: dict[str, object],
    expected: list[tuple[str, str]],
    dropped: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comma_separated, "_NUM_ROWS_PER_CHUNK", 3)
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    assert read_pairs(tmp_path / "a.csv", max_record_bytes=800, **options) == (expected, dropped)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n", r"ambiguous pair columns: a.csv:1: has 3 columns \(a, b, c\)"),
        ('a,b\nc,"d\ne,f\n', r"malformed CSV: a.csv:2: a quotation mark is not closed"),
        (
            'a,"b\n' + "c,d\n" * 300 + 'e,"f"\n',
            r"malformed CSV: a.csv:1: a quoted cell is longer than --max-record-bytes \(800\)",
        ),
        (
            f'a,b\n"{"x" * 900}\ny",c\n',
            r"malformed CSV: a.csv:2: a quoted cell is longer than --max-record-bytes",
        ),
        (
            'a,b\n"He said "hi" there\nand left.","x"\n',
            r"malformed CSV: a.csv:2: a quotation mark in a quoted cell is not doubled",
        ),
        ('"a\nb "c" d",e\n', r"malformed CSV: a.csv:1: .* not doubled"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "a.csv", max_record_bytes=800)


@pytest.mark.parametrize("kind", ["struct", "map", "flat"])
def test_translations_in_parquet(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pairs = [{"en": en, "zh": zh} for en, zh in PAIRS]
    if kind == "flat":
        table = pyarrow.table({"zh": [p["zh"] for p in pairs], "en": [p["en"] for p in pairs]})
    else:
        text = pyarrow.string()
        of_map, of_struct = pyarrow.map_(text, text), pyarrow.struct([("en", text), ("zh", text)])
        values = [list(pair.items()) for pair in pairs] if kind == "map" else pairs
        column = pyarrow.array(values, of_map if kind == "map" else of_struct)
        table = pyarrow.table({"id": range(len(pairs)), "translation": column})
    table = table.append_column("score", pyarrow.array([k / 60 for k in range(60)]))
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_pairs(tmp_path / "a.parquet") == (PAIRS, {})
    assert read_pairs(tmp_path, min_score=0.5) == (PAIRS[30:], {"low_score": 30})
    if kind == "struct":
        keys = ("translation.zh", "translation.en")
        assert read_pairs(tmp_path, keys=keys) == ([pair[::-1] for pair in PAIRS], {})
