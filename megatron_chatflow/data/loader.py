"""Global batches of a run: this rank's part of each, prepared ahead by threads.

In: sources, the blend that orders their samples, this rank's place. Out: `GlobalBatch` objects.
What a batch holds depends on the global sample index alone: number of ranks, micro-batch size,
threads and the place where a run resumed change only how it is cut.

Rows of a batch, read from many sources into given buffers: the reference and the compiled part.

In: readers, which of them and which of its samples each row takes. Out: filled buffers, and the
attention segments of each micro-batch.

Hashes of samples and of batches, by which two runs are compared.

In: a sample's tokens and loss mask. Out: 128 bits a sample, and one hex string a global batch that
does not depend on how the batch was cut into ranks and micro-batches.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.data.samples import RowReader, Sample
from megatron_chatflow.data.source import Source, SourceUnavailableError
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.extension import load_extension

extension = load_extension("data")


DIGEST_BYTES = 16


class Buffers(NamedTuple):
    """Where rows go; contiguous, perhaps pinned.

    Attributes:
        tokens: int64[num_rows, seq_length].
        labels: int64[num_rows, seq_length].
        loss_mask: float32[num_rows, seq_length].
        digests: int64[num_rows, 2].
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    digests: npt.NDArray[np.int64]


def sample_digest(
    tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Hashes one sample: blake2b-128 of its tokens, little endian, and then of its loss mask.

    Args:
        tokens: int32[seq_length + 1].
        loss_mask: uint8[seq_length].

    Returns:
        int64[2], the digest's 16 bytes as two little-endian words.
    """
    digest = blake2b(tokens.astype("<i4", copy=False).tobytes(), digest_size=DIGEST_BYTES)
    digest.update(loss_mask.tobytes())
    return np.frombuffer(digest.digest(), "<i8").astype(np.int64)


def read_rows_reference(
    readers: Sequence[RowReader],
    reader_of_row: npt.NDArray[np.int64],
    ordinals: npt.NDArray[np.int64],
    micro_batch_size: int,
    buffers: Buffers,
) -> list[npt.NDArray[np.int32]]:
    """Reads rows into buffers.

    Args:
        readers: Of all sources.
        reader_of_row: int64[num_rows].
        ordinals: int64[num_rows], which of its reader's samples each row is.
        micro_batch_size: Rows of a micro-batch; divides their number.
        buffers: Of ``num_rows`` rows.

    Returns:
        For each micro-batch its cu_seqlens: int32[num_segments + 1], begins of the segments in its
        flattened rows, and their end.

    Raises:
        ValueError: A row cannot be read; the message begins with its reader's label.
    """
    num_rows, seq_length = buffers.tokens.shape
    segments: list[npt.NDArray[np.int32]] = []
    for first in range(0, num_rows, micro_batch_size):
        begins = []
        for row in range(first, first + micro_batch_size):
            reader = readers[int(reader_of_row[row])]
            tokens, loss_mask, cu_seqlens = reader.read(int(ordinals[row]))
            buffers.tokens[row] = tokens[:-1]
            buffers.labels[row] = tokens[1:]
            buffers.loss_mask[row] = loss_mask
            buffers.digests[row] = sample_digest(tokens, loss_mask)
            begins.append(cu_seqlens[:-1] + (row - first) * seq_length)
        end = np.array([micro_batch_size * seq_length])
        segments.append(np.concatenate([*begins, end]).astype(np.int32))
    return segments


def read_rows(
    readers: Sequence[Any],
    reader_of_row: npt.NDArray[np.int64],
    ordinals: npt.NDArray[np.int64],
    micro_batch_size: int,
    buffers: Buffers,
) -> list[npt.NDArray[np.int32]]:
    """The compiled `read_rows_reference`, or the reference itself where nothing is compiled.

    The readers are those of `megatron_chatflow.data.samples.make_window_reader` and
    `make_packed_reader`. The global interpreter lock is released.
    """
    if extension is None:
        return read_rows_reference(readers, reader_of_row, ordinals, micro_batch_size, buffers)
    segments: list[npt.NDArray[np.int32]] = extension.read_rows(
        readers, reader_of_row, ordinals, micro_batch_size, *buffers
    )
    return segments


__all__ = ["combine_digests", "sample_digest"]


def combine_digests(digests: torch.Tensor | npt.NDArray[np.int64]) -> str:
    """Hashes a batch: blake2b-128 of its samples' digests in the order of the samples.

    Args:
        digests: int64[num_samples, 2], a row per sample, ascending by global sample number.

    Returns:
        32 hex digits.
    """
    rows = np.asarray(digests).astype("<i8", copy=False)
    return blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=DIGEST_BYTES).hexdigest()


logger = logging.getLogger(__name__)


@dataclass
class MicroBatch:
    """Samples that go through the model at once, on the CPU.

    Attributes:
        tokens: int64[micro_batch_size, seq_length], the inputs.
        labels: int64[micro_batch_size, seq_length], the tokens that follow them.
        loss_mask: float32[micro_batch_size, seq_length], 1 where a label counts.
        cu_seqlens: int32[num_segments + 1], begins of the attention segments in the flattened
            tokens, from 0 to micro_batch_size * seq_length; a row always begins one. Positions
            count from the begin of the segment.
        max_seqlen: The longest segment.
        source: int64[micro_batch_size], number of each sample's source.
        sample_index: int64[micro_batch_size], which of its source's samples each is.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    source: torch.Tensor
    sample_index: torch.Tensor


@dataclass
class GlobalBatch:
    """This rank's part of one iteration's samples.

    Attributes:
        micro_batches: This rank's, in the order in which they are to be run.
        begin: First global sample of the whole batch.
        end: The one after its last.
        num_drawn: int64[num_sources], draws of each source in the whole batch.
        counts: int64[num_sources], draws of each source in samples [0, end): the loader's state.
        sample_digests: int64[num_local_samples, 2], in the order of this rank's samples.
        sample_positions: int64[num_local_samples], global sample of each.
    """

    micro_batches: list[MicroBatch]
    begin: int
    end: int
    num_drawn: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    sample_digests: torch.Tensor
    sample_positions: torch.Tensor


class Draws(Protocol):
    """What the loader asks of a blend."""

    def take(self, begin: int, end: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
        """Source and index within the source of the samples [begin, end)."""

    def counts(self, sample: int) -> npt.NDArray[np.int64]:
        """Draws of each source in samples [0, sample)."""


def collate(
    samples: Sequence[Sample], source: Sequence[int], sample_index: Sequence[int]
) -> MicroBatch:
    """Makes a micro-batch of samples.

    Args:
        samples: All of the same length.
        source: Number of each sample's source.
        sample_index: Which of its source's samples each is.
    """
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples])).long()
    loss_mask = torch.from_numpy(np.stack([sample.loss_mask for sample in samples])).float()
    seq_length = loss_mask.shape[1]
    begins = [sample.cu_seqlens[:-1] + row * seq_length for row, sample in enumerate(samples)]
    end = np.array([len(samples) * seq_length])
    cu_seqlens = np.concatenate([*begins, end]).astype(np.int32)
    return MicroBatch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        loss_mask=loss_mask,
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        source=torch.tensor(source, dtype=torch.int64),
        sample_index=torch.tensor(sample_index, dtype=torch.int64),
    )


