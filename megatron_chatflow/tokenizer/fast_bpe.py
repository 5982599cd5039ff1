"""Decides whether a SentencePiece model may be encoded by the compiled encoder.

In: a model and its sentencepiece processor. Out: the compiled encoder, where its ids are shown to
be the processor's: the model is of the kind that it is defined for, and both agree on the model's
own pieces. Otherwise None, with the reason in the log.
"""

import logging
import math
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.native.bpe import BpePieces, CompiledBpeEncoder, compiled_bpe_encoder
from megatron_chatflow.tokenizer.base import split_arrays

logger = logging.getLogger(__name__)
Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
NUM_PROBED_PIECES = 2000


def fast_encoder(model_bytes: bytes, processor: Any) -> CompiledBpeEncoder | None:
    """The compiled encoder for a model.

    Args:
        model_bytes: The serialized model.
        processor: The `SentencePieceProcessor` that it has to agree with.

    Returns:
        The encoder, or None where sentencepiece has to do the work.
    """
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(model_bytes)
    reason = _why_not(model)
    encoder: CompiledBpeEncoder | None = None
    if reason is None:
        encoder = compiled_bpe_encoder(_pieces_of(model))
        if encoder is None:
            reason = "csrc/data is not built"
        elif not _agree(encoder, processor, model):
            encoder, reason = None, "its ids differ from sentencepiece's"
    if encoder is None:
        logger.info("encoding with sentencepiece, not the compiled encoder: %s", reason)
    else:
        logger.info("encoding with the compiled byte-pair encoder, ids are sentencepiece's")
    return encoder


def _why_not(model: Any) -> str | None:
    """What keeps a model from the compiled encoder; None if nothing does."""
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
        "its bytes are not 256 pieces": len(_byte_ids(model)) != 256,
        "it normalizes characters": bool(normalizer.precompiled_charsmap),
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it does not escape spaces": not normalizer.escape_whitespaces,
        "it puts spaces last": trainer.treat_whitespace_as_suffix,
        "a control piece is one character": any(len(piece.piece) == 1 for piece in reserved),
        "a piece is empty": any(not piece.piece for piece in ordinary),
        "a piece is given twice": len({piece.piece for piece in ordinary}) != len(ordinary),
        "a score is not a number": any(math.isnan(piece.score) for piece in ordinary),
    }
    return next((name for name, stands in obstacles.items() if stands), None)


def _byte_ids(model: Any) -> dict[str, int]:
    return {p.piece: i for i, p in enumerate(model.pieces) if p.type == Piece.BYTE}


def _pieces_of(model: Any) -> BpePieces:
    byte_ids = _byte_ids(model)
    ordinary = [(p.piece, i, p.score) for i, p in enumerate(model.pieces) if p.type == Piece.NORMAL]
    pieces, ids, scores = zip(*ordinary, strict=True) if ordinary else ((), (), ())
    return BpePieces(pieces, ids, scores, tuple(byte_ids[f"<0x{b:02X}>"] for b in range(256)))


def _agree(encoder: CompiledBpeEncoder, processor: Any, model: Any) -> bool:
    """Tries both on pieces strung together, with what models stumble over in between."""
    pieces = [piece.piece for piece in model.pieces if piece.type == Piece.NORMAL]
    step = max(1, len(pieces) // NUM_PROBED_PIECES)
    probed = [piece.replace("\u2581", " ") for piece in pieces[::step]]
    probes = ["", " ", "  a\t\nb\x00 ", "<s></s><unk>", "\ue000\U0001f9ff\u2581", *probed[:200]]
    probes += ["".join(probed[k : k + 20]) for k in range(0, len(probed), 20)]
    probes.append("".join(piece.strip() for piece in probed))
    ids, lengths = encoder.encode_batch(probes, model.normalizer_spec.add_dummy_prefix)
    expected: list[list[int]] = [processor.encode(probe.encode()) for probe in probes]
    return split_arrays(ids, lengths) == expected
