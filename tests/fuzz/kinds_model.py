"""Defines the kinds for checkpoints and Hugging Face folders."""

import io
import json
import math
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from made_up_text import made_up_sentences

from fuzz.case import Command, Damage, Kind
from fuzz.kinds_text import copy_tokenizers, preprocess, write_lines
from fuzz.mutations import (
    VALUES,
    get,
    mutate_bytes,
    mutate_json,
    mutate_object,
    mutate_text,
    places,
    put,
)
from fuzz.sandbox import Limits

_ITERATION = "run/iter_0000002"
_REHASHED = "hashes removed, "


def _make_checkpoint(folder: Path) -> None:
    """Creates a run of two iterations and its export."""
    copy_tokenizers(folder)
    write_lines(folder / "a.jsonl", [{"text": text} for text in made_up_sentences(120, seed=2)])
    Command("", preprocess("--input", "a.jsonl", "--append-eod")).call_to_end()
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {
                    "num_layers": 2,
                    "hidden_size": 16,
                    "ffn_hidden_size": 24,
                    "num_attention_heads": 2,
                    "num_query_groups": 1,
                    "max_position_embeddings": 32,
                },
                "tokenizer": {"tokenizer_model": "tokenizer.model"},
                "data": {"seq_length": 16, "sources": {"a": {"paths": ["out_text_document"]}}},
                "optimizer": {"lr": 1e-3},
                "train": {
                    "train_iters": 2,
                    "micro_batch_size": 2,
                    "global_batch_size": 2,
                    "bf16": False,
                },
                "checkpoint": {"save": "run"},
            }
        )
    )
    Command("", ("megatron_chatflow.pretrain", "--config", "run.yaml")).call_to_end()
    export = ("convert_checkpoint.py", "export", "--checkpoint", "run", "--output", "export")
    Command("", export).call_to_end()


def _damage_checkpoint(folder: Path, rng: random.Random) -> Damage:
    checkpoint = folder / _ITERATION
    names = sorted(
        path.relative_to(folder).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    )
    index = f"{_ITERATION}/.metadata"
    tensors = [name for name in names if name.endswith(".distcp")]
    name = rng.choice([index, index, *tensors, *tensors, rng.choice(names)])
    name = rng.choice([name] * 12 + ["run/latest_checkpointed_iteration.txt"])
    path = folder / name
    content = path.read_bytes()
    if path.name == ".metadata" and rng.random() < 0.7:
        changed, how = _mutate_index(content, rng)
    elif path.suffix == ".distcp" and rng.random() < 0.4:
        changed, how = _replace_record(content, checkpoint, rng)
    elif path.suffix == ".json":
        changed, how = mutate_json(content, rng)
    elif path.suffix in (".yaml", ".txt"):
        changed, how = mutate_text(content, rng, ["\n", "0", "-", "{", "x: 1", "9" * 400, "*", "!"])
    else:
        changed, how = mutate_bytes(content, rng)
    path.write_bytes(changed)
    if rng.random() < 0.6 and path.name != "hashes.json":
        (checkpoint / "hashes.json").unlink()
        if path.name != "tensor_index.json" and rng.random() < 0.8:
            (checkpoint / "tensor_index.json").unlink()  # otherwise its hash protects the index
        how = _REHASHED + how
    return Damage(name, how)


