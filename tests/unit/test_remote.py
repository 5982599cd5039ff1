"""Tests reading, copying and writing remote files over connections that fail."""

import functools
import hashlib
import http.server
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_store import SECRET, ObjectStore
from s3fs import S3FileSystem

from megatron_chatflow import remote
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import refuse_url
from megatron_chatflow.preprocess.readers import find_inputs
from megatron_chatflow.remote import CachedPath, RemoteError

CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 100_000)


def found(url: str) -> remote.RemoteFile:
    file = remote.stat(url)
    assert file is not None
    return file


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:secret@bucket/x.jsonl",
        "https://user:secret@host/x.jsonl",
        "https://host/x.jsonl?X-Amz-Signature=secret&X-Amz-Expires=60",
        "https://host/x.jsonl?access_token=secret",
        "hf://datasets/o/n/x.jsonl?token=secret",
        "s3://AKIA:very/secret@bucket/x",
        "s3://AKIA:1/secret@bucket/x",
        "s3://bucket:secret/x",
        "https://u:my/secret@h/x",
        "https://h/x?accessToken=secret",
        "https://h/x?sv=1;sas=secret",
        "https://h/x?%74oken=secret",
        "https://h/x#token=secret",
    ],
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="has credentials in the URL") as caught:
        remote.parse_location(url)
    if "@" in url or "=" in url:  # otherwise it looks like a name
        assert "secret" not in str(caught.value)
        assert "secret" not in remote.mask(f"{url}: failed")
        with pytest.raises(UserError, match="is a URL") as caught:
            refuse_url(Path(url))
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "ftp:// is not supported"),
        ("s3://bucket//x", "single slashes"),
        ("s3://bucket/../x", "single slashes"),
        ("s3://bucket/x#y", "must not contain #"),
        ("s3://bucket/x::file:///etc/passwd", "must not contain # or ::"),
        ("s3://", "single slashes"),
        ("file://host/x", "must be a local path"),
        ("https://[::1/x", "not a valid URL"),
    ],
)
def test_invalid_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        remote.parse_location(url)


def test_locations_that_are_accepted() -> None:
    assert remote.parse_location("data/en.jsonl") == "data/en.jsonl"
    assert remote.parse_location("file:///data/a%20b.jsonl") == "/data/a b.jsonl"
    assert remote.parse_location("file:///data/a#b?c.jsonl") == "/data/a#b?c.jsonl"
    assert remote.parse_location("https://host:8080/a@b") == "https://host:8080/a@b"
    assert remote.mask("https://host:8080/a@b: x") == "https://host:8080/a@b: x"
    assert remote.parse_location("hf://datasets/o/n@main/x") == "hf://datasets/o/n@main/x"
    assert remote.parse_location("S3://bucket/x") == "s3://bucket/x"
    assert remote.parse_location("https://host/x?keyword=a") == "https://host/x?keyword=a"


def test_a_cached_path_knows_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(remote.CACHE_VARIABLE, "/cache")
    path = CachedPath.of("s3://bucket/a/zh_text_document")
    assert str(path) == "/cache/s3/bucket/a/zh_text_document"
    assert path.url == "s3://bucket/a/zh_text_document"
    with pytest.raises(UserError, match="is not a file name within the folder"):
        CachedPath.of("s3://b/x/../../../../etc/foo_document")
    monkeypatch.setenv(remote.CACHE_VARIABLE, "~/copies")
    assert remote.cache_folder() == Path.home() / "copies"


def test_names_on_the_store_that_leave_the_folder_are_refused(object_store: ObjectStore) -> None:
    object_store.put("raw/a/../../../etc/foo_document.idx", b"x")
    with pytest.raises(UserError, match="is not a file name within the folder"):
        remote.find("s3://corpora/raw")


def test_only_failures_of_networks_and_servers_are_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[BaseException] = []

    def failing(error: Exception) -> None:
        calls.append(error)
        raise error

    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 2)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.0)
    for error, number in ((TypeError("no"), 1), (TimeoutError("slow"), 2)):
        calls.clear()
        with pytest.raises(RemoteError, match=f"{number} attempt"):
            remote._attempt("s3://b/x", "read", lambda error=error: failing(error))
        assert len(calls) == number


def test_an_error_of_the_file_system_is_one_masked_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def failing(url: str, **options: object) -> None:
        raise ValueError("bad s3://key:sec/ret@bucket/x")

    monkeypatch.setattr(fsspec.core, "url_to_fs", failing)
    with pytest.raises(RemoteError, match=r"cannot open: s3://b/x: bad s3://\*\*\*@bucket/x"):
        remote.stat("s3://b/x")


