"""The loader: assembles this rank's part of every global batch in background threads.

The contents of a global batch depend only on the global sample index. The number of ranks, the
micro-batch size, the number of threads and the sample at which a run resumed only change how the
batch is divided. Rows are read by the extension in ``csrc/data``, or by `read_rows_reference` if it
is not built.

Every sample has a digest, and `combine_digests` turns the digests of all ranks into one hash per
global batch that does not depend on how the batch was divided. Two runs that trained on the same
data log the same hashes. The hash function is BLAKE2b-128. Changing it would make the metrics of
earlier runs incomparable.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.blend.adaptive import AdaptiveBlend
from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.data.samples import RowReader, Sample
from megatron_chatflow.data.source import Source, SourceUnavailableError
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime import load_extension

extension = load_extension("data")
logger = logging.getLogger(__name__)

DIGEST_BYTES = 16


@dataclass
class MicroBatch:
    """Samples of one forward pass, on the CPU."""

    tokens: torch.Tensor  # int64[micro_batch_size, seq_length], the inputs
    labels: torch.Tensor  # int64[micro_batch_size, seq_length], the tokens that follow them
    loss_mask: torch.Tensor  # float32[micro_batch_size, seq_length], 1 for labels with loss
    # int32[num_segments + 1], boundaries of the attention segments in the flattened tokens, from 0
    # to micro_batch_size * seq_length. Every row begins a segment, and positions restart at each
    # segment.
    cu_seqlens: torch.Tensor
    source: torch.Tensor  # int64[micro_batch_size], number of each sample's source
    sample_index: torch.Tensor  # int64[micro_batch_size], number of each sample within its source


@dataclass
class GlobalBatch:
    """This rank's part of the samples of one iteration."""

    micro_batches: list[MicroBatch]  # this rank's micro-batches, in the order in which they are run
    begin: int  # first global sample of the whole batch
    end: int  # global sample after its last one
    num_drawn: npt.NDArray[np.int64]  # int64[num_sources], draws of each source in the whole batch
    # int64[num_local_samples, 2], digests in the order of this rank's samples
    sample_digests: torch.Tensor
    sample_positions: torch.Tensor  # int64[num_local_samples], global sample number of each


class Loader:
    """Assembles this rank's part of every global batch and prefetches batches in threads."""

    def __init__(
        self,
        sources: Sequence[Source],
        blend: Blend | AdaptiveBlend,
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
        """Initializes the loader. No I/O happens until the first batch is requested.

        Args:
            sources: The sources, in the order of the source numbers that the blend returns.
            blend: The blend that orders the samples. It is called in the thread that requests
                batches.
            seq_length: Input tokens per sample.
            micro_batch_size: Samples per micro-batch.
            data_parallel_rank: This rank among those that share the global batch.
            data_parallel_size: Number of ranks that share the global batch.
            num_prefetch: Global batches prepared ahead; 0 assembles a batch when it is requested.
            num_threads: Number of threads that assemble batches.
            pin_memory: Whether to allocate batches in page-locked memory, so that copies to a GPU
                overlap with computation. None means True if a GPU is available.
            retry_seconds: How long to retry reading a source that is unavailable.
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
        select_device = None
        if self._pin_memory:
            # Pinning memory creates a CUDA context on the current device of the thread.
            select_device = partial(torch.cuda.set_device, torch.cuda.current_device())
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="loader", initializer=select_device
        )

    def batches(
        self, begin_sample: int, global_batch_size: int | Callable[[int], int]
    ) -> Iterator[GlobalBatch]:
        """Yields global batches indefinitely.

        Micro-batch m of rank d contains the global samples ``begin_sample + (m * data_parallel_size
        + d) * micro_batch_size + k``, 0 <= k < micro_batch_size. ``global_batch_size`` counts the
        samples of all ranks; a function computes it from the first sample of the batch.

        Raises:
            UserError: The batch size is not divisible among the ranks, or a source is damaged.
            SourceUnavailableError: A source remained unreadable for ``retry_seconds``.
        """
        if isinstance(global_batch_size, int):
            self._check_size(global_batch_size)
            return self._generate(begin_sample, lambda _: global_batch_size)
        return self._generate(begin_sample, global_batch_size)

    def _check_size(self, size: int) -> int:
        if size < 1 or size % (self._micro_batch_size * self._num_ranks):
            raise UserError(
                f"train.global_batch_size: {size} is not a multiple of train.micro_batch_size "
                f"{self._micro_batch_size} x {self._num_ranks} data-parallel ranks"
            )
        return size

    def _generate(self, begin: int, size_at: Callable[[int], int]) -> Iterator[GlobalBatch]:
        pending: deque[Future[GlobalBatch]] = deque()

        def is_decided() -> bool:
            return begin + size_at(begin) <= self._blend.decided_samples

        def submit() -> None:
            nonlocal begin
            size = self._check_size(size_at(begin))
            source, index = self._blend.take(begin, begin + size)
            pending.append(self._pool.submit(self._assemble, begin, source, index))
            begin += size

        def prefetch() -> None:
            # A controller decides weights after earlier iterations; draws behind them can wait.
            while len(pending) <= self._num_prefetch and is_decided():
                submit()

        try:
            while True:
                prefetch()
                if not pending:
                    submit()
                batch = pending.popleft().result()
                if self._num_prefetch:
                    prefetch()
                yield batch
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Stops the threads and discards prepared batches."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _assemble(
        self, begin: int, source: npt.NDArray[np.int16], index: npt.NDArray[np.int64]
    ) -> GlobalBatch:
        """Assembles a batch from its draws and retries while a source is unavailable."""
        deadline = None
        while True:
            try:
                return self._assemble_once(begin, source, index)
            except SourceUnavailableError as error:
                now = time.monotonic()
                if deadline is None:
                    logger.warning("%s; retrying for %g s", error, self._retry_seconds)
                    deadline = now + self._retry_seconds
                if now >= deadline:
                    raise SourceUnavailableError(
                        f"{error}; it stayed unavailable for {self._retry_seconds:g} s "
                        "(--data-retry-seconds): make it available, then resume the run"
                    ) from error
                time.sleep(min(1.0, deadline - now))

    def _assemble_once(
        self, begin: int, drawn: npt.NDArray[np.int16], drawn_index: npt.NDArray[np.int64]
    ) -> GlobalBatch:
        num_drawn = np.bincount(drawn, minlength=len(self._sources)).astype(np.int64)
        for number in np.flatnonzero(num_drawn).tolist():
            self._sources[number].check_files()
        size = self._micro_batch_size
        places = np.arange(len(drawn)).reshape(-1, self._num_ranks, size)[:, self._rank].reshape(-1)
        source, index = drawn[places].astype(np.int64), drawn_index[places]
        ordinals = np.empty_like(index)
        for number in np.unique(source).tolist():
            chosen = source == number
            ordinals[chosen] = self._sources[number].ordinals(index[chosen])
        # Tensors with all samples of this rank. Micro-batches are slices of them.
        tokens, labels, loss_mask = (
            torch.empty(len(places), self._seq_length, dtype=dtype, pin_memory=self._pin_memory)
            for dtype in (torch.int64, torch.int64, torch.float32)
        )
        digests = torch.empty(len(places), 2, dtype=torch.int64)
        buffers = Buffers(tokens.numpy(), labels.numpy(), loss_mask.numpy(), digests.numpy())
        try:
            segments = read_rows(self._readers, source, ordinals, size, buffers)
        except OSError as error:
            raise SourceUnavailableError(str(error)) from error
        except ValueError as error:
            raise UserError(str(error)) from error
        micro_batches = []
        for number, cu_seqlens in enumerate(segments):
            mine = slice(number * size, (number + 1) * size)
            micro_batches.append(
                MicroBatch(
                    tokens=tokens[mine],
                    labels=labels[mine],
                    loss_mask=loss_mask[mine],
                    cu_seqlens=torch.from_numpy(cu_seqlens),
                    source=torch.from_numpy(source[mine]),
                    sample_index=torch.from_numpy(index[mine]),
                )
            )
        return GlobalBatch(
            micro_batches=micro_batches,
            begin=begin,
            end=begin + len(drawn),
            num_drawn=num_drawn,
            sample_digests=digests,
            sample_positions=torch.from_numpy(begin + places),
        )


def collate(
    samples: Sequence[Sample], source: Sequence[int], sample_index: Sequence[int]
) -> MicroBatch:
    """Combines samples of equal length to a micro-batch, with their numbers and their sources'."""
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
        source=torch.tensor(source, dtype=torch.int64),
        sample_index=torch.tensor(sample_index, dtype=torch.int64),
    )


