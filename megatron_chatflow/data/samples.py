"""Samples: their format, the readers of token files, and the assignment of documents to splits.

A sample has ``seq_length + 1`` tokens. The first ``seq_length`` are inputs, the last ``seq_length``
are labels, and position t predicts token t + 1. Samples are read directly from memory-mapped files.
There is no index of samples. Reading a sample costs two binary searches and a copy.

There are two kinds of samples. `Windows` are cut at a stride of ``seq_length`` from the runs of
tokens that belong to a split, so two neighboring windows share one token: the last label of one is
the first input of the next. Packed samples (`megatron_chatflow.data.packing`) consist of whole
documents. Readers of both kinds exist in ``csrc/data`` and as a reference here.

Documents are held out in one of two ways. With ``holdout_every`` k, document d belongs to the
validation split if ``d % k == k - 1``. With ``shares``, as in Megatron-LM, the documents of each
dataset are divided in order into training, validation and test. Without either, every split has all
documents.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime import load_extension

extension = load_extension("data")

Split = Literal["train", "validation", "test"]
_SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class TokenFile:
    """A memory-mapped indexed dataset."""

    name: str  # the prefix of the dataset's files
    tokens: npt.NDArray[Any]  # flat array of all tokens
    sequence_pointers: npt.NDArray[np.int64]  # int64[num_sequences], byte offsets into ``tokens``
    # int64[num_documents + 1], the first sequence of each document
    document_indices: npt.NDArray[np.int64]
    # uint8[num_tokens], nonzero for tokens with loss; None if every token has loss
    loss_mask: npt.NDArray[np.uint8] | None = None

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def document_begin(self, document: int) -> int:
        """Returns the first token of a document; for ``num_documents``, the end of the file.

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
        """Yields the tokens in [begin, end) at which a non-empty document begins, ascending.

        An empty document and its successor begin at the same token, which is yielded once.

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
    """The runs of consecutive tokens that belong to a split; each begins with a document."""

    file: npt.NDArray[np.int32]  # int32[num_runs], the number of the token file
    token_begin: npt.NDArray[np.int64]  # int64[num_runs], first token in that file
    # int64[num_runs + 1], number of tokens before each run, and in total
    cumulative: npt.NDArray[np.int64]


class DocumentLists(NamedTuple):
    """The documents of every packed sample."""

    # int64[num_files + 1], number of documents before each file, and in total
    first_documents: npt.NDArray[np.int64]
    # int64[num_samples + 1], begin of each sample's documents in ``documents``
    offsets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]  # int64[num_packed], numbered over all files


class SampleShape(NamedTuple):
    """Properties shared by all samples of a source."""

    seq_length: int  # number of inputs
    pad_id: int  # id that fills incomplete samples
    vocab_size: int  # exclusive bound of ids
    # Whether each document is an attention segment. Then a label that begins another document has
    # no loss.
    isolate: bool


SampleArrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8], npt.NDArray[np.int32]]
"""Tokens int32[seq_length + 1], loss mask uint8[seq_length], cu_seqlens int32[num_segments + 1]."""


class RowReader(Protocol):
    """Reads any sample of an epoch."""

    def read(self, ordinal: int) -> SampleArrays:
        """Reads the ``ordinal``-th sample in file order.

        Raises:
            ValueError: There is no such sample, an id is outside the vocabulary, or an index is
                damaged.
        """


class Samples(NamedTuple):
    """The samples of one epoch: windows or packed documents."""

    num_samples: int  # samples per epoch
    num_tokens: int  # tokens per epoch, without padding
    rows: RowReader  # reads any sample


class _TokenRange(NamedTuple):
    file: TokenFile
    begin: int
    length: int


class _ReferenceReader:
    """The part of a reader in Python that does not depend on the kind of the samples."""

    _label: str
    _num_samples: int

    def read(self, ordinal: int) -> SampleArrays:
        """Reads a sample; see `RowReader.read`."""
        if not 0 <= ordinal < self._num_samples:
            raise ValueError(f"{self._label}: sample {ordinal} is not one of {self._num_samples}")
        try:
            return self._read(ordinal)
        except ValueError as error:
            raise ValueError(f"{self._label}: {error}") from error

    def _read(self, ordinal: int) -> SampleArrays:
        raise NotImplementedError


class WindowReaderReference(_ReferenceReader):
    """Reads windows of ``seq_length + 1`` tokens at a stride of ``seq_length``.

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
        """Initializes the reader. Each window begins before the end of the last run."""
        self._label = label
        self._files = files
        self._runs = runs
        self._shape = shape
        self._num_samples = num_samples

    def _read(self, ordinal: int) -> SampleArrays:
        runs, shape = self._runs, self._shape
        position = ordinal * shape.seq_length
        remaining = min(shape.seq_length + 1, int(runs.cumulative[-1]) - position)
        run = int(np.searchsorted(runs.cumulative, position, side="right")) - 1
        ranges, starts, filled = [], [], 0
        while remaining > 0:
            offset = position - int(runs.cumulative[run])
            length = min(remaining, int(runs.cumulative[run + 1]) - position)
            file, begin = self._files[int(runs.file[run])], int(runs.token_begin[run]) + offset
            ranges.append(_TokenRange(file, begin, length))
            if shape.isolate:
                begins = file.document_begins(begin, begin + length)
                starts += [filled + token - begin for token in begins]
            position += length
            remaining -= length
            filled += length
            run += 1
        return _assemble(ranges, starts, shape)