def _mutate_index(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes the objects of a checkpoint's index: chunks, sizes, places and classes."""
    index = pickle.loads(content)
    what = rng.choice(["any", "any", "chunk", "chunk", "place", "class", "attribute"])
    if what == "class":
        return pickle.dumps({"a": _Planted()}), "runs code"
    if what == "attribute":
        return _pickle_that_sets_attributes(rng), "sets attributes of classes"
    if what == "any":
        values = [*VALUES, (), (1,), (0,), (-1,), (2**40,), b"", {1: 2}, _Any()]
        changed, how = mutate_object(index, rng, values)
        how = f"index {how}"
    elif what == "place":
        changed, how = index, "index place"
        places_ = list(changed.storage_data.values())
        place, other = rng.choice(places_), rng.choice(places_)
        field = rng.choice(["offset", "length", "relative_path"])
        value = rng.choice(
            [getattr(other, field), 0, -1, 2**62, 1, None, "../x", "/etc/passwd", "a\0b", ""]
        )
        put(place, field, value)
    else:
        changed, how = index, "index chunks"
        entries = [e for e in changed.state_dict_metadata.values() if hasattr(e, "chunks")]
        entry = rng.choice(entries)
        _mutate_chunks(entry, rng)
    try:
        return pickle.dumps(changed), how
    except Exception:  # torch's classes refuse some values themselves
        return mutate_bytes(content, rng)


def _mutate_chunks(entry: Any, rng: random.Random) -> None:
    """Lists a tensor's chunks twice, not at all, split, shifted, or with another size."""
    import torch

    chunk = rng.choice(entry.chunks)
    what = rng.choice(["twice", "drop", "shift", "size", "whole", "replace"])
    if what == "twice":
        entry.chunks.append(chunk)
    elif what == "drop":
        entry.chunks.remove(chunk)
    elif what == "whole":
        entry.size = torch.Size([n + rng.choice([0, 1, -1, n]) for n in entry.size])
    elif what == "replace":
        entry.chunks[rng.randrange(len(entry.chunks))] = rng.choice(entry.chunks)
    else:
        field = "offsets" if what == "shift" else "sizes"
        old = list(getattr(chunk, field)) or [0]
        axis = rng.randrange(len(old))
        old[axis] = rng.choice([old[axis] + 1, old[axis] - 1, old[axis] // 2, 0, -1, 2**40])
        put(chunk, field, torch.Size(old))


class _Planted:
    """Pickles as a call that creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("planted").touch.__func__, (Path("planted"),)


class _Any:
    """A class that an index never contains."""


def _pickle_that_sets_attributes(rng: random.Random) -> bytes:
    """Returns a pickle that loads a class and sets attributes of the class itself (BUILD)."""
    module, name, attribute = rng.choice(
        [
            ("pathlib", "PosixPath", "with_name"),
            ("torch", "Size", "numel"),
            ("collections", "OrderedDict", "items"),
            ("torch.distributed.checkpoint.metadata", "Metadata", "storage_data"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata", "sizes"),
        ]
    )
    key = attribute.encode()
    return (
        b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\n}X"
        + struct.pack("<I", len(key)) + key + b"Nsb."
    )  # fmt: skip


def _tensors(tensor: Any, rng: random.Random) -> Any:
    """Returns a tensor or another value that does not belong in the place of a tensor."""
    import torch

    shape = tuple(tensor.shape)
    makers: list[Callable[[], Any]] = [
        lambda: torch.empty(shape, device="meta"),
        lambda: tensor.to_sparse(),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: torch.zeros(shape, dtype=torch.int64),
        lambda: torch.zeros(shape, dtype=torch.bool),
        lambda: torch.zeros(shape, dtype=torch.complex64),
        lambda: tensor.double(),
        lambda: tensor.half(),
        lambda: tensor.to(torch.float8_e4m3fn),
        lambda: torch.zeros(()),
        lambda: torch.zeros(0),
        lambda: tensor.reshape(-1),
        lambda: tensor.unsqueeze(0),
        lambda: tensor[..., :-1].clone(),
        lambda: torch.zeros(1).expand(shape),
        lambda: tensor.requires_grad_(),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: torch.full(shape, float("nan")),
        lambda: [tensor],
        lambda: {"a": tensor},
        lambda: None,
        lambda: 3,
        lambda: "x",
        lambda: torch.Size([2, 3]),
    ]
    try:
        return rng.choice(makers)()
    except (RuntimeError, TypeError, IndexError):
        return None


def _replace_record(content: bytes, checkpoint: Path, rng: random.Random) -> tuple[bytes, str]:
    """Replaces the record of a tensor in a file, and updates its place in the index."""
    import torch

    path = checkpoint / ".metadata"
    index = pickle.loads(path.read_bytes())
    found = [place for place in index.storage_data.values() if place.length]
    name = rng.choice(sorted({place.relative_path for place in found}))
    place = rng.choice([place for place in found if place.relative_path == name])
    try:
        old = torch.load(io.BytesIO(content[place.offset : place.offset + place.length]))
    except Exception:
        return mutate_bytes(content, rng)
    if not isinstance(old, torch.Tensor):
        return mutate_bytes(content, rng)
    record = io.BytesIO()
    torch.save(_tensors(old, rng), record)
    put(place, "offset", len(content))
    put(place, "length", len(record.getvalue()))
    path.write_bytes(pickle.dumps(index))
    return content + record.getvalue(), "another value"


def _is_small_damage(damage: Damage) -> bool:
    """Returns whether the damage is to a small file whose hash every command checks."""
    return (
        not damage.how.startswith(_REHASHED)
        and damage.file.startswith(_ITERATION)
        and not damage.file.endswith((".distcp", "hashes.json"))
    )


def _is_hashed(damage: Damage) -> bool:
    """Returns whether the damage is to a file whose hash `--ckpt-verify` checks."""
    return (
        not damage.how.startswith(_REHASHED)
        and damage.file.startswith(_ITERATION)
        and not damage.file.endswith("hashes.json")
    )


def fill_memory() -> None:
    """Makes torch fill uninitialized memory with NaN, so that holes are detected."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _check_export(folder: Path, damage: Damage) -> None:
    """Checks that the export contains only values of the checkpoint."""
    from safetensors.torch import load_file

    if damage.file.endswith(".distcp"):
        return  # the values themselves may have become NaN
    for path in sorted((folder / "new").glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if not math.isfinite(float(tensor.float().sum())):
                raise AssertionError(f"{name} has memory that was not initialized")


def _filled(*arguments: str) -> Callable[[], object]:
    def run() -> object:
        fill_memory()
        return Command("", arguments).call()

    return run


_RESUME = (
    *("megatron_chatflow.pretrain", "--config", "run.yaml", "--load", "run"),
    *("--train-iters", "3", "--override-opt-param-scheduler"),
)
_RUN_FILES = ("run/*", "out_*packing*", "*.cache*")
CHECKPOINT = Kind(
    "checkpoint",
    _make_checkpoint,
    _damage_checkpoint,
    [
        Command(
            "export",
            _filled("convert_checkpoint.py", "export", "--checkpoint", "run", "--output", "new"),
            outputs=["new/*"],
            compared=["new/*.safetensors"],
            is_covered=_is_small_damage,
            check=_check_export,
        ),
        Command(
            "verify",
            ("convert_checkpoint.py", "verify", "--checkpoint", "run", "--hf", "export",
             "--weights-only"),
            statuses=(0, 1, 2),
        ),
        Command(
            "resume",
            _RESUME,
            may_write=_RUN_FILES,
            is_covered=_is_small_damage,
        ),
        Command(
            "resume with all hashes",
            (*_RESUME, "--ckpt-verify"),
            may_write=_RUN_FILES,
            is_covered=_is_hashed,
        ),
        Command(
            "dry run",
            (*_RESUME, "--dry-run"),
            may_write=_RUN_FILES,
        ),
    ],
    needs=["tokenizer"],
    limits=Limits(cpu_seconds=40, wall_seconds=240),
)  # fmt: skip


# Hugging Face folders


def _make_huggingface(folder: Path) -> None:
    """Exports one file, several files, and `pytorch_model.bin`."""
    import torch
    from safetensors.torch import load_file

    source = folder.parent / "checkpoint"
    shutil.copytree(source / "export", folder / "one")
    shutil.copytree(source / "run", folder / "run")
    for name in ("tokenizer.model", "run.yaml", "out_text_document.bin"):
        shutil.copy(source / name, folder)
    for suffix in ("idx", "json"):
        shutil.copy(source / f"out_text_document.{suffix}", folder)
    export = ("convert_checkpoint.py", "export", "--checkpoint", "run", "--output", "several")
    Command("", (*export, "--max-shard-size", "12KB")).call_to_end()
    shutil.copytree(folder / "one", folder / "bin")
    torch.save(
        load_file(folder / "bin" / "model.safetensors"), folder / "bin" / "pytorch_model.bin"
    )
    (folder / "bin" / "model.safetensors").unlink()
    shutil.rmtree(folder / "run")


def _damage_huggingface(folder: Path, rng: random.Random) -> Damage:
    model = rng.choice(["one", "several", "bin"])
    names = sorted(path.name for path in (folder / model).iterdir() if path.is_file())
    weights = [name for name in names if name.startswith(("model", "pytorch_model"))]
    name = rng.choice(
        [*weights, *weights, "config.json", *(["config.json"] * 2), rng.choice(names)]
    )
    path = folder / model / name
    content = path.read_bytes()
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        changed, how = _mutate_header(content, rng)
    elif path.suffix == ".bin" and rng.random() < 0.7:
        changed, how = _mutate_weights(content, rng)
    elif path.suffix == ".json":
        changed, how = mutate_json(content, rng)
    else:
        changed, how = mutate_bytes(content, rng)
    path.write_bytes(changed)
    return Damage(f"{model}/{name}", how)


def _mutate_header(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    entries = [name for name in header if name != "__metadata__"]
    entry, other = header[rng.choice(entries)], header[rng.choice(entries)]
    what = rng.choice(["any", "offsets", "shift", "hole", "length", "dtype"])
    if what == "any":
        header, _ = mutate_object(header, rng)
    elif what == "offsets":
        entry["data_offsets"] = list(other["data_offsets"])
    elif what == "shift":
        by = rng.choice([-4, 4, 1, 64])
        entry["data_offsets"] = [max(0, at + by) for at in entry["data_offsets"]]
    elif what == "dtype":
        entry["dtype"] = rng.choice(["F16", "BF16", "I32", "F64", "F8_E4M3", "X", ""])
    elif what == "hole":
        content += bytes(rng.choice([1, 8, 4096]))
    text = json.dumps(header).encode()
    size = len(text) + (rng.choice([-1, 1, 2**40, -len(text)]) if what == "length" else 0)
    return size.to_bytes(8, "little", signed=True) + text + content[8 + length :], f"header {what}"


def _mutate_weights(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changes the values or the archive entries of a `pytorch_model.bin`."""
    import torch

    output = io.BytesIO()
    if rng.random() < 0.3:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(output, "w") as new:
            chosen = rng.choice(old.namelist())
            for name in old.namelist():
                entry = old.read(name)
                new.writestr(name, mutate_bytes(entry, rng)[0] if name == chosen else entry)
        return output.getvalue(), f"entry {chosen}"
    weights = torch.load(io.BytesIO(content))
    container, key = rng.choice(places(weights))
    what = rng.choice(["tensor", "tensor", "tensor", "drop", "name", "wrap", "code"])
    if what == "tensor":
        put(container, key, _tensors(get(container, key), rng))
    elif what == "drop":
        del container[key]
    elif what == "name":
        container[rng.choice([1, None, "", "x", f"{key}.", "lm_head.weight"])] = container.pop(key)
    elif what == "wrap":
        weights = rng.choice([{"state_dict": weights}, [weights], {"model": weights}, None])
    else:
        weights = {**weights, "x": _Planted()}
    torch.save(weights, output)
    return output.getvalue(), f"weights {what}"


def _check_import(folder: Path, damage: Damage) -> None:
    """Checks that safetensors can read what was imported, and that the import verifies."""
    from safetensors import safe_open

    model, _, name = damage.file.partition("/")
    if name.endswith(".safetensors"):
        with safe_open(folder / damage.file, "pt"):
            pass
    from megatron_chatflow.convert.verify import compare

    if not compare(folder / (model or "one"), folder / "new", [], weights_only=True).is_same:
        raise AssertionError("the import differs from its folder")


HUGGINGFACE = Kind(
    "huggingface",
    _make_huggingface,
    _damage_huggingface,
    [
        command
        for model in ("one", "several", "bin")
        for command in (
            Command(
                f"import {model}",
                _filled("convert_checkpoint.py", "import", "--hf", model, "--output", "new"),
                outputs=["new/*"],
                reads=[f"{model}/*"],
                check=_check_import,
            ),
            Command(
                f"start from {model}",
                ("megatron_chatflow.pretrain", "--config", "run.yaml", "--load-hf", model,
                 "--train-iters", "1", "--save", "started"),
                may_write=["started/*", "out_*packing*"],
                reads=[f"{model}/*"],
            ),
            Command(
                f"generate by {model}",
                ("generate.py", model, "--prompt", "bana", "--max-new-tokens", "2"),
                reads=[f"{model}/*"],
            ),
        )
        if not (model == "several" and command.name.startswith("start"))
    ],
    needs=["checkpoint"],
    limits=Limits(cpu_seconds=40, wall_seconds=240),
)  # fmt: skip

KINDS = [CHECKPOINT, HUGGINGFACE]
