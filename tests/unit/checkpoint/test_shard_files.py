"""Tests a rank's file: readable by torch, written completely or not at all, and hashed."""

import errno
import io
import math
import os
import re
import resource
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from megatron_chatflow.checkpoint.direct_file import (
    ALGORITHMS,
    CHUNK_BYTES,
    DirectFile,
    hash_file,
)
from megatron_chatflow.checkpoint.files import MANIFEST, find_damage, manifest_text, read_manifest
from megatron_chatflow.checkpoint.layout import (
    ALIGNMENT,
    SplitFp32,
    TensorShard,
    build_file_image,
    frame,
    index_files,
)
from megatron_chatflow.checkpoint.store import _write_in_chunks, _write_whole
from megatron_chatflow.checkpoint.writer import page_aligned
from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (1, 1, 7)])
def test_records_are_what_torch_reads(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(dtype)
    for phase in (0, 13, 63):
        around = frame(dtype, shape, phase)
        values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        record = around.head + values + around.tail
        assert len(record) == around.length
        assert (phase + len(around.head)) % ALIGNMENT == 0
        found = torch.load(io.BytesIO(record), weights_only=True)
        assert found.dtype == dtype and found.shape == tensor.shape and found.is_contiguous()
        assert torch.equal(found, tensor)
        # Other programs can open it as a zip archive too.
        assert zipfile.ZipFile(io.BytesIO(record)).read("archive/version") == b"3\n"


def test_a_record_above_4_gib_says_its_size() -> None:
    num_values = 2**31 + 5
    around = frame(torch.bfloat16, (num_values,), 0)
    size = (2 * num_values).to_bytes(8, "little")
    assert size in around.head and size in around.tail


def _shards() -> list[TensorShard]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(300, 1000, generator=generator)
    large = torch.randn(5, 2**20, generator=generator)
    masters = torch.randn(3, 2**20, generator=generator)
    split = SplitFp32(masters.bfloat16(), torch.zeros(masters.shape, dtype=torch.int16))
    split.set(masters)
    return [
        # One tensor is not contiguous in memory, one is shared by several chunks.
        TensorShard("whole", (1000, 300), (0, 0), (1000, 300), whole.T),
        TensorShard("large", (5, 2**20), (0, 0), (5, 2**20), large),
        # One tensor is put together while it is copied.
        TensorShard(
            "split",
            (3, 2**20),
            (0, 0),
            (3, 2**20),
            split.rounded,
            remainders=split.remainders,
        ),
    ]


@pytest.mark.parametrize("has_copy", [True, False])
def test_a_file_is_what_was_saved(tmp_path: Path, has_copy: bool) -> None:
    shards = _shards()
    image = build_file_image("__0_0.distcp", shards, [])
    assert image.num_bytes > CHUNK_BYTES
    path = tmp_path / "__0_0.distcp"
    written: list[None] = []

    def progress() -> None:
        written.append(None)

    if has_copy:
        memory, tensor = page_aligned(image.num_bytes)
        image.copy(0, image.num_bytes, tensor)
        recorded = _write_whole(memoryview(memory), image.num_bytes, path, progress)
    else:
        recorded = _write_in_chunks(image, path, CPU, progress)
    assert len(written) == math.ceil(image.num_bytes / CHUNK_BYTES)
    assert path.stat().st_size == image.num_bytes
    assert hash_file(path) == recorded
    for name, content in index_files([image.plan]).items():
        (tmp_path / name).write_bytes(content)
    reader = DistributedReader(tmp_path)
    for shard in shards:
        parts = shard.parts
        values = parts.joined() if isinstance(parts, SplitFp32) else parts
        assert torch.equal(reader.read_whole(shard.name), values)


def test_weights_and_remainders_are_master_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**20,), generator=generator).int()
    exact = torch.tensor([0.0, -0.0, 1.5, 3.3e38, -3.3e38, 1e-40])
    values = torch.cat([bits.view(torch.float32), exact])
    values = values[values.isfinite() & values.bfloat16().isfinite()]
    split = SplitFp32(values.bfloat16(), torch.zeros(len(values), dtype=torch.int16))
    split.set(values)
    found = split.joined()
    # Halves are rounded to even, and where that is down, the remainder is one too small.
    is_down = (values.view(torch.int32) & 0x1FFFF) == 0x08000
    assert 0 < is_down.sum() < 40
    assert torch.equal(found[~is_down].view(torch.int32), values[~is_down].view(torch.int32))
    assert torch.equal(found[is_down].view(torch.int32), values[is_down].view(torch.int32) - 1)


