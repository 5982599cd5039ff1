"""Tests that any split of a global batch has the same samples and that errors reach the caller."""

import os
import threading
import time

import numpy as np
import pytest
import torch
from data_files import PlainTokenizer, data_config, numbered_documents, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.data import source as source_module
from megatron_chatflow.data.loader import Loader, collate, combine_digests, sample_digest
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.errors import UserError

SEQ_LENGTH = 8
BATCH = 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    random = np.random.default_rng(0)
    config = {}
    for name, num_documents in (("english", 60), ("chinese", 30), ("chat", 40)):
        documents = numbered_documents(random.integers(0, 12, num_documents))
        masks = [random.integers(0, 2, len(document)) for document in documents]
        path = write_dataset(folder / f"{name}_document", documents, np.uint16, masks)
        config[name] = {"paths": [path]}
    config["chinese"]["boundaries"] = "isolate"
    config["chat"] |= {"loss": "response", "packing": "best_fit"}
    return build_sources(data_config(config), seed=1, tokenizer=PlainTokenizer())


def make_blend():
    block = {
        "knots": [
            {"at": 0, "weights": {"english": 0.7, "chinese": 0.2, "chat": 0.1}},
            {"at": 100, "weights": {"english": 0.1, "chinese": 0.4, "chat": 0.5}, "ramp": "linear"},
        ]
    }
    names = ["english", "chinese", "chat"]
    return Blend(Schedule.from_dict(block, names, samples_per_iteration=BATCH, seq_length=8))


def load(sources, begin, num_batches, *, ranks=1, micro=1, size=BATCH, prefetch=2, threads=1):
    """Returns the batches of every rank: for each rank a list by iteration."""
    result = [[] for _ in range(num_batches)]
    for rank in range(ranks):
        loader = Loader(
            sources,
            make_blend(),
            seq_length=SEQ_LENGTH,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            num_prefetch=prefetch,
            num_threads=threads,
        )
        batches = loader.batches(begin, size)
        for number in range(num_batches):
            result[number].append(next(batches))
        loader.close()
    return result


def in_sample_order(parts):
    """Returns the samples of a global batch from all ranks, in order, and the batch's hash."""
    positions = torch.cat([part.sample_positions for part in parts])
    order = positions.argsort()
    fields = {}
    for field in ("tokens", "labels", "loss_mask", "source", "sample_index"):
        rows = torch.cat([getattr(m, field) for part in parts for m in part.micro_batches])
        fields[field] = rows[order].tolist()
    digests = torch.cat([part.sample_digests for part in parts])[order]
    return positions[order].tolist(), fields, combine_digests(digests)


@settings(max_examples=40, deadline=None)
@given(
    cut=st.sampled_from([(1, 1), (1, 12), (2, 1), (2, 3), (3, 2), (3, 4), (4, 3), (12, 1), (6, 2)]),
    prefetch=st.integers(0, 3),
    threads=st.integers(1, 3),
    skipped=st.integers(0, 3),
)
def test_any_cut_holds_the_same_samples(sources, cut, prefetch, threads, skipped):
    reference = load(sources, 0, 5)
    begin = skipped * BATCH
    loaded = load(
        sources,
        begin,
        5 - skipped,
        ranks=cut[0],
        micro=cut[1],
        prefetch=prefetch,
        threads=threads,
    )
    for expected, found in zip(reference[skipped:], loaded, strict=True):
        assert in_sample_order(found) == in_sample_order(expected)
        for part in found:
            assert (part.begin, part.end) == (expected[0].begin, expected[0].end)
            assert part.num_drawn.tolist() == expected[0].num_drawn.tolist()


def test_another_batch_size_goes_on_with_the_same_samples(sources):
    whole = [in_sample_order(parts) for parts in load(sources, 0, 3, size=12)]
    halves = [in_sample_order(parts) for parts in load(sources, 0, 6, size=6, ranks=2, micro=3)]
    tokens = [row for _, fields, _ in whole for row in fields["tokens"]]
    assert tokens == [row for _, fields, _ in halves for row in fields["tokens"]]