@dataclass(frozen=True)
class _Order:
    """A global batch that has been drawn and is to be assembled."""

    begin: int
    end: int
    source: npt.NDArray[np.int16]
    index: npt.NDArray[np.int64]
    num_drawn: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


class _Rows(NamedTuple):
    """This rank's samples of a global batch; micro-batches are slices of them."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor


class Loader:
    """Assembles this rank's part of every global batch, ahead of its use."""

    def __init__(
        self,
        sources: Sequence[Source],
        blend: Draws,
        *,
        seq_length: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_prefetch: int = 2,
        num_threads: int = 1,
        pin_memory: bool | None = None,
        retry_seconds: float = 0.0,
    ) -> None:
        """Takes its parts; reads nothing yet.

        Args:
            sources: In the blend's numbering.
            blend: Orders the samples. It is asked in the thread that asks for batches.
            seq_length: Inputs of a sample.
            micro_batch_size: Samples of a micro-batch.
            data_parallel_rank: This rank's place among those that share the global batch.
            data_parallel_size: Their number.
            num_prefetch: Global batches prepared ahead; 0 assembles each when it is asked for.
            num_threads: That assemble them.
            pin_memory: Whether batches lie in page-locked memory, from which copies to a GPU run
                beside it; where there is a GPU if None.
            retry_seconds: In which a source that cannot be read may come back.
        """
        self._sources = list(sources)
        self._readers = [source.rows for source in self._sources]
        self._blend = blend
        self._seq_length = seq_length
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._num_ranks = data_parallel_size
        self._num_prefetch = num_prefetch
        self._retry_seconds = retry_seconds
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="loader", initializer=self._thread_initializer()
        )

    def _thread_initializer(self) -> Callable[[], None] | None:
        """Page-locked memory makes a context on the thread's GPU, which must be this rank's."""
        if not self._pin_memory:
            return None
        return partial(torch.cuda.set_device, torch.cuda.current_device())

    def batches(self, begin_sample: int, global_batch_size: int) -> Iterator[GlobalBatch]:
        """Yields global batches without end.

        Micro-batch m of rank d holds the global samples ``begin + (m * data_parallel_size + d) *
        micro_batch_size + k`` for k below the micro-batch size.

        Args:
            begin_sample: First global sample.
            global_batch_size: Samples of a batch over all ranks.

        Raises:
            UserError: The batch does not divide among the ranks, or a source holds damaged samples.
            SourceUnavailableError: A source cannot be read, and did not come back.
        """
        share = self._micro_batch_size * self._num_ranks
        if global_batch_size < 1 or global_batch_size % share:
            raise UserError(
                f"train.global_batch_size: {global_batch_size} is not a multiple of "
                f"train.micro_batch_size {self._micro_batch_size} x {self._num_ranks} "
                "data-parallel ranks"
            )
        return self._generate(self._orders(begin_sample, global_batch_size))

    def _generate(self, orders: Iterator[_Order]) -> Iterator[GlobalBatch]:
        pending: deque[Future[GlobalBatch]] = deque()
        try:
            while True:
                while len(pending) < self._num_prefetch + 1:
                    pending.append(self._pool.submit(self._assemble, next(orders)))
                batch = pending.popleft().result()
                if self._num_prefetch:
                    pending.append(self._pool.submit(self._assemble, next(orders)))
                yield batch
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Ends the threads; batches that nobody took are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _orders(self, begin: int, size: int) -> Iterator[_Order]:
        num_sources = len(self._sources)
        counts = np.array(self._blend.counts(begin)[:num_sources], np.int64)
        while True:
            end = begin + size
            source, index = self._blend.take(begin, end)
            num_drawn = np.bincount(source, minlength=num_sources).astype(np.int64)
            counts = counts + num_drawn
            yield _Order(begin, end, source, index, num_drawn, counts)
            begin = end

    def _assemble(self, order: _Order) -> GlobalBatch:
        """Assembles a batch; a source that is away may come back meanwhile."""
        deadline = None
        while True:
            try:
                return self._assemble_once(order)
            except SourceUnavailableError as error:
                now = time.monotonic()
                if deadline is None:
                    logger.warning("%s; trying again for %g s", error, self._retry_seconds)
                    deadline = now + self._retry_seconds
                if now >= deadline:
                    raise SourceUnavailableError(
                        f"{error}; it was away for {self._retry_seconds:g} s "
                        "(--data-retry-seconds): bring it back and resume"
                    ) from error
                time.sleep(min(1.0, deadline - now))

    def _assemble_once(self, order: _Order) -> GlobalBatch:
        for number in np.flatnonzero(order.num_drawn).tolist():
            self._sources[number].check_files()
        positions = self._positions(order)
        places = positions - order.begin
        source = order.source[places].astype(np.int64)
        index = order.index[places]
        rows = self._allocate(len(positions))
        digests = torch.empty(len(positions), 2, dtype=torch.int64)
        segments = self._read(source, index, rows, digests)
        return GlobalBatch(
            micro_batches=[
                self._micro_batch(number, cu_seqlens, rows, source, index)
                for number, cu_seqlens in enumerate(segments)
            ],
            begin=order.begin,
            end=order.end,
            num_drawn=order.num_drawn,
            counts=order.counts,
            sample_digests=digests,
            sample_positions=torch.from_numpy(positions),
        )

    def _allocate(self, num_rows: int) -> _Rows:
        shape = (num_rows, self._seq_length)
        return _Rows(
            torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory),
            torch.empty(shape, dtype=torch.int64, pin_memory=self._pin_memory),
            torch.empty(shape, dtype=torch.float32, pin_memory=self._pin_memory),
        )

    def _read(
        self,
        source: npt.NDArray[np.int64],
        index: npt.NDArray[np.int64],
        rows: _Rows,
        digests: torch.Tensor,
    ) -> list[npt.NDArray[np.int32]]:
        ordinals = np.empty_like(index)
        for number in np.unique(source).tolist():
            chosen = source == number
            ordinals[chosen] = self._sources[number].ordinals(index[chosen])
        buffers = Buffers(
            rows.tokens.numpy(), rows.labels.numpy(), rows.loss_mask.numpy(), digests.numpy()
        )
        try:
            return read_rows(self._readers, source, ordinals, self._micro_batch_size, buffers)
        except OSError as error:
            raise SourceUnavailableError(str(error)) from error
        except ValueError as error:
            raise UserError(str(error)) from error

    def _micro_batch(
        self,
        number: int,
        cu_seqlens: npt.NDArray[np.int32],
        rows: _Rows,
        source: npt.NDArray[np.int64],
        index: npt.NDArray[np.int64],
    ) -> MicroBatch:
        mine = slice(number * self._micro_batch_size, (number + 1) * self._micro_batch_size)
        return MicroBatch(
            tokens=rows.tokens[mine],
            labels=rows.labels[mine],
            loss_mask=rows.loss_mask[mine],
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=int(np.diff(cu_seqlens).max()),
            source=torch.from_numpy(source[mine]),
            sample_index=torch.from_numpy(index[mine]),
        )

    def _positions(self, order: _Order) -> npt.NDArray[np.int64]:
        """Global samples of this rank, int64[num_micro_batches * micro_batch_size]."""
        shape = (-1, self._num_ranks, self._micro_batch_size)
        mine = np.arange(order.begin, order.end, dtype=np.int64).reshape(shape)[:, self._rank]
        return np.ascontiguousarray(mine.reshape(-1))
