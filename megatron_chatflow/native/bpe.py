"""SentencePiece's byte-pair encoding: reference and compiled encoder.

In: the pieces of a model, with ids and scores, and the ids of the 256 bytes. Out: the ids of texts.

The definition, for a model with byte fallback whose pieces are all ordinary ones: every space
becomes U+2581 (and one is put first if asked for), the text is cut into characters, and of all
neighbours that together are a piece those with the highest score are joined, the leftmost if there
are several, until there are none. What is then no piece becomes the pieces of its UTF-8 bytes.
(Sennrich, Haddow and Birch, ACL 2016; Kudo and Richardson, EMNLP 2018.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.extension import extension

SPACE = "\u2581"


@dataclass(frozen=True)
class BpePieces:
    """A byte-pair model.

    Attributes:
        pieces: Text of the ordinary pieces, each once.
        ids: The id of each.
        scores: The score of each.
        byte_ids: The ids of the bytes 0 to 255.
    """

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    scores: tuple[float, ...]
    byte_ids: tuple[int, ...]


class ReferenceBpeEncoder:
    """The definition, read aloud: quadratic in the length of a text."""

    def __init__(self, model: BpePieces) -> None:
        """Takes the model."""
        numbered = zip(model.pieces, model.ids, model.scores, strict=True)
        self._pieces = {piece: (token_id, score) for piece, token_id, score in numbered}
        self._byte_ids = model.byte_ids

    def encode_batch(
        self, texts: Sequence[str], with_prefix: bool, end_id: int = -1
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Encodes texts.

        Args:
            texts: Without lone surrogates.
            with_prefix: Whether a text that is not empty gets a space put before it.
            end_id: Put behind the ids of every text that has any; -1 for nothing.

        Returns:
            int32: the ids of all texts one after the other, and int32: the number of each.
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
    """What csrc offers; any number of threads may call it at once."""

    def encode_batch(
        self, texts: Sequence[str], with_prefix: bool, end_id: int = -1, narrow: bool = False
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """As the reference; `narrow` for ids in uint16."""

    def encode_json_lines(
        self, data: bytes, key: str, with_prefix: bool, end_id: int = -1, narrow: bool = False
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], int] | None:
        """The same of the string under the key of every line, and the strings' UTF-8 bytes.

        None if a line is not an object with such a string, or takes a full parser to tell.
        """


def compiled_bpe_encoder(model: BpePieces) -> CompiledBpeEncoder | None:
    """The compiled encoder; None if it is not built.

    Raises:
        ValueError: A piece is empty, given twice, or not text.
    """
    encoder_type = getattr(extension, "BpeEncoder", None)  # a build of before lacks it
    if encoder_type is None:
        return None
    pieces = [piece.encode() for piece in model.pieces]
    encoder: CompiledBpeEncoder = encoder_type(pieces, model.ids, model.scores, model.byte_ids)
    return encoder
