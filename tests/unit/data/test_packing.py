"""Packing: whole documents, best fit, kept on disk, computed by one of many processes."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
from data_files import BothReaders, numbered_documents, write_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_chatflow.data import build_once as build_once_module
from megatron_chatflow.data.build_once import build_once
from megatron_chatflow.data.packing import (
    PackedSamples,
    cached_packing,
    pack_documents,
    packing_key,
    packing_path,
)
from megatron_chatflow.data.packing_cache import load_packing, save_packing
from megatron_chatflow.data.samples import open_token_file
from megatron_chatflow.native.packing import best_fit, best_fit_reference
from megatron_chatflow.native.samples import DocumentLists, PackedReaderReference, SampleShape

PAD = 3
SHAPE = SampleShape(seq_length=7, pad_id=PAD, vocab_size=1 << 20, isolate=True)


def slow_best_fit(lengths, capacity):
    """The rule as it is stated, by looking at every sample every time."""
    rooms, reached, samples, clock = [], [], [-1] * len(lengths), 0
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        if lengths[document] == 0:
            continue
        fitting = [s for s in range(len(rooms)) if rooms[s] >= lengths[document]]
        if fitting:
            sample = min(fitting, key=lambda s: (rooms[s], -reached[s]))
        else:
            sample = len(rooms)
            rooms.append(capacity)
            reached.append(0)
        clock += 1
        rooms[sample] -= lengths[document]
        reached[sample] = clock
        samples[document] = sample
    first_seen = {}
    return [first_seen.setdefault(s, len(first_seen)) if s >= 0 else -1 for s in samples]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), max_size=60), slack=st.integers(0, 10))
@example(lengths=[], slack=1)
@example(lengths=[0, 0], slack=1)
def test_best_fit_is_the_rule_as_stated(lengths, slack):
    capacity = max(lengths, default=0) + slack
    samples = best_fit_reference(np.array(lengths, np.int64), capacity)
    assert samples.tolist() == slow_best_fit(lengths, capacity)
    assert best_fit(np.array(lengths, np.int64), capacity).tolist() == samples.tolist()
    filled = np.bincount(samples[samples >= 0], np.array(lengths)[samples >= 0])
    assert filled.max(initial=0) <= capacity


def test_best_fit_wastes_little():
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, 20_000).astype(np.int64).clip(1, 2049)
    samples = best_fit(lengths, 2049)
    assert np.array_equal(samples, best_fit_reference(lengths, 2049))
    num_samples = int(samples.max()) + 1
    assert num_samples == -(-int(lengths.sum()) // 2049)


@pytest.mark.parametrize("lengths", [[5], [-1]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    for packed in (best_fit, best_fit_reference):
        with pytest.raises(ValueError, match="not between 0 and 4"):
            packed(np.array(lengths), 4)


def open_files(folder, lengths_by_file):
    documents = numbered_documents(np.concatenate(lengths_by_file))
    prefixes, first = [], 0
    for number, lengths in enumerate(lengths_by_file):
        part = documents[first : first + len(lengths)]
        masks = [np.arange(len(document)) % 2 for document in part]
        prefixes.append(write_dataset(folder / f"{number}_document", part, masks=masks))
        first += len(lengths)
    return [open_token_file(prefix, with_loss_mask=True) for prefix in prefixes], documents


def read_both(files, packing):
    counts = [0, *np.cumsum([file.num_documents for file in files])]
    lists = DocumentLists(np.array(counts, np.int64), packing.offsets, packing.documents)
    return BothReaders(
        PackedSamples("source", files, packing, SHAPE),
        PackedReaderReference("source", files, lists, SHAPE),
    )


def test_packed_samples_by_hand(tmp_path):
    files, documents = open_files(tmp_path, [[3, 9, 4], [0, 2, 1]])
    packing = pack_documents(files, "train", None, seq_length=7)
    # 8 of the 9 tokens fill a sample; 4 + 3 + 1 and 2 remain.
    assert (packing.num_samples, packing.num_tokens) == (3, 18)
    assert (packing.num_truncated, packing.num_truncated_tokens) == (1, 1)
    reader = read_both(files, packing)
    first, second, third = (reader.read(k) for k in range(3))
    assert first.tokens.tolist() == [*documents[0], *documents[2], *documents[5]]
    assert first.cu_seqlens.tolist() == [0, 3, 7]
    assert first.loss_mask.tolist() == [1, 0, 0, 1, 0, 1, 0]
    assert second.tokens.tolist() == documents[1][:8].tolist()
    assert second.cu_seqlens.tolist() == [0, 7]
    assert third.tokens.tolist() == [*documents[4], *[PAD] * 6]
    assert third.cu_seqlens.tolist() == [0, 2, 7]
    assert third.loss_mask.tolist() == [1, 0, 0, 0, 0, 0, 0]
    for ordinal in (-1, 3):
        with pytest.raises(ValueError, match="is not one of 3"):
            reader.read(ordinal)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 14), max_size=15), min_size=1, max_size=3),
    holdout_every=st.sampled_from([None, 2, 3]),
    split=st.sampled_from(["train", "validation"]),
)
def test_every_document_of_the_split_comes_once(tmp_path_factory, lengths, holdout_every, split):
    files, documents = open_files(tmp_path_factory.mktemp("packing"), lengths)
    packing = pack_documents(files, split, holdout_every, seq_length=7)
    reader = read_both(files, packing)
    found = []
    for ordinal in range(reader.num_samples):
        sample = reader.read(ordinal)
        bounds = sample.cu_seqlens.tolist()
        for begin, end in zip(bounds, bounds[1:], strict=False):
            segment = sample.tokens[begin : end + 1 if end == 7 else end]
            segment = segment[segment >= 10]
            found += np.split(segment, np.flatnonzero(np.diff(segment) != 1) + 1)
        padding = sample.tokens[1:] == PAD
        assert not sample.loss_mask[padding].any()
    number = 0
    expected = []
    for file_lengths in lengths:
        for local in range(len(file_lengths)):
            held_out = holdout_every is not None and local % holdout_every == holdout_every - 1
            if holdout_every is None or held_out == (split == "validation"):
                expected += documents[number][:8].tolist()
            number += 1
    assert sorted(int(token) for part in found for token in part) == sorted(expected)
    assert reader.num_tokens == len(expected)


def test_the_cache_is_read_again_and_rebuilt_when_stale(tmp_path, caplog):
    files, _ = open_files(tmp_path, [[3, 9, 4, 2, 2, 6]])
    arguments = (files, [{"content": 1}], "train", None)
    packing = cached_packing(*arguments, 7)
    [path] = tmp_path.glob("*.packing.*")
    written = path.stat().st_mtime_ns
    again = cached_packing(*arguments, 7)
    assert path.stat().st_mtime_ns == written
    assert again.offsets.tolist() == packing.offsets.tolist()
    assert again.documents.tolist() == packing.documents.tolist()
    assert (again.num_tokens, again.num_truncated) == (packing.num_tokens, packing.num_truncated)
    assert cached_packing(files, [{"content": 2}], "train", None, 7).num_samples
    assert cached_packing(*arguments, 3).num_samples > packing.num_samples
    assert len(list(tmp_path.glob("*.packing.*"))) == 3
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert cached_packing(*arguments, 7).documents.tolist() == packing.documents.tolist()
    assert path.read_bytes() != bytes(damaged)


def test_damaged_caches_count_as_absent(tmp_path):
    files, _ = open_files(tmp_path, [[3, 4, 2]])
    packing = pack_documents(files, "train", None, 7)
    key, path = packing_key([{}], seq_length=7), tmp_path / "cache"
    save_packing(path, key, packing)
    whole = path.read_bytes()
    assert load_packing(path, key) is not None
    assert load_packing(path, bytes(16)) is None
    for damage in (b"", whole[:50], whole[:-8], whole + bytes(8), b"X" + whole[1:]):
        path.write_bytes(damage)
        assert load_packing(path, key) is None
    path.unlink()
    assert load_packing(path, key) is None


def test_a_packing_that_cannot_be_written_is_kept_in_memory(tmp_path, caplog):
    files, _ = open_files(tmp_path, [[3, 4, 2]])
    key = packing_key([{}], split="train", holdout_every=None, seq_length=7)
    path = packing_path(files[0].name, key)
    # A folder in the way stops root too, whom permissions do not.
    path.with_name(path.name + ".partial").mkdir()
    packing = cached_packing(files, [{}], "train", None, 7)
    assert packing.num_samples == 2
    assert not path.exists()
    assert "kept in memory" in caplog.text


def test_where_no_lock_can_be_made_everyone_builds(tmp_path, caplog):
    content = build_once(
        tmp_path / "missing" / "target", load=lambda: None, build=lambda: 5, save=lambda _: None
    )
    assert content == 5
    assert "built in memory" in caplog.text


def _build_in_process(folder, number, barrier):
    def build():
        (folder / f"built_by_{number}").touch()
        time.sleep(0.3)
        return "content"

    def save(content):
        beside = folder / f"target.{number}"
        beside.write_text(content)
        beside.rename(target)

    target = folder / "target"
    barrier.wait()
    content = build_once(
        target,
        load=lambda: target.read_text() if target.exists() else None,
        build=build,
        save=save,
    )
    (folder / f"got_{content}_{number}").touch()


def test_one_process_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=_build_in_process, args=(tmp_path, number, barrier))
        for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("built_by_*"))) == 1
    assert len(list(tmp_path.glob("got_content_*"))) == 4
    assert not list(tmp_path.glob("*.lock"))


def build_beside_lock(folder, **kwargs):
    saved = []
    content = build_once(
        folder / "target", load=lambda: None, build=lambda: 5, save=saved.append, **kwargs
    )
    return content, saved


def test_the_lock_of_a_dead_process_is_removed(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    process.join()
    owner = {**build_once_module._owner(), "pid": process.pid}
    (tmp_path / "target.lock").write_text(str(owner).replace("'", '"'))
    assert build_beside_lock(tmp_path) == (5, [5])


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 1}', "", "[1]", '{"pid": "x"}'])
def test_a_lock_that_nobody_touches_is_removed(tmp_path, content):
    (tmp_path / "target.lock").write_text(content)
    assert build_beside_lock(tmp_path, stale_seconds=0.2) == (5, [5])
    assert not list(tmp_path.glob("*.lock"))


def test_a_lock_that_is_touched_is_respected(tmp_path):
    lock = tmp_path / "target.lock"
    lock.write_text('{"host": "elsewhere", "pid": 1}')
    released = threading.Event()
    result = []
    builder = threading.Thread(
        target=lambda: result.append(
            build_once(
                tmp_path / "target",
                load=lambda: "theirs" if released.is_set() else None,
                build=lambda: "ours",
                save=lambda content: None,
                stale_seconds=0.6,
            )
        )
    )
    builder.start()
    for _ in range(15):
        time.sleep(0.1)
        os.utime(lock)
    assert not result
    released.set()
    builder.join()
    assert result == ["theirs"]
