"""Fast byte-pair encoding for SentencePiece models, with a reference implementation.

`fast_encoder` returns the compiled encoder for a model if two conditions hold: the model is of the
kind described below, and the encoder agrees with the sentencepiece library on probes made of the
model's own pieces. Otherwise it returns None and logs the reason.

The algorithm applies to models with byte fallback and ordinary pieces only:

1. Replace every space by U+2581 (after prepending a space, if requested) and split the text into
   characters.
2. Among all adjacent pairs that form a piece, join the pair with the highest score. On a tie, join
   the leftmost pair. Repeat until no pair forms a piece.
3. Replace every remaining symbol that is not a piece by the byte pieces of its UTF-8 encoding.

Sources: Sennrich, Haddow and Birch, ACL 2016; Kudo and Richardson, EMNLP 2018.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.runtime.extension import load_extension
from megatron_chatflow.tokenizer.base import split_arrays

extension = load_extension("tokenizer")


SPACE = "\u2581"

logger = logging.getLogger(__name__)
Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
NUM_PROBED_PIECES = 2000


@dataclass(frozen=True)
class BpePieces:
    """The pieces of a byte-pair model.

    Attributes:
        pieces: Texts of the ordinary pieces, without duplicates.
        ids: The id of each piece.
        scores: The score of each piece.
        byte_ids: The ids of the byte pieces for the bytes 0 to 255.
    """

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    scores: tuple[float, ...]
    byte_ids: tuple[int, ...]


class ReferenceBpeEncoder:
    """Implements the algorithm literally, in quadratic time in the length of a text."""

    def __init__(self, model: BpePieces) -> None:
        """Indexes the pieces of the model by their text."""
        numbered = zip(model.pieces, model.ids, model.scores, strict=True)
        self._pieces = {piece: (token_id, score) for piece, token_id, score in numbered}
        self._byte_ids = model.byte_ids

    def encode_batch(
        self, texts: Sequence[str], with_prefix: bool, end_id: int = -1
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Encodes texts.

        Args:
            texts: Texts without lone surrogates.
            with_prefix: Whether to prepend a space to every text that is not empty.
            end_id: Appended to the ids of every text that has at least one id; -1 for none.

        Returns:
            The concatenated ids of all texts, int32[num_ids], and the number of ids of each text,
            int32[num_texts].
        """
        sequences = [self._encode(text, with_prefix) for text in texts]
        for sequence in sequences:
            if sequence and end_id >= 0:
                sequence.append(end_id)
        flat = [token_id for sequence in sequences for token_id in sequence]
        return np.array(flat, np.int32), np.array([len(s) for s in sequences], np.int32)

    def _encode(self, text: str, with_prefix: bool) -> list[int]:
        if not text:
            return []
        symbols = list(((" " if with_prefix else "") + text).replace(" ", SPACE))
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


