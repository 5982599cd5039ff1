"""Tests sources whose files disappear during a run: a retry, then a clear error, never a crash."""

import logging
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_files import PlainTokenizer, data_config, numbered_documents, write_dataset

from megatron_chatflow.data import source as source_module
from megatron_chatflow.data.loader import Loader
from megatron_chatflow.data.source import SourceUnavailableError, build_sources

_LENGTH = 4096


class _Blend:
    """A blend of one source in its own order."""

    decided_samples = 2**62

    def take(self, begin, end):
        return np.zeros(end - begin, np.int16), np.arange(begin, end, dtype=np.int64)

    def counts(self, sample):
        return np.array([sample], np.int64)


def _source(folder: Path):
    prefix = write_dataset(folder / "long", numbered_documents([60000] * 4))
    config = data_config({"long": {"paths": [prefix]}}, seq_length=_LENGTH)
    return build_sources(config, seed=1, tokenizer=PlainTokenizer())[0]


def _loader(source, retry_seconds: float) -> Loader:
    return Loader(
        [source],
        _Blend(),
        seq_length=_LENGTH,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_prefetch=0,
        retry_seconds=retry_seconds,
    )


def test_a_source_that_comes_back_in_time_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(source_module, "_CHECK_SECONDS", 0.0)
    folder = tmp_path / "mounted"
    folder.mkdir()
    source = _source(folder)
    loader = _loader(source, retry_seconds=300)
    batches = loader.batches(0, 1)
    next(batches)
    expected = source.sample(1).tokens
    away = tmp_path / "away"
    shutil.move(folder, away)
    back = threading.Timer(1.5, lambda: shutil.move(away, folder))
    back.start()
    with caplog.at_level(logging.WARNING):
        batch = next(batches)
    back.join()
    loader.close()
    assert (batch.micro_batches[0].tokens[0].numpy() == expected[:-1]).all()
    assert [record.message for record in caplog.records if "retrying" in record.message] == [
        f"data.sources.long: {folder / 'long.bin'}: No such file or directory; retrying for 300 s"
    ]


def test_a_source_that_stays_away_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_CHECK_SECONDS", 0.0)
    folder = tmp_path / "mounted"
    folder.mkdir()
    loader = _loader(_source(folder), retry_seconds=1.0)
    batches = loader.batches(0, 1)
    next(batches)
    shutil.rmtree(folder)
    begin = time.monotonic()
    with pytest.raises(
        SourceUnavailableError, match=r"sources\.long: .*stayed unavailable for 1 s"
    ) as caught:
        next(batches)
    loader.close()
    assert time.monotonic() - begin >= 1.0
    assert "make it available, then resume the run" in str(caught.value)
