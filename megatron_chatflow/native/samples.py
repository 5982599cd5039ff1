"""Samples cut from flat token files: the reference.

In: mapped token files with their document indices, and what a sample is made of: a window over the
tokens that a split takes, or a list of whole documents. Out: tokens, loss mask and attention
segments of one sample. Nothing is materialised: a sample costs two binary searches and a copy.

A sample has ``seq_length + 1`` tokens: the first ``seq_length`` are inputs, the last ``seq_length``
are labels, and position t predicts token t + 1.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        tokens: int32[seq_length + 1].
        loss_mask: uint8[seq_length], aligned with the labels ``tokens[1:]``.
        cu_seqlens: int32[num_segments + 1], begins of the attention segments, from 0 to seq_length.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    cu_seqlens: npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenFile:
    """One indexed dataset, mapped.

    Attributes:
        name: The path, for messages.
        tokens: Flat array of integers, one document after the other.
        sequence_pointers: int64[num_sequences], byte offsets into ``tokens``.
        document_indices: int64[num_documents + 1], the first sequence of each document.
        loss_mask: uint8, as long as ``tokens``; None where every token carries loss.
    """

    name: str
    tokens: npt.NDArray[Any]
    sequence_pointers: npt.NDArray[np.int64]
    document_indices: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.uint8] | None = None

    @property
    def num_documents(self) -> int:
        """The number of documents."""
        return len(self.document_indices) - 1

    def document_begin(self, document: int) -> int:
        """The token at which a document begins; that after the last document ends the file."""
        sequence = int(self.document_indices[document])
        if sequence >= len(self.sequence_pointers):
            return len(self.tokens)
        return int(self.sequence_pointers[sequence]) // self.tokens.itemsize

    def document_begins(self, begin: int, end: int) -> Iterator[int]:
        """Tokens in [begin, end) at which a document that is not empty begins, ascending.

        An empty document and the one after it begin at the same token, which comes once.

        Raises:
            ValueError: The documents' begins do not ascend.
        """
        documents = range(self.num_documents)
        previous = begin - 1
        for document in documents[bisect_left(documents, begin, key=self.document_begin) :]:
            token = self.document_begin(document)
            if token >= end:
                return
            if token < previous or token < begin:
                raise ValueError(f"{self.name}: its index goes back at document {document}")
            if token != previous:
                yield token
            previous = token


class Runs(NamedTuple):
    """The stretches of tokens that a split takes, in order; each begins with a document.

    Attributes:
        file: int32[num_runs], which token file.
        token_begin: int64[num_runs], first token in that file.
        cumulative: int64[num_runs + 1], tokens in the runs before each, and in all.
    """

    file: npt.NDArray[np.int32]
    token_begin: npt.NDArray[np.int64]
    cumulative: npt.NDArray[np.int64]


class SampleShape(NamedTuple):
    """What every sample of a source has in common.

    Attributes:
        seq_length: Number of inputs.
        pad_id: Fills a sample that its tokens do not.
        vocab_size: Ids must lie below it.
        isolate: Whether documents are attention segments of their own; a label that begins another
            document then carries no loss.
    """

    seq_length: int
    pad_id: int
    vocab_size: int
    isolate: bool


class _Piece(NamedTuple):
    file: TokenFile
    begin: int
    length: int


def read_window_reference(
    files: Sequence[TokenFile], runs: Runs, shape: SampleShape, ordinal: int
) -> Sample:
    """Cuts the ``ordinal``-th window of ``seq_length + 1`` tokens, at stride ``seq_length``.

    A window that reaches past the last run is filled with padding without loss.

    Args:
        files: The token files.
        runs: What the split takes of them.
        shape: Of the samples.
        ordinal: The window, counted from 0; it begins before the end of the last run.

    Raises:
        ValueError: A token lies outside the vocabulary, or the index is damaged.
    """
    position = ordinal * shape.seq_length
    total = int(runs.cumulative[-1])
    remaining = min(shape.seq_length + 1, total - position)
    run = int(np.searchsorted(runs.cumulative, position, side="right")) - 1
    pieces = []
    while remaining > 0:
        offset = position - int(runs.cumulative[run])
        length = min(remaining, int(runs.cumulative[run + 1]) - position)
        begin = int(runs.token_begin[run]) + offset
        pieces.append(_Piece(files[int(runs.file[run])], begin, length))
        position += length
        remaining -= length
        run += 1
    starts: list[int] = []
    filled = 0
    for file, begin, length in pieces if shape.isolate else ():
        starts += [filled + token - begin for token in file.document_begins(begin, begin + length)]
        filled += length
    return _assemble(pieces, starts, shape)


def read_packed_reference(
    files: Sequence[TokenFile],
    first_documents: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    shape: SampleShape,
) -> Sample:
    """Puts whole documents one after the other; each is a segment, and so is the padding.

    Args:
        files: The token files.
        first_documents: int64[num_files + 1], documents in the files before each, and in all.
        documents: int64[n], numbered over all files; what exceeds the sample is cut off.
        shape: Of the samples.

    Raises:
        ValueError: A document lies outside the files, or a token outside the vocabulary.
    """
    pieces, starts, filled = [], [], 0
    for document in documents.tolist():
        if not 0 <= document < first_documents[-1]:
            raise ValueError(f"document {document} lies outside the {first_documents[-1]} there")
        number = int(np.searchsorted(first_documents, document, side="right")) - 1
        file, local = files[number], document - int(first_documents[number])
        begin = file.document_begin(local)
        length = min(file.document_begin(local + 1) - begin, shape.seq_length + 1 - filled)
        pieces.append(_Piece(file, begin, length))
        starts.append(filled)
        filled += length
    return _assemble(pieces, starts, shape)


def _assemble(pieces: Sequence[_Piece], starts: Sequence[int], shape: SampleShape) -> Sample:
    """Joins pieces; ``starts`` are the positions at which documents begin, ascending."""
    seq_length = shape.seq_length
    tokens = np.full(seq_length + 1, shape.pad_id, np.int32)
    loss_mask = np.zeros(seq_length + 1, np.uint8)  # of the tokens; shifted to the labels below
    filled = 0
    for file, begin, length in pieces:
        if begin < 0 or length < 0 or begin + length > len(file.tokens):
            raise ValueError(
                f"{file.name}: its index points at tokens {begin} to {begin + length} of "
                f"{len(file.tokens)}"
            )
        piece = file.tokens[begin : begin + length]
        _check_vocabulary(piece, file, begin, shape.vocab_size)
        tokens[filled : filled + length] = piece
        loss_mask[filled : filled + length] = (
            1 if file.loss_mask is None else file.loss_mask[begin : begin + length] != 0
        )
        filled += length
    if not shape.isolate:
        return Sample(tokens, loss_mask[1:], np.array([0, seq_length], np.int32))
    loss_mask[list(starts)] = 0
    begins = {0, *starts, filled}
    cu_seqlens = sorted(begin for begin in begins if begin < seq_length) + [seq_length]
    return Sample(tokens, loss_mask[1:], np.array(cu_seqlens, np.int32))


def _check_vocabulary(
    piece: npt.NDArray[Any], file: TokenFile, begin: int, vocab_size: int
) -> None:
    outside = (piece < 0) | (piece >= vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        raise ValueError(
            f"{file.name}: token {begin + at} is id {piece[at]}, outside the vocabulary of "
            f"{vocab_size}"
        )
