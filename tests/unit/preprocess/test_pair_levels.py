"""Tests JSON pairs whose sides are lists of sentences, read as sentences or as documents."""

import pytest

from megatron_chatflow.preprocess.pairs import PairSettings, pairs_of_record
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import Chunk
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer.documents import BadLineError, ParsedChunk

KEYS = ("en", "zh")
RECORD = {"en": ["One.", "Two.", "Same"], "zh": ["\u4e00\u3002", "\u4e8c\u3002", "Same"]}


def _parsed(level: str, *lines: bytes) -> ParsedChunk:
    pairs = PairSettings(direction="forward", level=level)  # type: ignore[arg-type]
    settings = CorpusSettings(format="pairs", pairs=pairs)
    return parse_chunk(Chunk("f.jsonl", 1, "lines", b"\n".join(lines), 0), settings)


def _texts(parsed: ParsedChunk) -> list[str]:
    return [
        "".join(part.text for part in document.segments) for document in parsed.documents["text"]
    ]


LINE = b'{"en": ["One.", "Two.", "Same"], "zh": ["\\u4e00\\u3002", "\\u4e8c\\u3002", "Same"]}'


def test_sentences_are_pairs_of_their_own_and_filtered_one_by_one() -> None:
    parsed = _parsed("sentence", LINE)
    assert _texts(parsed) == ["One.\n\u4e00\u3002", "Two.\n\u4e8c\u3002"]
    assert parsed.num_dropped == {"identical_sides": 1}


def test_a_document_is_one_pair() -> None:
    parsed = _parsed("document", LINE)
    assert _texts(parsed) == ["One.\nTwo.\nSame\n\u4e00\u3002\n\u4e8c\u3002\nSame"]
    assert parsed.num_dropped == {}


def test_lists_one_level_down_and_plain_text() -> None:
    assert len(pairs_of_record({"translation": RECORD}, KEYS, "sentence")) == 3
    plain = {"en": "a", "zh": "b"}
    assert pairs_of_record(plain, KEYS, "document") == [("a", "b")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"en": ["a"], "zh": "b"}, "list_beside_text"),
        ({"en": ["a", 1], "zh": ["b", "c"]}, "not_text_en"),
        ({"en": ["a"], "zh": ["b", "c"]}, "unaligned_sentences"),
        ({"en": ["a"]}, "no_key_zh"),
    ],
)
def test_sides_that_are_not_alike_are_bad_lines(record: dict[str, object], reason: str) -> None:
    with pytest.raises(BadLineError) as caught:
        pairs_of_record(record, KEYS, "sentence")
    assert caught.value.reason == reason
