"""Byte-pair models for the tests of the compiled encoder."""

from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from megatron_chatflow.tokenizer.bpe import BpePieces


def pieces_of(path: Path) -> BpePieces:
    """Returns the pieces of a SentencePiece model."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    ordinary = [(p.piece, i, p.score) for i, p in enumerate(model.pieces) if p.type == 1]
    numbers = {p.piece: i for i, p in enumerate(model.pieces)}
    byte_ids = tuple(numbers[f"<0x{byte:02X}>"] for byte in range(256))
    pieces, ids, scores = zip(*ordinary, strict=True)
    return BpePieces(pieces, ids, scores, byte_ids)
