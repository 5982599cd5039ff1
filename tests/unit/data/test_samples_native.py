"""Tests that compiled samples, packing, order and batches equal the references.

This includes damaged data.

The sanitizer build also runs this file, which detects reads outside of an array.
"""

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_chatflow.data.indexed import IndexedDatasetWriter
from megatron_chatflow.data.loader import Buffers, read_rows, read_rows_reference
from megatron_chatflow.data.packing import (
    Packing,
    best_fit,
    best_fit_reference,
    load_packing,
    make_packed_samples,
    pack_documents,
    save_packing,
)
from megatron_chatflow.data.permutation import permute, permute_reference
from megatron_chatflow.data.samples import (
    DocumentLists,
    PackedReaderReference,
    Runs,
    SampleShape,
    TokenFile,
    WindowReaderReference,
    make_packed_reader,
    make_window_reader,
    make_windows,
    open_token_file,
    split_runs,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime import load_extension

pytestmark = pytest.mark.native

extension = load_extension("data")

SHAPE = SampleShape(seq_length=7, pad_id=3, vocab_size=50_000, isolate=True)
EDGES = [-(2**63), -(2**31), -1, 0, 1, 7, 34, 2**31, 2**40, 2**62, 2**63 - 1]


def test_the_extension_is_built():
    assert extension is not None


def outcome(reader, ordinal):
    """Returns the result of a read as plain values, or the message of its ValueError."""
    try:
        return [(array.dtype, array.tolist()) for array in reader.read(ordinal)]
    except ValueError as error:
        return str(error)


def token_file(random, lengths, dtype=np.uint16, name="file"):
    """Returns a file in memory of exactly the required bytes, with an unaligned index."""
    num_tokens = int(np.sum(lengths))
    tokens = random.integers(0, 50_000 if dtype == np.uint16 else 100, num_tokens).astype(dtype)
    pointers = np.cumsum([0, *lengths])[:-1] * tokens.itemsize
    return TokenFile(
        name,
        tokens,
        unaligned(pointers),
        unaligned(np.arange(len(lengths) + 1)),
        random.integers(0, 2, num_tokens).astype(np.uint8),
    )


def unaligned(values):
    return np.frombuffer(b"\0" * 2 + np.asarray(values, "<i8").tobytes(), np.uint8)[2:].view("<i8")


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "i8", "u2"])
@pytest.mark.parametrize("isolate", [False, True])
def test_every_token_type(dtype, isolate):
    files = [token_file(np.random.default_rng(1), [5, 0, 9, 4, 13], np.dtype(dtype))]
    shape = SHAPE._replace(isolate=isolate)
    runs = split_runs(files, "train", None)
    windows = make_windows("label", files, runs, shape, keep_tail=True)
    reference = WindowReaderReference("label", files, runs, shape, windows.num_samples)
    for ordinal in range(-1, windows.num_samples + 1):
        assert outcome(windows.rows, ordinal) == outcome(reference, ordinal)
    smaller = shape._replace(vocab_size=5)
    reader = make_window_reader("label", files, runs, smaller, 4)
    reference = WindowReaderReference("label", files, runs, smaller, 4)
    assert "outside the vocabulary of 5" in outcome(reader, 0)
    assert outcome(reader, 0) == outcome(reference, 0)


