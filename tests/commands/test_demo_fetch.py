"""Tests the demo corpus: fetching by the real pip from a folder, and extraction by processes."""

import hashlib
import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from examples.corpus import write
from examples.corpus.build import extract_corpus
from examples.corpus.fetch import fetch
from examples.corpus.pins import Pin
from megatron_chatflow.errors import UserError

Publish = Callable[..., Pin]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "archives"
    path.mkdir()
    return path


def test_fetches_only_what_is_missing_or_damaged(publish: Publish, folder: Path) -> None:
    first, second = publish("prose"), publish("verse")
    paths = fetch([first, second], folder)
    assert sorted(os.listdir(folder)) == sorted(path.name for path in paths.values())
    assert paths["prose"].name == first.file_name
    paths["prose"].write_bytes(b"damaged")
    before = paths["verse"].stat().st_mtime_ns
    assert fetch([first, second], folder) == paths
    assert paths["verse"].stat().st_mtime_ns == before
    upstream = folder.parent / "upstream"
    assert paths["prose"].read_bytes() == (upstream / first.file_name).read_bytes()
    for name in os.listdir(upstream):
        (upstream / name).unlink()
    assert fetch([first, second], folder) == paths, "files with the right hash need no index"


def test_hash_mismatch_names_the_package(publish: Publish, folder: Path) -> None:
    pin = publish("prose")
    publish("prose", b"other text")
    with pytest.raises(UserError, match=r"^prose==1\.0: hash mismatch: .*index[^\n]*$"):
        fetch([pin], folder)
    assert os.listdir(folder) == []


def test_full_disk_is_reported_as_such(publish: Publish, folder: Path) -> None:
    pin = publish("prose", random.Random(0).randbytes(1 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        with pytest.raises(UserError, match=r"archives: prose-1\.0.* does not fit .*File too la"):
            fetch([pin], folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert fetch([pin], folder)["prose"].parent == folder


def test_unreachable_index_says_how_to_continue_without(
    publish: Publish, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = publish("prose")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(UserError) as caught:
        fetch([pin], folder)
    message = str(caught.value)
    assert message.startswith("prose==1.0: pip cannot fetch it (")
    assert "--archive-dir" in message and pin.file_name in message
    assert "secret" not in message and "\n" not in message


def test_archive_folder_is_used_in_place(publish: Publish, folder: Path, tmp_path: Path) -> None:
    pin = publish("prose")
    upstream = tmp_path / "upstream"
    assert fetch([pin], folder, archive_folders=[upstream])["prose"] == upstream / pin.file_name
    assert os.listdir(folder) == []
    (upstream / pin.file_name).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"prose==1\.0: hash mismatch: .*upstream"):
        fetch([pin], folder, archive_folders=[upstream])


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_writes_the_same_bytes_in_one_process_and_in_many(packages, tmp_path, monkeypatch):
    upstream, pins = packages
    folders = [tmp_path / name for name in ("one", "two")]
    manifest = write.make_demo_corpus(pins, folders[0], archive_folders=[upstream])
    monkeypatch.setattr(
        write, "extract_corpus", lambda archives: extract_corpus(archives, num_workers=0)
    )
    write.make_demo_corpus(pins, folders[1], archive_folders=[upstream])
    assert files_of(folders[0]) == files_of(folders[1])
    assert sorted(files_of(folders[0])) == [
        "LICENSES.md",
        "instruction.train.jsonl",
        "instruction.valid.jsonl",
        "manifest.json",
        "parallel.train.jsonl",
        "parallel.valid.jsonl",
        "tokenizer.model",
    ]
    lines = (folders[0] / "parallel.valid.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"en": "Fish 25 swims.", "zh": "第25条鱼在水里游。"}
    ]
    assert manifest == orjson.loads((folders[0] / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        content = (folders[0] / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["num_bytes"] == len(content)
    assert manifest["files"]["parallel.train.jsonl"]["num_documents"] == 59
    report = "\n".join(write.report(manifest))
    assert "hsk-sentences-audio 1.0 (MIT): parallel 60 documents" in report
    assert "mistral-common" in (folders[0] / "LICENSES.md").read_text()
