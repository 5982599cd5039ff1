"""Tests the direct conversion of JSON lines to ids: equal to a full parser, or deferred to it."""

import json
import random
from pathlib import Path

import orjson
import pytest
from bpe_models import pieces_of

from megatron_chatflow.runtime import load_extension
from megatron_chatflow.tokenizer.bpe import CompiledBpeEncoder, compiled_bpe_encoder

extension = load_extension("tokenizer")

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(extension is None, reason="csrc/tokenizer is not built"),
]


@pytest.fixture(scope="module")
def encoder(tiny_sentencepiece_model: Path) -> CompiledBpeEncoder:
    compiled = compiled_bpe_encoder(pieces_of(tiny_sentencepiece_model))
    assert compiled is not None
    return compiled


def texts_by_full_parser(data: bytes) -> list[str] | None:
    """Returns the texts, or None if a line has none."""
    texts = []
    for line in data.split(b"\n"):
        if not line or line.isspace():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            return None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            return None
        texts.append(record["text"])
    return texts


def check(encoder: CompiledBpeEncoder, data: bytes) -> bool:
    """Compares both. Returns whether the fast parser handled the lines."""
    encoded = encoder.encode_json_lines(data, "text", True, 2)
    texts = texts_by_full_parser(data)
    if encoded is None:
        return False
    assert texts is not None, data
    ids, lengths = encoder.encode_batch(texts, True, 2)
    assert encoded[0].tolist() == ids.tolist(), data
    assert encoded[1].tolist() == lengths.tolist(), data
    assert encoded[2] == sum(len(text.encode()) for text in texts), data
    return True


UNDERSTOOD = [
    b"",
    b" \t\r\n\n",
    b'{"text":"a"}',
    b' { "text" : "a" , "n" : [ 1 , -2.5e+3, {"text": 5} ], "t": true, "f": false, "0": null }\r',
    b'{"text": ""}\n{"text": "two"}\n',
    b'{"text": "\\" \\\\ \\/ \\b\\f\\n\\r\\t \\u0041\\u00e9\\u4e00\\ud83e\\uddff\\u0000"}',
    b'{"id": {"a": [[], {}, [{}]]}, "text": "nested \xe4\xb8\x80\xf0\x9f\xa7\xbf\xc3\xa9\x7f"}',
    b'{"text": "first", "text": "last"}',
    b'{"n": 0, "m": -0.0, "k": 1E9, "text": "numbers"}',
    b'{"note": "\\ud83e\\uddff", "text": "pair elsewhere"}',
    b'{"n": 123456789012345678901234567890, "text": "big"}',
]
LEFT_TO_THE_PARSER = [
    b"{",
    b"[]",
    b'"text"',
    b"{}",
    b'{"Text": "a"}',
    b'{"text": 5}',
    b'{"text": null}',
    b'{"text": "a"} x',
    b'{"text": "a",}',
    b'{"text": "a" "b": 1}',
    b'{"text": "cut',
    b'{"text": "cut\\',
    b'{"text": "\\x"}',
    b'{"text": "\\u12"}',
    b'{"text": "\\u12G4"}',
    b'{"text": "\\ud800"}',
    b'{"text": "\\udc00"}',
    b'{"text": "\\ud800\\u0041"}',
    b'{"text": "\\ud800\\udbff"}',
    b'{"note": "\\ud800", "text": "a"}',
    b'{"text": "raw\ttab"}',
    b'{"text": "raw\x00"}',
    b'{"text": "\xff"}',
    b'{"text": "\xc0\xaf"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "\xe0\x80\x80"}',
    b'{"text": "\xf4\x90\x80\x80"}',
    b'{"text": "\xe4\xb8"}',
    b'{"n": 01, "text": "a"}',
    b'{"n": 1., "text": "a"}',
    b'{"n": .5, "text": "a"}',
    b'{"n": +1, "text": "a"}',
    b'{"n": NaN, "text": "a"}',
    b'{"n": 1e999, "text": "a"}',
    b'{"n": tru, "text": "a"}',
    b'{"n": ' + b"[" * 100 + b"]" * 100 + b', "text": "a"}',
    b'{"\\u0074ext": "a"}',
    b'\xef\xbb\xbf{"text": "a"}',
]


@pytest.mark.parametrize("data", UNDERSTOOD)
def test_understood(encoder: CompiledBpeEncoder, data: bytes) -> None:
    assert check(encoder, data)


@pytest.mark.parametrize("data", LEFT_TO_THE_PARSER)
def test_left_to_the_parser(encoder: CompiledBpeEncoder, data: bytes) -> None:
    assert not check(encoder, data)
    assert not check(encoder, b'{"text": "a"}\n' + data + b'\n{"text": "b"}')


def test_damaged_lines_are_never_misread(encoder: CompiledBpeEncoder) -> None:
    """Replaces, removes and doubles bytes of good lines.

    Handled lines must be read as by orjson.
    """
    generator = random.Random(0)
    record = {"id": "\u4e00-12", "meta": {"score": -1.5e-3, "tags": ["a", None, True, {"x": []}]}}
    texts = ['bana \u4e00\u4e25\n"quoted" \\ \U0001f9ff', "kedo luno" * 5, "\x1f\ufffd\x7f\u2028"]
    lines = [json.dumps({**record, "text": text}).encode() for text in texts]
    lines += [json.dumps({"text": text, **record}, ensure_ascii=False).encode() for text in texts]
    alphabet = b'"\\{}[]:,utfn0.9eE+- \n\r\x00\x1f\x7f\x80\xc3\xe4\xed\xa0\xf0\xf4\xff'
    num_understood = 0
    for _ in range(30_000):
        line = bytearray(generator.choice(lines))
        for _ in range(generator.randint(1, 2)):
            at = generator.randrange(len(line))
            line[at : at + generator.randint(0, 2)] = bytes(
                generator.choices(alphabet, k=generator.randint(0, 2))
            )
        num_understood += check(encoder, bytes(line))
    assert 3_000 < num_understood < 27_000


def test_good_lines_are_understood(encoder: CompiledBpeEncoder) -> None:
    """Covers every code point, as JSON writers write them."""
    code_points = [*range(0xD800), *range(0xE000, 0x110000, 7)]
    for begin in range(0, len(code_points), 5000):
        text = "".join(map(chr, code_points[begin : begin + 5000]))
        for data in (
            json.dumps({"text": text}).encode(),
            json.dumps({"text": text}, ensure_ascii=False).encode(),
            orjson.dumps({"a": [text], "text": text}),
        ):
            assert check(encoder, data)
