"""SentencePiece models (`Llama2Tokenizer`). Ids equal those of the sentencepiece library."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2
from typing_extensions import override

from megatron_chatflow.config.fields import shorten
from megatron_chatflow.errors import UserError
from megatron_chatflow.tokenizer.base import (
    Tokenizer,
    read_model_file,
    sha256_of,
    split_arrays,
    without_surrogates,
)
from megatron_chatflow.tokenizer.bpe import CompiledBpeEncoder, fast_encoder
from megatron_chatflow.tokenizer.tokenizer_json import error_text

SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A `Tokenizer` for a SentencePiece model. A literal `<s>` in text is encoded as text."""

    tokenizer_type = "Llama2Tokenizer"

    def __init__(self, path: Path) -> None:
        """Loads a `.model` file.

        Raises:
            UserError: If the file cannot be read, is not a SentencePiece model, or has no EOS
                id.
        """
        self.model_path = path
        self._model_bytes = read_model_file(path)
        self._processor = _processor_of(self._model_bytes, path)
        model = _parsed(self._model_bytes, path)
        self._has_prefix = bool(model.normalizer_spec.add_dummy_prefix)
        self.fingerprint = sha256_of(self._model_bytes)
        self.vocab_size = int(self._processor.vocab_size())
        self.bos_id = int(self._processor.bos_id())
        self.eos_id = int(self._processor.eos_id())
        self.unk_id = int(self._processor.unk_id())
        if self.eos_id < 0:
            raise UserError(f"tokenizer has no EOS token: {path}: use a model that has one")
        pad_id = int(self._processor.pad_id())
        self.pad_id = pad_id if pad_id >= 0 else self.eos_id

    @cached_property
    def _continuing_processor(self) -> sentencepiece.SentencePieceProcessor:
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(self._model_bytes)
        model.normalizer_spec.add_dummy_prefix = False
        return _processor_of(model.SerializeToString(), self.model_path)

    @cached_property
    @override
    def num_bytes_per_id(self) -> npt.NDArray[np.int64]:
        processor = self._processor
        num_bytes = np.zeros(self.vocab_size, np.int64)
        for token_id in range(self.vocab_size):
            if processor.is_byte(token_id):
                num_bytes[token_id] = 1
            elif not processor.is_control(token_id) and not processor.is_unknown(token_id):
                piece = processor.id_to_piece(token_id).replace(SPACE, " ")
                num_bytes[token_id] = len(piece.encode())
        return num_bytes

    @cached_property
    def _fast_encoder(self) -> CompiledBpeEncoder | None:
        return fast_encoder(self._model_bytes, self._processor)

    @override
    def encode_continuation(self, text: str) -> list[int]:
        if self._fast_encoder is None:
            return _encode(self._continuing_processor, text)
        ids, _ = _encode_fast(self._fast_encoder, [text], False, -1)
        found: list[int] = ids.tolist()
        return found

    @override
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._fast_encoder is None:
            return [_encode(self._processor, text) for text in texts]
        return split_arrays(*self.encode_arrays(texts))

    @override
    def encode_arrays(
        self, texts: Sequence[str], end_id: int = -1
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        if self._fast_encoder is None:
            return super().encode_arrays(texts, end_id)
        return _encode_fast(self._fast_encoder, texts, self._has_prefix, end_id)

    @property
    @override
    def runs_in_threads(self) -> bool:
        return self._fast_encoder is not None  # it releases the interpreter lock

    @override
    def encode_json_lines(
        self, data: bytes, key: str, end_id: int, narrow: bool
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int] | None:
        if self._fast_encoder is None:
            return None
        return self._fast_encoder.encode_json_lines(data, key, self._has_prefix, end_id, narrow)

    @override
    def control_id(self, name: str) -> int | None:
        token_id = int(self._processor.piece_to_id(name))
        return token_id if self._processor.is_control(token_id) else None

    @cached_property
    @override
    def control_tokens(self) -> tuple[str, ...]:
        ids = range(self.vocab_size)
        return tuple(self._processor.id_to_piece(i) for i in ids if self._processor.is_control(i))

    @property
    @override
    def special_tokens(self) -> dict[str, str]:
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        ids["unk_token"] = self.unk_id
        return {name: self._processor.id_to_piece(i) for name, i in ids.items() if i >= 0}

    @override
    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode([int(token_id) for token_id in ids])
        return text


def _processor_of(data: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = processor.LoadFromSerializedProto(data)
    except UnicodeDecodeError as error:  # the library's message quotes the model's bytes
        raise UserError(f"not a SentencePiece model: {path}: its text is not UTF-8") from error
    except (RuntimeError, OSError, TypeError) as error:
        raise UserError(f"not a SentencePiece model: {path}: {error_text(error)}") from error
    if not loaded or processor.vocab_size() == 0:
        raise UserError(f"not a SentencePiece model: {path}: use a tokenizer.model")
    return processor


def _parsed(data: bytes, path: Path) -> Any:
    """Parses a model. Rejects those that sentencepiece accepts but this package cannot use."""
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise UserError(f"not a SentencePiece model: {path}: {error}") from error
    num_pieces = len(model.pieces)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        token_id = getattr(model.trainer_spec, name)
        if token_id >= num_pieces:
            raise UserError(
                f"damaged SentencePiece model: {path}: {name} is {token_id}, but it has "
                f"{num_pieces} pieces; download it again"
            )
    control = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
    texts: set[str] = set()
    for token_id, piece in enumerate(model.pieces):
        text: Any = piece.piece
        problem = None
        if not isinstance(text, str):  # protobuf returns bytes if they are not valid UTF-8
            problem = "is not UTF-8"
        elif text in texts:
            problem = f"is a duplicate of {shorten(text)}"
        elif not math.isfinite(piece.score) and piece.type != control:
            problem = f"has the score {piece.score}"
        if problem:
            raise UserError(
                f"damaged SentencePiece model: {path}: piece {token_id} {problem}; download it "
                "again"
            )
        texts.add(text)
    return model


def _encode(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = without_surrogates(text).encode()
    ids: list[int] = processor.encode(data)
    return ids


def _encode_fast(
    encoder: CompiledBpeEncoder, texts: Sequence[str], with_prefix: bool, end_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    try:
        return encoder.encode_batch(texts, with_prefix, end_id)
    except UnicodeEncodeError:
        cleaned = [without_surrogates(text) for text in texts]
        return encoder.encode_batch(cleaned, with_prefix, end_id)