def test_positions_beyond_2_to_the_40(tmp_path):
    """Token offsets past 2^40 in a sparse file must not be truncated to 32 bits."""
    num_tokens = (1 << 41) + 19
    path = tmp_path / "sparse.bin"
    try:
        with path.open("wb") as file:
            file.truncate(num_tokens)
            file.seek(num_tokens - 19)
            file.write(bytes(range(19)))
        tokens = np.asarray(np.memmap(path, np.uint8, mode="r"))
    except OSError as error:
        pytest.skip(f"no room for a sparse file of 2 TiB: {error}")
    pointers = np.array([0, num_tokens - 15, num_tokens - 4], np.int64)
    files = [TokenFile("file", tokens, pointers, np.arange(4, dtype=np.int64))]
    runs = split_runs(files, "train", None)
    windows = make_windows("label", files, runs, SHAPE, keep_tail=True)
    assert windows.num_samples == -(-(num_tokens - 1) // 7)
    reference = WindowReaderReference("label", files, runs, SHAPE, windows.num_samples)
    for ordinal in range(windows.num_samples - 4, windows.num_samples):
        assert outcome(windows.rows, ordinal) == outcome(reference, ordinal)
    tokens, _, cu_seqlens = windows.rows.read(windows.num_samples - 1)
    assert tokens[: len(tokens) - np.count_nonzero(tokens == 3)][-1] == 18
    assert cu_seqlens[0] == 0


def mutate_entries(random, array, num_changes):
    """Returns a copy of an int64 array, of exactly its bytes, with some entries replaced."""
    changed = np.array(array, np.int64)
    for _ in range(num_changes if changed.size else 0):
        place = random.integers(changed.size)
        near = max(min(int(changed[place]), 2**62), -(2**62)) + int(random.integers(-3, 4))
        changed[place] = random.choice([*EDGES, near])
    return unaligned(changed)


def test_damaged_indices_in_memory_give_the_reference_or_an_error():
    """Opening a file checks only parts of a large index and misses such damage."""
    random = np.random.default_rng(2)
    num_errors = 0
    for _ in range(6000):
        lengths = random.integers(0, 8, random.integers(1, 12))
        whole = token_file(random, lengths)
        file = TokenFile(
            whole.name,
            whole.tokens,
            mutate_entries(random, whole.sequence_pointers, random.integers(0, 3)),
            mutate_entries(random, whole.document_indices, random.integers(0, 3)),
            whole.loss_mask,
        )
        runs = Runs(
            np.zeros(1, np.int32), np.zeros(1, np.int64), np.array([0, len(file.tokens)], np.int64)
        )
        num_windows = -(-max(len(file.tokens) - 1, 0) // 7)
        windows = ("label", [file], runs, SHAPE, num_windows)
        documents = random.integers(0, file.num_documents, 6)
        lists = DocumentLists(
            np.array([0, file.num_documents], np.int64), np.array([0, 4, 6], np.int64), documents
        )
        packed = ("label", [file], lists, SHAPE)
        for compiled, reference, num_samples in (
            (make_window_reader(*windows), WindowReaderReference(*windows), num_windows),
            (make_packed_reader(*packed), PackedReaderReference(*packed), 2),
        ):
            for ordinal in range(num_samples):
                expected = outcome(reference, ordinal)
                assert outcome(compiled, ordinal) == expected
                num_errors += isinstance(expected, str)
    assert num_errors > 1000


def test_damaged_packings_in_memory_give_the_reference_or_an_error():
    random = np.random.default_rng(3)
    num_errors = 0
    for _ in range(2000):
        files = [token_file(random, random.integers(0, 12, 6)) for _ in range(2)]
        packing = pack_documents(files, "train", None, 7)
        lists = DocumentLists(
            np.array([0, 6, 12], np.int64),
            np.array(mutate_entries(random, packing.offsets, random.integers(0, 2))),
            np.array(mutate_entries(random, packing.documents, random.integers(0, 3))),
        )
        arguments = ("label", files, lists, SHAPE)
        compiled, reference = make_packed_reader(*arguments), PackedReaderReference(*arguments)
        for ordinal in range(-1, packing.num_samples + 1):
            expected = outcome(reference, ordinal)
            assert outcome(compiled, ordinal) == expected
            num_errors += isinstance(expected, str)
    assert num_errors > 6000


def mutate_bytes(random, data):
    """Flips, overwrites, removes or adds some bytes."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 4)):
        kind = random.integers(5)
        place = int(random.integers(len(changed))) if changed else 0
        if kind == 0 and changed:
            changed[place] ^= 1 << random.integers(8)
        elif kind == 1:
            changed[place : place + 8] = struct.pack("<q", int(random.choice(EDGES)))
        elif kind == 2:
            changed[place : place + 4] = struct.pack("<i", int(random.integers(-3, 50)))
        elif kind == 3:
            del changed[place:]
        else:
            changed[place:place] = random.bytes(int(random.integers(1, 9)))
    return bytes(changed)


def test_damaged_index_files_give_an_error_or_samples_of_the_file(tmp_path):
    random = np.random.default_rng(4)
    prefix = tmp_path / "a_document"
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for length in (5, 0, 9, 4, 13, 1):
        writer.add_document(random.integers(0, 1000, length))
    writer.finalize()
    index_path = tmp_path / "a_document.idx"
    whole = index_path.read_bytes()
    num_opened = 0
    for _ in range(1000):
        index_path.write_bytes(mutate_bytes(random, whole))
        try:
            files = [open_token_file(prefix, with_loss_mask=False)]
            runs = split_runs(files, "train", random.choice([None, 2, 3]))
            packing = pack_documents(files, "train", None, 7)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        num_opened += 1
        windows = make_windows("label", files, runs, SHAPE, keep_tail=True)
        reference = WindowReaderReference("label", files, runs, SHAPE, windows.num_samples)
        for ordinal in range(windows.num_samples):
            assert outcome(windows.rows, ordinal) == outcome(reference, ordinal)
        packed = make_packed_samples("label", files, packing, SHAPE)
        for ordinal in range(packed.num_samples):
            outcome(packed.rows, ordinal)
    assert num_opened


def test_damaged_packing_caches_count_as_absent(tmp_path):
    random = np.random.default_rng(5)
    path, key = tmp_path / "cache", bytes(range(16))
    packing = Packing(np.array([0, 2, 3], np.int64), np.array([0, 2, 1], np.int64), 20, 0, 0)
    save_packing(path, key, packing)
    whole = path.read_bytes()
    for _ in range(1000):
        damaged = mutate_bytes(random, whole)
        path.write_bytes(damaged)
        loaded = load_packing(path, key)
        assert (loaded is None) == (damaged != whole)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5000), max_size=200),
    capacity=st.one_of(st.integers(5000, 5200), st.integers(5000, 2**14)),
    dtype=st.sampled_from([np.int32, np.int64]),
)
def test_best_fit_equals_the_reference(lengths, capacity, dtype):
    expected = best_fit_reference(np.array(lengths, dtype), capacity)
    for found, wanted in zip(best_fit(np.array(lengths, dtype), capacity), expected, strict=True):
        assert found.dtype == np.int64 and np.array_equal(found, wanted)


def test_best_fit_refuses_other_arrays():
    for lengths in (np.zeros(4, np.uint16), np.zeros((2, 2), np.int32), np.zeros(8, np.int32)[::2]):
        with pytest.raises(ValueError, match="must be a contiguous 1-D array of int32 or int64"):
            best_fit(lengths, 5)


def test_permutation_equals_the_reference_on_all_sizes():
    random = np.random.default_rng(6)
    for size in [*range(1, 300), 10**6, 2**32 - 1, 2**32, 10**12, 2**53 + 1, 2**61 + 3, 2**62]:
        keys = random.integers(0, 2**64, 16, dtype=np.uint64)
        places = random.integers(0, size, 20)
        expected = permute_reference(places, size, keys)
        assert np.array_equal(permute(places, size, keys), expected)
    for size in (0, -1, 2**62 + 1):
        with pytest.raises(ValueError, match="not between 1 and 2"):
            permute(np.zeros(1, np.int64), size, keys)
    with pytest.raises(ValueError, match="needs 16 keys"):
        permute(np.zeros(1, np.int64), 5, keys[:4])


@pytest.mark.parametrize("seq_length", [1, 6, 7, 24, 25, 26, 31, 50, 51, 127, 300])
def test_rows_and_digests_equal_the_reference(seq_length):
    """Covers lengths around the hash's 128-byte blocks: a sample has 5 * seq_length + 4 bytes."""
    random = np.random.default_rng(seq_length)
    shape = SHAPE._replace(seq_length=seq_length, vocab_size=60_000)
    readers, references = [], []
    for number in range(3):
        files = [token_file(random, random.integers(1, 40, 60))]
        runs = split_runs(files, "train", None)
        own_shape = shape._replace(isolate=number != 1)
        windows = make_windows("label", files, runs, own_shape, keep_tail=False)
        readers.append(windows.rows)
        references.append(
            WindowReaderReference("label", files, runs, own_shape, windows.num_samples)
        )
    reader_of_row = random.integers(0, 3, 12)
    ordinals = random.integers(0, 2, 12)
    results = []
    for function, given_readers in ((read_rows, readers), (read_rows_reference, references)):
        buffers = make_buffers(12, seq_length)
        segments = function(given_readers, reader_of_row, ordinals, 4, buffers)
        results.append(
            [array.tolist() for array in buffers] + [(s.dtype, s.tolist()) for s in segments]
        )
    assert results[0] == results[1]


def make_buffers(num_rows, seq_length):
    return Buffers(
        np.zeros((num_rows, seq_length), np.int64),
        np.zeros((num_rows, seq_length), np.int64),
        np.zeros((num_rows, seq_length), np.float32),
        np.zeros((num_rows, 2), np.int64),
    )


def test_the_digest_is_blake2b():
    files = [token_file(np.random.default_rng(7), [1000])]
    windows = make_windows("label", files, split_runs(files, "train", None), SHAPE, keep_tail=False)
    buffers = make_buffers(1, 7)
    read_rows([windows.rows], np.zeros(1, np.int64), np.full(1, 5), 1, buffers)
    tokens, loss_mask, _ = windows.rows.read(5)
    expected = hashlib.blake2b(tokens.tobytes() + loss_mask.tobytes(), digest_size=16).digest()
    assert buffers.digests.tobytes() == expected


@pytest.mark.parametrize(
    "change",
    [
        {"reader_of_row": np.array([0, 1])},
        {"reader_of_row": np.array([0, -1])},
        {"reader_of_row": np.zeros(3, np.int64)},
        {"reader_of_row": np.zeros(2, np.int32)},
        {"ordinals": np.zeros(4, np.int64)[::2]},
        {"micro_batch_size": 0},
        {"micro_batch_size": 3},
        {"tokens": np.zeros((2, 6), np.int64)},
        {"labels": np.zeros((2, 7), np.int32)},
        {"loss_mask": np.zeros((1, 7), np.float32)},
        {"digests": np.zeros((2, 3), np.int64)},
    ],
)
def test_buffers_that_do_not_fit_are_refused(change):
    files = [token_file(np.random.default_rng(8), [100])]
    windows = make_windows("label", files, split_runs(files, "train", None), SHAPE, keep_tail=False)
    arguments = {
        "reader_of_row": np.zeros(2, np.int64),
        "ordinals": np.zeros(2, np.int64),
        "micro_batch_size": 2,
        **make_buffers(2, 7)._asdict(),
    }
    extension.read_rows([windows.rows], *arguments.values())
    with pytest.raises(ValueError, match=r"must be|read_rows"):
        extension.read_rows([windows.rows], *{**arguments, **change}.values())


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": np.zeros(4, np.float32)},
        {"tokens": np.zeros((2, 2), np.int32)},
        {"tokens": np.zeros(8, np.int32)[::2]},
        {"sequence_pointers": np.zeros(2, np.int32)},
        {"document_indices": np.zeros(0, np.int64)},
        {"loss_mask": np.zeros(3, np.uint8)},
        {"loss_mask": np.zeros(4, np.int8)},
    ],
)
def test_token_files_of_other_types_are_refused(change):
    columns = {
        "name": "file",
        "tokens": np.zeros(4, np.int32),
        "sequence_pointers": np.zeros(1, np.int64),
        "document_indices": np.array([0, 1]),
        "loss_mask": np.zeros(4, np.uint8),
    }
    lists = (np.array([0, 1]), np.array([0, 1]), np.array([0]))
    extension.PackedReader("label", [tuple(columns.values())], *lists, 3, 0, 9, True).read(0)
    with pytest.raises(ValueError, match="tokens|array|loss mask|document indices"):
        extension.PackedReader(
            "label", [tuple({**columns, **change}.values())], *lists, 3, 0, 9, True
        )
