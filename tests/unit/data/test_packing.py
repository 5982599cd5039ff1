"""Tests packing: whole documents, best fit, and the cache on disk."""

import tempfile

import numpy as np
import pytest
from data_files import BothReaders, numbered_documents, write_dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_chatflow.data import packing as packing_module
from megatron_chatflow.data.packing import (
    best_fit,
    best_fit_reference,
    build_once,
    cached_packing,
    load_packing,
    make_packed_samples,
    pack_documents,
    packing_key,
    save_packing,
)
from megatron_chatflow.data.samples import (
    DocumentLists,
    PackedReaderReference,
    SampleShape,
    open_token_file,
)
from megatron_chatflow.files import FileLock

PAD = 3
SHAPE = SampleShape(seq_length=7, pad_id=PAD, vocab_size=1 << 20, isolate=True)


def slow_best_fit(lengths, capacity):
    """Implements the rule as stated, by scanning all samples at every step."""
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


def samples_of(packed, num_documents):
    """Returns the sample of each document in the result of `best_fit`, -1 for none."""
    offsets, documents = packed
    samples = np.full(num_documents, -1)
    samples[documents] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    assert all(np.diff(part).min(initial=1) > 0 for part in np.split(documents, offsets[1:-1]))
    return samples


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), max_size=60), slack=st.integers(0, 10))
@example(lengths=[], slack=1)
@example(lengths=[0, 0], slack=1)
def test_best_fit_is_the_rule_as_stated(lengths, slack):
    capacity = max(lengths, default=0) + slack
    for packed in (best_fit_reference, best_fit):
        samples = samples_of(packed(np.array(lengths, np.int64), capacity), len(lengths))
        assert samples.tolist() == slow_best_fit(lengths, capacity)
    filled = np.bincount(samples[samples >= 0], np.array(lengths)[samples >= 0])
    assert filled.max(initial=0) <= capacity


def test_best_fit_wastes_little():
    lengths = np.random.default_rng(0).lognormal(5.0, 1.0, 20_000).astype(np.int64).clip(1, 2049)
    num_tokens = int(lengths.sum())
    expected = best_fit_reference(lengths, 2049)
    offsets, documents = best_fit(lengths.astype(np.int32), 2049)
    assert np.array_equal(offsets, expected[0]) and np.array_equal(documents, expected[1])
    assert len(offsets) - 1 == -(-num_tokens // 2049)


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
        make_packed_samples("source", files, packing, SHAPE),
        PackedReaderReference("source", files, lists, SHAPE),
    )


def test_packed_samples_by_hand(tmp_path):
    files, documents = open_files(tmp_path, [[3, 9, 4], [0, 2, 1]])
    packing = pack_documents(files, "train", None, seq_length=7)
    # 8 of the 9 tokens fill a sample. 4 + 3 tokens and 2 tokens remain. A single token is no label.
    assert (packing.num_samples, packing.num_tokens) == (3, 17)
    assert (packing.num_truncated, packing.num_truncated_tokens) == (1, 1)
    assert packing.num_without_loss == 1
    reader = read_both(files, packing)
    first, second, third = (reader.read(k) for k in range(3))
    assert first.tokens.tolist() == [*documents[0], *documents[2], PAD]
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
            has_labels = file_lengths[local] > 1
            if has_labels and (holdout_every is None or held_out == (split == "validation")):
                expected += documents[number][:8].tolist()
            number += 1
    assert sorted(int(token) for part in found for token in part) == sorted(expected)
    assert reader.num_tokens == len(expected)


def documents_with_masks(folder, masks, name="x_document"):
    """Opens a dataset of numbered documents with these loss masks, with and without the masks."""
    documents = numbered_documents([len(mask) for mask in masks])
    prefix = write_dataset(folder / name, documents, masks=masks)
    return [open_token_file(prefix, with_loss_mask=loss) for loss in (True, False)]


