"""Extends a tokenizer by the tokens of a language. Existing tokens keep their ids.

The new pieces are the most frequent characters of the language, as in ChatFlow (arXiv 2405.10626:
8,076 characters added to LLaMA's 32,000 pieces), or these characters and the longer pieces of a
trained byte-pair model. `growth_lines` reports how many fewer tokens a held-out text needs.

A byte-level `tokenizer.json` can be extended by merges, as if its training had continued. Each
piece is encoded with the current merges, and its tokens are then joined from left to right.
Intermediate results that are not in the vocabulary, such as the first bytes of a character, get ids
as well. Existing text keeps its ids unless it contains the same bytes: a character that shares its
first bytes with a new one may be encoded as this prefix and its last byte. Merges are preferred to
added tokens, which are matched before the text is split. Merges allow longer pieces, stay fast with
thousands of tokens, and never split a word that the pre-tokenizer keeps whole.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer import Tokenizer, load_tokenizer
from megatron_chatflow.tokenizer.export import SPACE, added_token
from megatron_chatflow.tokenizer.small_files import (
    TOKENIZER_CONFIG,
    complete_tokenizer,
    read_tokenizer_files,
    replace_tokenizer,
    write_small_files,
)
from megatron_chatflow.tokenizer.text_encoding import guess_encoding
from megatron_chatflow.tokenizer.tokenizer_json import open_tokenizer_json, parse_tokenizer_json

logger = logging.getLogger(__name__)
Script = Literal["han", "any"]
PieceKind = Literal["characters", "pieces"]
Addition = Literal["added-tokens", "merges"]
SCRIPTS: tuple[Script, ...] = get_args(Script)
PIECE_KINDS: tuple[PieceKind, ...] = get_args(PieceKind)
ADDITIONS: tuple[Addition, ...] = get_args(Addition)
# Unicode blocks of Chinese characters and of the punctuation in Chinese text.
_HAN_BLOCKS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_PUNCTUATION_BLOCKS = ((0x2010, 0x2027), (0x3000, 0x303F), (0xFE30, 0xFE4F), (0xFF01, 0xFF65))
_MAX_TRAINING_SENTENCES = 2_000_000
_NUM_SHOWN = 8


def with_merges(
    content: dict[str, Any], pieces: Sequence[str], first_id: int
) -> tuple[dict[str, Any], list[int]]:
    """Adds pieces to a byte-level byte-pair model, the content of a `tokenizer.json`, as merges.

    ``first_id`` is the first new id, larger than all existing ids. Returns the new content and the
    id of each piece.

    Raises:
        UserError: If the model is not a byte-level byte-pair model.
    """
    model = content["model"]
    if model.get("type") != "BPE" or "ByteLevel" not in str(content.get("pre_tokenizer")):
        raise UserError(
            "merges can be added only to byte-level BPE models; use --add-as added-tokens"
        )
    vocabulary: dict[str, int] = dict(model["vocab"])
    # The library numbers added tokens that the model lacks (as in LLaMA 3 and Qwen) behind the
    # model's own tokens, whatever their ids in the file are, so more of those would move them.
    for token in content.get("added_tokens") or []:
        vocabulary.setdefault(token["content"], token["id"])
    are_lists = not model["merges"] or isinstance(model["merges"][0], list)
    merges = [tuple(m) if are_lists else tuple(m.split(" ")) for m in model["merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    alphabet = byte_alphabet()
    next_id = first_id
    ids = []
    for piece in pieces:
        characters = "".join(alphabet[byte] for byte in piece.encode())
        while len(symbols := _merged(characters, ranks)) > 1:
            left, right = symbols[:2]
            if left + right not in vocabulary:
                vocabulary[left + right] = next_id
                next_id += 1
            ranks[left, right] = len(ranks)
        ids.append(vocabulary[characters])
    written = [list(m) if are_lists else " ".join(m) for m in ranks]
    return {**content, "model": {**model, "vocab": vocabulary, "merges": written}}, ids


def byte_alphabet() -> list[str]:
    """Returns the characters that represent the bytes 0 to 255 in byte-level models.

    A printable byte represents itself. Source: the encoder of Radford et al., "Language Models are
    Unsupervised Multitask Learners", 2019.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _merged(text: str, ranks: dict[tuple[str, ...], int]) -> list[str]:
    """Applies merges to a text, the merge with the lowest rank first."""
    symbols = list(text)
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:], strict=False))
        rank, at = min((ranks.get(pair, len(ranks)), k) for k, pair in enumerate(pairs))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = ["".join(pairs[at])]
    return symbols


@dataclass(frozen=True)
class Choice:
    """Selects which pieces are added."""

    num_new: int  # the maximum number of pieces
    kind: PieceKind = "characters"  # ``characters``, or ``pieces`` for characters and longer pieces
    # ``han`` for Chinese characters and punctuation, ``any`` for all characters
    script: Script = "han"
    min_count: int = 2  # the minimum number of occurrences of a character in the corpus