def test_a_file_is_read_although_connections_are_cut(object_store: ObjectStore) -> None:
    file = found(object_store.put("x.bin", CONTENT))
    object_store.proxy.fail_next(50_000, 150_000, 0, None, 120_000)
    with file.open() as stream:
        assert stream.read() == CONTENT
    assert object_store.proxy.num_cut >= 1


def test_a_file_is_read_at_random(object_store: ObjectStore) -> None:
    with found(object_store.put("x.bin", CONTENT)).open() as stream:
        for begin in (2_950_000, 0, 1_234_567, 99_999):
            stream.seek(begin)
            data = b""
            while len(data) < 150_000 and (part := stream.read(150_000 - len(data))):
                data += part
            assert data == CONTENT[begin : begin + 150_000]


def test_attempts_are_bounded_and_the_error_is_one_line(object_store: ObjectStore) -> None:
    file = found(object_store.put("x.bin", CONTENT))
    object_store.proxy.go_down()
    with pytest.raises(RemoteError, match=r"cannot read: s3://corpora/x.bin: .*\(6 attempts\)"):
        file.open().read()


def test_a_file_that_changes_while_it_is_read_is_an_error(object_store: ObjectStore) -> None:
    file = found(object_store.put("x.bin", CONTENT))
    with file.open() as stream:
        stream.read(10)
        object_store.put("x.bin", CONTENT[::-1])
        with pytest.raises(RemoteError, match="changed while it was read"):
            stream.read()


