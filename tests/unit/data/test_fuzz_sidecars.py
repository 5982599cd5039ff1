"""Tests that every command that reads a damaged sidecar works, or refuses it in one line."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import data_config
from preprocess_jobs import Jobs

from megatron_chatflow.convert.template import trained_chat_template
from megatron_chatflow.data.findings import data_findings
from megatron_chatflow.data.sidecar import (
    MAX_SIDECAR_BYTES,
    appends_bos,
    read_sidecar,
    sidecar_path,
    writes_bos,
)
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.inspect import Inspection
from megatron_chatflow.preprocess.merge import PartitionPolicy, merge_datasets
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer import load_tokenizer

NUM_MUTATIONS = int(os.environ.get("NUM_SIDECAR_MUTATIONS", "300"))
VALUES = [None, True, 0, -1, 2**63, 10**300, 1.5, float("nan"), "", "x" * 70_000, "\ud800", "a\nb"]
VALUES += [[], {}, [[]], [1, 2], {"": 0}, {"a\nb" * 9000: -1}]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Returns every container in a JSON value with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def mutate(content: dict[str, Any], rng: random.Random) -> bytes:
    """Returns a damaged copy of a sidecar, changed in its values or its bytes."""
    changed = copy.deepcopy(content)
    if rng.random() < 0.75:
        for _ in range(rng.choice([1, 1, 2])):
            container, key = rng.choice(places(changed))
            if isinstance(container, dict) and rng.random() < 0.3:
                del container[key]
            else:
                container[key] = copy.deepcopy(rng.choice([*VALUES, changed]))
        return json.dumps(changed).encode()
    data = bytearray(json.dumps(changed).encode())
    begin = rng.randrange(len(data))
    if rng.random() < 0.5:
        data[begin] = rng.randrange(256)
    else:
        data[begin : begin + rng.randrange(200)] = rng.randbytes(rng.randrange(3))
    return bytes(data)


@pytest.fixture
def parts(tmp_path: Path, tiny_sentencepiece_model: Path) -> list[Path]:
    """Creates the two parts of a chat preprocessing job with `--dedup`."""
    jobs = Jobs(tmp_path, tiny_sentencepiece_model)
    records = [{"instruction": f"bana {k}", "output": "kedo luno" * 9} for k in range(12)]
    paths = [jobs.lines("0.jsonl", records[:9]), jobs.lines("1.jsonl", records[5:])]
    for number in range(2):
        corpus = CorpusSettings(format="chat", json_keys=("messages",))
        jobs.run(*paths, corpus=corpus, dedup=True, shard=(number, 2))
    return sorted(path.with_suffix("") for path in tmp_path.glob("*_document.idx"))


def commands(parts: list[Path], model: Path) -> dict[str, Callable[[], object]]:
    """Returns the commands that read sidecars, by name."""
    tokenizer = load_tokenizer(model)
    source = {"paths": [str(path) for path in parts], "loss": "response", "packing": "best_fit"}
    config = data_config({"chat": source, "more": {"paths": [str(parts[0])]}}, seq_length=64)

    def train() -> None:
        sources = build_sources(config, seed=1, tokenizer=tokenizer)
        data_findings(config, sources, [], tokenizer)
        for path in parts:
            appends_bos(read_sidecar(path)), writes_bos(read_sidecar(path))

    def inspect() -> None:
        inspection = Inspection(parts[0])
        inspection.describe()
        inspection.check_tokenizer(tokenizer)
        inspection.check_hashes()

    def merge() -> None:
        output = parts[0].with_name("merged_document")
        merge_datasets(parts, output, overwrite=True)
        assert read_sidecar(output) is not None
        Inspection(output).check_hashes()

    def merge_other() -> None:
        alone = parts[0].with_name("alone_document")
        merge_datasets(
            [parts[0]], alone, overwrite=True, policy=PartitionPolicy(allow_missing=True)
        )
        assert read_sidecar(alone) is not None

    def export() -> None:
        trained_chat_template({"chat": parts}, None)

    found = [train, inspect, merge, merge_other, export]
    return {command.__name__: command for command in found}


def test_damaged_sidecars_are_one_line(parts: list[Path], tiny_sentencepiece_model: Path) -> None:
    """The environment variable NUM_SIDECAR_MUTATIONS=3000 runs more mutations."""
    path = sidecar_path(parts[0])
    content = json.loads(path.read_bytes())
    todo = commands(parts, tiny_sentencepiece_model)
    for command in todo.values():
        command()
    num_refused = num_taken = 0
    for seed in range(NUM_MUTATIONS):
        rng = random.Random(seed)
        path.write_bytes(mutate(content, rng))
        for name in todo if seed < 40 else [rng.choice(list(todo))]:
            try:
                todo[name]()
                num_taken += 1
            except UserError as error:
                assert len(str(error)) < 1500 and "\n" not in str(error), (seed, name)
                num_refused += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}: {name}: {error!r}"[:2000]) from error
    assert num_refused > NUM_MUTATIONS / 3 and num_taken > NUM_MUTATIONS / 30


def test_sidecars_of_the_first_version_are_read(parts: list[Path]) -> None:
    path = sidecar_path(parts[0])
    content = json.loads(path.read_bytes())
    for name in ("part", "settings", "template", "repaired", "num_bad_lines", "max_bad_lines"):
        content.pop(name)
    content["a_later_versions"] = {"key": [None, 1.5]}
    content["sha256"]["other"] = "f" * 64
    path.write_text(json.dumps(content))
    expected = {**content, "settings": {}, "repaired": {}, "num_bad_lines": 0}
    assert read_sidecar(parts[0]) == expected
    Inspection(parts[0]).check_hashes()
    merge_datasets([parts[0]], parts[0].with_name("merged_document"))
    merged = read_sidecar(parts[0].with_name("merged_document"))
    assert merged is not None and merged["a_later_versions"] == {"key": [None, 1.5]}


def test_counts_of_another_dataset(parts: list[Path]) -> None:
    shutil.copy(sidecar_path(parts[0]), sidecar_path(parts[1]))
    content = json.loads(sidecar_path(parts[0]).read_bytes())
    content["num_tokens"] += 1
    sidecar_path(parts[0]).write_text(json.dumps(content))
    message = r"part00000of00002_messages_document\.json describes another dataset: num_tokens is"
    with pytest.raises(UserError, match=message):
        Inspection(parts[0])
    with pytest.raises(UserError, match=message):
        merge_datasets(parts, parts[0].with_name("merged_document"))


def test_hashes_that_repeat_more_than_there_is(parts: list[Path]) -> None:
    """A damaged `.hashes` of the right length would lead to negative counts in the sidecar."""
    hashes = parts[1].with_suffix(".hashes")
    records = np.frombuffer(hashes.read_bytes(), np.uint8).copy()
    records.reshape(-1, 24)[:, 16:] = 1
    hashes.write_bytes(records.tobytes())
    with pytest.raises(UserError, match=f"wrong contents: {hashes}: does not match the hash"):
        merge_datasets(parts, parts[0].with_name("merged_document"))
    content = json.loads(sidecar_path(parts[1]).read_bytes())
    del content["sha256"]["hashes"]
    sidecar_path(parts[1]).write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged partition: .*num_text_bytes"):
        merge_datasets(parts, parts[0].with_name("merged_document"))


def test_what_is_no_file_of_a_sidecars_size(tmp_path: Path) -> None:
    path = sidecar_path(tmp_path / "a")
    os.mkfifo(path)
    with pytest.raises(UserError, match="cannot read: .*a.json: is not a regular file"):
        read_sidecar(tmp_path / "a")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot read: .*a.json: is a folder"):
        read_sidecar(tmp_path / "a")
    path.rmdir()
    path.touch()
    os.truncate(path, MAX_SIDECAR_BYTES + 1)
    with pytest.raises(UserError, match="damaged sidecar: .*is larger than 64 MiB"):
        read_sidecar(tmp_path / "a")


def test_an_input_whose_name_is_not_utf8(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    jobs = Jobs(tmp_path, tiny_sentencepiece_model)
    path = Path(os.fsdecode(bytes(tmp_path) + b"/a\xff.jsonl"))
    shutil.copy(jobs.lines("a.jsonl", [{"text": "bana"}]), path)
    content = jobs.run(str(path))
    assert content["inputs"][0]["name"] == r"a\xff.jsonl"
    assert read_sidecar(f"{jobs.prefix}_text_document") == content