def choose_pieces(tokenizer: Tokenizer, texts: Iterable[str], choice: Choice) -> list[str]:
    """Finds the pieces of texts that the tokenizer lacks, the most frequent characters first.

    Raises:
        UserError: If the texts contain no such piece.
    """
    counts: Counter[str] = Counter()
    kept: list[str] = []
    for text in texts:
        counts.update(text)
        if choice.kind == "pieces" and len(kept) < _MAX_TRAINING_SENTENCES:
            kept.append(text)
    is_wanted = is_han if choice.script == "han" else str.isprintable
    characters = [
        character
        for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count >= choice.min_count and is_wanted(character) and not character.isspace()
    ]
    new = [c for c in characters if len(tokenizer.encode_continuation(c)) > 1]
    if choice.kind == "pieces":
        new += _train_pieces(tokenizer, kept, set(characters), choice.num_new - len(new))
    if not new:
        raise UserError(
            "--corpus: contains no new character for the tokenizer; check that it is text in "
            "the new language"
        )
    if len(new) < choice.num_new:
        logger.warning("the corpus has only %d new pieces instead of %d", len(new), choice.num_new)
    return new[: choice.num_new]


def is_han(character: str) -> bool:
    """Returns whether a character is Chinese or is punctuation of Chinese text."""
    code = ord(character)
    return any(begin <= code <= end for begin, end in _HAN_BLOCKS + _PUNCTUATION_BLOCKS)


def listed_pieces(
    tokenizer: Tokenizer, path: Path, num_new: int, encoding: str = "utf-8"
) -> list[str]:
    """Reads the first pieces of a list, one per line, that the tokenizer does not have.

    Raises:
        UserError: If the file cannot be read, or the tokenizer has all of its pieces.
    """
    try:
        data = path.read_bytes()
        text = data.decode(encoding).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"--list: cannot read: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--list: not {encoding}: {path}: byte {error.start}: {guess_encoding(data)}"
        ) from error
    # `splitlines` would also split at U+2028 and U+0085, which a piece may contain.
    listed = dict.fromkeys(text.replace("\r\n", "\n").split("\n"))
    new = [p for p in listed if p and len(tokenizer.encode_continuation(p)) > 1]
    if not new:
        raise UserError("--list: contains no new piece for the tokenizer; write one piece per line")
    return new[:num_new]