class Buffers(NamedTuple):
    """Contiguous, possibly pinned arrays that rows are written to."""

    tokens: npt.NDArray[np.int64]  # int64[num_rows, seq_length]
    labels: npt.NDArray[np.int64]  # int64[num_rows, seq_length]
    loss_mask: npt.NDArray[np.float32]  # float32[num_rows, seq_length]
    digests: npt.NDArray[np.int64]  # int64[num_rows, 2]


def read_rows_reference(
    readers: Sequence[RowReader],
    reader_of_row: npt.NDArray[np.int64],
    ordinals: npt.NDArray[np.int64],
    micro_batch_size: int,
    buffers: Buffers,
) -> list[npt.NDArray[np.int32]]:
    """Reads rows into buffers.

    Args:
        readers: The readers of all sources.
        reader_of_row: int64[num_rows], index into ``readers`` for each row.
        ordinals: int64[num_rows], the sample to read for each row, counted within its reader.
        micro_batch_size: Rows per micro-batch; a divisor of ``num_rows``.
        buffers: Buffers of ``num_rows`` rows.

    Returns:
        The cu_seqlens of each micro-batch, int32[num_segments + 1].

    Raises:
        ValueError: A row cannot be read. The message begins with the label of its reader.
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
    """Reads rows into buffers; see `read_rows_reference`.

    The C++ version is used if the extension is built. It releases the GIL. The readers must be
    created by `megatron_chatflow.data.samples.make_window_reader` or `make_packed_reader`.
    """
    if extension is None:
        return read_rows_reference(readers, reader_of_row, ordinals, micro_batch_size, buffers)
    segments: list[npt.NDArray[np.int32]] = extension.read_rows(
        readers, reader_of_row, ordinals, micro_batch_size, *buffers
    )
    return segments


def sample_digest(
    tokens: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """Hashes one sample: BLAKE2b-128 of its little-endian tokens followed by its loss mask.

    Returns int64[2], the digest's 16 bytes as two little-endian words.
    """
    digest = blake2b(tokens.astype("<i4", copy=False).tobytes(), digest_size=DIGEST_BYTES)
    digest.update(loss_mask.tobytes())
    return np.frombuffer(digest.digest(), "<i8").astype(np.int64)


def combine_digests(digests: torch.Tensor | npt.NDArray[np.int64]) -> str:
    """Hashes a batch: BLAKE2b-128 of its samples' digests, in hexadecimal.

    ``digests`` is int64[num_samples, 2], one row per sample, by ascending global sample number.
    """
    rows = np.asarray(digests).astype("<i8", copy=False)
    return blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=DIGEST_BYTES).hexdigest()
