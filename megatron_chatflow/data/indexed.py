r"""Megatron's indexed datasets: a flat file of token ids (`.bin`) and its index (`.idx`).

`IndexedDatasetWriter` writes the same bytes as megatron-core's builder, and `IndexedDataset` maps
the files for reading.

Layout of `.idx` (little endian): magic `MMIDIDX\0\0`, version uint64 = 1, dtype code uint8,
num_sequences uint64, num_documents + 1 uint64, then int32 lengths (tokens), int64 pointers (bytes
into `.bin`) and int64 document indices (the first sequence of each document, then num_sequences).
The header has 34 bytes, so the mapped arrays are not aligned to their items.
"""

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.data.mapped_file import map_file
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import Spool, StagedFile, publish_all, refuse_url

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in enumerate(
        ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"], start=1
    )
}
# Opening a dataset checks every sequence if there are at most NUM_CHECKED, and evenly spaced blocks
# of NUM_CHECKED sequences in total otherwise, so that the time to open does not grow with the
# corpus. `validate` checks all.
NUM_CHECKED = 1 << 22
CHECK_BLOCK = 1 << 16
WIDENED_BLOCK = 1 << 20  # tokens per block when a dataset is converted to another dtype


def optimal_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns Megatron's dtype for ids of this vocabulary: uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """Returns `<prefix>.bin`."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Returns `<prefix>.idx`."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """Memory-mapped reader of one dataset.

    Attributes:
        prefix: The path without `.bin` or `.idx`.
        dtype: Dtype of the token ids.
        num_tokens: Number of tokens in the whole dataset.
        sequence_lengths: int32[num_sequences], tokens per sequence.
        sequence_pointers: int64[num_sequences], byte offsets into `.bin`.
        document_indices: int64[num_documents + 1], the first sequence of each document.
        tokens: dtype[num_tokens], the mapped `.bin`: all sequences, concatenated.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Maps the files `<prefix>.bin` and `<prefix>.idx` and checks that they are consistent.

        Raises:
            UserError: A file is missing, truncated or not in Megatron's format, or the two
                files are inconsistent.
        """
        self.prefix = Path(prefix)
        buffer, content = _map(idx_path(prefix)), _map(bin_path(prefix))
        self.dtype, num_sequences, num_boundaries = _read_header(idx_path(prefix), buffer)

        end_of_lengths = HEADER.size + 4 * num_sequences
        end_of_pointers = end_of_lengths + 8 * num_sequences
        self.sequence_lengths: npt.NDArray[np.int32] = buffer[HEADER.size : end_of_lengths].view(
            "<i4"
        )
        self.sequence_pointers: npt.NDArray[np.int64] = buffer[end_of_lengths:end_of_pointers].view(
            "<i8"
        )
        self.document_indices: npt.NDArray[np.int64] = buffer[end_of_pointers:].view("<i8")

        self.num_tokens = content.size // self.dtype.itemsize
        self._check_ends(content.size)
        spread = num_sequences > NUM_CHECKED
        for begin in _block_begins(num_sequences, NUM_CHECKED if spread else num_sequences):
            self._check_block(begin)
        for begin in _block_begins(num_boundaries, NUM_CHECKED if spread else num_boundaries):
            self._check_document_block(begin)
        self.tokens: npt.NDArray[Any] = content.view(self.dtype)

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """Returns the tokens of one sequence as a view of the mapped file."""
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Returns tokens of a sequence as a view of the mapped file, dtype[length].

        A negative index counts from the end. The length None reads to the end of the sequence.

        Raises:
            IndexError: The index or the requested range is out of bounds.
        """
        num_sequences = len(self.sequence_lengths)
        if not -num_sequences <= index < num_sequences:
            raise IndexError(f"sequence {index} of {num_sequences} in {self.prefix}")
        sequence_length = int(self.sequence_lengths[index])
        if length is None:
            length = sequence_length - offset
        if offset < 0 or length < 0 or offset + length > sequence_length:
            raise IndexError(
                f"tokens {offset}..{offset + length} of sequence {index} in {self.prefix}, which "
                f"has {sequence_length} tokens"
            )
        begin = int(self.sequence_pointers[index]) // self.dtype.itemsize + offset
        return self.tokens[begin : begin + length]

    @property
    def num_documents(self) -> int:
        """Number of documents. Megatron-LM may write several sequences per document."""
        return len(self.document_indices) - 1

    def validate(self) -> None:
        """Checks every length, pointer and document boundary, independent of the dataset's size.

        Raises:
            UserError: The index is damaged. The message names the first wrong sequence or document.
        """
        for begin in _block_begins(len(self), len(self)):
            self._check_block(begin)
        for begin in _block_begins(len(self.document_indices), len(self.document_indices)):
            self._check_document_block(begin)

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[Path]]:
        """Pickles the prefix only. Unpickling maps the files again."""
        return IndexedDataset, (self.prefix,)

    def _check_ends(self, num_bin_bytes: int) -> None:
        num_sequences = len(self.sequence_lengths)
        end = 0
        if num_sequences:
            end = int(self.sequence_pointers[-1])
            end += int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if end != num_bin_bytes:
            relation = "shorter" if num_bin_bytes < end else "longer"
            raise UserError(
                f"damaged dataset: {bin_path(self.prefix)}: has {num_bin_bytes} bytes, "
                f"{relation} than the {end} bytes that its .idx describes: copy or preprocess it "
                "again"
            )
        boundaries = self.document_indices
        if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != num_sequences:
            self._fail(f"its documents do not cover sequences 0 to {num_sequences}")

    def _check_block(self, begin: int) -> None:
        """Checks that each sequence of a block begins where the previous one ends."""
        end = min(begin + CHECK_BLOCK, len(self))
        lengths = self.sequence_lengths[begin:end]
        if lengths.min(initial=0) < 0:
            bad = int(np.argmax(lengths < 0))
            self._fail(f"sequence {begin + bad} has length {lengths[bad]}")
        if begin == 0 and end > 0 and self.sequence_pointers[0] != 0:
            self._fail(f"sequence 0 begins at byte {self.sequence_pointers[0]} instead of 0")
        # Include the last sequence of the previous block, to check the boundary between blocks.
        first = max(begin - 1, 0)
        pointers = self.sequence_pointers[first:end]
        ends = pointers + self.sequence_lengths[first:end].astype(np.int64) * self.dtype.itemsize
        agree = pointers[1:] == ends[:-1]
        if not agree.all():
            bad = int(np.argmin(agree))
            self._fail(
                f"sequence {first + bad + 1} begins at byte {pointers[bad + 1]}, but the "
                f"previous one ends at {ends[bad]}"
            )

    def _check_document_block(self, begin: int) -> None:
        boundaries = self.document_indices[max(begin - 1, 0) : begin + CHECK_BLOCK]
        ascending = boundaries[1:] >= boundaries[:-1]
        if not ascending.all():
            bad = max(begin - 1, 0) + int(np.argmin(ascending))
            self._fail(f"document {bad} ends before it begins")

    def _fail(self, what: str) -> None:
        raise UserError(
            f"damaged index: {idx_path(self.prefix)}: {what}: copy or preprocess it again"
        )