class PackedReaderReference(_ReferenceReader):
    """Reads samples of whole documents. Each document is a segment, and the padding is another."""

    def __init__(
        self, label: str, files: Sequence[TokenFile], lists: DocumentLists, shape: SampleShape
    ) -> None:
        """Initializes the reader. Tokens that do not fit are cut off; ``isolate`` must be true."""
        self._label = label
        self._files = files
        self._lists = lists
        self._shape = shape
        self._num_samples = len(lists.offsets) - 1

    def _read(self, ordinal: int) -> SampleArrays:
        first_documents, offsets, documents = self._lists
        begin, end = offsets[ordinal : ordinal + 2].tolist()
        if not 0 <= begin <= end <= len(documents):
            raise ValueError(f"damaged packing: sample {ordinal} has documents {begin} to {end}")
        capacity = self._shape.seq_length + 1
        ranges, starts, filled = [], [], 0
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
                ranges.append(_TokenRange(file, first, length))
                starts.append(filled)
                filled += length
        return _assemble(ranges, starts, self._shape)


def _assemble(
    ranges: Sequence[_TokenRange], starts: Sequence[int], shape: SampleShape
) -> SampleArrays:
    """Builds a sample; ``starts`` are the positions at which documents begin, ascending."""
    seq_length = shape.seq_length
    tokens = np.full(seq_length + 1, shape.pad_id, np.int32)
    # One value per token; the return value drops the first, which aligns it with the labels.
    loss_mask = np.zeros(seq_length + 1, np.uint8)
    for file, begin, length in ranges:
        if begin + length > len(file.tokens):
            raise ValueError(f"{file.name}: ends before token {begin + length}")
    filled = 0
    for file, begin, length in ranges:
        ids = file.tokens[begin : begin + length]
        outside = (ids < 0) | (ids >= shape.vocab_size)
        if outside.any():
            at = int(np.argmax(outside))
            raise ValueError(
                f"{file.name}: token {begin + at} is id {ids[at]}, outside the vocabulary of "
                f"{shape.vocab_size}"
            )
        tokens[filled : filled + length] = ids
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


def make_window_reader(
    label: str, files: Sequence[TokenFile], runs: Runs, shape: SampleShape, num_samples: int
) -> RowReader:
    """Creates the reader in C++, or `WindowReaderReference` if the extension is not built."""
    if extension is None:
        return WindowReaderReference(label, files, runs, shape, num_samples)
    reader: RowReader = extension.WindowReader(
        label, [_columns(file) for file in files], *runs, *shape, num_samples
    )
    return reader


def make_packed_reader(
    label: str, files: Sequence[TokenFile], lists: DocumentLists, shape: SampleShape
) -> RowReader:
    """Creates the reader in C++, or `PackedReaderReference` if the extension is not built."""
    if extension is None:
        return PackedReaderReference(label, files, lists, shape)
    reader: RowReader = extension.PackedReader(
        label, [_columns(file) for file in files], *lists, *shape
    )
    return reader


def _columns(file: TokenFile) -> tuple[Any, ...]:
    return file.name, file.tokens, file.sequence_pointers, file.document_indices, file.loss_mask


def make_windows(
    label: str, files: Sequence[TokenFile], runs: Runs, shape: SampleShape, *, keep_tail: bool
) -> Samples:
    """Computes window boundaries without reading any tokens.

    The last tokens form a padded window if ``keep_tail`` is set (validation), and are left out
    otherwise (training). Error messages of the reader begin with ``label``.
    """
    num_tokens = int(runs.cumulative[-1])
    num_labels = max(num_tokens - 1, 0)  # the very first token is not a label
    num_samples = (num_labels + (shape.seq_length - 1) * keep_tail) // shape.seq_length
    rows = make_window_reader(label, files, runs, shape, num_samples)
    return Samples(num_samples, num_tokens, rows)


@dataclass(frozen=True)
class Sample:
    """One training sample."""

    tokens: npt.NDArray[np.int32]  # int32[seq_length + 1]
    loss_mask: npt.NDArray[np.uint8]  # uint8[seq_length], aligned with the labels ``tokens[1:]``
    # int32[num_segments + 1], boundaries of attention segments, 0 to seq_length
    cu_seqlens: npt.NDArray[np.int32]


def open_token_file(prefix: str | Path, *, with_loss_mask: bool) -> TokenFile:
    """Maps the dataset with a prefix and, if only marked tokens have loss, its loss mask.

    Raises:
        UserError: A file is missing or damaged, it does not contain integers, or the loss mask
            does not match.
    """
    dataset = IndexedDataset(prefix)
    if dataset.dtype.kind not in "iu":
        raise UserError(f"no token ids: {prefix}: contains {dataset.dtype}: preprocess the text")
    return TokenFile(
        name=str(prefix),
        tokens=dataset.tokens,
        sequence_pointers=dataset.sequence_pointers,
        document_indices=dataset.document_indices,
        loss_mask=_open_loss_mask(prefix, dataset) if with_loss_mask else None,
    )


