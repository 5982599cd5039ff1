"""Tests indexed datasets: byte-identical to Megatron's, and precise errors for damaged files."""

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_chatflow.data import indexed
from megatron_chatflow.data.indexed import IndexedDataset, IndexedDatasetWriter, optimal_dtype
from megatron_chatflow.errors import UserError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: type = np.uint16) -> Path:
    writer = IndexedDatasetWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    writer.finalize()
    return prefix


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_megatron_reads_ours_and_the_bytes_are_its_own(tmp_path: Path, dtype: type) -> None:
    ours = write(tmp_path / "ours", dtype=dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (
            tmp_path / f"theirs.{suffix}"
        ).read_bytes()
    theirs = MegatronDataset(str(ours))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS


def test_reads_megatrons_documents_of_several_sequences(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [4, 0, 6])
    builder.add_document(torch.arange(3), [3])
    builder.finalize(str(tmp_path / "x.idx"))
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.dtype == np.int32
    assert dataset.document_indices.tolist() == [0, 3, 4]
    assert [dataset[i].tolist() for i in range(4)] == [
        [0, 1, 2, 3],
        [],
        [4, 5, 6, 7, 8, 9],
        [0, 1, 2],
    ]
    assert dataset.get(2, 1, 3).tolist() == [5, 6, 7]
    assert dataset[-1].tolist() == [0, 1, 2]
    assert dataset.tokens.tolist() == [*range(10), *range(3)]
    assert dataset.num_tokens == 13


def test_a_multimodal_dataset_is_named(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32, multimodal=True)
    builder.add_document(torch.arange(9), [4, 5], [0, 1])
    builder.finalize(str(tmp_path / "x.idx"))
    with pytest.raises(
        UserError, match=r"multimodal dataset: .*x\.idx: .* each of its 2 sequences"
    ):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("prefix", ["s3://bucket/x_document", "https://host/x_document"])
def test_urls_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.chdir(tmp_path)
    for make in (IndexedDataset, lambda path: IndexedDatasetWriter(path, np.int32)):
        for path in (prefix, Path(prefix)):
            with pytest.raises(UserError, match=r"^\w+://?\w+/x_document.*: is a URL, and only"):
                make(path)
    assert list(tmp_path.iterdir()) == []


def test_rewriting_sequences_keeps_documents(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "x", np.int32)
    for _ in range(2):
        writer.add_sequences(
            np.arange(7, dtype=np.int32), np.array([3, 4], np.int32), np.array([2], np.int64)
        )
    writer.finalize()
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.document_indices.tolist() == [0, 2, 4]
    assert dataset[3].tolist() == [3, 4, 5, 6]


def test_empty_dataset(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", []))
    assert (len(dataset), dataset.num_tokens, dataset.num_documents) == (0, 0, 0)
    assert dataset.tokens.shape == (0,)


def test_pickles_as_its_prefix(tmp_path: Path) -> None:
    dataset = pickle.loads(pickle.dumps(IndexedDataset(write(tmp_path / "x"))))
    assert dataset[2].tolist() == DOCUMENTS[2]


@pytest.mark.parametrize(
    ("index", "offset", "length"),
    [(4, 0, None), (-5, 0, None), (0, 1, 3), (0, -1, 1), (0, 4, None)],
)
def test_refuses_what_lies_outside(
    tmp_path: Path, index: int, offset: int, length: int | None
) -> None:
    dataset = IndexedDataset(write(tmp_path / "x"))
    with pytest.raises(IndexError):
        dataset.get(index, offset, length)


def test_offsets_past_two_to_the_forty(tmp_path: Path) -> None:
    """A sparse file of 2.2 TB. Megatron's own readers overflowed on such files."""
    lengths = np.full(1025, 2**30, np.int64)
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1] * 2)])
    with (tmp_path / "x.idx").open("wb") as file:
        file.write(indexed.HEADER.pack(indexed.MAGIC, 1, 8, 1025, 2))
        file.write(lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes())
        file.write(np.array([0, 1025], "<i8").tobytes())
    with (tmp_path / "x.bin").open("wb") as file:
        try:
            os.truncate(file.fileno(), int(lengths.sum()) * 2)
        except OSError:
            pytest.skip("this file system holds no sparse file of 2 TB")
        file.seek(1024 * 2**31 + 10)
        file.write(struct.pack("<H", 777))
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.sequence_pointers[-1] == 2**41
    assert dataset.get(1024, 5, 2).tolist() == [777, 0]


def test_pointers_past_two_to_the_forty_are_written_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed.StagedFile, "write", _write_small_parts_only)
    writer = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    block = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), (2**31 - 1,), (0,))
    monkeypatch.setattr(indexed.np, "ascontiguousarray", lambda array: np.zeros(0, np.uint16))
    for _ in range(300):
        writer.add_documents(block, np.array([block.size], np.int32))
    monkeypatch.undo()
    writer.finalize()
    data = (tmp_path / "x.idx").read_bytes()
    pointers = np.frombuffer(data, "<i8", 300, indexed.HEADER.size + 4 * 300)
    assert pointers.tolist() == [k * (2**32 - 2) for k in range(300)]
    assert pointers[-1] > 2**40