def test_a_short_answer_is_requested_again(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, num_short = S3FileSystem._cat_file, 3

    async def short(*arguments: Any, **options: Any) -> bytes:
        nonlocal num_short
        data: bytes = await real(*arguments, **options)
        num_short -= 1
        return data if num_short < 0 else data[:-1]

    monkeypatch.setattr(S3FileSystem, "_cat_file", short)
    file = found(object_store.put("x.bin", CONTENT))
    with file.open() as stream:
        assert stream.read() == CONTENT
    assert num_short < 0


def test_a_file_that_changes_while_it_is_copied_leaves_nothing(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = found(object_store.put("x.bin", CONTENT))
    real = remote._read_block

    def replaced(file: remote.RemoteFile, begin: int, end: int) -> bytes:
        if begin == 2_000_000:
            object_store.put("x.bin", CONTENT[::-1])
        return real(file, begin, end)

    monkeypatch.setattr(remote, "_read_block", replaced)
    with pytest.raises(RemoteError, match="changed while it was read"):
        remote.download(file, tmp_path / "x.bin")
    assert not list(tmp_path.glob("*x.bin*"))


def test_wrong_credentials_are_not_tried_again(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(RemoteError, match="Unable to locate credentials: check the credentials"):
        remote.stat("s3://corpora/x.bin")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://b/x: needs the package gcsfs: pip install"):
        remote.stat("gs://b/x")


def test_a_copy_is_made_once(object_store: ObjectStore, tmp_path: Path) -> None:
    file = found(object_store.put("x.bin", CONTENT))
    target = tmp_path / "local" / "x.bin"
    assert remote.download(file, target)
    assert target.read_bytes() == CONTENT
    assert not remote.download(file, target)
    object_store.put("x.bin", CONTENT[:1000])
    assert remote.download(found(file.url), target)
    assert target.read_bytes() == CONTENT[:1000]
    names = sorted(path.name for path in target.parent.iterdir())
    assert names == [".x.bin.remote.json", "x.bin"]


def test_an_interrupted_copy_continues(object_store: ObjectStore, tmp_path: Path) -> None:
    file = found(object_store.put("x.bin", CONTENT))
    target = tmp_path / "x.bin"
    object_store.proxy.fail_next(350_000, *[0] * 1000)
    with pytest.raises(RemoteError):
        remote.download(file, target)
    assert not target.exists()
    (partial,) = tmp_path.glob(".x.bin.*.partial")
    num_kept = partial.stat().st_size
    assert 100_000 <= num_kept < len(CONTENT)
    assert CONTENT.startswith(partial.read_bytes())
    object_store.proxy.cuts.clear()
    object_store.proxy.num_bytes = 0
    assert remote.download(file, target)
    assert target.read_bytes() == CONTENT
    assert object_store.proxy.num_bytes < len(CONTENT) - num_kept + 100_000


def test_a_damaged_copy_gets_no_name(object_store: ObjectStore, tmp_path: Path) -> None:
    file = found(object_store.put("x.bin", CONTENT))
    check = remote.sha256_damage(hashlib.sha256(b"other").hexdigest())
    with pytest.raises(UserError, match="SHA-256 is not the recorded one"):
        remote.download(file, tmp_path / "x.bin", find_damage=check)
    assert not list(tmp_path.glob("*x.bin*"))


def test_a_full_disk_is_reported_before_copying(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = found(object_store.put("x.bin", CONTENT))
    usage = remote.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"needs 0.00 GB for a copy of s3://corpora/x.bin"):
        remote.download(file, tmp_path / "x.bin")
    assert not (tmp_path / "x.bin").exists()


def test_an_upload_survives_cut_connections(object_store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "x.bin"
    source.write_bytes(CONTENT)
    object_store.proxy.fail_next(1_000_000, 2_000_000)
    remote.upload(source, "s3://corpora/a/x.bin")
    assert object_store.proxy.num_cut >= 1
    assert object_store.get("a/x.bin") == CONTENT


def test_a_large_upload_in_parts_that_fails_leaves_nothing(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 2)
    source = tmp_path / "x.bin"
    with source.open("wb") as file:
        file.truncate(120 << 20)

    calls: list[int] = []

    def fail(num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) == 1:  # other parts may still be sent when the upload has failed
            object_store.proxy.go_down()

    with pytest.raises(RemoteError, match="cannot write: s3://corpora/x.bin"):
        remote.upload(source, "s3://corpora/x.bin", fail)
    object_store.proxy.is_down = False
    assert object_store.names() == []
    remote.upload(source, "s3://corpora/x.bin")
    assert found("s3://corpora/x.bin").num_bytes == 120 << 20


def test_a_missing_bucket_is_named(object_store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(RemoteError, match="s3://nowhere/x: the bucket does not exist"):
        remote.upload(tmp_path / "x", "s3://nowhere/x")
    assert remote.find("s3://nowhere/x") == []


def test_small_files_are_replaced_and_removed(object_store: ObjectStore) -> None:
    assert remote.read_bytes("s3://corpora/latest.txt") is None
    remote.write_bytes("s3://corpora/latest.txt", b"1")
    remote.write_bytes("s3://corpora/latest.txt", b"2")
    assert remote.read_bytes("s3://corpora/latest.txt") == b"2"
    remote.remove(["s3://corpora/missing.txt", "s3://corpora/latest.txt"])
    assert object_store.names() == []


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which sends whole files only."""

    cut_after: list[int] = []
    stall_seconds = 0.0  # before a cut

    def log_message(self, *arguments: object) -> None:
        pass

    def copyfile(self, source: object, outputfile: object) -> None:
        limit = self.cut_after.pop(0) if self.cut_after else -1
        outputfile.write(source.read(limit))  # type: ignore[attr-defined]
        if limit >= 0:
            time.sleep(self.stall_seconds)


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "web").mkdir()
    handler = functools.partial(_Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_web_server_without_ranges_is_read(
    web_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    (tmp_path / "web" / "x.bin").write_bytes(CONTENT)
    file = found(f"{web_server}/x.bin")
    assert not file.has_ranges
    _Handler.cut_after = [1_500_000, 2_500_000]
    with file.open() as stream:
        assert stream.read() == CONTENT
    assert _Handler.cut_after == []
    assert remote.download(file, tmp_path / "copy.bin")
    assert (tmp_path / "copy.bin").read_bytes() == CONTENT


def test_a_web_server_that_stalls_is_asked_again(
    web_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(_Handler, "stall_seconds", 4.0)
    monkeypatch.setattr(_Handler, "cut_after", [1_000_000])
    (tmp_path / "web" / "x.bin").write_bytes(CONTENT)
    begin = time.monotonic()
    with found(f"{web_server}/x.bin").open() as stream:
        assert stream.read() == CONTENT
    assert time.monotonic() - begin < 3.5


def test_the_query_of_a_web_page_is_no_part_of_the_name(web_server: str, tmp_path: Path) -> None:
    (tmp_path / "web" / "x.jsonl").write_bytes(b'{"text": "bana"}\n')
    (file,) = find_inputs([f"{web_server}/x.jsonl?download=true"])
    assert (file.name, file.kind, file.num_bytes) == ("x.jsonl", "jsonl", 17)
    with pytest.raises(UserError, match=r"no input: http://.*/y.jsonl\?\*\*\*: no such file"):
        find_inputs([f"{web_server}/y.jsonl?download=true"])


def test_web_servers_are_not_written(web_server: str, tmp_path: Path) -> None:
    assert remote.stat(f"{web_server}/missing.bin") is None
    with pytest.raises(UserError, match="web servers can only be read"):
        remote.write_bytes(f"{web_server}/x.bin", b"")


def test_the_log_has_no_credentials(
    object_store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "megatron_chatflow")
    file = found(object_store.put("x.bin", CONTENT))
    object_store.proxy.fail_next(*[0] * 20)
    with file.open() as stream:
        stream.read()
    assert "attempt 2 follows" in caplog.text
    assert SECRET not in caplog.text