def _open_loss_mask(prefix: str | Path, dataset: IndexedDataset) -> npt.NDArray[np.uint8]:
    mask_prefix = loss_mask_prefix(prefix)
    remedy = "preprocess with --format chat or pairs, or set loss: all"
    try:
        masks = IndexedDataset(mask_prefix)
    except UserError as error:
        raise UserError(f"no loss masks for {prefix}: {error}: {remedy}") from error
    if masks.dtype != np.uint8:
        raise UserError(
            f"no loss masks: {mask_prefix}: contains {masks.dtype} instead of uint8: {remedy}"
        )
    if not np.array_equal(masks.sequence_lengths, dataset.sequence_lengths):
        raise UserError(
            f"loss masks do not fit: {mask_prefix}: its lengths differ from {prefix}'s: {remedy}"
        )
    return np.asarray(masks.tokens, dtype=np.uint8)


def document_begins(file: TokenFile, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the first tokens of many documents, int64[n], each in [0, num_tokens].

    ``documents`` is int64[n]; the value num_documents means the end of the file.

    Raises:
        UserError: The index points outside the file.
    """
    num_tokens = len(file.tokens)
    sequences = file.document_indices[documents]
    inside = sequences < len(file.sequence_pointers)
    begins = np.full(len(sequences), num_tokens, np.int64)
    begins[inside] = file.sequence_pointers[sequences[inside].clip(0)] // file.tokens.itemsize
    check_index(file, (sequences >= 0) & (begins >= 0) & (begins <= num_tokens))
    return begins


def check_index(file: TokenFile, holds: npt.NDArray[np.bool_]) -> None:
    """Raises `UserError` unless the index of a file ``holds`` at each document, bool[n]."""
    if not holds.all():
        raise UserError(
            f"damaged index: {file.name}.idx: its documents are not consecutive: copy or "
            "preprocess it again"
        )


def document_range(num_documents: int, split: Split, shares: Sequence[float]) -> tuple[int, int]:
    """Returns the documents [begin, end) of a split, rounded as in Megatron-LM.

    ``shares`` are those of training, validation and test, which sum to 1.
    """
    ends = [0.0, *accumulate(shares)]
    number = _SPLITS.index(split)
    begin, end = (round(ends[n] * float(num_documents)) for n in (number, number + 1))
    return begin, end


def split_runs(
    files: Sequence[TokenFile],
    split: Split,
    holdout_every: int | None,
    shares: Sequence[float] | None = None,
) -> Runs:
    """Returns the runs of tokens that belong to a split, in the order of files and documents.

    The result has one entry per held-out document, or one per file without held-out documents.
    Documents are held out by ``holdout_every`` or ``shares``, as in the module's docstring.

    Raises:
        UserError: The index of a file is damaged.
    """
    none = np.zeros(0, np.int64)
    file_parts, begin_parts, length_parts = [none.astype(np.int32)], [none], [none]
    for number, file in enumerate(files):
        begins, ends = _file_runs(file, split, holdout_every, shares)
        check_index(file, begins <= ends)
        file_parts.append(np.full(len(begins), number, np.int32))
        begin_parts.append(begins)
        length_parts.append(ends - begins)
    lengths = np.concatenate(length_parts)
    return Runs(
        file=np.concatenate(file_parts),
        token_begin=np.concatenate(begin_parts),
        cumulative=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
    )


def _file_runs(
    file: TokenFile, split: Split, holdout_every: int | None, shares: Sequence[float] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the first tokens and the ends of the runs of one file."""
    if shares is not None:
        documents = np.array(document_range(file.num_documents, split, shares), np.int64)
        edges = document_begins(file, documents)
        return edges[:1], edges[1:]
    if holdout_every is None:
        return np.zeros(1, np.int64), np.array([len(file.tokens)], np.int64)
    held_out = np.arange(holdout_every - 1, file.num_documents, holdout_every, dtype=np.int64)
    begins = document_begins(file, held_out)
    ends = document_begins(file, held_out + 1)
    if split == "validation":
        return begins, ends
    zero, last = np.zeros(1, np.int64), np.array([len(file.tokens)], np.int64)
    return np.concatenate([zero, ends]), np.concatenate([begins, last])


def documents_in_split(
    begin: int,
    end: int,
    split: Split,
    holdout_every: int | None,
    taken: tuple[int, int] | None = None,
) -> npt.NDArray[np.bool_]:
    """Returns whether each of the documents [begin, end) of a file belongs to a split, bool[n].

    ``taken`` is the range that `document_range` returned, instead of ``holdout_every``.
    """
    if taken is not None:
        documents = np.arange(begin, end)
        return np.asarray((taken[0] <= documents) & (documents < taken[1]))
    if holdout_every is None:
        return np.ones(end - begin, np.bool_)
    held_out = np.arange(begin, end) % holdout_every == holdout_every - 1
    return np.asarray(held_out if split == "validation" else ~held_out)
