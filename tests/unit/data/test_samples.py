"""Tests windows over documents: every token once, boundaries, loss masks, padding."""

import numpy as np
import pytest
from data_files import BothReaders, numbered_documents, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.data.samples import (
    SampleShape,
    WindowReaderReference,
    documents_in_split,
    make_windows,
    open_token_file,
    split_runs,
)
from megatron_chatflow.data.sidecar import loss_mask_prefix
from megatron_chatflow.errors import UserError

PAD = 3


def shape(seq_length=8, isolate=False, vocab_size=1 << 20):
    return SampleShape(seq_length, PAD, vocab_size, isolate)


def reader_of(
    prefixes, *, split="train", holdout_every=None, keep_tail=False, loss=False, **kwargs
):
    files = [open_token_file(prefix, with_loss_mask=loss) for prefix in prefixes]
    runs = split_runs(files, split, holdout_every)
    windows = make_windows("source", files, runs, shape(**kwargs), keep_tail=keep_tail)
    return BothReaders(
        windows,
        WindowReaderReference("source", files, runs, shape(**kwargs), windows.num_samples),
    )


def expected_sample(documents, masks, ordinal, seq_length, isolate):
    """Returns the expected window, cut from the concatenation of all documents."""
    tokens = np.concatenate([np.asarray(d, np.int64) for d in documents] + [np.empty(0, np.int64)])
    mask = np.concatenate([np.asarray(m, np.int64) for m in masks] + [np.empty(0, np.int64)])
    starts = np.cumsum([0] + [len(d) for d in documents])
    begin = ordinal * seq_length
    cut, cut_mask = tokens[begin : begin + seq_length + 1], mask[begin : begin + seq_length + 1]
    num_padding = seq_length + 1 - len(cut)
    cut_mask = np.concatenate([cut_mask, np.zeros(num_padding, np.int64)])
    begins = {0}
    if isolate:
        inside = {int(s) - begin for s in starts if begin < s <= begin + seq_length}
        for start in inside:
            cut_mask[start] = 0
        begins |= {s for s in inside if s < seq_length}
    return (
        np.concatenate([cut, np.full(num_padding, PAD)]),
        cut_mask[1:],
        [*sorted(begins), seq_length],
    )


@pytest.mark.parametrize("isolate", [False, True])
def test_a_window_by_hand(tmp_path, isolate):
    prefix = write_dataset(tmp_path / "a_document", [[10, 11, 12], [13, 14], [], [15, 16, 17, 18]])
    reader = reader_of([prefix], seq_length=4, isolate=isolate)
    assert (reader.num_samples, reader.num_tokens) == (2, 9)
    first, second = reader.read(0), reader.read(1)
    assert first.tokens.tolist() == [10, 11, 12, 13, 14]
    assert second.tokens.tolist() == [14, 15, 16, 17, 18]
    assert (first.tokens.dtype, first.loss_mask.dtype) == (np.int32, np.uint8)
    if isolate:
        assert first.cu_seqlens.tolist() == [0, 3, 4]
        assert first.loss_mask.tolist() == [1, 1, 0, 1]
        assert second.cu_seqlens.tolist() == [0, 1, 4]
        assert second.loss_mask.tolist() == [0, 1, 1, 1]
    else:
        assert first.cu_seqlens.tolist() == [0, 4]
        assert first.loss_mask.tolist() == [1, 1, 1, 1]