class CompiledBpeEncoder(Protocol):
    """Interface of the encoder in `csrc/tokenizer`. It is safe to call from several threads."""

    def encode_batch(
        self, texts: Sequence[str], with_prefix: bool, end_id: int = -1, narrow: bool = False
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Encodes texts as `ReferenceBpeEncoder` does. `narrow` selects uint16 ids over int32."""

    def encode_json_lines(
        self, data: bytes, key: str, with_prefix: bool, end_id: int = -1, narrow: bool = False
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int] | None:
        """Encodes the string under a key of every JSON line.

        Returns:
            The two arrays of `encode_batch` and the total size of the strings in UTF-8 bytes. None
            if a line is not an object with such a string, or needs a full JSON parser.
        """


def compiled_bpe_encoder(model: BpePieces) -> CompiledBpeEncoder | None:
    """Creates the compiled encoder. Returns None if the extension is not built.

    Raises:
        ValueError: If a piece is empty, occurs twice, or is not valid UTF-8.
    """
    encoder_type = getattr(extension, "BpeEncoder", None)  # missing in an older build
    if encoder_type is None:
        return None
    pieces = [piece.encode() for piece in model.pieces]
    encoder: CompiledBpeEncoder = encoder_type(pieces, model.ids, model.scores, model.byte_ids)
    return encoder


def fast_encoder(model_bytes: bytes, processor: Any) -> CompiledBpeEncoder | None:
    """Creates the compiled encoder for a model if its ids equal those of sentencepiece.

    Args:
        model_bytes: The serialized model.
        processor: The `SentencePieceProcessor` of the same model, for comparison.

    Returns:
        The encoder, or None if the model must be encoded with sentencepiece.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(model_bytes)
    reason = _unsupported_reason(model)
    encoder: CompiledBpeEncoder | None = None
    if reason is None:
        encoder = compiled_bpe_encoder(_pieces_of(model))
        if encoder is None:
            reason = "csrc/tokenizer is not built"
        elif not _has_same_ids(encoder, processor, model):
            encoder, reason = None, "its ids differ from those of sentencepiece"
    if encoder is None:
        logger.info("encoding with sentencepiece instead of the compiled encoder: %s", reason)
    else:
        logger.info(
            "encoding with the compiled byte-pair encoder, whose ids equal those of sentencepiece"
        )
    return encoder


def _unsupported_reason(model: Any) -> str | None:
    """Returns why the compiled encoder does not support a model, or None if it does."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    is_bpe = trainer.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
    kinds = {piece.type for piece in model.pieces}
    ordinary = [piece for piece in model.pieces if piece.type == Piece.NORMAL]
    reserved = [piece for piece in model.pieces if piece.type not in (Piece.NORMAL, Piece.BYTE)]
    obstacles = {
        "it is not a byte-pair model": not is_bpe,
        "it has user-defined pieces": Piece.USER_DEFINED in kinds,
        "it has unused pieces": Piece.UNUSED in kinds,
        "it has no byte fallback": not trainer.byte_fallback,
        "it does not have 256 byte pieces": len(_byte_ids(model)) != 256,
        "it normalizes characters": bool(normalizer.precompiled_charsmap),
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it does not escape spaces": not normalizer.escape_whitespaces,
        "it puts spaces at the end of pieces": trainer.treat_whitespace_as_suffix,
        "a control piece has only one character": any(len(piece.piece) == 1 for piece in reserved),
        "a piece is empty": any(not piece.piece for piece in ordinary),
        "it has duplicate pieces": len({piece.piece for piece in ordinary}) != len(ordinary),
        "a score is not a number": any(math.isnan(piece.score) for piece in ordinary),
    }
    return next((name for name, applies in obstacles.items() if applies), None)


def _byte_ids(model: Any) -> dict[str, int]:
    return {p.piece: i for i, p in enumerate(model.pieces) if p.type == Piece.BYTE}


def _pieces_of(model: Any) -> BpePieces:
    byte_ids = _byte_ids(model)
    ordinary = [(p.piece, i, p.score) for i, p in enumerate(model.pieces) if p.type == Piece.NORMAL]
    pieces, ids, scores = zip(*ordinary, strict=True) if ordinary else ((), (), ())
    return BpePieces(pieces, ids, scores, tuple(byte_ids[f"<0x{b:02X}>"] for b in range(256)))


def _has_same_ids(encoder: CompiledBpeEncoder, processor: Any, model: Any) -> bool:
    """Compares both encoders on concatenated pieces and on known difficult texts."""
    pieces = [piece.piece for piece in model.pieces if piece.type == Piece.NORMAL]
    step = max(1, len(pieces) // NUM_PROBED_PIECES)
    probed = [piece.replace("\u2581", " ") for piece in pieces[::step]]
    probes = ["", " ", "  a\t\nb\x00 ", "<s></s><unk>", "\ue000\U0001f9ff\u2581", *probed[:200]]
    probes += ["".join(probed[k : k + 20]) for k in range(0, len(probed), 20)]
    probes.append("".join(piece.strip() for piece in probed))
    ids, lengths = encoder.encode_batch(probes, model.normalizer_spec.add_dummy_prefix)
    expected: list[list[int]] = [processor.encode(probe.encode()) for probe in probes]
    return split_arrays(ids, lengths) == expected
