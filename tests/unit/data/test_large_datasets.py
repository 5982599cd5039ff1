"""Tests datasets beyond 2^31 tokens and 2^32 bytes, in sparse files that need no disk space."""

import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml
from tiny_run import TinyRun

from megatron_chatflow.config import RunConfig
from megatron_chatflow.data.indexed import HEADER, MAGIC, VERSION, IndexedDataset
from megatron_chatflow.files import StagedFile
from megatron_chatflow.preprocess.merge import merge_datasets
from megatron_chatflow.training.dry_run import dry_run

LENGTH = 4096  # tokens per document
NUM_DOCUMENTS = (1 << 18) + 3  # of each of the two datasets, so 2^31 tokens in both
NUM_TOKENS = 2 * NUM_DOCUMENTS * LENGTH
MARKS = {0: 7, 1: 8, NUM_DOCUMENTS - 1: 9}  # first tokens of documents; all others are 0
MAX_BYTES = 384 << 20  # of memory, of which 256 MiB are a buffer of fixed size; the ids have 4 GiB
MAX_SECONDS = 120  # on a busy machine; a few seconds suffice


def write_sparse(prefix: Path) -> Path:
    """Writes a dataset of uint16 whose `.bin` has holes except for the marked documents."""
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(NUM_DOCUMENTS * LENGTH * 2)
        for document, token in MARKS.items():
            file.seek(document * LENGTH * 2)
            file.write(np.uint16(token).tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, NUM_DOCUMENTS, NUM_DOCUMENTS + 1))
        file.write(np.full(NUM_DOCUMENTS, LENGTH, "<i4").tobytes())
        file.write((np.arange(NUM_DOCUMENTS, dtype="<i8") * LENGTH * 2).tobytes())
        file.write(np.arange(NUM_DOCUMENTS + 1, dtype="<i8").tobytes())
    return prefix


def copy_sparse(staged: StagedFile, source: Path) -> int:
    """Copies a file without its holes. Replaces the copy of all bytes and their hash."""
    num_bytes = source.stat().st_size
    with source.open("rb") as given, staged.partial_path.open("r+b") as copy:
        copy.truncate(staged.num_bytes + num_bytes)
        end = 0
        while end < num_bytes:
            try:
                begin = os.lseek(given.fileno(), end, os.SEEK_DATA)
            except OSError:  # only holes follow
                break
            end = os.lseek(given.fileno(), begin, os.SEEK_HOLE)
            data = os.pread(given.fileno(), end - begin, begin)
            os.pwrite(copy.fileno(), data, staged.num_bytes + begin)
    return num_bytes


def test_merge_and_dry_run_beyond_two_to_the_31(
    tmp_path: Path, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [write_sparse(tmp_path / f"{k}_document") for k in range(2)]
    if sum(path.stat().st_blocks for path in tmp_path.glob("*.bin")) > 1 << 16:
        pytest.skip("this file system has no sparse files")
    monkeypatch.setattr(StagedFile, "_copy", copy_sparse)
    merged = tmp_path / "merged_document"
    values = yaml.safe_load(tiny_run.config.read_text())
    values["data"]["sources"] = {"large": {"paths": [str(merged)]}}
    values["data"]["schedule"]["knots"] = [{"at": 0, "weights": {"large": 1}}]
    values["train"]["train_iters"] = NUM_TOKENS // (64 * 8)  # the whole dataset once
    begin = time.monotonic()
    tracemalloc.start()
    try:
        assert merge_datasets(parts, merged) == 2 * NUM_DOCUMENTS
        report = dry_run(RunConfig.from_dict(values))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES
    assert time.monotonic() - begin < MAX_SECONDS
    assert "large" in report and f"{NUM_TOKENS * 49 // 50:,}"[:5] in report

    dataset = IndexedDataset(merged)
    dataset.validate()
    assert dataset.num_tokens == NUM_TOKENS > 1 << 31
    assert int(dataset.sequence_pointers[-1]) == (NUM_TOKENS - LENGTH) * 2 > 1 << 32
    for part in range(2):
        for document, token in MARKS.items():
            first = dataset.get(part * NUM_DOCUMENTS + document, 0, 2)
            assert first.tolist() == [token, 0]