def test_a_document_that_begins_at_the_last_label_carries_no_loss(tmp_path):
    prefix = write_dataset(tmp_path / "a_document", [[10, 11, 12, 13], [14, 15, 16]])
    sample = reader_of([prefix], seq_length=4, isolate=True).read(0)
    assert sample.cu_seqlens.tolist() == [0, 4]
    assert sample.loss_mask.tolist() == [1, 1, 1, 0]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_windows_equal_the_joined_documents(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("windows")
    files = data.draw(
        st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=4), label="lengths"
    )
    seq_length = data.draw(st.integers(1, 9))
    isolate, keep_tail, loss = (data.draw(st.booleans()) for _ in range(3))
    holdout_every = data.draw(st.sampled_from([None, 2, 3, 5]))
    split = data.draw(st.sampled_from(["train", "validation"]))
    dtypes = [data.draw(st.sampled_from([np.uint16, np.int32, np.int64])) for _ in files]
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    prefixes, documents, masks = [], [], []
    for number, (lengths, dtype) in enumerate(zip(files, dtypes, strict=True)):
        file_documents = [random.integers(0, 60000, length) for length in lengths]
        file_masks = [random.integers(0, 2, length) for length in lengths]
        prefix = folder / f"{number}_document"
        prefixes.append(write_dataset(prefix, file_documents, dtype, file_masks))
        kept = np.flatnonzero(documents_in_split(0, len(lengths), split, holdout_every))
        documents += [file_documents[k] for k in kept]
        masks += [file_masks[k] if loss else np.ones(lengths[k], np.int64) for k in kept]
    reader = reader_of(
        prefixes,
        split=split,
        holdout_every=holdout_every,
        keep_tail=keep_tail,
        loss=loss,
        seq_length=seq_length,
        isolate=isolate,
    )
    num_labels = max(sum(map(len, documents)) - 1, 0)
    expected = -(-num_labels // seq_length) if keep_tail else num_labels // seq_length
    assert reader.num_samples == expected
    for ordinal in range(reader.num_samples):
        sample = reader.read(ordinal)
        tokens, mask, cu_seqlens = expected_sample(documents, masks, ordinal, seq_length, isolate)
        assert sample.tokens.tolist() == tokens.tolist()
        assert sample.loss_mask.tolist() == mask.tolist()
        assert sample.cu_seqlens.tolist() == cu_seqlens


def test_sequences_of_one_document_form_one_segment(tmp_path):
    """Megatron-LM may split a document into several sequences, one per sentence."""
    writer = IndexedDatasetWriter(tmp_path / "a_document", np.int32)
    tokens, lengths = np.arange(10, 20, dtype=np.int32), np.array([2, 3, 1, 4], np.int32)
    writer.add_sequences(tokens, lengths, np.array([2, 4], np.int64))
    writer.finalize()
    sample = reader_of([tmp_path / "a_document"], seq_length=9, isolate=True).read(0)
    assert sample.cu_seqlens.tolist() == [0, 5, 9]


@pytest.mark.parametrize("holdout_every", [2, 3, 7])
def test_training_and_validation_share_no_document(tmp_path, holdout_every):
    lengths = np.random.default_rng(5).integers(0, 30, 40)
    documents = numbered_documents(lengths)
    prefixes = [
        write_dataset(tmp_path / "a_document", documents[:25]),
        write_dataset(tmp_path / "b_document", documents[25:]),
    ]
    seen = {}
    for split in ("train", "validation"):
        reader = reader_of(
            prefixes, split=split, holdout_every=holdout_every, keep_tail=True, seq_length=1
        )
        seen[split] = {int(reader.read(k).tokens[0]) for k in range(reader.num_samples)}
        seen[split].add(int(reader.read(reader.num_samples - 1).tokens[1]))
    held_out = [d for d in range(25) if d % holdout_every == holdout_every - 1]
    held_out += [25 + d for d in range(15) if d % holdout_every == holdout_every - 1]
    expected = set(np.concatenate([documents[d] for d in held_out]).tolist())
    assert seen["validation"] == expected
    assert seen["train"] == set(np.concatenate(documents).tolist()) - expected


def test_ids_outside_the_vocabulary_are_named(tmp_path):
    prefix = write_dataset(tmp_path / "a_document", [[10, 11, 12, 999, 14, 15]])
    reader = reader_of([prefix], seq_length=4, vocab_size=100)
    with pytest.raises(ValueError, match=r"a_document: token 3 is id 999, outside .* of 100"):
        reader.read(0)
    prefix = write_dataset(tmp_path / "b_document", [[10, -1, 12, 9]])
    with pytest.raises(ValueError, match="token 1 is id -1"):
        reader_of([prefix], seq_length=3).read(0)


@pytest.mark.parametrize("ordinal", [-1, 2, 3, 10**15])
def test_windows_outside_are_refused(tmp_path, ordinal):
    prefix = write_dataset(tmp_path / "a_document", [np.arange(13)])
    with pytest.raises(ValueError, match="is not one of 2"):
        reader_of([prefix], seq_length=5).read(ordinal)


def test_loss_masks_must_fit(tmp_path):
    prefix = write_dataset(tmp_path / "a_document", [[10, 11], [12]], masks=[[0, 1], [1]])
    assert loss_mask_prefix(prefix) == tmp_path / "a_loss_mask"
    assert open_token_file(prefix, with_loss_mask=True).loss_mask.tolist() == [0, 1, 1]
    prefix = write_dataset(tmp_path / "b_document", [[10, 11], [12]])
    with pytest.raises(UserError, match="no loss masks for .*b_document.*or set loss: all"):
        open_token_file(prefix, with_loss_mask=True)
    prefix = write_dataset(tmp_path / "c_document", [[10, 11], [12]], masks=[[0], [1, 1]])
    with pytest.raises(UserError, match="loss masks do not fit: .*c_loss_mask"):
        open_token_file(prefix, with_loss_mask=True)
    prefix = write_dataset(tmp_path / "d_document", [[1.0]], np.float32)
    with pytest.raises(UserError, match="contains float32"):
        open_token_file(prefix, with_loss_mask=False)
