"""Tests damaged and hostile tokenizer files: a one-line error, not a crash or wrong ids."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from made_up_text import made_up_sentences
from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.base import read_tokenizer_config
from megatron_chatflow.tokenizer.export import sentencepiece_files
from megatron_chatflow.tokenizer.extend import extend_tokenizer
from megatron_chatflow.tokenizer.tokenizer_json import (
    library_errors,
    open_tokenizer_json,
    parse_json,
    parse_tokenizer_json,
)

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
REPEATS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
SLOW_SPLIT = {**SPLIT, "pattern": {"Regex": "(a|a|aa)+$"}}
TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}


def changed(original: Path, folder: Path, **components: Any) -> Path:
    content = json.loads(original.read_bytes())
    content |= components
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("components", "reason"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [REPEATS] * 8}}, "times longer"),
        ({"normalizer": [{"normalizers": [REPEATS] * 8}]}, "times longer"),
        ({"decoder": {"type": "Sequence", "decoders": [REPEATS] * 8}}, "times longer"),
        (
            {
                "normalizer": {"type": "Prepend", "prepend": "b" * 200},
                "added_tokens": [
                    {"id": k, "content": f"{k}" * 16_000, "special": False, **TOKEN}
                    for k in range(9)
                ],
            },
            "added tokens too long",
        ),
        ({"added_tokens": [{"id": 0, "content": "a" * 10**5}]}, "added token is too long"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fw=="}}, "map is dam"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "map is damaged"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 1000,
                    "pair": [],
                    "special_tokens": {"x": {"id": "x", "ids": [0] * 1000, "tokens": ["x"] * 1000}},
                }
            },
            "tokens to a text",
        ),
        ({"model": 5}, "with a model"),
    ],
)
def test_what_asks_for_too_much_memory_is_refused_before_it_is_loaded(
    tmp_path: Path, byte_level_model: Path, components: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        load_tokenizer(changed(byte_level_model, tmp_path, **components))


def test_sparse_ids_are_refused(tmp_path: Path, byte_level_model: Path) -> None:
    model = json.loads(byte_level_model.read_bytes())["model"]
    model["vocab"]["zz"] = 3_000_000_000
    with pytest.raises(UserError, match="largest id is 3000000000, but it has only 501 tokens"):
        load_tokenizer(changed(byte_level_model, tmp_path, model=model))
    model["vocab"]["zz"] = 900_000  # a gap is not damage
    assert load_tokenizer(changed(byte_level_model, tmp_path, model=model)).vocab_size == 900_001


def test_ordinary_normalizers_are_within_the_bounds(tmp_path: Path, byte_level_model: Path) -> None:
    """Covers the normalizers of LLaMA and of models that spell out white space."""
    named = {" ": "\u2581", "\n": "<n>", "\t": "<|tab|>", "\r": "<return>"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "NFKC"}, {"type": "Lowercase"}]
    steps += [{"type": "Replace", "pattern": {"String": a}, "content": b} for a, b in named.items()]
    normalizer = {"type": "Sequence", "normalizers": steps}
    tokenizer = load_tokenizer(changed(byte_level_model, tmp_path, normalizer=normalizer))
    assert tokenizer.encode("a b\tc")


def test_padding_and_truncation_do_not_matter(tmp_path: Path, byte_level_model: Path) -> None:
    padding = {"strategy": {"Fixed": 3_000_000_000}, "direction": "Right", "pad_id": 0}
    padding |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "</s>"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 5}
    path = changed(byte_level_model, tmp_path, padding=padding, truncation=truncation)
    tokenizer = load_tokenizer(path)
    assert not tokenizer.add_bos_token  # detected by encoding with the file's post-processor
    assert tokenizer.encode("bana") == load_tokenizer(byte_level_model).encode("bana")


def test_a_panic_while_loading_is_one_line(
    tmp_path: Path, byte_level_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = json.loads(byte_level_model.read_bytes())["model"]
    model["continuing_subword_prefix"] = "######"
    path = changed(byte_level_model, tmp_path, model=model)
    with pytest.raises(UserError, match=f"not a tokenizer.json: {path}: ") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_panic_while_encoding_is_one_line(
    tmp_path: Path, byte_level_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = changed(byte_level_model, tmp_path, pre_tokenizer=SLOW_SPLIT)
    tokenizer = load_tokenizer(path)
    for encode in (tokenizer.encode, tokenizer.encode_continuation):
        with pytest.raises(UserError, match=f"cannot encode text: {path}: .*retry-limit"):
            encode("a" * 100 + "!")
        assert capfd.readouterr().err == ""


def test_a_panic_while_decoding_is_one_line(
    tmp_path: Path, byte_level_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    strip = {"type": "Strip", "content": "a", "start": 10**18, "stop": 10**18}
    path = changed(byte_level_model, tmp_path, decoder=strip)
    tokenizer = load_tokenizer(path)
    with pytest.raises(UserError, match=f"cannot decode ids: {path}"):
        tokenizer.decode(tokenizer.encode("bana kedo"))
    assert capfd.readouterr().err == ""


def test_other_output_survives_a_panic(
    tmp_path: Path, byte_level_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    library = tokenizers.Tokenizer.from_file(
        str(changed(byte_level_model, tmp_path, pre_tokenizer=SLOW_SPLIT))
    )
    for _ in range(2):  # Rust adds a note to the first panic of a process only
        with pytest.raises(UserError), library_errors("cannot encode text"):
            os.write(2, b"before\n")
            try:
                library.encode("a" * 100 + "!")
            finally:
                os.write(2, "后\n".encode())
        assert capfd.readouterr().err == "before\n后\n"
    with library_errors("cannot encode text"):
        os.write(2, b"thread 'x' panicked at no panic\n")
    assert capfd.readouterr().err == "thread 'x' panicked at no panic\n"


def test_ctrl_c_is_no_error_of_the_library() -> None:
    with pytest.raises(KeyboardInterrupt), library_errors("cannot encode text"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" + "[]," * 16_000_000 + "1]",
        '{"eos_token": "\\ud800"}',
        "[" + "9" * 5000 + "]",
    ],
    ids=["lists", "objects", "many", "surrogate", "digits"],
)
def test_json_bombs_are_refused(tmp_path: Path, text: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError):
        parse_json(text.encode())
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match="not a tokenizer configuration") as caught:
        read_tokenizer_config(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    assert time.process_time() - begin < 60


def test_a_device_is_no_tokenizer() -> None:
    with pytest.raises(UserError, match="not a file"):
        load_tokenizer("/dev/zero", "HuggingFaceTokenizer")
    with pytest.raises(UserError, match="not a file"):
        load_tokenizer("/dev/zero", "Llama2Tokenizer")


def _set_id(name: str, value: int) -> Callable[[Any], None]:
    return lambda model: setattr(model.trainer_spec, name, value)


def _repeat_a_piece(model: Any) -> None:
    model.pieces[-1].piece = model.pieces[-2].piece


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set_id("unk_id", 5000), "unk_id is 5000, but it has 512 pieces"),
        (_set_id("bos_id", 512), "bos_id is 512, but it has 512 pieces"),
        (_set_id("eos_id", 2**31 - 1), "eos_id is 2147483647"),
        (_set_id("pad_id", 5000), "pad_id is 5000"),
        (lambda model: model.ClearField("pieces"), "not a SentencePiece model"),
        (_repeat_a_piece, "already defined|repeats"),
        (lambda model: setattr(model.pieces[-1], "piece", ""), "must not be empty"),
        (lambda model: setattr(model.pieces[-1], "score", float("nan")), "piece 511 has the score"),
        (lambda model: setattr(model.pieces[-1], "score", float("-inf")), "the score -inf"),
    ],
)
def test_damaged_sentencepiece_models(
    tmp_path: Path, tiny_sentencepiece_model: Path, change: Callable[[Any], None], reason: str
) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tiny_sentencepiece_model.read_bytes())
    change(model)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=reason) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_pieces_have_to_be_utf_8(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    data = tiny_sentencepiece_model.read_bytes()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data.replace(b"</s>", b"\xff/s>", 1))
    with pytest.raises(UserError, match="piece 2 is not UTF-8|no EOS token"):
        load_tokenizer(path)
    piece = load_tokenizer(tiny_sentencepiece_model).decode([400]).encode()
    assert data.count(piece)
    path.write_bytes(data.replace(piece, b"\xff" * len(piece), 1))
    with pytest.raises(UserError, match="is not UTF-8"):
        load_tokenizer(path)


def test_special_tokens_are_those_that_sentencepiece_finds(
    tmp_path: Path, tiny_sentencepiece_model: Path
) -> None:
    """The trainer's ids may name other pieces, and an export must not use them."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tiny_sentencepiece_model.read_bytes())
    model.trainer_spec.eos_id, model.trainer_spec.bos_id, model.trainer_spec.unk_id = 300, -1, 301
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    tokenizer = load_tokenizer(path)
    files = sentencepiece_files(path.read_bytes(), tokenizer)
    config = json.loads(files["tokenizer_config.json"])
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    assert [config.get(name) for name in names] == ["<s>", "</s>", "<unk>", None]
    assert json.loads(files["tokenizer.json"])["model"]["unk_token"] == "<unk>"


