"""Tests appending files: every byte at any position, with and without bypassing the page cache."""

import hashlib
import os
import random
from pathlib import Path

import pytest

from megatron_chatflow import files as file_copy
from megatron_chatflow.data.indexed import IndexedDataset, IndexedDatasetWriter, bin_path
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import StagedFile, publish_all

SIZES = [0, 1, 4095, 4096, 4097, 3 * 4096, 100_000, 2 * 65536, 2 * 65536 + 5, 300_001]


@pytest.fixture(params=[True, False], ids=["direct", "through the cache"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_copy, "COPY_BYTES", 65536)
    if not request.param:
        monkeypatch.setattr(file_copy, "_open_direct", lambda path: None)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(6))
def test_every_byte_arrives_in_order(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    expected = b""
    file = StagedFile(tmp_path / "whole")
    for number in range(12):
        data = generator.randbytes(generator.choice(SIZES))
        if generator.random() < 0.7:
            (tmp_path / f"part{number}").write_bytes(data)
            assert file.append_file(tmp_path / f"part{number}") == len(data)
        else:
            file.write(data)
        expected += data
    assert file.num_bytes == len(expected)
    publish_all([file])
    assert (tmp_path / "whole").read_bytes() == expected
    assert file.sha256 == hashlib.sha256(expected).hexdigest()


def test_blocks_cover_the_file_and_are_aligned_where_they_are_large() -> None:
    for num_before in (0, 1, 4095, 4096, 123_457):
        for num_bytes in (*SIZES, 3 * file_copy.COPY_BYTES + 17):
            blocks = list(file_copy._blocks(num_before, num_bytes))
            ends = [end for _, end in blocks]
            assert [begin for begin, _ in blocks] == [0, *ends][: len(blocks)]
            assert (ends or [0])[-1] == num_bytes
            for begin, end in blocks:
                aligned = (num_before + begin) % 4096 == 0 == (num_before + end) % 4096
                assert aligned or end - begin <= 4096


def test_a_source_that_is_missing_or_shrinks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_copy, "COPY_BYTES", 8192)
    with StagedFile(tmp_path / "whole") as file:
        with pytest.raises(UserError, match="cannot read: .*absent"):
            file.append_file(tmp_path / "absent")
        part = tmp_path / "part"
        part.write_bytes(bytes(100_000))

        class Shrinking:
            def update(self, data: memoryview) -> None:
                os.truncate(part, 9000)

        monkeypatch.setattr(file, "_hash", Shrinking())
        with pytest.raises(UserError, match="was truncated"):
            file.append_file(part)
    assert not list(tmp_path.glob("whole*"))


def test_a_dataset_that_changes_is_told(tmp_path: Path) -> None:
    writer = IndexedDatasetWriter(tmp_path / "a", "uint16")
    writer.add_document([1, 2, 3])
    writer.finalize()
    dataset = IndexedDataset(tmp_path / "a")
    with bin_path(tmp_path / "a").open("ab") as file:
        file.write(b"xx")
    target = IndexedDatasetWriter(tmp_path / "b", "uint16")
    with pytest.raises(UserError, match="changed while it was merged"):
        target.add_dataset(dataset)
    target.discard()
