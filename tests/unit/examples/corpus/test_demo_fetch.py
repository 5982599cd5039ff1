"""Fetching from a real index on the loopback address: hashes, resuming, folders, errors."""

import base64
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from examples.corpus.console import Console
from examples.corpus.fetch import fetch, locked
from examples.corpus.pins import Pin
from examples.corpus.pip_settings import PipSettings
from megatron_chatflow.errors import UserError

QUIET = Console(quiet=True)
Publish = Callable[..., Pin]


def settings_for(*urls: str, **others: object) -> PipSettings:
    return PipSettings(index_urls=urls, **others)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "archives"
    path.mkdir()
    return path


@pytest.mark.parametrize("says_json", [False, True])
def test_fetches_what_is_missing_and_nothing_else(index, publish, folder, says_json):
    index.says_json = says_json
    pins = [publish("prose"), publish("more-prose", "other text")]
    paths = fetch(pins, folder, settings=settings_for(index.url), console=QUIET)
    assert {name: path.name for name, path in paths.items()} == {
        pin.package: pin.file_name for pin in pins
    }
    assert paths["prose"].read_bytes() == index.files["prose"][pins[0].file_name]
    assert len(index.requests) == 2
    paths["prose"].write_bytes(b"damaged")
    fetch(pins, folder, settings=settings_for(index.url), console=QUIET)
    assert [path for path, _ in index.requests[2:]] == [f"/files/prose/{pins[0].file_name}"]
    assert sorted(os.listdir(folder)) == sorted(pin.file_name for pin in pins)


def test_a_full_disk_is_not_the_networks_fault(index, publish, folder):
    pin = publish("prose")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=r"archives: .* does not fit \(File too large\): make"):
            fetch([pin], folder, settings=settings_for(index.url), console=QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    fetch([pin], folder, settings=settings_for(index.url), console=QUIET)
    assert os.listdir(folder) == [pin.file_name], "the download went on where it stopped"


@pytest.mark.parametrize("declares_hashes", [False, True])
def test_hash_mismatch_names_the_package(index, publish, folder, declares_hashes):
    index.declares_hashes = declares_hashes
    pin = publish("prose")
    content = bytearray(index.files["prose"][pin.file_name])
    content[-1] ^= 1
    index.files["prose"][pin.file_name] = bytes(content)
    with pytest.raises(UserError, match=r"prose==1\.0: hash mismatch"):
        fetch([pin], folder, settings=settings_for(index.url), console=QUIET)
    assert os.listdir(folder) == []
    assert len(index.requests) == (0 if declares_hashes else 1)


@pytest.mark.parametrize("change", [-1000, 1000])
def test_file_of_another_size_is_a_mismatch(index, publish, folder, change):
    index.declares_hashes = False
    pin = publish("prose")
    content = index.files["prose"][pin.file_name]
    content = content[:change] if change < 0 else content + bytes(change)
    index.files["prose"][pin.file_name] = content
    with pytest.raises(UserError, match="hash mismatch"):
        fetch([pin], folder, settings=settings_for(index.url), console=QUIET)


def test_goes_on_where_a_killed_run_stopped(index, publish, folder):
    pin = publish("prose")
    content = index.files["prose"][pin.file_name]
    (folder / f".{pin.file_name}.part").write_bytes(content[:300])
    fetch([pin], folder, settings=settings_for(index.url), console=QUIET)
    assert [wanted for _, wanted in index.requests] == ["bytes=300-"]
    assert (folder / pin.file_name).read_bytes() == content


def test_leftover_of_another_file_is_fetched_anew(index, publish, folder):
    pin = publish("prose")
    (folder / f".{pin.file_name}.part").write_bytes(b"x" * 300)
    fetch([pin], folder, settings=settings_for(index.url), console=QUIET)
    assert [wanted for _, wanted in index.requests] == ["bytes=300-", None]
    assert os.listdir(folder) == [pin.file_name]


def test_broken_connection_is_resumed(index, publish, folder):
    pin = publish("prose")
    index.cut_after[pin.file_name] = 400
    fetch([pin], folder, settings=settings_for(index.url), console=QUIET)
    assert [wanted for _, wanted in index.requests] == [None, "bytes=400-"]


def test_archive_folder_is_used_in_place(publish, folder, tmp_path):
    pin = publish("prose")
    paths = fetch([pin], folder, archive_folders=[tmp_path / "upstream"], console=QUIET)
    assert paths["prose"] == tmp_path / "upstream" / pin.file_name
    assert os.listdir(folder) == []


def test_wrong_file_in_archive_folder_is_refused(publish, folder, tmp_path):
    pin = publish("prose")
    (tmp_path / "upstream" / pin.file_name).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"prose==1\.0: hash mismatch: .*upstream"):
        fetch([pin], folder, archive_folders=[tmp_path / "upstream"], console=QUIET)


def test_find_links_and_folder_index_need_no_server(publish, folder, tmp_path):
    pin = publish("prose")
    upstream = tmp_path / "upstream"
    settings = settings_for(find_links=(str(upstream),))
    assert fetch([pin], folder, settings=settings, console=QUIET)["prose"].parent == folder
    (folder / pin.file_name).unlink()
    project = tmp_path / "simple" / "prose"
    project.mkdir(parents=True)
    (project / "index.html").write_text(f'<a href="../../upstream/{pin.file_name}">x</a>')
    settings = settings_for((tmp_path / "simple").as_uri())
    assert fetch([pin], folder, settings=settings, console=QUIET)["prose"].parent == folder


def test_second_index_is_asked_when_the_first_has_another_file(index, publish, folder, tmp_path):
    pin = publish("prose")
    project = tmp_path / "simple" / "prose"
    project.mkdir(parents=True)
    (project / pin.file_name).write_bytes(b"a namesake")
    settings = settings_for((tmp_path / "simple").as_uri(), index.url)
    assert fetch([pin], folder, settings=settings, console=QUIET)


def test_unreachable_index_says_how_to_go_on_without(publish, folder):
    pin = publish("prose")
    settings = settings_for("http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(UserError) as caught:
        fetch([pin], folder, settings=settings, console=QUIET)
    message = str(caught.value)
    assert "refused" in message and "--archive-dir" in message and pin.file_name in message
    assert "secret" not in message and "\n" not in message


def test_file_that_no_index_has(index, publish, folder):
    pin = publish("prose")
    index.files["prose"] = {}
    with pytest.raises(UserError, match="in none of the 1 places"):
        fetch([pin], folder, settings=settings_for(index.url), console=QUIET)


def test_credentials_go_to_index_and_files(index, publish, folder):
    pin = publish("prose")
    index.credentials = "Basic " + base64.b64encode(b"me:p@ss").decode()
    url = index.url.replace("http://", "http://me:p%40ss@")
    assert fetch([pin], folder, settings=settings_for(url), console=QUIET)
    (folder / pin.file_name).unlink()
    with pytest.raises(UserError, match="401"):
        fetch([pin], folder, settings=settings_for(index.url), console=QUIET)


def test_folder_takes_one_run_at_a_time(folder):
    code = (
        "import sys; from pathlib import Path\n"
        "from examples.corpus.fetch import locked\n"
        "with locked(Path(sys.argv[1])): print('in')"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with locked(folder):
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "another run is writing there" in other.stderr
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.stdout == "in\n"
