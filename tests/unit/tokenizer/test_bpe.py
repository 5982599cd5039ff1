"""Compares the compiled BPE encoder with its definition and with sentencepiece, on hard texts."""

import random
import string
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from bpe_models import pieces_of

from megatron_chatflow.runtime import load_extension
from megatron_chatflow.tokenizer.bpe import BpePieces, compiled_bpe_encoder

extension = load_extension("tokenizer")

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(extension is None, reason="csrc/tokenizer is not built"),
]

ALPHABETS = [
    "ab",
    "abcde ",
    string.ascii_letters + "    .,;:-_()[]{}<>/\\\"'\n\t",
    "\u4e00\u4e25\u4e4a\u4e6f\u3002\uff0c ",
    "a \u2581\x00\ufffd\ue000\U000e0fff\U0001f9ff\u0301\u200d\u202e",
]
WORDS = ["<s>", "</s>", "<unk>", "[INST]", "<0x41>", " ", "  ", "\u2581", "\n\n", "ban", "12345"]


def hard_texts(num_texts: int, seed: int) -> list[str]:
    """Returns texts of one alphabet each, with words in between, some without any space."""
    generator = random.Random(seed)
    texts = []
    for _ in range(num_texts):
        alphabet = generator.choice(ALPHABETS)
        parts = []
        for _ in range(generator.randint(0, 6)):
            length = generator.choice([1, 3, 8, 25, 60])
            parts.append("".join(generator.choices(alphabet, k=generator.randint(1, length))))
            if generator.random() < 0.3:
                parts.append(generator.choice(WORDS))
        texts.append("".join(parts))
    return texts


class ReferenceBpeEncoder:
    """Implements the algorithm in `bpe` literally, in quadratic time in the length of a text."""

    def __init__(self, model: BpePieces) -> None:
        numbered = zip(model.pieces, model.ids, model.scores, strict=True)
        self._pieces = {piece: (token_id, score) for piece, token_id, score in numbered}
        self._byte_ids = model.byte_ids

    def encode_batch(
        self, texts: list[str], with_prefix: bool, end_id: int = -1
    ) -> tuple[np.ndarray, np.ndarray]:
        sequences = [self._encode(text, with_prefix) for text in texts]
        for sequence in sequences:
            if sequence and end_id >= 0:
                sequence.append(end_id)
        flat = [token_id for sequence in sequences for token_id in sequence]
        return np.array(flat, np.int32), np.array([len(s) for s in sequences], np.int32)

    def _encode(self, text: str, with_prefix: bool) -> list[int]:
        if not text:
            return []
        symbols = list(((" " if with_prefix else "") + text).replace(" ", "\u2581"))
        while True:
            joints = [
                (-self._pieces[left + right][1], k)
                for k, (left, right) in enumerate(zip(symbols, symbols[1:], strict=False))
                if left + right in self._pieces
            ]
            if not joints:
                break
            k = min(joints)[1]
            symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]
        ids: list[int] = []
        for symbol in symbols:
            if symbol in self._pieces:
                ids.append(self._pieces[symbol][0])
            else:
                ids += [self._byte_ids[byte] for byte in symbol.encode()]
        return ids


def made_up_model(seed: int) -> BpePieces:
    """Creates a vocabulary that no training produces: gaps, ties, characters that are no piece."""
    generator = random.Random(seed)
    alphabet = generator.choice(["ab\u2581", "abcd\u2581\u4e00", "a\u4e00\u4e25\U0001f9ff\u2581"])
    pieces = {"".join(generator.choices(alphabet, k=generator.randint(1, 6))) for _ in range(60)}
    ordered = sorted(pieces)
    scores = [float(-generator.randint(0, 20)) for _ in ordered]
    ids = list(range(300, 300 + len(ordered)))
    generator.shuffle(ids)
    return BpePieces(tuple(ordered), tuple(ids), tuple(scores), tuple(range(3, 259)))


@pytest.mark.parametrize("seed", range(40))
def test_equals_its_definition_on_made_up_models(seed: int) -> None:
    model = made_up_model(seed)
    compiled = compiled_bpe_encoder(model)
    assert compiled is not None
    generator = random.Random(seed)
    alphabet = "".join(model.pieces).replace("\u2581", " ") + "\u2581z"
    texts = ["".join(generator.choices(alphabet, k=generator.randint(0, 90))) for _ in range(60)]
    texts += hard_texts(20, seed)
    for with_prefix in (True, False):
        for _ in range(2):  # the second time from the cache
            ids, lengths = compiled.encode_batch(texts, with_prefix, 7)
            expected = ReferenceBpeEncoder(model).encode_batch(texts, with_prefix, 7)
            assert ids.tolist() == expected[0].tolist()
            assert lengths.tolist() == expected[1].tolist()


def test_equals_sentencepiece(tiny_sentencepiece_model: Path) -> None:
    compiled = compiled_bpe_encoder(pieces_of(tiny_sentencepiece_model))
    assert compiled is not None
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sentencepiece_model))
    texts = hard_texts(30_000, seed=1)
    ids, lengths = compiled.encode_batch(texts, True)
    expected = [reference.encode(text) for text in texts]
    assert lengths.tolist() == [len(sequence) for sequence in expected]
    assert ids.tolist() == [token_id for sequence in expected for token_id in sequence]


def test_more_distinct_words_than_are_remembered(tiny_sentencepiece_model: Path) -> None:
    model = pieces_of(tiny_sentencepiece_model)
    compiled = compiled_bpe_encoder(model)
    assert compiled is not None
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sentencepiece_model))
    generator = random.Random(3)
    words = ["".join(generator.choices("abdeknoslur", k=9)) for _ in range(200_000)]
    text = " ".join(words)
    ids, _ = compiled.encode_batch([text], True)
    assert ids.tolist() == reference.encode(text)


def test_one_long_word(tiny_sentencepiece_model: Path) -> None:
    """Without a place to cut, the heap processes the whole word. Its time must not be quadratic."""
    compiled = compiled_bpe_encoder(pieces_of(tiny_sentencepiece_model))
    assert compiled is not None
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sentencepiece_model))
    generator = random.Random(4)
    for text in ["ban" * 50_000, "".join(generator.choices("abdeknos", k=200_000))]:
        assert compiled.encode_batch([text], True)[0].tolist() == reference.encode(text)


def test_refuses_what_is_no_model() -> None:
    byte_ids = tuple(range(256))
    for pieces in (("a", "a"), ("",), ("a", "b")):
        ids = tuple(range(len(pieces)))
        with pytest.raises(ValueError, match="byte-pair model"):
            compiled_bpe_encoder(BpePieces(pieces, ids, (0.0,), byte_ids))


def test_refuses_lone_surrogates(tiny_sentencepiece_model: Path) -> None:
    compiled = compiled_bpe_encoder(pieces_of(tiny_sentencepiece_model))
    assert compiled is not None
    with pytest.raises(UnicodeEncodeError):
        compiled.encode_batch(["a\ud800"], True)


def test_threads_and_narrow_ids(tiny_sentencepiece_model: Path) -> None:
    compiled = compiled_bpe_encoder(pieces_of(tiny_sentencepiece_model))
    assert compiled is not None
    texts = hard_texts(3000, seed=5)
    expected = compiled.encode_batch(texts, True)[0].tolist()
    with ThreadPoolExecutor(4) as executor:
        calls = [executor.submit(compiled.encode_batch, texts, True, -1, True) for _ in range(8)]
        for call in calls:
            ids, _ = call.result()
            assert ids.dtype == np.uint16
            assert ids.tolist() == expected
