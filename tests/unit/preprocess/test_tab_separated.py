"""Tests which columns of tab-separated lines form the pair, and which lines are JSON."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess import readers
from megatron_chatflow.preprocess.pairs import PairSettings
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings

PAIRS = [(f"bana {k}", f"\u53e5 {k}") for k in range(60)]


def read(path: Path, **options: Any) -> tuple[list[list[str]], dict[str, int]]:
    """Returns the pairs of a file and the counts of dropped lines."""
    pairs = PairSettings(direction="forward", **options)
    settings = CorpusSettings(format="pairs", pairs=pairs)
    found, dropped = [], {}
    for chunk in CorpusReader(find_inputs([str(path)]), settings).chunks():
        result = parse_chunk(chunk, settings)
        dropped.update(result.num_dropped)
        for document in result.documents["text"]:
            assert not isinstance(document, str)
            found.append(document.segments[0].text.split("\n"))
    return found, dropped


def lines_of(*rows: tuple[object, ...]) -> bytes:
    return "".join("\t".join(map(str, row)) + "\n" for row in rows).encode()


URLS = [(f"http://a.b/{k}", f"http://a.b/zh/{k}", en, zh, 0.5) for k, (en, zh) in enumerate(PAIRS)]
SCORES = [(1.1, en, zh) for en, zh in PAIRS]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 200)


@pytest.mark.parametrize(
    ("rows", "header", "columns"),
    [
        (URLS, None, ("3", "4")),
        (URLS, ("url", "url", "en", "zh", "score"), ("3", "4")),
        (URLS, ("url", "url", "EN", "zh", "score"), ("en", "ZH")),
        (URLS, ("#from", "to", "one", "other", "how good"), ("one", "other")),
        (SCORES, ("score", "en", "zh"), ("2", "zh")),
        ([(*pair[::-1], 1) for pair in PAIRS], None, ("2", "1")),
        (PAIRS, None, ("1", "2")),
        (PAIRS, None, None),
        (PAIRS, ("en", "zh"), None),
        (PAIRS, ("English", "Chinese"), None),
        ([pair[::-1] for pair in PAIRS], ("zh", "en"), None),
        ([pair[::-1] for pair in PAIRS], ("Chinese", "en"), None),
    ],
)
@pytest.mark.parametrize("name", ["a.tsv", "a.txt", "a.tsv.gz"])
def test_columns_and_headers(
    tmp_path: Path,
    name: str,
    rows: list[tuple[object, ...]],
    header: tuple[str, ...] | None,
    columns: tuple[str, str] | None,
) -> None:
    content = b"\n" + lines_of(*([header] if header else []), *rows)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found, dropped = read(tmp_path / name, columns=columns)
    assert found == [list(pair) for pair in PAIRS]
    assert dropped == ({"header": 1} if header else {})


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        (lines_of(*URLS), None, r"a.tsv:1: has 5 columns \(http://a.b/0, .*--pair-columns"),
        (lines_of(*SCORES), None, r"a.tsv:1: has 3 columns \(1.1, bana 0, "),
        (lines_of(*SCORES), ("2", "4"), "there is no column 4, only columns 1 to 3"),
        (lines_of(*SCORES), ("0", "1"), "there is no column 0, only columns 1 to 3"),
        (lines_of(*SCORES), ("en", "zh"), r"no column en in the header \(1.1, bana 0, "),
        (lines_of(*SCORES), ("2", "2"), "the two columns are the same"),
        (lines_of(*((f'"{a}"', f'"{b}"') for a, b in PAIRS)), None, "quoted as in CSV: a.tsv: "),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, content: bytes, columns: tuple[str, str] | None, message: str
) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.tsv", columns=columns)


def test_single_lines_with_other_columns_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(lines_of(("x", "y", "z"), *PAIRS, ("alone",)))
    found, dropped = read(tmp_path / "a.tsv")
    assert found == [list(pair) for pair in PAIRS]
    assert dropped == {"wrong_number_of_columns": 1, "no_tab": 1}


def test_doubled_quotes_of_csv_are_undone(tmp_path: Path) -> None:
    rows = [*PAIRS, ('"He said ""no"""', "\u4ed6\u8bf4\u4e0d"), ('"Yes," she said', "\u662f")]
    (tmp_path / "a.tsv").write_bytes(lines_of(*rows))
    found, _ = read(tmp_path / "a.tsv")
    assert found[-2:] == [['He said "no"', "\u4ed6\u8bf4\u4e0d"], ['"Yes," she said', "\u662f"]]


BRACES = [("{0} files", "{0} \u6587\u4ef6"), ("[1] see", "[1] \u89c1"), *PAIRS]


@pytest.mark.parametrize("name", ["a.tsv", "a.txt"])
@pytest.mark.parametrize("rows", [BRACES, BRACES[1:], [*PAIRS, *BRACES]])
def test_text_that_begins_with_a_brace(
    tmp_path: Path, name: str, rows: list[tuple[str, str]]
) -> None:
    (tmp_path / name).write_bytes(lines_of(*rows))
    found, dropped = read(tmp_path / name)
    assert (found, dropped) == ([list(pair) for pair in rows], {})


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_json_lines_of_pairs(tmp_path: Path, name: str) -> None:
    records = [json.dumps({"en": en, "zh": zh}) for en, zh in PAIRS]
    (tmp_path / name).write_text("\n".join(records))
    found, dropped = read(tmp_path / name)
    assert (found, dropped) == ([list(pair) for pair in PAIRS], {})
    if name != "a.json":
        with pytest.raises(UserError, match="--pair-columns: .*its lines are JSON"):
            read(tmp_path / name, columns=("1", "2"))