def test_a_batch_is_what_the_blend_and_the_sources_say(sources):
    source, index = make_blend().take(24, 36)
    [[batch]] = load(sources, 24, 1, micro=4)
    assert (batch.begin, batch.end, len(batch.micro_batches)) == (24, 36, 3)
    assert batch.num_drawn.tolist() == np.bincount(source, minlength=3).tolist()
    for number, micro_batch in enumerate(batch.micro_batches):
        assert micro_batch.tokens.dtype == micro_batch.labels.dtype == torch.int64
        assert micro_batch.loss_mask.dtype == torch.float32
        assert micro_batch.cu_seqlens.dtype == torch.int32
        begins = []
        for row in range(4):
            place = number * 4 + row
            sample = sources[source[place]].sample(int(index[place]))
            assert micro_batch.tokens[row].tolist() == sample.tokens[:-1].tolist()
            assert micro_batch.labels[row].tolist() == sample.tokens[1:].tolist()
            assert micro_batch.loss_mask[row].tolist() == sample.loss_mask.tolist()
            assert micro_batch.source[row] == source[place]
            assert micro_batch.sample_index[row] == index[place]
            digest = sample_digest(sample.tokens, sample.loss_mask)
            assert batch.sample_digests[place].tolist() == digest.tolist()
            begins += [row * SEQ_LENGTH + begin for begin in sample.cu_seqlens[:-1].tolist()]
        assert micro_batch.cu_seqlens.tolist() == [*begins, 4 * SEQ_LENGTH]


def test_micro_batches_interleave_the_ranks(sources):
    [[first, second]] = load(sources, 0, 1, ranks=2, micro=3)
    assert first.sample_positions.tolist() == [0, 1, 2, 6, 7, 8]
    assert second.sample_positions.tolist() == [3, 4, 5, 9, 10, 11]


def make_loader(sources, **kwargs):
    place = {"micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 2}
    return Loader(sources, make_blend(), seq_length=SEQ_LENGTH, **{**place, **kwargs})


@pytest.mark.parametrize("size", [0, -4, 6, 1])
def test_batches_that_do_not_divide_are_refused(sources, size):
    loader = make_loader(sources)
    with pytest.raises(UserError, match=f"train.global_batch_size: {size} is not a multiple"):
        loader.batches(0, size)
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_threads_reach_the_caller(tmp_path, monkeypatch, prefetch):
    monkeypatch.setattr(source_module, "_CHECK_SECONDS", 0.0)
    path = write_dataset(tmp_path / "a_document", numbered_documents([500]))
    names = ["english", "chinese", "chat"]
    config = data_config({name: {"paths": [path]} for name in names})
    sources = build_sources(config, seed=1, tokenizer=PlainTokenizer())
    loader = make_loader(sources, num_prefetch=prefetch)
    batches = loader.batches(0, 4)
    next(batches)
    os.remove(f"{path}.bin")
    with pytest.raises(UserError, match=r"data\.sources\.\w+: .*a_document\.bin: No such file"):
        for _ in range(prefetch + 2):
            time.sleep(0.001)
            next(batches)
    loader.close()


def test_ids_outside_the_vocabulary_name_the_source(tmp_path):
    tokens = np.full(40_000 * 20, 5)
    tokens[45_000] = 70
    path = write_dataset(tmp_path / "a_document", [tokens])
    tokenizer = PlainTokenizer(vocab_size=64)
    [source] = build_sources(
        data_config({"english": {"paths": [path]}}), seed=1, tokenizer=tokenizer
    )
    with pytest.raises(UserError, match=r"data\.sources\.english: .*token 45000 is id 70"):
        source.sample_in_order(45_000 // 8)


def test_close_ends_the_threads(sources):
    before = threading.active_count()
    loader = make_loader(sources, num_threads=2)
    next(loader.batches(0, 4))
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_collate_of_one_sample_of_one_segment(sources):
    sample = sources[0].sample(0)
    batch = collate([sample], [0], [7])
    assert batch.cu_seqlens.tolist() == [0, SEQ_LENGTH]
    assert batch.sample_index.tolist() == [7]
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()
