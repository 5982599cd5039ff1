"""Tests vocabulary extension: the chosen pieces, their ids, and that existing ids do not change."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from fuzz_text import fuzz_documents
from made_up_text import made_up_sentences

from megatron_chatflow.convert.vocabulary import vocabulary_growth
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.extend import (
    Choice,
    choose_pieces,
    extend_tokenizer,
    is_han,
    listed_pieces,
    tokens_per_character,
    with_merges,
)

NEW = [chr(0x6000 + 13 * k) for k in range(40)]  # characters that the tiny model lacks


def new_language(num_lines: int) -> list[str]:
    """Returns lines of words of two new characters. The first characters are the most frequent."""
    generator = random.Random(5)
    words = [NEW[k] + NEW[(3 * k + 1) % 40] for k in range(40)]
    weights = [40 - k for k in range(40)]
    return ["".join(generator.choices(words, weights, k=12)) + "。ab " for _ in range(num_lines)]


@pytest.fixture(scope="module")
def old(tiny_sentencepiece_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_sentencepiece_model)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Creates a byte-level `tokenizer.json` like GPT-2's."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(made_up_sentences(200), trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    model.save(str(path))
    (path.parent / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return load_tokenizer(path)


def test_the_most_frequent_new_characters_are_chosen(old: Tokenizer) -> None:
    lines = new_language(400)
    pieces = choose_pieces(old, lines, Choice(num_new=10))
    counts = {character: "".join(lines).count(character) for character in NEW}
    assert pieces == sorted(NEW, key=lambda c: (-counts[c], c))[:10]
    every = choose_pieces(old, lines, Choice(num_new=1000))
    assert sorted(every) == sorted(NEW)  # no existing pieces, letters or spaces
    rare = [*lines, "\u9f8d"]
    assert "\u9f8d" not in choose_pieces(old, rare, Choice(num_new=1000))
    assert "\u9f8d" in choose_pieces(old, rare, Choice(num_new=1000, min_count=1))
    other = [*lines, "ΩΩΩ"]
    assert "Ω" not in choose_pieces(old, other, Choice(num_new=1000))
    assert "Ω" in choose_pieces(old, other, Choice(num_new=1000, script="any"))
    with pytest.raises(UserError, match="contains no new character for the tokenizer"):
        choose_pieces(old, ["plain text"], Choice(num_new=10))


def test_script() -> None:
    assert all(map(is_han, "中文。，“…—𠀀")) and not any(map(is_han, "aé Ωか한"))


@pytest.mark.parametrize("kind", ["characters", "pieces"])
def test_extended_model_keeps_old_ids_and_old_text(
    old: Tokenizer, kind: str, tmp_path: Path
) -> None:
    lines = new_language(400)
    pieces = choose_pieces(old, lines, Choice(num_new=70, kind=kind))
    assert len(pieces) == (70 if kind == "pieces" else 40)
    assert any(len(piece) > 1 for piece in pieces) == (kind == "pieces")
    extended = extend_tokenizer(old, pieces, tmp_path)
    assert extended.vocab_size == old.vocab_size + len(pieces)
    for text in made_up_sentences(300, seed=9):
        assert extended.encode(text) == old.encode(text)
    assert tokens_per_character(extended, lines) < 0.5 * tokens_per_character(old, lines)
    # The library itself agrees, and so does the tokenizer that transformers loads from the folder.
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*lines, *made_up_sentences(100, seed=9)]:
        ids = extended.encode(text)
        assert ids == reference.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert extended.decode(ids) == text
    again = extend_tokenizer(extended, ["龍"], tmp_path / "again")
    assert again.encode_continuation("龍") == [extended.vocab_size]


def test_byte_level_tokenizers_take_characters(byte_level: Tokenizer, tmp_path: Path) -> None:
    lines = new_language(100)
    pieces = choose_pieces(byte_level, lines, Choice(num_new=30))
    extended = extend_tokenizer(byte_level, pieces, tmp_path)
    assert extended.vocab_size == byte_level.vocab_size + 30
    for text in made_up_sentences(100, seed=9):
        if not any(character in pieces for character in text):
            assert extended.encode(text) == byte_level.encode(text)
    for text in lines:
        assert extended.decode(extended.encode(text)) == text
        assert extended.num_bytes_per_id[extended.encode(text)].sum() == len(text.encode())
    with pytest.raises(UserError, match="use --method characters"):
        extend_tokenizer(byte_level, ["ab"], tmp_path / "x")


def test_byte_level_tokenizers_take_merges(byte_level: Tokenizer, tmp_path: Path) -> None:
    lines = new_language(400)
    pieces = choose_pieces(byte_level, lines, Choice(num_new=70, kind="pieces"))
    assert any(len(piece) > 1 for piece in pieces)
    extended = extend_tokenizer(byte_level, pieces, tmp_path, "merges")
    # including pieces for parts of characters
    assert extended.vocab_size > byte_level.vocab_size + len(pieces)
    old = json.loads(byte_level.model_path.read_bytes())["model"]
    new = json.loads(extended.model_path.read_bytes())["model"]
    assert list(new["vocab"].items())[: len(old["vocab"])] == list(old["vocab"].items())
    assert new["merges"][: len(old["merges"])] == old["merges"]
    assert sorted(new["vocab"].values()) == list(range(extended.vocab_size))
    for text in made_up_sentences(300, seed=9):
        if text.isascii():
            assert extended.encode(text) == byte_level.encode(text)
    assert tokens_per_character(extended, lines) < 0.5 * tokens_per_character(byte_level, lines)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*lines[:100], *fuzz_documents(lines, 500, seed=1)]:
        ids = extended.encode(text)
        assert extended.decode(ids) == text
        assert extended.num_bytes_per_id[ids].sum() == len(text.encode())
        assert ids == theirs(text, split_special_tokens=True)["input_ids"]
    growth = vocabulary_growth(byte_level, extended, extended.vocab_size)
    of_piece = dict(
        zip(range(byte_level.vocab_size, extended.vocab_size), growth.pieces, strict=True)
    )
    for piece in pieces:
        [token_id] = extended.encode_continuation(piece)
        assert of_piece[token_id] == tuple(byte_level.encode_continuation(piece))


def test_merges_need_a_byte_level_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only to byte-level BPE models"):
        with_merges({"model": {"type": "Unigram"}, "pre_tokenizer": None}, ["a"], 3)


def test_a_list_of_pieces(old: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "pieces.txt"
    path.write_text("龍\na\n\n龍\n龘\n鳳\n")
    assert listed_pieces(old, path, 2) == ["龍", "龘"]
    path.write_bytes("龍\r\n龘\u2028鳳\r\n".encode())  # U+2028 is an ordinary character here
    assert listed_pieces(old, path, 2) == ["龍", "龘\u2028鳳"]
    path.write_text("a\n")
    with pytest.raises(UserError, match="contains no new piece"):
        listed_pieces(old, path, 2)
    with pytest.raises(UserError, match="cannot read"):
        listed_pieces(old, tmp_path / "absent", 2)
    path.write_bytes("龍\n鳳\n".encode("gb18030"))
    assert listed_pieces(old, path, 2, "gb18030") == ["龍", "鳳"]
    with pytest.raises(UserError, match="--list: not utf-8: .*set its encoding with --encoding"):
        listed_pieces(old, path, 2)
