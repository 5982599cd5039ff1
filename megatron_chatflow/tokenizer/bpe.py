"""Fast byte-pair encoding for SentencePiece models.

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

from megatron_chatflow.runtime import load_extension
from megatron_chatflow.tokenizer.base import split_arrays

extension = load_extension("tokenizer")


SPACE = "\u2581"

logger = logging.getLogger(__name__)
Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
NUM_PROBED_PIECES = 2000


@dataclass(frozen=True)
class BpePieces:
    """The ordinary pieces of a byte-pair model with their ids and scores, without duplicates.

    `byte_ids` are the ids of the byte pieces for the bytes 0 to 255.
    """

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    scores: tuple[float, ...]
    byte_ids: tuple[int, ...]


class CompiledBpeEncoder(Protocol):
    """Interface of the encoder in `csrc/tokenizer`. It is safe to call from several threads."""

    def encode_batch(
        self, texts: Sequence[str], with_prefix: bool, end_id: int = -1, narrow: bool = False
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Encodes texts without lone surrogates.

        ``with_prefix`` prepends a space to every text that is not empty. ``end_id`` is appended to
        the ids of every text that has at least one id, unless it is -1. Returns the concatenated
        ids, int32[num_ids] or with ``narrow`` uint16, and their number per text, int32[num_texts].
        """

    def encode_json_lines(
        self, data: bytes, key: str, with_prefix: bool, end_id: int = -1, narrow: bool = False
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int] | None:
        """Encodes the string under a key of every JSON line; see `Tokenizer.encode_json_lines`."""


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
    """Creates the compiled encoder for a model if its ids equal those of the model's processor.

    Returns None if the model must be encoded with sentencepiece.
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


def structural_obstacles(model: Any) -> dict[str, bool]:
    """Returns by what a model differs from merges over characters with escaped spaces."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    return {
        "it is not a byte-pair model": (
            trainer.model_type != sentencepiece_model_pb2.TrainerSpec.BPE
        ),
        "it has user-defined pieces": Piece.USER_DEFINED in kinds,
        "it has unused pieces": Piece.UNUSED in kinds,
        "it normalizes characters": bool(normalizer.precompiled_charsmap),
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it does not escape spaces": not normalizer.escape_whitespaces,
        "it puts spaces at the end of pieces": trainer.treat_whitespace_as_suffix,
    }


def _unsupported_reason(model: Any) -> str | None:
    """Returns why the compiled encoder does not support a model, or None if it does."""
    ordinary = [piece for piece in model.pieces if piece.type == Piece.NORMAL]
    reserved = [piece for piece in model.pieces if piece.type not in (Piece.NORMAL, Piece.BYTE)]
    obstacles = structural_obstacles(model) | {
        "it has no byte fallback": not model.trainer_spec.byte_fallback,
        "it does not have 256 byte pieces": len(_byte_ids(model)) != 256,
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
