"""Tests that the number of open descriptors does not grow with the number of datasets."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_files import PlainTokenizer, data_config, numbered_documents, write_dataset
from preprocess_jobs import Jobs
from tiny_run import TinyRun

from megatron_chatflow.config import RunConfig
from megatron_chatflow.data.indexed import IndexedDataset
from megatron_chatflow.data.mapped_file import map_file, release_pages
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.preprocess import dedup as duplicates
from megatron_chatflow.preprocess.merge import merge_datasets
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.training.dry_run import dry_run

NUM_DATASETS = 60
NUM_SPARE = 24
"""Number of descriptors that may still be opened. It is below the number of datasets."""


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def limit_of_open_files(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def few_files() -> Iterator[None]:
    """Lets this process open only `NUM_SPARE` further files."""
    with limit_of_open_files(max(map(int, os.listdir("/proc/self/fd"))) + NUM_SPARE):
        yield


def write_datasets(folder: Path, number: int) -> list[str]:
    """Writes datasets with loss masks, all with the same content."""
    documents = numbered_documents([7, 9, 12, 8])
    masks = [np.arange(len(document)) > 1 for document in documents]
    first = write_dataset(folder / "0_document", documents, masks=masks)
    for k in range(1, number):
        for name in ("document", "loss_mask"):
            for suffix in ("bin", "idx"):
                os.link(folder / f"0_{name}.{suffix}", folder / f"{k}_{name}.{suffix}")
    return [first, *(str(folder / f"{k}_document") for k in range(1, number))]


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_sources_of_many_datasets(tmp_path: Path, few_files: None, packing: str) -> None:
    paths = write_datasets(tmp_path, NUM_DATASETS)
    source = {"paths": paths, "loss": "response", "packing": packing, "boundaries": "isolate"}
    config = data_config({"many": source}, holdout_every=2)
    before = open_files()
    for split in ("train", "validation"):
        [built] = build_sources(config, seed=1, tokenizer=PlainTokenizer(), split=split)
        assert built.num_samples >= NUM_DATASETS
        for k in range(built.num_samples):
            assert len(built.sample(k).tokens) == 9
    assert open_files() == before


def test_merging_many_datasets(tmp_path: Path, few_files: None) -> None:
    prefixes = [Path(path) for path in write_datasets(tmp_path, NUM_DATASETS)]
    merge_datasets(prefixes, tmp_path / "merged_document")
    merged, mask = (
        IndexedDataset(tmp_path / f"merged_{name}") for name in ("document", "loss_mask")
    )
    assert len(merged) == len(mask) == 4 * NUM_DATASETS
    assert merged[-1].tolist() == merged[3].tolist()


def test_a_job_of_many_parts(
    tmp_path: Path, tiny_sentencepiece_model: Path, few_files: None
) -> None:
    jobs = Jobs(tmp_path, tiny_sentencepiece_model)
    (tmp_path / "in").mkdir()
    for k in range(NUM_DATASETS):
        jobs.lines(f"in/{k:03d}.jsonl", [{"en": f"bana {k}", "zh": "luno"}, {"en": "a", "zh": "b"}])
    sidecar = jobs.run(
        str(tmp_path / "in"),
        corpus=CorpusSettings(format="pairs"),
        num_partitions=NUM_DATASETS,
        dedup=True,
    )
    assert sidecar["num_documents"] == NUM_DATASETS + 1
    assert len(jobs.masks()) == NUM_DATASETS + 1


def test_hashes_spilled_many_times(
    tmp_path: Path, few_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "HASHES_PER_RUN", 2)
    seen = duplicates.SeenHashes(tmp_path)
    hashes = duplicates.hashes_of(str(k).encode() for k in range(4 * NUM_DATASETS))
    for begin in range(0, len(hashes), 2):
        assert seen.add(hashes[begin : begin + 2]).all()
    assert not seen.add(hashes).any()


def test_a_map_outlives_name_and_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    before = open_files()
    mapped = map_file(path)
    part = mapped[3:11].view("<i8")
    assert open_files() == before
    path.unlink()
    del mapped
    assert part.tobytes() == bytes(range(3, 11))
    release_pages(part)  # read only from the process's memory
    assert part.tobytes() == bytes(range(3, 11))
    assert not part.flags.writeable
    (tmp_path / "empty").touch()
    assert map_file(tmp_path / "empty").size == 0
    with pytest.raises(IsADirectoryError):
        map_file(tmp_path)


def test_pages_of_other_memory_are_not_released() -> None:
    array = np.arange(1 << 16)
    release_pages(array)
    assert array[-1] == (1 << 16) - 1


@pytest.mark.slow
def test_two_thousand_datasets_at_the_usual_limit(tiny_run: TinyRun, tmp_path: Path) -> None:
    paths = write_datasets(tmp_path, 2000)
    values = yaml.safe_load(tiny_run.config.read_text())
    shared = {"loss": "response", "boundaries": "isolate"}
    values["data"]["sources"] = {
        "windows": {"paths": paths[:1000], **shared},
        "packed": {"paths": paths[1000:], "packing": "best_fit", **shared},
    }
    values["data"]["schedule"]["knots"] = [{"at": 0, "weights": {"windows": 1, "packed": 1}}]
    values["data"]["holdout_every"] = 4
    with limit_of_open_files(1024):
        assert "packed" in dry_run(RunConfig.from_dict(values))
        assert merge_datasets(list(map(Path, paths)), tmp_path / "merged_document") == 8000
