"""Tests checkpoints whose index or values are impossible: refused, or read as the original."""

import copy
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny_shape
import torch
from packaging.version import Version
from safetensors.torch import save_file
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_chatflow.checkpoint.index import TENSOR_INDEX, coverage_fault, read_index
from megatron_chatflow.checkpoint.layout import (
    TensorShard,
    build_file_image,
    index_files,
    plan_tensor,
)
from megatron_chatflow.checkpoint.reader import SafeReader, fill
from megatron_chatflow.checkpoint.state import _num_steps
from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.from_huggingface import import_huggingface
from megatron_chatflow.convert.grown_reader import GrownReader
from megatron_chatflow.convert.shape import huggingface_config
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.convert.to_huggingface import export_checkpoint, read_weight
from megatron_chatflow.convert.vocabulary import GrownVocabulary, Resize, VocabularyGrowth
from megatron_chatflow.convert.weight_map import huggingface_shapes, placements
from megatron_chatflow.errors import UserError

SHAPE = replace(tiny_shape.SHAPE, num_layers=1)
NORM = "decoder.final_layernorm.weight"
NUM_MUTATIONS = 150


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a small Hugging Face folder."""
    folder = tmp_path_factory.mktemp("huggingface")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.rand(size, generator=generator)
        for name, size in huggingface_shapes(SHAPE).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = huggingface_config(SHAPE, torch.float32, {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def imported(huggingface: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imports the Hugging Face folder as a checkpoint."""
    run = tmp_path_factory.mktemp("run") / "run"
    import_huggingface(huggingface, run)
    return run / "iter_0000000"


@pytest.fixture
def checkpoint(imported: Path, tmp_path: Path) -> Path:
    """Returns a copy of the checkpoint that a test may change."""
    shutil.copytree(imported, tmp_path / "iter_0000000")
    return tmp_path / "iter_0000000"