def _write_small_parts_only(self: indexed.StagedFile, data: bytes) -> None:
    assert len(data) < 2**20


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


LENGTHS = indexed.HEADER.size
POINTERS = LENGTHS + 4 * len(DOCUMENTS)
BOUNDARIES = POINTERS + 8 * len(DOCUMENTS)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"PK\x03\x04", "begins with"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x09", "unknown dtype code 9"),
        (17, b"\x00", "unknown dtype code 0"),
        (18, struct.pack("<Q", 5), "truncated"),
        (18, struct.pack("<Q", 3), "too long"),
        (18, struct.pack("<Q", 2**60), "truncated"),
        (LENGTHS + 4, struct.pack("<i", 2), "sequence 2 begins at byte 8"),
        (LENGTHS + 8, struct.pack("<i", -4), "sequence 2 has length -4"),
        (LENGTHS + 12, struct.pack("<i", 3), "x.bin"),
        (LENGTHS + 12, struct.pack("<i", 1), "x.bin"),
        (POINTERS, struct.pack("<q", 2), "sequence 0 begins at byte 2"),
        (POINTERS + 8, struct.pack("<q", 5), "sequence 1 begins at byte 5"),
        (BOUNDARIES, struct.pack("<q", 1), "do not cover"),
        (BOUNDARIES + 8, struct.pack("<q", 9), "document 1 ends before it begins"),
        (BOUNDARIES + 32, struct.pack("<q", 3), "do not cover"),
    ],
)
def test_damage_is_named(tmp_path: Path, offset: int, data: bytes, message: str) -> None:
    prefix = write(tmp_path / "x")
    patch(tmp_path / "x.idx", offset, data)
    with pytest.raises(UserError, match=message) as caught:
        IndexedDataset(prefix)
    assert str(tmp_path / "x.") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_bytes", [0, 5, 20, 33, 40, 81])
def test_truncated_index(tmp_path: Path, num_bytes: int) -> None:
    prefix = write(tmp_path / "x")
    os.truncate(tmp_path / "x.idx", num_bytes)
    with pytest.raises(UserError, match="x.idx: truncated"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("num_bytes", "relation"), [(0, "shorter"), (19, "shorter"), (22, "longer")]
)
def test_bin_of_another_length(tmp_path: Path, num_bytes: int, relation: str) -> None:
    prefix = write(tmp_path / "x")
    os.truncate(tmp_path / "x.bin", num_bytes)
    with pytest.raises(UserError, match=f"x.bin: has {num_bytes} bytes, {relation} than the 20"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    prefix = write(tmp_path / "x")
    (tmp_path / f"x.{suffix}").unlink()
    with pytest.raises(UserError, match=f"x.{suffix}: No such file"):
        IndexedDataset(prefix)


def test_validate_sees_what_opening_a_large_dataset_skips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_documents = 40
    prefix = write(tmp_path / "x", [[k] for k in range(num_documents)])
    monkeypatch.setattr(indexed, "CHECK_BLOCK", 4)
    monkeypatch.setattr(indexed, "NUM_CHECKED", 8)
    pointer_of_15 = indexed.HEADER.size + 4 * num_documents + 8 * 15
    patch(tmp_path / "x.idx", pointer_of_15, struct.pack("<q", 3))
    dataset = IndexedDataset(prefix)
    with pytest.raises(UserError, match="sequence 15 begins at byte 3"):
        dataset.validate()
    patch(tmp_path / "x.idx", pointer_of_15, struct.pack("<q", 30))
    patch(tmp_path / "x.idx", pointer_of_15 + 8 * 22, struct.pack("<q", 3))
    with pytest.raises(UserError, match="sequence 37 begins at byte 3"):
        IndexedDataset(prefix)


def test_nothing_under_the_final_name_before_finalize(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    writer.add_document([1, 2, 3])
    writer.seal()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin.partial", "x.idx.partial"]
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_prefix(tmp_path: Path) -> None:
    first = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    with pytest.raises(UserError, match="another job is writing"):
        IndexedDatasetWriter(tmp_path / "x", np.uint16)
    first.add_document([1])
    first.finalize()
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [1]


def test_dtypes_are_megatrons() -> None:
    assert optimal_dtype(65499) == np.uint16
    assert optimal_dtype(65500) == np.int32


def test_refuses_what_would_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="float16"):
        IndexedDatasetWriter(tmp_path / "x", np.float16)
    with pytest.raises(UserError, match="cannot write"):
        IndexedDatasetWriter("/proc/nowhere/x", np.uint16)
    writer = IndexedDatasetWriter(tmp_path / "x", np.uint16)
    with pytest.raises(ValueError, match="add up"):
        writer.add_documents(np.zeros(3, np.uint16), np.array([2], np.int32))
    for document in ([70000], np.array([1, 70000]), np.array([-1])):
        with pytest.raises(OverflowError):
            writer.add_document(document)
    writer.discard()
