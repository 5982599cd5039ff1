"""Samples cut from flat token files: the reference, and the compiled reader where it was built.

In: mapped token files with their document indices, and what a sample is made of: a window over the
tokens that a split takes, or a list of whole documents. Out: tokens, loss mask and attention
segments of one sample. Nothing is materialised: a sample costs two binary searches and a copy.

A sample has ``seq_length + 1`` tokens: the first ``seq_length`` are inputs, the last ``seq_length``
are labels, and position t predicts token t + 1.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_chatflow.native.extension import extension


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
        """The token at which a document begins; that after the last document ends the file.

        Raises:
            ValueError: The index points outside the file.
        """
        num_tokens = len(self.tokens)
        sequence = int(self.document_indices[document])
        if sequence >= len(self.sequence_pointers):
            return num_tokens
        token = -1
        if sequence >= 0:
            token = int(self.sequence_pointers[sequence]) // self.tokens.itemsize
        if not 0 <= token <= num_tokens:
            raise ValueError(f"{self.name}: its index points outside the file at {document}")
        return token

    def document_begins(self, begin: int, end: int) -> Iterator[int]:
        """Tokens in [begin, end) at which a document that is not empty begins, ascending.

        An empty document and the one after it begin at the same token, which comes once.

        Raises:
            ValueError: The index is not ascending, or points outside the file.
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


class DocumentLists(NamedTuple):
    """The documents of every packed sample.

    Attributes:
        first_documents: int64[num_files + 1], documents in the files before each, and in all.
        offsets: int64[num_samples + 1], where each sample's documents begin in ``documents``.
        documents: int64[num_packed], numbered over all files.
    """

    first_documents: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]


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


SampleArrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.int32]]
"""Tokens int32[seq_length + 1], loss mask uint8[seq_length], cu_seqlens int32[num_segments + 1]."""


class RowReader(Protocol):
    """Reads any sample of an epoch."""

    def read(self, ordinal: int) -> SampleArrays:
        """The ``ordinal``-th sample, 0 <= ordinal < num_samples; ValueError if it cannot be."""


class _Piece(NamedTuple):
    file: TokenFile
    begin: int
    length: int


class WindowReaderReference:
    """Cuts windows of ``seq_length + 1`` tokens, at stride ``seq_length``.

    A window that reaches past the last run is filled with padding without loss.
    """

    def __init__(
        self,
        label: str,
        files: Sequence[TokenFile],
        runs: Runs,
        shape: SampleShape,
        num_samples: int,
    ) -> None:
        """Takes what the windows are cut from.

        Args:
            label: Begins every error message.
            files: The token files.
            runs: What the split takes of them.
            shape: Of the samples.
            num_samples: Windows; each begins before the end of the last run.
        """
        self._label = label
        self._files = files
        self._runs = runs
        self._shape = shape
        self._num_samples = num_samples

    def read(self, ordinal: int) -> SampleArrays:
        """The ``ordinal``-th window.

        Raises:
            ValueError: There is none such, an id is outside the vocabulary, an index is damaged.
        """
        _check_ordinal(self._label, ordinal, self._num_samples)
        try:
            return self._read(ordinal)
        except ValueError as error:
            raise ValueError(f"{self._label}: {error}") from error

    def _read(self, ordinal: int) -> SampleArrays:
        runs, shape = self._runs, self._shape
        position = ordinal * shape.seq_length
        remaining = min(shape.seq_length + 1, int(runs.cumulative[-1]) - position)
        run = int(np.searchsorted(runs.cumulative, position, side="right")) - 1
        pieces, starts, filled = [], [], 0
        while remaining > 0:
            offset = position - int(runs.cumulative[run])
            length = min(remaining, int(runs.cumulative[run + 1]) - position)
            file, begin = self._files[int(runs.file[run])], int(runs.token_begin[run]) + offset
            pieces.append(_Piece(file, begin, length))
            if shape.isolate:
                begins = file.document_begins(begin, begin + length)
                starts += [filled + token - begin for token in begins]
            position += length
            remaining -= length
            filled += length
            run += 1
        return _assemble(pieces, starts, shape)