def test_parts_that_make_no_whole_are_refused() -> None:
    values = torch.zeros(2, 3)
    half = TensorShard("a", (4, 3), (0, 0), (2, 3), values)
    plan = build_file_image("__0_0.distcp", [half], []).plan
    with pytest.raises(ValueError, match="a has 12 values, but its chunks contain 6"):
        index_files([plan])
    with pytest.raises(ValueError, match="saved by two ranks"):
        index_files([plan, build_file_image("__1_0.distcp", [half], []).plan])


@pytest.fixture
def small_files_only() -> Iterator[int]:
    """Limits files of this process to one megabyte, as a quota would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_without_room_is_an_error_at_once(tmp_path: Path, small_files_only: int) -> None:
    with pytest.raises(OSError) as caught:
        DirectFile(tmp_path / "file", small_files_only + 1)
    assert caught.value.errno == errno.EFBIG
    with closing(DirectFile(tmp_path / "small", 0)) as file:
        assert file.finish().num_bytes == 0


def _damaged(path: Path, change: str) -> None:
    content = bytearray(path.read_bytes())
    if change == "flipped":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif change == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [("flipped", "its hash differs"), ("cut", "bytes, but"), ("missing", "is missing")],
)
def test_damage_is_named_by_file(tmp_path: Path, change: str, says: str) -> None:
    names = ("a", "b", "c")
    for name in names:
        (tmp_path / name).write_bytes(os.urandom(200_000))
    hashes = {name: hash_file(tmp_path / name) for name in names}
    (tmp_path / MANIFEST).write_text(manifest_text(hashes))
    assert find_damage(tmp_path) == []
    _damaged(tmp_path / "b", change)
    shares = [find_damage(tmp_path, part=part, num_parts=2) for part in range(2)]
    assert [line.split()[0] for lines in shares for line in lines] == ["b"]
    assert says in find_damage(tmp_path)[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_hash_depends_on_every_bit_and_the_length(tmp_path: Path, algorithm: str) -> None:
    path = tmp_path / "a"
    data = bytearray(os.urandom(CHUNK_BYTES + 100))
    path.write_bytes(data)
    before = hash_file(path, algorithm)
    assert re.fullmatch("[0-9a-f]{32}", before.digest)
    for place in (0, 65535, 65536, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 99):
        data[place] ^= 1
        path.write_bytes(data)
        assert hash_file(path, algorithm).digest != before.digest
        data[place] ^= 1
    assert len({_hash_of_zeros(path, algorithm, n) for n in (0, 1, 65536, CHUNK_BYTES)}) == 4


def _hash_of_zeros(path: Path, algorithm: str, num_bytes: int) -> str:
    path.write_bytes(bytes(num_bytes))
    return hash_file(path, algorithm).digest


def test_files_without_a_hash_are_damage(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(os.urandom(100))
    (tmp_path / MANIFEST).write_text(manifest_text({"a": hash_file(tmp_path / "a")}))
    assert find_damage(tmp_path) == [f"{MANIFEST} has no hash of b"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": 3}',
        '{"files": {"a": 1}}',
        "[" * 100_000,
        '{"files": {"a": {"bytes": "1", "digest": "x"}}}',
        '{"files": {"../a": {"bytes": 1, "digest": "00000000000000000000000000000000"}}}',
        '{"files": {"/etc/hosts": {"bytes": 1, "digest": "00000000000000000000000000000000"}}}',
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"hashes\.json: is damaged"):
        read_manifest(tmp_path)
