"""Disk throughput, and the throughput of merging datasets beside it.

Measures MB per second of writing and reading with O_DIRECT, of writing through the page cache until
fsync returns, of copying, and of `merge_datasets`, which copies and hashes. Files are evicted from
the page cache before they are read.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from megatron_chatflow.data.indexed import IndexedDatasetWriter, bin_path
from megatron_chatflow.preprocess.merge import merge_datasets
from megatron_chatflow.runtime.table import Cell, Row

_BLOCK = 1 << 23
_NUM_SHARDS = 4
_MERGE_TARGET = 0.8
_DIRECT = getattr(os, "O_DIRECT", 0)


def disk_rows(folder: Path, num_bytes: int, num_rounds: int) -> Iterator[Row]:
    """Measures writing and reading, the best of several rounds."""
    size = -(-num_bytes // _BLOCK) * _BLOCK
    path = folder / "roof"
    works: dict[str, Callable[[], None]] = {
        "roof: write, direct": partial(_write, path, size, _DIRECT),
        "roof: read, direct": partial(_read, path, _DIRECT),
        "roof: write and fsync": partial(_write, path, size, 0),
        "roof: read": partial(_read, path, 0),
    }
    best: dict[str, float] = {}
    for _ in range(num_rounds):
        for name, work in works.items():
            _forget(path)
            best[name] = min(best.get(name, float("inf")), _seconds(work))
    path.unlink()
    for name, seconds in best.items():
        yield {"what": "disk", "by": name, **_speed(size, seconds)}


def merge_rows(folder: Path, num_bytes: int, num_rounds: int) -> Iterator[Row]:
    """Measures a merge and copies of the same bytes in alternating rounds, the best of each."""
    prefixes = [folder / f"shard{number}_text_document" for number in range(_NUM_SHARDS)]
    for number, prefix in enumerate(prefixes):
        _write_shard(prefix, num_bytes // _NUM_SHARDS, number)
    sources = [bin_path(prefix) for prefix in prefixes]
    size = sum(path.stat().st_size for path in sources)
    works: dict[str, Callable[[], object]] = {
        "roof: copy, direct": partial(_copy, sources, folder / "copy"),
        "roof: copy_file_range and fsync": partial(_copy_in_kernel, sources, folder / "copy"),
        "merge_datasets": partial(
            merge_datasets, prefixes, folder / "merged_text_document", overwrite=True
        ),
    }
    best: dict[str, float] = {}
    for _ in range(num_rounds):
        for name, work in works.items():
            for path in sources:
                _forget(path)
            best[name] = min(best.get(name, float("inf")), _seconds(work))
    roof = min(seconds for name, seconds in best.items() if name.startswith("roof"))
    for name, seconds in best.items():
        row: dict[str, Cell] = {"what": "merge", "by": name, **_speed(size, seconds)}
        row["share_of_roof"] = roof / seconds
        if name == "merge_datasets":
            row["target"] = f"{_MERGE_TARGET:.0%} of the fastest copy"
            row["met"] = roof / seconds >= _MERGE_TARGET
        yield row
    for path in [*folder.glob("*_text_document.*"), folder / "copy"]:
        path.unlink(missing_ok=True)


def _speed(num_bytes: int, seconds: float) -> dict[str, Cell]:
    return {"seconds": seconds, "mb_per_second": num_bytes / 1e6 / seconds}


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _block() -> mmap.mmap:
    """Allocates random memory that is aligned for O_DIRECT."""
    block = mmap.mmap(-1, _BLOCK)
    block.write(np.random.default_rng(0).bytes(_BLOCK))
    return block


def _forget(path: Path) -> None:
    """Flushes a file to the disk and evicts it from the page cache."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _write(path: Path, num_bytes: int, flags: int) -> None:
    block = _block()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags)
    try:
        for _ in range(num_bytes // _BLOCK):
            os.write(descriptor, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, flags: int) -> None:
    block = mmap.mmap(-1, _BLOCK)
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        while os.readv(descriptor, [block]):
            pass
    finally:
        os.close(descriptor)


def _copy(sources: list[Path], target: Path) -> None:
    """Copies with one block of read-ahead and O_DIRECT writes of whole blocks."""
    blocks = [mmap.mmap(-1, _BLOCK) for _ in range(2)]
    writing = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _DIRECT)
    try:
        with ThreadPoolExecutor(1) as pool:
            for source in sources:
                reading = os.open(source, os.O_RDONLY)
                ahead = pool.submit(os.readv, reading, [blocks[0]])
                number = 0
                while ahead.result():
                    number += 1
                    ahead = pool.submit(os.readv, reading, [blocks[number % 2]])
                    # write the last block completely, too
                    os.write(writing, blocks[(number - 1) % 2])
                os.close(reading)
        os.fsync(writing)
    finally:
        os.close(writing)


def _copy_in_kernel(sources: list[Path], target: Path) -> None:
    with target.open("wb", buffering=0) as writing:
        for source in sources:
            with source.open("rb", buffering=0) as reading:
                while os.copy_file_range(reading.fileno(), writing.fileno(), 1 << 30):
                    pass
        os.fsync(writing.fileno())


def _write_shard(prefix: Path, num_bytes: int, seed: int) -> None:
    """Writes a dataset of random ids in documents of 512 tokens, and one of odd length."""
    random = np.random.default_rng(seed)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    lengths = np.full(_BLOCK // 2 // 512, 512, np.int32)
    for _ in range(max(num_bytes // _BLOCK, 1)):
        writer.add_documents(random.integers(0, 32_000, _BLOCK // 2, dtype=np.uint16), lengths)
    writer.add_document(np.arange(777 + seed, dtype=np.uint16))
    writer.finalize()