class PackedReaderReference:
    """Puts whole documents one after the other; each is a segment, and so is the padding."""

    def __init__(
        self, label: str, files: Sequence[TokenFile], lists: DocumentLists, shape: SampleShape
    ) -> None:
        """Takes what the samples are made of.

        Args:
            label: Begins every error message.
            files: The token files.
            lists: The documents of every sample; what exceeds the sample is cut off.
            shape: Of the samples; ``isolate`` holds.
        """
        self._label = label
        self._files = files
        self._lists = lists
        self._shape = shape

    def read(self, ordinal: int) -> SampleArrays:
        """The ``ordinal``-th sample.

        Raises:
            ValueError: There is none such, an id is outside the vocabulary, an index is damaged.
        """
        _check_ordinal(self._label, ordinal, len(self._lists.offsets) - 1)
        try:
            return self._read(ordinal)
        except ValueError as error:
            raise ValueError(f"{self._label}: {error}") from error

    def _read(self, ordinal: int) -> SampleArrays:
        first_documents, offsets, documents = self._lists
        begin, end = offsets[ordinal : ordinal + 2].tolist()
        if not 0 <= begin <= end <= len(documents):
            raise ValueError(f"damaged packing: sample {ordinal} has documents {begin} to {end}")
        capacity = self._shape.seq_length + 1
        pieces, starts, filled = [], [], 0
        for document in documents[begin:end].tolist():
            if not 0 <= document < first_documents[-1]:
                raise ValueError(f"damaged packing: there is no document {document}")
            number = int(np.searchsorted(first_documents, document, side="right")) - 1
            file, local = self._files[number], document - int(first_documents[number])
            first = file.document_begin(local)
            length = min(file.document_begin(local + 1) - first, capacity - filled)
            if length < 0:
                raise ValueError(f"{file.name}: its index goes back at document {local + 1}")
            if length:
                pieces.append(_Piece(file, first, length))
                starts.append(filled)
                filled += length
        return _assemble(pieces, starts, self._shape)


def _check_ordinal(label: str, ordinal: int, num_samples: int) -> None:
    if not 0 <= ordinal < num_samples:
        raise ValueError(f"{label}: sample {ordinal} is not one of {num_samples}")


def _assemble(pieces: Sequence[_Piece], starts: Sequence[int], shape: SampleShape) -> SampleArrays:
    """Joins pieces; ``starts`` are the positions at which documents begin, ascending."""
    seq_length = shape.seq_length
    tokens = np.full(seq_length + 1, shape.pad_id, np.int32)
    loss_mask = np.zeros(seq_length + 1, np.uint8)  # of the tokens; shifted to the labels below
    for file, begin, length in pieces:
        if begin + length > len(file.tokens):
            raise ValueError(f"{file.name}: ends before token {begin + length}")
    filled = 0
    for file, begin, length in pieces:
        piece = file.tokens[begin : begin + length]
        _check_vocabulary(piece, file, begin, shape.vocab_size)
        tokens[filled : filled + length] = piece
        loss_mask[filled : filled + length] = (
            1 if file.loss_mask is None else file.loss_mask[begin : begin + length] != 0
        )
        filled += length
    if not shape.isolate:
        return tokens, loss_mask[1:], np.array([0, seq_length], np.int32)
    loss_mask[list(starts)] = 0
    begins = sorted({0, *starts, filled})
    cu_seqlens = [begin for begin in begins if begin < seq_length] + [seq_length]
    return tokens, loss_mask[1:], np.array(cu_seqlens, np.int32)


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


def make_window_reader(
    label: str, files: Sequence[TokenFile], runs: Runs, shape: SampleShape, num_samples: int
) -> RowReader:
    """The compiled `WindowReaderReference`, or the reference itself where nothing is compiled."""
    if extension is None:
        return WindowReaderReference(label, files, runs, shape, num_samples)
    reader: RowReader = extension.WindowReader(
        label, [_columns(file) for file in files], *runs, *shape, num_samples
    )
    return reader


def make_packed_reader(
    label: str, files: Sequence[TokenFile], lists: DocumentLists, shape: SampleShape
) -> RowReader:
    """The compiled `PackedReaderReference`, or the reference itself where nothing is compiled."""
    if extension is None:
        return PackedReaderReference(label, files, lists, shape)
    reader: RowReader = extension.PackedReader(
        label, [_columns(file) for file in files], *lists, *shape
    )
    return reader


def _columns(file: TokenFile) -> tuple[Any, ...]:
    return file.name, file.tokens, file.sequence_pointers, file.document_indices, file.loss_mask