def test_documents_without_loss_tokens_are_left_out(tmp_path):
    masks = [
        [0, 0, 1, 1],  # kept
        [0] * 5,  # no loss token
        [1, 0, 0],  # its only loss token is the first token, which is no label
        [0] * 8 + [1] * 4,  # a prompt longer than a sample
        [0] * 7 + [1] * 4,  # the cut leaves a single loss token
        [],
        [1],
    ]
    masked, plain = documents_with_masks(tmp_path, masks)
    packing = pack_documents([masked], "train", None, seq_length=7)
    assert sorted(packing.documents.tolist()) == [0, 4]
    assert (packing.num_without_loss, packing.num_tokens) == (4, 12)
    assert (packing.num_truncated, packing.num_truncated_tokens) == (1, 3)
    for ordinal in range(packing.num_samples):
        assert read_both([masked], packing).read(ordinal).loss_mask.any()
    # With loss on all tokens, only the document of a single token has no label.
    packing = pack_documents([plain], "train", None, seq_length=7)
    assert sorted(packing.documents.tolist()) == [0, 1, 2, 3, 4]
    assert packing.num_without_loss == 1
    # With two files and a split.
    packing = pack_documents([plain, masked], "validation", 2, seq_length=7)
    assert sorted(packing.documents.tolist()) == [1, 3]
    assert packing.num_without_loss == 2


@settings(max_examples=50, deadline=None)
@given(
    masks=st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=12), block=st.integers(1, 5)
)
def test_loss_tokens_are_counted_in_blocks(tmp_path_factory, masks, block):
    masked, _ = documents_with_masks(tmp_path_factory.mktemp("masks"), masks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "_BLOCK", block)
        packing = pack_documents([masked], "train", None, seq_length=7)
    expected = [number for number, mask in enumerate(masks) if any(mask[1:8])]
    assert sorted(packing.documents.tolist()) == expected
    assert packing.num_without_loss == sum(map(bool, masks)) - len(expected)


def test_the_cache_knows_loss_masks(tmp_path):
    masks = [[0, 1, 1], [0, 0], [0, 1]]
    masked, plain = documents_with_masks(tmp_path, masks)
    assert cached_packing([masked], [{}], "train", None, 7).num_without_loss == 1
    assert cached_packing([plain], [{}], "train", None, 7).num_without_loss == 0
    [masked, _] = documents_with_masks(tmp_path, [[0, 1, 1], [0, 1], [0, 1]])
    assert cached_packing([masked], [{}], "train", None, 7).num_without_loss == 0
    assert cached_packing([masked], [{}], "train", None, 7).num_without_loss == 0
    assert len(list(tmp_path.glob("*.packing.*"))) == 3


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
    key, path = packing_key([{}], 2, seq_length=7), tmp_path / "cache"
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
    cached_packing(files, [{}], "train", None, 7)
    [path] = tmp_path.glob("*.packing.*")
    path.unlink()
    # A folder at this path also stops root, which ignores permissions.
    path.with_name(path.name + ".partial").mkdir()
    packing = cached_packing(files, [{}], "train", None, 7)
    assert packing.num_samples == 2
    assert not path.exists()
    assert "keeping it in memory" in caplog.text


def test_where_no_lock_can_be_made_everyone_builds(tmp_path, caplog):
    content = build_once(
        tmp_path / "missing" / "target", load=lambda: None, build=lambda: 5, save=lambda _: None
    )
    assert content == 5
    assert "building in memory" in caplog.text


def test_a_lock_file_left_by_a_killed_process_does_not_matter(tmp_path):
    (tmp_path / "target.lock").write_text('{"host": "elsewhere", "pid": 1}')
    saved = []
    content = build_once(tmp_path / "target", load=lambda: None, build=lambda: 5, save=saved.append)
    assert (content, saved) == (5, [5])
    assert not list(tmp_path.iterdir())


def test_without_locks_of_the_file_system_a_process_per_machine_builds(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "local").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    acquire = FileLock.acquire
    used = []

    def without_flock(path, **kwargs):
        lock = acquire(path, **kwargs)
        used.append(path.parent.name)
        lock.is_effective = path.parent.name == "local"
        return lock

    monkeypatch.setattr(FileLock, "acquire", without_flock)
    target = tmp_path / "shared" / "target"
    content = build_once(target, load=lambda: None, build=lambda: 5, save=lambda content: None)
    assert content == 5 and used == ["shared", "local"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
