"""Tests fetching with the real pip from a folder: hashes, reuse, full disks, errors."""

import os
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

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
