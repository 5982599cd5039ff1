"""Tests exact de-duplication: the first of equal documents is kept, whatever the memory limit."""

import random
from pathlib import Path

import numpy as np
import pytest
from preprocess_jobs import Jobs

from megatron_chatflow.preprocess import dedup as duplicates
from megatron_chatflow.preprocess import readers
from megatron_chatflow.preprocess.dedup import SeenHashes, hashes_of
from megatron_chatflow.preprocess.settings import CorpusSettings


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


@pytest.mark.parametrize("hashes_per_run", [1, 7, 1000])
def test_equals_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes_per_run: int) -> None:
    monkeypatch.setattr(duplicates, "HASHES_PER_RUN", hashes_per_run)
    generator = random.Random(hashes_per_run)
    seen, expected = SeenHashes(tmp_path), set()
    for _ in range(40):
        texts = [b"%d" % generator.randrange(150) for _ in range(generator.randrange(12))]
        is_new = seen.add(hashes_of(texts))
        for text, new in zip(texts, is_new.tolist(), strict=True):
            assert new == (text not in expected)
            expected.add(text)
    assert list(tmp_path.iterdir()) == []


def test_hashes_that_share_a_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "HASHES_PER_RUN", 3)
    seen = SeenHashes(tmp_path)
    hashes = np.array([[5, 1], [5, 2], [5, 3], [4, 9]], np.uint64)
    assert seen.add(hashes).tolist() == [True] * 4
    asked = np.array([[5, 3], [5, 1], [5, 4], [4, 9], [4, 1], [9, 9], [5, 4]], np.uint64)
    assert seen.add(asked).tolist() == [False, False, True, False, True, True, False]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_texts(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 60)
    first = ["bana", "kedo luno", "", "bana ", "\u4e00"]
    path = jobs.lines("a.jsonl", [{"text": text} for text in first])
    expected = jobs.run(path, append_eod=True)
    documents = jobs.documents()
    again = jobs.lines("b.jsonl", [{"text": text} for text in [*first[::-1], "bana"]])
    content = jobs.run(path, again, append_eod=True, dedup=True, num_workers=num_workers)
    assert jobs.documents() == documents
    assert content["dropped"] == {"empty": 2, "duplicate": 5}
    for name in ("num_documents", "num_tokens", "num_loss_tokens", "num_text_bytes"):
        assert content[name] == expected[name]


def test_chats_with_masks(jobs: Jobs) -> None:
    records = [{"instruction": "bana", "output": answer} for answer in ("kedo", "luno")]
    corpus = CorpusSettings(format="chat", json_keys=("messages",))
    jobs.run(jobs.lines("a.jsonl", records), corpus=corpus)
    documents, masks = jobs.documents("messages"), jobs.masks("messages")
    content = jobs.run(jobs.lines("b.jsonl", records * 3), corpus=corpus, dedup=True)
    assert (jobs.documents("messages"), jobs.masks("messages")) == (documents, masks)
    assert content["num_loss_tokens"] == sum(map(sum, masks))
    assert content["dropped"] == {"duplicate": 4}