class IndexedDatasetWriter:
    """Writes one dataset incrementally, in constant memory.

    Lengths and document boundaries are kept in unnamed temporary files until `seal`. The attributes
    ``num_sequences``, ``num_documents`` and ``num_tokens`` count what has been added.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        """Creates temporary files in the folder of the dataset.

        Raises:
            UserError: The files cannot be created, or the format does not support the dtype.
        """
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        codes = [code for code, known in DTYPE_CODES.items() if known == self.dtype]
        if not codes:
            raise UserError(f"dtype not supported by indexed datasets: {self.dtype}: use int32")
        self._dtype_code = codes[0]
        with ExitStack() as stack:
            self.bin_file = StagedFile(bin_path(prefix))
            stack.callback(self.bin_file.discard)
            self.idx_file = StagedFile(idx_path(prefix))
            stack.callback(self.idx_file.discard)
            self._lengths = Spool(self.prefix.parent)
            stack.callback(self._lengths.close)
            self._boundaries = Spool(self.prefix.parent)
            stack.callback(self._boundaries.close)
            self._boundaries.write(np.zeros(1, "<i8").tobytes())
            stack.pop_all()
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Appends one document that consists of one sequence, integers[num_tokens].

        Raises:
            OverflowError: The writer's dtype cannot represent an id.
        """
        given = np.asarray(tokens)
        array = given.astype(self.dtype)
        if not np.array_equal(array, given):
            raise OverflowError(f"a token does not fit into the dataset's {self.dtype}")
        self.add_documents(array, np.array([array.size], np.int32))

    def add_documents(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> None:
        """Appends many documents of one sequence each; see `add_sequences`.

        Args:
            tokens: dtype[num_tokens], the tokens of all documents, concatenated.
            lengths: int32[num_documents], tokens per document, of sum ``tokens.size``.
        """
        boundaries = np.arange(1, len(lengths) + 1, dtype="<i8")
        self.add_sequences(tokens, lengths, boundaries)

    def add_sequences(
        self,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[np.int32],
        boundaries: npt.NDArray[np.int64],
    ) -> None:
        """Appends sequences that form whole documents.

        Args:
            tokens: dtype[num_tokens], the tokens of all sequences, concatenated.
            lengths: int32[num_sequences], tokens per sequence, of sum ``tokens.size``.
            boundaries: int64[num_documents], for each document the end of its sequences: the index
                into ``lengths`` after its last sequence.

        Raises:
            TypeError: ``tokens`` does not have the writer's dtype.
            ValueError: The lengths do not sum to ``tokens.size``.
        """
        if tokens.dtype != self.dtype:
            raise TypeError(f"tokens are {tokens.dtype}, the dataset is {self.dtype}")
        if int(lengths.sum(dtype=np.int64)) != tokens.size:
            raise ValueError(f"lengths do not add up to the {tokens.size} tokens given")
        self.bin_file.write(np.ascontiguousarray(tokens).view(np.uint8).data)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._boundaries.write((boundaries + self.num_sequences).astype("<i8").tobytes())
        self.num_sequences += len(lengths)
        self.num_documents += len(boundaries)
        self.num_tokens += tokens.size

    def add_dataset(self, dataset: IndexedDataset) -> None:
        """Appends a whole dataset, in blocks.

        Raises:
            TypeError: The dtype cannot be cast safely.
            UserError: The size of its `.bin` changed since it was opened.
        """
        if not np.can_cast(dataset.dtype, self.dtype, "safe"):
            raise TypeError(f"{dataset.prefix} is {dataset.dtype}, not {self.dtype}")
        path = bin_path(dataset.prefix)
        if dataset.dtype != self.dtype:
            for begin in range(0, dataset.num_tokens, WIDENED_BLOCK):
                tokens = dataset.tokens[begin : begin + WIDENED_BLOCK].astype(self.dtype)
                self.bin_file.write(tokens.view(np.uint8).data)
        elif self.bin_file.append_file(path) != dataset.num_tokens * dataset.dtype.itemsize:
            raise UserError(f"changed while it was merged: {path}: wait until it is complete")
        for begin in range(0, len(dataset), CHECK_BLOCK):
            self._lengths.write(dataset.sequence_lengths[begin : begin + CHECK_BLOCK].tobytes())
        for begin in range(1, len(dataset.document_indices), CHECK_BLOCK):
            boundaries = dataset.document_indices[begin : begin + CHECK_BLOCK]
            self._boundaries.write((boundaries + self.num_sequences).tobytes())
        self.num_sequences += len(dataset)
        self.num_documents += dataset.num_documents
        self.num_tokens += dataset.num_tokens

    def seal(self) -> list[StagedFile]:
        """Writes the index and flushes both files to disk, still under temporary names.

        Returns the files in the order in which they must be published. The `.idx` is last because
        its presence makes the dataset visible.
        """
        header = (MAGIC, VERSION, self._dtype_code, self.num_sequences, self.num_documents + 1)
        self.idx_file.write(HEADER.pack(*header))
        for block in self._lengths.blocks():
            self.idx_file.write(block)
        pointer = 0
        for block in self._lengths.blocks():
            ends = np.cumsum(np.frombuffer(block, "<i4"), dtype=np.int64) * self.dtype.itemsize
            pointers = np.concatenate([[0], ends[:-1]]) + pointer
            self.idx_file.write(pointers.astype("<i8").tobytes())
            pointer += int(ends[-1])
        for block in self._boundaries.blocks():
            self.idx_file.write(block)
        self._lengths.close()
        self._boundaries.close()
        files = [self.bin_file, self.idx_file]
        for file in files:
            file.seal()
        return files

    def finalize(self) -> None:
        """Completes the dataset and renames both files to their final names."""
        publish_all(self.seal())

    def discard(self) -> None:
        """Removes all files that have not been published."""
        self._lengths.close()
        self._boundaries.close()
        self.bin_file.discard()
        self.idx_file.discard()


def _map(path: Path) -> npt.NDArray[np.uint8]:
    refuse_url(path)
    try:
        return map_file(path)
    except OSError as error:
        raise UserError(
            f"cannot open dataset: {path}: {error.strerror}: check the path, which must be given "
            "without .bin or .idx"
        ) from error


def _read_header(path: Path, buffer: npt.NDArray[np.uint8]) -> tuple[np.dtype[Any], int, int]:
    """Returns the dtype, the number of sequences and the number of document boundaries."""

    def fail(what: str) -> UserError:
        return UserError(f"not a Megatron index: {path}: {what}: copy or preprocess it again")

    data = buffer[: HEADER.size].tobytes()
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise fail(f"begins with {data[: len(MAGIC)]!r} instead of {MAGIC!r}")
    if len(data) < HEADER.size:
        raise fail(f"truncated: {len(data)} bytes, but the header has {HEADER.size}")
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(data)
    if version != VERSION:
        raise fail(f"version {version} instead of {VERSION}")
    if code not in DTYPE_CODES:
        raise fail(f"unknown dtype code {code}")
    expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if num_sequences and buffer.size == expected + num_sequences:
        raise UserError(
            f"multimodal dataset: {path}: it stores a mode for each of its {num_sequences} "
            "sequences: preprocess only the text"
        )
    if buffer.size != expected:
        relation = "truncated" if buffer.size < expected else "too long"
        raise fail(
            f"{relation}: {buffer.size} bytes instead of {expected} for {num_sequences} sequences"
        )
    return DTYPE_CODES[code], num_sequences, num_boundaries


def _block_begins(num_items: int, num_checked: int) -> Iterator[int]:
    """Yields the begins of evenly spaced blocks with ``num_checked`` items in total.

    The last block is always included.
    """
    num_blocks = -(-num_items // CHECK_BLOCK)
    num_chosen = min(num_blocks, -(-num_checked // CHECK_BLOCK))
    for k in range(num_chosen):
        yield (k * (num_blocks - 1) // max(num_chosen - 1, 1)) * CHECK_BLOCK