def test_a_model_without_pieces_of_text_cannot_be_extended(
    tmp_path: Path, tiny_sentencepiece_model: Path
) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tiny_sentencepiece_model.read_bytes())
    kept = [piece for piece in model.pieces if piece.type != Piece.NORMAL]
    del model.pieces[:]
    model.pieces.extend(kept)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="has no text pieces"):
        extend_tokenizer(load_tokenizer(path), ["\u4e00"], tmp_path / "out")


def test_a_json_tokenizer_opens_as_before(byte_level_model: Path) -> None:
    content = parse_tokenizer_json(byte_level_model.read_bytes())
    tokenizer = open_tokenizer_json(content)
    assert tokenizer.get_vocab() == json.loads(byte_level_model.read_bytes())["model"]["vocab"]


def test_dropout_of_merges_is_left_out(byte_level_model: Path, tmp_path: Path) -> None:
    content = json.loads(byte_level_model.read_bytes())
    content["model"]["dropout"] = 0.5
    texts = made_up_sentences(20, seed=7)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    expected = load_tokenizer(byte_level_model).encode_batch(texts)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.encode_continuation(text) for text in texts] == expected
    for dropout in (True, "x", 1.5, -0.5):
        content["model"]["dropout"] = dropout
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            load_tokenizer(path)
