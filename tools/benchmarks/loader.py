"""Time to fetch a sample and to assemble a batch, beside megatron-core's datasets.

Measures a made-up corpus of a given size, or an existing dataset. Prints a row for each way of
cutting samples: seconds until the first sample, bytes of index built, and microseconds per sample.
Samples are fetched in training order: first a few while the file is not in the page cache
(``cold_us_per_sample``), then all of them in rounds (median and best).
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import default_collate

from benchmarks.corpora import VOCAB_SIZE, BenchmarkVocabulary, write_corpus, write_sparse_corpus
from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.config import DataConfig, KnotConfig, ScheduleConfig, SourceConfig
from megatron_chatflow.data.indexed import bin_path
from megatron_chatflow.data.loader import GlobalBatch, Loader
from megatron_chatflow.data.samples import Sample
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.files import scratch_folder
from megatron_chatflow.runtime.table import Cell, Row

_NUM_ROUNDS = 20
_NUM_COLD_SAMPLES = 128
_MICRO_BATCH_SIZE = 4
_GLOBAL_BATCH_SIZE = 64
_WEIGHTS = (0.7, 0.3)
_SCALES = (10**9, 10**10, 10**11, 10**12)
_LARGEST_OF_PEER = 10**10  # above this size, building the peer's index takes minutes and gigabytes

OURS, PEER = "megatron_chatflow", "megatron-core"


class Dataset(Protocol):
    """Samples of one corpus."""

    num_samples: int
    num_index_bytes: int

    def sample(self, index: int) -> object:
        """Returns a sample, in training order."""


class Batches(Protocol):
    """Batches of a blend."""

    num_index_bytes: int

    def batch(self, begin: int, end: int, micro_batch_size: int) -> object:
        """Returns the micro-batches of the samples [begin, end)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--data", type=Path, help="prefix of a dataset (default: a random one)")
    parser.add_argument(
        "--num-tokens",
        type=int,
        default=200_000_000,
        help="tokens of the random dataset; default: %(default)s",
    )
    parser.add_argument(
        "--seq-length", type=int, default=4096, help="tokens per sample; default: %(default)s"
    )
    parser.add_argument(
        "--num-samples", type=int, default=4000, help="samples to measure; default: %(default)s"
    )
    parser.add_argument(
        "--scaling", action="store_true", help="also measure sparse corpora of 1e9 to 1e12 tokens"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Runs the benchmark, see the module docstring.

    Raises:
        UserError: The corpus has no samples, or cannot be read or written.
    """
    rows: list[Row] = []
    with scratch_folder("benchmark_loader_") as folder:
        prefix = arguments.data
        if prefix is None:
            prefix = folder / "made_up_document"
            write_corpus(prefix, arguments.num_tokens)
        rows += _fetch_rows(prefix, arguments)
        rows += _batch_rows(prefix, arguments)
        if arguments.scaling:
            rows += _scaling_rows(folder / "sparse_document", arguments)
    return rows


class OurDataset:
    """A source over one corpus.

    Attributes:
        num_samples: Number of samples in an epoch.
        num_index_bytes: Size of the packing index. Other kinds of samples need no index.
    """

    def __init__(
        self,
        prefix: Path,
        seq_length: int,
        *,
        boundaries: Literal["ignore", "isolate"] = "ignore",
        packing: Literal["none", "best_fit"] = "none",
    ) -> None:
        """Builds the source from a configuration.

        Raises:
            UserError: The source has no samples or cannot be read.
        """
        source = SourceConfig(paths=(prefix,), boundaries=boundaries, packing=packing)
        knot = KnotConfig(at=0, weights={"corpus": 1.0})
        config = DataConfig(
            seq_length=seq_length,
            sources={"corpus": source},
            schedule=ScheduleConfig(knots=(knot,)),
        )
        [self.source] = build_sources(config, seed=1, tokenizer=BenchmarkVocabulary())
        self.num_samples = self.source.num_samples
        caches = prefix.parent.glob(f"{prefix.name}.packing.*") if packing == "best_fit" else ()
        self.num_index_bytes = sum(path.stat().st_size for path in caches)

    def sample(self, index: int) -> Sample:
        """Returns a sample, in training order."""
        return self.source.sample(index)


class OurBatches:
    """Batches of a blend over one corpus, used as two sources and assembled on request.

    Attributes:
        num_index_bytes: 0, because no index is built.
    """

    num_index_bytes = 0

    def __init__(self, prefix: Path, seq_length: int) -> None:
        """Builds the sources, the blend and the loader."""
        source = OurDataset(prefix, seq_length).source
        names = [f"part_{number}" for number in range(len(_WEIGHTS))]
        knot = {"at": 0, "weights": dict(zip(names, _WEIGHTS, strict=True))}
        schedule = Schedule.from_dict(
            {"knots": [knot]},
            sources=names,
            samples_per_iteration=_GLOBAL_BATCH_SIZE,
            seq_length=seq_length,
        )
        self._loader = Loader(
            [source] * len(names),
            Blend(schedule),
            seq_length=seq_length,
            micro_batch_size=_MICRO_BATCH_SIZE,
            data_parallel_rank=0,
            data_parallel_size=1,
            num_prefetch=0,
        )
        self._batches = self._loader.batches(0, _GLOBAL_BATCH_SIZE)

    def batch(self, begin: int, end: int, micro_batch_size: int) -> GlobalBatch:
        """Returns the batch that begins at ``begin``. Sequential calls reuse the iterator."""
        batch = next(self._batches)
        if batch.begin != begin:
            self._batches = self._loader.batches(begin, end - begin)
            batch = next(self._batches)
        return batch


class _Tokenizer:
    """The attributes of a tokenizer that `GPTDataset` reads."""

    vocab_size = VOCAB_SIZE
    eod = 0
    pad = -1
    unique_identifiers = {"class": "benchmark"}


class PeerDataset:
    """One epoch of a `GPTDataset` without a dense mask, or with one that isolates documents.

    Attributes:
        num_samples: Number of samples in the epoch.
        num_index_bytes: Size of the index that was built.
    """

    def __init__(self, prefix: Path, seq_length: int, *, isolate: bool = False) -> None:
        """Builds the index, in memory."""
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        indexed = IndexedDataset(str(prefix), multimodal=False, mmap=True)
        self.config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=seq_length,
            split="1",
            tokenizer=_Tokenizer(),
            reset_position_ids=isolate,
            reset_attention_mask=isolate,
            eod_mask_loss=False,
            create_attention_mask=isolate,
        )
        documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
        self.dataset: Any = GPTDataset(
            indexed, str(prefix), documents, None, Split.train, self.config
        )
        self.num_samples = len(self.dataset)
        self.num_index_bytes = sum(
            int(index.nbytes)
            for index in (
                self.dataset.document_index,
                self.dataset.sample_index,
                self.dataset.shuffle_index,
            )
        )

    def sample(self, index: int) -> dict[str, torch.Tensor]:
        """Returns a sample."""
        sample: dict[str, torch.Tensor] = self.dataset[index]
        return sample


class PeerBatches:
    """Batches of a `BlendedDataset` over one corpus, used as two sources.

    Attributes:
        num_index_bytes: Size of the indices of the blend and of its datasets.
    """

    def __init__(
        self, prefix: Path, seq_length: int, weights: Sequence[float], num_samples: int
    ) -> None:
        """Builds the indices."""
        from megatron.core.datasets.blended_dataset import BlendedDataset

        parts = [PeerDataset(prefix, seq_length) for _ in weights]
        datasets = [part.dataset for part in parts]
        self._blended: Any = BlendedDataset(datasets, list(weights), num_samples, parts[0].config)
        self.num_index_bytes = sum(part.num_index_bytes for part in parts) + int(
            self._blended.dataset_index.nbytes + self._blended.dataset_sample_index.nbytes
        )

    def batch(self, begin: int, end: int, micro_batch_size: int) -> list[Any]:
        """Returns the micro-batches of the samples [begin, end)."""
        return [
            default_collate([self._blended[k] for k in range(first, first + micro_batch_size)])
            for first in range(begin, end, micro_batch_size)
        ]


def _fetch_rows(prefix: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    length, num_samples = arguments.seq_length, arguments.num_samples
    ours, isolated = partial(OurDataset, prefix, length), "window, documents isolated"
    yield _fetch_row("window", OURS, prefix, ours, num_samples)
    yield _fetch_row(isolated, OURS, prefix, partial(ours, boundaries="isolate"), num_samples)
    packed = partial(ours, packing="best_fit")
    yield _fetch_row("packed documents", OURS, prefix, packed, num_samples)
    if arguments.peers:
        peer = partial(PeerDataset, prefix, length)
        yield _fetch_row("window", PEER, prefix, peer, num_samples)
        # It isolates documents by a dense mask of seq_length squared, so a few samples suffice.
        few = min(num_samples, 2 * _NUM_ROUNDS)
        yield _fetch_row(isolated, PEER, prefix, partial(peer, isolate=True), few)


def _fetch_row(
    what: str, by: str, prefix: Path, build: Callable[[], Dataset], num_samples: int
) -> Row:
    begin = time.perf_counter()
    dataset = build()
    dataset.sample(0)
    seconds = time.perf_counter() - begin
    return {
        "what": what,
        "by": by,
        "start_seconds": seconds,
        "index_bytes": dataset.num_index_bytes,
        **time_samples(prefix, dataset.sample, min(num_samples, dataset.num_samples)),
    }


def time_samples(
    prefix: Path, fetch: Callable[[int], object], num_fetches: int, samples_per_fetch: int = 1
) -> dict[str, Cell]:
    """Measures microseconds per sample: with a cold page cache, then as median and best of rounds.

    Args:
        prefix: Prefix of the corpus.
        fetch: Called with 0, 1, 2, ...
        num_fetches: Number of calls in a pass.
        samples_per_fetch: Number of samples that one call returns.
    """
    drop_from_memory(prefix)
    num_cold = min(-(-_NUM_COLD_SAMPLES // samples_per_fetch), num_fetches)
    begin = time.perf_counter()
    for index in range(num_cold):
        fetch(index)
    cold = (time.perf_counter() - begin) / num_cold
    for index in range(num_fetches):
        fetch(index)
    seconds = []
    for part in np.array_split(np.arange(num_fetches), min(_NUM_ROUNDS, num_fetches)):
        indices = part.tolist()
        begin = time.perf_counter()
        for index in indices:
            fetch(index)
        seconds.append((time.perf_counter() - begin) / len(indices))
    scale = 1e6 / samples_per_fetch
    return {
        "us_per_sample": scale * float(np.median(seconds)),
        "best_us_per_sample": scale * min(seconds),
        "cold_us_per_sample": scale * cold,
    }


def drop_from_memory(prefix: Path) -> None:
    """Evicts a corpus from the page cache, if the system supports it."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(bin_path(prefix), os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _batch_rows(prefix: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    num_batches = max(arguments.num_samples // _GLOBAL_BATCH_SIZE, 1)
    yield _batch_row(OURS, prefix, partial(OurBatches, prefix, arguments.seq_length), num_batches)
    if arguments.peers:
        num_samples = num_batches * _GLOBAL_BATCH_SIZE
        peer = partial(PeerBatches, prefix, arguments.seq_length, _WEIGHTS, num_samples)
        yield _batch_row(PEER, prefix, peer, num_batches)


def _batch_row(by: str, prefix: Path, build: Callable[[], Batches], num_batches: int) -> Row:
    begin = time.perf_counter()
    batches = build()

    def batch(number: int) -> object:
        first = number * _GLOBAL_BATCH_SIZE
        return batches.batch(first, first + _GLOBAL_BATCH_SIZE, _MICRO_BATCH_SIZE)

    batch(0)
    seconds = time.perf_counter() - begin
    return {
        "what": f"batch of {_GLOBAL_BATCH_SIZE} from a blend",
        "by": by,
        "start_seconds": seconds,
        "index_bytes": batches.num_index_bytes,
        **time_samples(prefix, batch, num_batches, _GLOBAL_BATCH_SIZE),
    }


def _scaling_rows(prefix: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    for num_tokens in _SCALES:
        write_sparse_corpus(prefix, num_tokens)
        what = f"window of {num_tokens:.0e} sparse tokens"
        length, num_samples = arguments.seq_length, min(arguments.num_samples, 10 * _NUM_ROUNDS)
        yield _fetch_row(what, OURS, prefix, partial(OurDataset, prefix, length), num_samples)
        if arguments.peers and num_tokens <= _LARGEST_OF_PEER:
            yield _fetch_row(what, PEER, prefix, partial(PeerDataset, prefix, length), num_samples)
