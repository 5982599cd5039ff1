"""Tests that the loader benchmark gives a row for every contender, on small corpora."""

import argparse

from benchmarks import loader
from benchmarks.corpora import write_corpus, write_sparse_corpus
from benchmarks.loader import OURS, PEER, OurBatches, OurDataset, PeerDataset
from megatron_chatflow.data.indexed import IndexedDataset


def parse(*flags):
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", action="store_true")
    loader.add_arguments(parser)
    return parser.parse_args(flags)


def test_every_contender_has_a_row(tmp_path):
    small = ["--num-tokens", "200000", "--seq-length", "32", "--num-samples", "128"]
    rows = loader.run(parse("--peers", *small))
    whats = ["window", "window, documents isolated", "packed documents"]
    assert [row["what"] for row in rows if row["by"] == OURS] == [
        *whats,
        "batch of 64 from a blend",
    ]
    assert [row["what"] for row in rows if row["by"] == PEER] == [
        *whats[:2],
        "batch of 64 from a blend",
    ]
    for row in rows:
        assert 0 < row["best_us_per_sample"] <= row["us_per_sample"]
        assert row["start_seconds"] > 0
        assert (row["index_bytes"] > 0) == (row["by"] == PEER or "packed" in row["what"])


def test_both_contenders_cut_as_many_samples_from_the_same_tokens(tmp_path):
    prefix = tmp_path / "corpus_document"
    write_corpus(prefix, 200_000)
    ours, peer = OurDataset(prefix, 64), PeerDataset(prefix, 64)
    assert ours.num_samples == peer.num_samples
    stream = IndexedDataset(prefix).tokens.tolist()
    assert ours.source.sample_in_order(5).tokens.tolist() == stream[5 * 64 : 6 * 64 + 1]


def test_batches_come_as_asked_and_again_from_the_start(tmp_path):
    prefix = tmp_path / "corpus_document"
    write_corpus(prefix, 100_000)
    batches = OurBatches(prefix, 32)
    first = batches.batch(0, 64, 4)
    assert (first.begin, first.end, len(first.micro_batches)) == (0, 64, 16)
    assert batches.batch(64, 128, 4).begin == 64
    again = batches.batch(0, 64, 4)
    assert again.sample_digests.tolist() == first.sample_digests.tolist()


def test_a_sparse_corpus_is_read_at_its_end(tmp_path):
    prefix = tmp_path / "sparse_document"
    write_sparse_corpus(prefix, 10**10)
    ours = OurDataset(prefix, 4096)
    assert ours.num_samples == (10**10 - 1) // 4096
    assert not ours.source.sample_in_order(ours.num_samples - 1).tokens.any()