def read_as_export(folder: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor as an export does."""
    reader = DistributedReader(folder)
    found = {}
    for placement in placements(SHAPE):
        found |= dict(read_weight(reader, SHAPE, placement))
    return found


def read_as_training(folder: Path) -> dict[str, torch.Tensor]:
    """Reads all weights as training does, and a norm as optimizer state is read."""
    reader = SafeReader(folder)
    index = reader.read_metadata()
    state = {
        name: torch.full(tuple(entry.size), -1.0)
        for name, entry in read_index(ORIGINAL[0]).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    for name, tensor in state.items():
        entry = index.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensor.shape:
            # as megatron-core's planner does
            raise UserError(f"{name} is missing or of another shape")
    load(state, storage_reader=SafeReader(folder))
    norm = torch.full_like(state[NORM], -1.0)
    size = tuple(norm.shape)
    fill([TensorShard(NORM, size, (0,), size, norm)], folder, SafeReader(folder))
    assert torch.equal(norm, state[NORM])
    return state


ORIGINAL: list[Path] = []


@cache
def original(read: Callable[[Path], dict[str, torch.Tensor]], imported: Path) -> Any:
    """Returns what ``read`` returns for the unchanged checkpoint."""
    return read(imported)


def refused_or_same(folder: Path, imported: Path) -> bool:
    """Reads a changed checkpoint in both ways. Returns whether it was refused."""
    ORIGINAL[:] = [imported]
    outcomes = []
    for read in (read_as_export, read_as_training):
        try:
            found = read(folder)
        except (Exception, CheckpointException) as error:
            cause: Any = error
            if isinstance(error, CheckpointException):
                cause, _ = next(iter(error.failures.values()))
            assert isinstance(cause, UserError), repr(error)
            assert "\n" not in str(cause) and len(str(cause)) < 2000
            outcomes.append(True)
            continue
        expected = original(read, imported)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        outcomes.append(False)
    return any(outcomes)


def count(size: tuple[int, ...], boxes: list[Any]) -> Any:
    counts = np.zeros(size, dtype=int)
    for offsets, sizes in boxes:
        counts[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    return counts


def random_cut(rng: random.Random, offsets: list[int], sizes: list[int], depth: int) -> list[Any]:
    """Cuts a box into boxes at random."""
    axis = rng.randrange(len(sizes))
    if depth == 0 or sizes[axis] < 2:
        return [(tuple(offsets), tuple(sizes))]
    at = rng.randrange(1, sizes[axis])
    low, high, moved = list(sizes), list(sizes), list(offsets)
    low[axis], high[axis], moved[axis] = at, sizes[axis] - at, offsets[axis] + at
    return random_cut(rng, offsets, low, depth - 1) + random_cut(rng, moved, high, depth - 1)


def test_coverage_is_what_counting_says() -> None:
    rng = random.Random(0)
    num_good = num_bad = 0
    for _ in range(600):
        size = tuple(rng.randrange(1, 7) for _ in range(rng.randrange(1, 5)))
        boxes = random_cut(rng, [0] * len(size), list(size), 4)
        rng.shuffle(boxes)
        for _ in range(rng.randrange(3)):  # keep the number of values where possible
            offsets, sizes = boxes[rng.randrange(len(boxes))]
            room = [limit - length for limit, length in zip(size, sizes, strict=True)]
            moved = tuple(rng.randrange(most + 1) for most in room)
            boxes[rng.randrange(len(boxes))] = (moved, sizes)
        is_exact = bool((count(size, boxes) == 1).all())
        assert (coverage_fault(size, boxes) is None) == is_exact
        num_good += is_exact
        num_bad += not is_exact
    assert num_good > 200 and num_bad > 200


@pytest.mark.parametrize(
    ("size", "boxes", "fault"),
    [
        ((), [((), ())], None),
        ((0, 4), [], None),
        # shards of ranks that have no rows
        ((4,), [((0,), (4,)), ((4,), (0,)), ((2,), (0,))], None),
        ((), [], "has 1 values, but its chunks contain 0"),
        ((4,), [((0, 0), (4, 1))], "a different number of dimensions"),
        ((), [((0,), (1,))], "a different number of dimensions"),
        ((4,), [((-1,), (4,))], "outside"),
        ((4,), [((1,), (4,))], "outside"),
        ((4,), [((0,), (2,))], "but its chunks contain 2"),
        ((4,), [((0,), (2,)), ((0,), (2,))], "overlap"),
        ((4, 4), [((0, 0), (2, 4)), ((1, 0), (2, 4))], "overlap"),
        ((2,) * 8, [(at, (1,) * 8) for at in product((0, 1), repeat=8)], "more than 6 dimensions"),
    ],
)
def test_coverage(size: tuple[int, ...], boxes: list[Any], fault: str | None) -> None:
    found = coverage_fault(size, boxes)
    assert found is None if fault is None else fault in str(found)


def test_chunks_that_hide_a_hole_are_refused(tmp_path: Path) -> None:
    """Half of the tensor is stored twice, so the number of values is right.

    The other half is missing.
    """
    half = torch.arange(256.0 * 16).view(256, 16)
    shards = [TensorShard("w", (512, 16), (at, 0), (256, 16), half) for at in (0, 256)]
    image = build_file_image("__0_0.distcp", shards, [])
    content = torch.empty(image.num_bytes, dtype=torch.uint8)
    image.copy(0, image.num_bytes, content)
    (tmp_path / "__0_0.distcp").write_bytes(content.numpy().tobytes())
    for name, data in index_files([image.plan]).items():
        (tmp_path / name).write_bytes(data)
    assert torch.equal(DistributedReader(tmp_path).read_whole("w"), torch.cat([half, half]))
    index = json.loads((tmp_path / TENSOR_INDEX).read_text())
    chunks = index["tensors"]["w"]["chunks"]
    index["tensors"]["w"]["chunks"] = [chunks[1], chunks[1]]
    (tmp_path / TENSOR_INDEX).write_text(json.dumps(index))
    for read in (DistributedReader, lambda folder: SafeReader(folder).read_metadata()):
        with pytest.raises(UserError, match="w has overlapping and missing chunks"):
            read(tmp_path)
    (tmp_path / TENSOR_INDEX).unlink()
    assert torch.equal(DistributedReader(tmp_path).read_whole("w"), torch.cat([half, half]))
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["w"]
    entry.chunks = [entry.chunks[1], entry.chunks[1]]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    for read in (DistributedReader, lambda folder: SafeReader(folder).read_metadata()):
        with pytest.raises(UserError, match="w has overlapping and missing chunks"):
            read(tmp_path)
    plan = image.plan
    plan["tensors"] = [plan["tensors"][0]]
    plan_tensor(plan, "w", torch.float32, ((512, 16), (128, 0), (256, 16)), 0, 20000)
    with pytest.raises(ValueError, match="overlap"):
        index_files([plan])


NAMES = [
    *(("torch.distributed.checkpoint.metadata", name) for name in ("Metadata", "MetadataIndex")),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", name) for name in ("Size", "device", "strided", "contiguous_format", "bfloat16")),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
    ("builtins", "getattr"),
]


def real(module: str, name: str) -> Any:
    return getattr(__import__(module, fromlist=[name]), name, None)


@pytest.mark.parametrize(("module", "name"), [n for n in NAMES if n[0] != "pathlib._local"])
@pytest.mark.parametrize("attribute", ["with_name", "__setstate__", "__call__", "get", "__dict__"])
def test_an_index_sets_no_attributes(
    checkpoint: Path, module: str, name: str, attribute: str
) -> None:
    before = getattr(real(module, name), attribute, None)
    (checkpoint / TENSOR_INDEX).unlink()
    good = (checkpoint / ".metadata").read_bytes()
    values = pickle.dumps({attribute: 3}, protocol=2)[2:-1]
    head = b"\x80\x02c" + f"{module}\n{name}\n".encode()
    # the class itself, called, created by __new__
    for made in (b"", b")R", b")\x81", b"K\x00\x85R"):
        for state in (values, b"N" + values + b"\x86"):
            # The tampered object is popped, and a good index comes last.
            (checkpoint / ".metadata").write_bytes(head + made + state + b"b0" + good[2:])
            try:
                read_index(checkpoint)
            except UserError as error:
                assert "is damaged" in str(error)
    assert getattr(real(module, name), attribute, None) == before or attribute == "__dict__"
    (checkpoint / ".metadata").write_bytes(good)
    assert len(read_index(checkpoint).state_dict_metadata) > 10


def test_both_indices_are_the_same(checkpoint: Path) -> None:
    one = read_index(checkpoint)
    (checkpoint / TENSOR_INDEX).unlink()
    other = read_index(checkpoint)
    assert one == other
    assert one == pickle.loads((checkpoint / ".metadata").read_bytes())


def test_indices_that_disagree_are_refused(checkpoint: Path) -> None:
    path = checkpoint / ".metadata"
    good = path.read_bytes()
    index = pickle.loads(good)
    index.state_dict_metadata.pop(NORM)
    path.write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=f"was changed after {TENSOR_INDEX} was written"):
        read_index(checkpoint)
    path.write_bytes(good)
    read_index(checkpoint)
    path.unlink()
    with pytest.raises(UserError, match=r"no \.metadata"):
        read_index(checkpoint)
    path.write_bytes(good)
    content = json.loads((checkpoint / TENSOR_INDEX).read_text())
    (checkpoint / TENSOR_INDEX).write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(UserError, match=rf"{TENSOR_INDEX}: is damaged \(version: "):
        read_index(checkpoint)


ODD: list[Any] = [None, (), [], {}, "x", "../x", -1, 0, 2**62, 2**80, 1.5, True, [[1]], {"a": 1}]
ODD += [torch.Size(()), torch.Size((1, 2, 3)), torch.Size((2**62,)), (-1,), ("a",), (1.0, 2.0)]
ODD += [torch.float64, torch.int64, torch.bool, torch.device("cpu"), BytesStorageMetadata()]


def mutate_metadata(index: Metadata, rng: random.Random) -> None:
    """Gives one field of an index a different value."""
    name = rng.choice([n for n, e in index.state_dict_metadata.items() if hasattr(e, "chunks")])
    entry = copy.deepcopy(index.state_dict_metadata[name])
    index.state_dict_metadata[name] = entry
    key = MetadataIndex(name, entry.chunks[0].offsets)
    place = copy.deepcopy(index.storage_data[key])
    index.storage_data[key] = place
    chunk = rng.choice(entry.chunks)
    owners = [(entry, f) for f in ("size", "chunks", "properties")]
    owners += [(chunk, f) for f in ("offsets", "sizes")]
    owners += [(place, f) for f in ("offset", "length", "relative_path", "transform_descriptors")]
    owners += [(entry.properties, "dtype"), (index, "storage_data"), (index, "planner_data")]
    owner, field = rng.choice(owners)
    value = rng.choice([*ODD, chunk, entry, place, [chunk], [chunk] * 2, entry.chunks * 2])
    setattr(owner, field, value)


def mutate_json(content: Any, rng: random.Random) -> Any:
    """Changes or removes one value of a JSON document."""
    content = copy.deepcopy(content)
    at = content
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys)
        if not isinstance(at[key], (dict, list)) or not at[key] or rng.random() < 0.2:
            break
        at = at[key]
    values = [value for value in ODD if isinstance(value, (type(None), list, dict, str, int))]
    if rng.random() < 0.2:
        del at[key]
    else:
        at[key] = rng.choice([*values, [at[key]] * 2])
    return content


def test_mutated_indices(checkpoint: Path, imported: Path) -> None:
    rng = random.Random(1)
    good = (imported / ".metadata").read_bytes()
    text = (imported / TENSOR_INDEX).read_text()
    num_refused = 0
    for number in range(NUM_MUTATIONS):
        if number % 3 == 0:
            (checkpoint / ".metadata").write_bytes(good)
            content = json.dumps(mutate_json(json.loads(text), rng))
            (checkpoint / TENSOR_INDEX).write_text(content)
        else:
            (checkpoint / TENSOR_INDEX).unlink(missing_ok=True)
            index = pickle.loads(good)
            mutate_metadata(index, rng)
            content = pickle.dumps(index, protocol=rng.choice((2, 4)))
            if number % 3 == 2:
                raw = bytearray(good)
                raw[rng.randrange(len(raw))] = rng.randrange(256)
                content = bytes(raw)
            (checkpoint / ".metadata").write_bytes(content)
        num_refused += refused_or_same(checkpoint, imported)
    assert num_refused > NUM_MUTATIONS // 2


def hostile_tensors(like: torch.Tensor) -> dict[str, Any]:
    """Returns values to put in the place of an ordinary tensor."""
    quantized = torch.quantize_per_tensor(like.float(), 0.1, 0, torch.qint8)
    return {
        "meta": like.to("meta"),
        "sparse": like.to_sparse(),
        "quantized": quantized,
        "nested": torch.nested.nested_tensor([like.flatten()]),
        "int64": like.long(),
        "float64": like.double(),
        "bool": like.bool(),
        "complex": like.to(torch.complex64),
        "scalar": torch.tensor(1.0),
        "other shape": like.flatten()[:3].clone(),
        "more axes": like.unsqueeze(0).clone(),
        "list": [like],
        "number": 3,
        "nothing": None,
    }


KINDS = list(hostile_tensors(torch.ones(2, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_values(checkpoint: Path, imported: Path, kind: str) -> None:
    index = pickle.loads((imported / ".metadata").read_bytes())
    key = MetadataIndex(NORM, (0,))
    value = hostile_tensors(read_as_export(imported)["model.norm.weight"])[kind]
    buffer = io.BytesIO()
    torch.save(value, buffer)
    shard = checkpoint / "__0_0.distcp"
    begin = shard.stat().st_size
    with open(shard, "ab") as file:
        file.write(buffer.getvalue())
    index.storage_data[key] = replace(
        index.storage_data[key], offset=begin, length=len(buffer.getvalue())
    )
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    (checkpoint / TENSOR_INDEX).unlink()
    assert refused_or_same(checkpoint, imported)
    for read in (read_as_export, read_as_training):
        message = rf"__0_0.distcp: is damaged at {NORM} \("
        with pytest.raises((UserError, CheckpointException), match=message):
            read(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_weights_of_no_dtype_of_weights(checkpoint: Path, tmp_path: Path, dtype: Any) -> None:
    """Both the index and the values have the dtype."""
    values = torch.ones(16, dtype=dtype)
    image = build_file_image("__1_0.distcp", [TensorShard(NORM, (16,), (0,), (16,), values)], [])
    content = torch.empty(image.num_bytes, dtype=torch.uint8)
    image.copy(0, image.num_bytes, content)
    (checkpoint / "__1_0.distcp").write_bytes(content.numpy().tobytes())
    added = pickle.loads(index_files([image.plan])[".metadata"])
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    index.state_dict_metadata |= added.state_dict_metadata
    index.storage_data |= added.storage_data
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    (checkpoint / TENSOR_INDEX).unlink()
    with pytest.raises(UserError, match=f"{NORM} is {dtype}, but must be fp32, bf16 or fp16"):
        export_checkpoint(checkpoint, tmp_path / "hf", tokenizer=TokenizerChoice(leave_out=True))
    if not dtype.is_floating_point:
        shard = TensorShard(NORM, (16,), (0,), (16,), torch.zeros(16))
        with pytest.raises(UserError, match=f"a tensor is {dtype}, but"):
            fill([shard], checkpoint, SafeReader(checkpoint))


@pytest.mark.parametrize(
    "step",
    [float("nan"), float("inf"), -1, torch.ones(2), torch.empty(1, device="meta"), torch.empty(0)],
)
def test_steps_of_the_optimizer(tmp_path: Path, step: Any) -> None:
    with pytest.raises(UserError, match=r"common\.pt: the optimizer step is not a number"):
        _num_steps({"optimizer": {"param_groups": [{"step": step}]}}, tmp_path)
    assert _num_steps({"param_groups": [{"step": torch.tensor(3)}]}, tmp_path) == 3


def test_a_structure_without_an_end(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UserError, match="is not a number"):
        _num_steps(endless, tmp_path)


def test_two_imports_are_the_same_bytes(huggingface: Path, imported: Path, tmp_path: Path) -> None:
    import_huggingface(huggingface, tmp_path / "again")
    other = tmp_path / "again" / "iter_0000000"
    names = sorted(p.relative_to(imported) for p in imported.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert {".metadata", TENSOR_INDEX, "__0_0.distcp", "common.pt"} <= {str(n) for n in names}
    for name in names:
        assert (imported / name).read_bytes() == (other / name).read_bytes(), name


def test_the_index_does_not_depend_on_how_plans_arrive() -> None:
    """Plans of other ranks arrive as JSON, in which equal names are distinct objects."""
    rows = [torch.ones(1, 3) for _ in range(4)]
    shards = [TensorShard("w", (4, 3), (at, 0), (1, 3), row) for at, row in enumerate(rows)]
    plans = [
        build_file_image(f"__{n}_0.distcp", shards[2 * n : 2 * n + 2], []).plan for n in range(2)
    ]
    assert index_files(plans) == index_files(json.loads(json.dumps(plans)))


@pytest.mark.skipif(
    Version(torch.__version__).release < (2, 8),
    reason="torch before 2.8 reads only indices with the keys of nested dictionaries",
)
def test_torchs_own_tools_read_our_checkpoints(imported: Path, tmp_path: Path) -> None:
    format_utils.dcp_to_torch_save(imported, tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=False)
    expected = {
        name: DistributedReader(imported).read_whole(name)
        for name, entry in read_index(imported).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert expected and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_that_torch_wrote(tmp_path: Path) -> None:
    """Its index has a path, an id and the keys of nested dictionaries."""
    import torch.distributed.checkpoint as dcp

    tensors = {"a": {"b": torch.randn(5, 3)}, "c": torch.ones((), dtype=torch.bfloat16)}
    dcp.save(tensors, checkpoint_id=tmp_path)
    reader = DistributedReader(tmp_path)
    assert torch.equal(reader.read_whole("a.b"), tensors["a"]["b"])  # type: ignore[call-overload]
    assert torch.equal(reader.read_whole("c"), tensors["c"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_old_rows", "message"),
    [(9, None), (129, "has shape .128, 16., but the vocabulary has 129 rows")],
)
def test_a_vocabulary_that_is_not_the_checkpoints(
    imported: Path, num_old_rows: int, message: str | None
) -> None:
    name = "embedding.word_embeddings.weight"
    growth = VocabularyGrowth(num_old_rows, ((0,),), num_old_rows + 1)
    grown = GrownVocabulary(growth, Resize(cast(Any, None), "mean-of-pieces"), num_old_rows)
    state = {name: torch.full((256, 16), -1.0)}
    reader = GrownReader(imported, grown, 256)
    if message is not None:
        with pytest.raises(CheckpointException, match=message):
            load(state, storage_reader=reader)
        return
    load(state, storage_reader=reader)
    stored = DistributedReader(imported).read_whole(name)
    assert torch.equal(state[name][:9], stored[:9])
    assert torch.equal(state[name][9], stored[0]) and not state[name][10:].any()