def whole_pieces(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[str]:
    """Returns the pieces that merges can join, and logs which ones they cannot.

    A `tokenizer.json` normalizes and splits text before merges are applied. Qwen's splits digits
    from each other, for example, and both Qwen's and LLaMA 3's split before a vowel sign.

    Raises:
        UserError: If no piece is left.
    """
    opened = open_tokenizer_json(parse_tokenizer_json(tokenizer.model_path.read_bytes()))
    normalizer, splitter = opened.normalizer, opened.pre_tokenizer

    def is_whole(piece: str) -> bool:
        normalized = piece if normalizer is None else normalizer.normalize_str(piece)
        return normalized == piece and (
            splitter is None or len(splitter.pre_tokenize_str(piece)) == 1
        )

    whole = [piece for piece in pieces if is_whole(piece)]
    left_out = sorted(set(pieces) - set(whole))
    if not whole:
        raise UserError(
            f"{tokenizer.model_path}: splits or normalizes every new piece, such as "
            f"{left_out[0]!r}, so merges cannot join them; use --add-as added-tokens"
        )
    if left_out:
        logger.warning(
            "%d pieces are left out, because the tokenizer splits or normalizes them: %s",
            len(left_out),
            ", ".join(map(repr, left_out[:_NUM_SHOWN])),
        )
    return whole


def extend_tokenizer(
    tokenizer: Tokenizer,
    pieces: Sequence[str],
    output: Path,
    addition: Addition = "added-tokens",
) -> Tokenizer:
    """Writes the tokenizer with additional pieces to a folder, for training and for transformers.

    The ids of the pieces follow the existing ids, in this order. A `tokenizer.json` is extended by
    ``added-tokens``, which are matched before the text is split, or by ``merges``, which may assign
    additional ids to intermediate results, such as the first bytes of a character.

    Raises:
        UserError: If the folder cannot be written, or the pieces cannot be added to the
            tokenizer.
    """
    expected = list(range(tokenizer.vocab_size, tokenizer.vocab_size + len(pieces)))
    name = "tokenizer.json"
    if tokenizer.tokenizer_type == "Llama2Tokenizer":
        name, data = "tokenizer.model", _extended_model(tokenizer, pieces)
    elif addition == "merges":
        content: dict[str, Any] = json.loads(tokenizer.model_path.read_bytes())
        content, expected = with_merges(content, pieces, tokenizer.vocab_size)
        data = json.dumps(content, ensure_ascii=False).encode()
    else:
        data = _extended_json(tokenizer, pieces)
    old = read_tokenizer_files(tokenizer)
    write_small_files(output, {name: data})
    if name == "tokenizer.json":  # loading needs the configuration, which may name the EOS token
        old = complete_tokenizer(old, tokenizer)
        write_small_files(output, {TOKENIZER_CONFIG: old[TOKENIZER_CONFIG]})
    extended = load_tokenizer(output / name)
    write_small_files(output, complete_tokenizer(replace_tokenizer(old, extended), extended))
    for piece, token_id in zip(pieces, expected, strict=True):
        ids = extended.encode_continuation(piece)
        if ids != [token_id]:
            raise UserError(
                f"{tokenizer.model_path}: {piece!r} is encoded as {ids} instead of one new id, "
                "so this tokenizer cannot be extended in this way"
            )
    return extended


def tokens_per_character(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Returns the mean number of ids per character of the texts."""
    num_ids = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    return num_ids / max(1, sum(map(len, texts)))


def _extended_model(tokenizer: Tokenizer, pieces: Sequence[str]) -> bytes:
    """Adds pieces to the SentencePiece model with scores below those of all other pieces."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.model_path.read_bytes())
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    # LLaMA's runs of spaces have the score -1e9. Near it, float32 cannot represent single ranks.
    scores = [p.score for p in model.pieces if p.type == normal and p.piece.strip(SPACE)]
    if not scores:
        raise UserError(f"{tokenizer.model_path}: has no text pieces, so it cannot be extended")
    lowest = min(scores)
    # In a byte-pair model scores are ranks; in a unigram model they are log-probabilities.
    is_ranked = model.trainer_spec.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
    for number, text in enumerate(pieces, start=1):
        piece = model.pieces.add()
        piece.piece = text
        piece.score = lowest - (number if is_ranked else 0)
        piece.type = normal
    model.trainer_spec.vocab_size = len(model.pieces)
    data: bytes = model.SerializeToString()
    return data


def _extended_json(tokenizer: Tokenizer, pieces: Sequence[str]) -> bytes:
    """Adds pieces to the `tokenizer.json` as tokens that are matched before the text is split."""
    if any(len(piece) > 1 for piece in pieces):
        raise UserError(
            f"{tokenizer.model_path}: longer pieces cannot be added as tokens; use --method "
            "characters or --add-as merges"
        )
    content: dict[str, Any] = json.loads(tokenizer.model_path.read_bytes())
    content["added_tokens"] = [
        *content.get("added_tokens", []),
        *(
            added_token(tokenizer.vocab_size + k, piece, special=False)
            for k, piece in enumerate(pieces)
        ),
    ]
    text = json.dumps(content, ensure_ascii=False)
    try:
        opened = open_tokenizer_json(content)
    except ValueError as error:
        raise UserError(f"{tokenizer.model_path}: cannot be extended: {error}") from error
    if opened.get_vocab_size() != tokenizer.vocab_size + len(pieces):
        raise UserError(
            f"{tokenizer.model_path}: has ids without a piece, so it cannot be extended"
        )
    return text.encode()


def _train_pieces(
    tokenizer: Tokenizer, texts: Sequence[str], characters: set[str], num_new: int
) -> list[str]:
    """Trains a byte-pair model and returns its longer pieces in the order of its merges.

    The pieces consist of the given characters only. Each piece is formed by joining two characters
    or earlier pieces, so any prefix of the list can be used.
    """
    if num_new <= 0 or not characters:
        return []
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_runs(texts, characters.__contains__),
        model_writer=model,
        model_type="bpe",
        # Room for the pieces, for the characters, and for the unknown and control pieces.
        vocab_size=num_new + len(characters) + 3,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    trained = [processor.id_to_piece(i) for i in range(3, processor.vocab_size())]
    return [
        piece
        for piece in trained
        if len(piece) > 1
        and all(character in characters for character in piece)
        and len(tokenizer.encode_continuation(piece)) > 1
    ][:num_new]


def _runs(texts: Sequence[str], is_wanted: Callable[[str], bool]) -> Iterator[str]:
    """Yields the maximal runs of wanted characters in the texts."""
    for text in texts:
        run: list[str] = []
        for character in text:
            if is_wanted(character):
                run.append(character)
            elif run:
                yield "".join(run)
                run = []
        if run:
            yield "".join(run)


def growth_lines(
    old: Tokenizer, new: Tokenizer, pieces: Sequence[str], held_out: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Yields a report about the pieces that were added to a tokenizer.

    The texts ``held_out`` are documents by the name of their language.
    """
    num_parts = new.vocab_size - old.vocab_size - len(pieces)
    parts = f" and {num_parts} intermediate pieces" if num_parts > 0 else ""
    yield f"added {len(pieces)} pieces{parts}: {old.vocab_size} -> {new.vocab_size}"
    for name, texts in held_out.items():
        if not texts:
            continue
        before, after = (tokens_per_character(tokenizer, texts) for tokenizer in (old, new))
        yield (
            f"tokens per character, {name} ({len(texts)} documents): {before:.3f} -> {after:.3f}"
        )
    decompositions = [old.encode_continuation(piece) for piece in pieces]
    mean = sum(map(len, decompositions)) / max(1, len(pieces))
    yield (
        f"a new piece replaces {mean:.2f} old ones on average, whose embeddings can "
        "initialize its own; for example:"
    )
    for piece, ids in list(zip(pieces, decompositions, strict=True))[:_NUM_SHOWN]:
        decomposition = " ".join(f"{token_id}:{old.decode([token_id])!r}" for token_id in ids)
        yield f"  {piece} = {decomposition}"
