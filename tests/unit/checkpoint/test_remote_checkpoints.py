"""Tests copies of checkpoints on an S3 server whose connections fail."""

import logging
import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore
from torch.distributed import HashStore

from megatron_chatflow import remote
from megatron_chatflow.checkpoint import remote as copies
from megatron_chatflow.checkpoint import writer
from megatron_chatflow.checkpoint.direct_file import hash_file
from megatron_chatflow.checkpoint.files import (
    LATEST,
    MANIFEST,
    find_damage,
    latest_iteration,
    manifest_text,
    prune,
    resolve_checkpoint,
)
from megatron_chatflow.checkpoint.remote import (
    CheckpointUploader,
    adopt_run,
    check_new_run,
    claim_run,
    fetch_newer_checkpoint,
    fetch_run,
)
from megatron_chatflow.checkpoint.store import wait_for_uploads
from megatron_chatflow.checkpoint.writer import SaveReports
from megatron_chatflow.errors import UserError

URL = "s3://corpora/runs/a"
FILES = ("__0_0.distcp", "__1_0.distcp", ".metadata", "state.json", "huggingface/config.json")


def make_checkpoint(root: Path, iteration: int, seed: int = 0) -> Path:
    """Writes a checkpoint's folder with hashes, and names it as the latest."""
    folder = root / f"iter_{iteration:07d}"
    hashes = {}
    for number, name in enumerate(FILES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(f"{iteration} {seed} {name}").randbytes(200_000 + number))
        hashes[name] = hash_file(path)
    (folder / MANIFEST).write_text(manifest_text(hashes))
    (root / LATEST).write_text(f"{iteration}\n")
    (root / "metrics.jsonl").write_text(f'{{"iteration": {iteration}}}\n')
    return folder


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def stored(store: ObjectStore, iteration: int) -> dict[str, bytes]:
    top = f"runs/a/iter_{iteration:07d}/"
    names = [name for name in store.names() if name.startswith(top)]
    return {name.removeprefix(top): store.get(name) for name in names}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    claim_run(folder)
    return folder


@pytest.fixture
def uploaders(object_store: ObjectStore) -> Iterator[list[CheckpointUploader]]:
    made: list[CheckpointUploader] = []
    yield made
    object_store.proxy.is_down = False
    for one in made:
        one.close()


def start(
    uploaders: list[CheckpointUploader], root: Path, **rule: int | None
) -> CheckpointUploader:
    uploader = CheckpointUploader(root, URL, **{"retain": None, "keep_every": None, **rule})
    uploaders.append(uploader)
    return uploader


def finish(uploader: CheckpointUploader) -> str | None:
    return uploader.finish(lambda: None)


def test_a_checkpoint_is_uploaded_although_connections_are_cut(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader]
) -> None:
    folder = make_checkpoint(root, 5)
    object_store.proxy.fail_next(100_000, 0, 50_000, None, 250_000)
    uploader = start(uploaders, root)
    assert finish(uploader) is None
    assert object_store.proxy.num_cut >= 1
    assert stored(object_store, 5) == content(folder)
    assert object_store.get(f"runs/a/{LATEST}") == b"5\n"
    assert object_store.get("runs/a/metrics.jsonl") == b'{"iteration": 5}\n'
    (result,) = uploader.take_results()
    assert result.to_dict()["status"] == "uploaded"
    assert result.num_bytes >= 5 * 200_000
    assert uploader.take_results() == []


def test_the_latest_file_is_written_last(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    for name in ("upload", "write_bytes"):
        real = getattr(remote, name)

        def seen(*arguments: Any, real: Any = real, name: str = name) -> None:
            order.append(arguments[1 if name == "upload" else 0].removeprefix(f"{URL}/"))
            real(*arguments)

        monkeypatch.setattr(remote, name, seen)
    make_checkpoint(root, 5)
    assert finish(start(uploaders, root)) is None
    assert order[:2] == ["run_id.txt", "iter_0000005/upload.json"]
    assert set(order[2:7]) == {f"iter_0000005/{name}" for name in FILES}
    assert order[7] == f"iter_0000005/{MANIFEST}"
    assert order[-1] == LATEST


def test_a_failed_upload_is_reported_and_repeated_at_the_next_save(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 2)
    first = make_checkpoint(root, 5)
    object_store.proxy.go_down()
    uploader = start(uploaders, root)
    with caplog.at_level(logging.ERROR):
        problem = finish(uploader)
    assert problem is not None and "cannot read: s3://corpora/runs/a/run_id.txt" in problem
    assert "uploading iteration 5 failed" in caplog.text and str(root) in caplog.text
    (failed,) = uploader.take_results()
    assert failed.to_dict() == {
        "iteration": 5,
        "status": "failed",
        "num_bytes": 0,
        "seconds": pytest.approx(failed.seconds, abs=1e-3),
        "error": problem,
    }
    assert object_store.names() == []

    object_store.proxy.is_down = False
    second = make_checkpoint(root, 10)
    uploader.submit(10)
    assert finish(uploader) is None
    assert [result.iteration for result in uploader.take_results()] == [10, 5]
    assert stored(object_store, 5) == content(first)
    assert stored(object_store, 10) == content(second)
    assert object_store.get(f"runs/a/{LATEST}") == b"10\n"


def test_an_interrupted_upload_continues_with_the_missing_files(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(root, 5)
    real, sent = remote.upload, []

    def interrupted(path: Path, url: str, *arguments: Any) -> None:
        if len(sent) >= 2:
            raise remote.RemoteError("the network is gone")
        sent.append(path.name)
        real(path, url, *arguments)

    monkeypatch.setattr(copies, "_NUM_FILES", 1)
    monkeypatch.setattr(remote, "upload", interrupted)
    assert finish(start(uploaders, root)) == "the network is gone"
    names = set(stored(object_store, 5))
    assert names == {"upload.json", *(name for name in FILES if Path(name).name in sent)}
    with pytest.raises(UserError, match="its upload was interrupted"):
        copies.fetch_checkpoint(f"{URL}/iter_0000005", tmp_path / "copy")
    before = list(sent)
    monkeypatch.setattr(
        remote, "upload", lambda path, *rest: (sent.append(path.name), real(path, *rest))
    )
    assert finish(start(uploaders, root)) is None  # as another process would
    assert sorted(sent) == sorted(Path(name).name for name in FILES)
    assert sent[:2] == before
    assert stored(object_store, 5) == content(folder)


def test_files_of_another_checkpoint_of_the_same_iteration_are_replaced(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader]
) -> None:
    make_checkpoint(root, 5)
    assert finish(start(uploaders, root)) is None
    (root / "iter_0000005").rename(root / "old")
    folder = make_checkpoint(root, 5, seed=1)  # the run went back and trained again
    object_store.put("runs/a/iter_0000005/stale.distcp", b"x")
    assert finish(start(uploaders, root)) is None
    assert stored(object_store, 5) == content(folder)


def test_checkpoints_after_the_latest_are_not_uploaded(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader]
) -> None:
    make_checkpoint(root, 10)
    make_checkpoint(root, 5)
    assert finish(start(uploaders, root)) is None
    assert stored(object_store, 10) == {}
    assert object_store.get(f"runs/a/{LATEST}") == b"5\n"


def test_the_retention_rule_holds_on_the_store(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader]
) -> None:
    uploader = start(uploaders, root, retain=2, keep_every=10)
    for iteration in (5, 10, 15, 20, 25):
        make_checkpoint(root, iteration)
        uploader.submit(iteration)
        assert finish(uploader) is None
        prune(root, retain=2, keep_every=10, pinned=uploader.pinned())
    tops = {name.split("/")[2] for name in object_store.names() if "/iter_" in name}
    assert tops == {"iter_0000010", "iter_0000020", "iter_0000025"}


def test_a_checkpoint_is_not_removed_while_it_is_uploaded(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, begun, go_on = remote.upload, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> None:
        begun.set()
        go_on.wait(20)
        real(*arguments)

    monkeypatch.setattr(remote, "upload", slow)
    first = make_checkpoint(root, 5)
    uploader = start(uploaders, root, retain=1)
    uploader.submit(5)
    assert begun.wait(20)
    for iteration in (10, 15):
        make_checkpoint(root, iteration)
        uploader.submit(iteration)
        prune(root, retain=1, keep_every=None, pinned=uploader.pinned())
    assert first.exists() and not (root / "iter_0000010").exists()
    go_on.set()
    assert finish(uploader) is None
    assert object_store.get(f"runs/a/{LATEST}") == b"15\n"
    assert prune(root, retain=1, keep_every=None, pinned=uploader.pinned()) == [5]


def test_an_upload_is_given_up_at_once(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copies, "_NUM_FILES", 1)
    real, begun = remote.upload, threading.Event()
    sent = []

    def slow(path: Path, *arguments: Any) -> None:
        begun.set()
        sent.append(path.name)
        real(path, *arguments)

    monkeypatch.setattr(remote, "upload", slow)
    make_checkpoint(root, 5)
    uploader = start(uploaders, root)
    uploader.submit(5)
    assert begun.wait(20)
    uploader.close()
    assert len(sent) < len(FILES)
    assert f"runs/a/{LATEST}" not in object_store.names()


def upload(root: Path, uploaders: list[CheckpointUploader], *iterations: int) -> None:
    for iteration in iterations:
        make_checkpoint(root, iteration)
    assert finish(start(uploaders, root)) is None


def test_a_run_continues_on_another_node(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader], tmp_path: Path
) -> None:
    upload(root, uploaders, 5, 10)
    other = tmp_path / "other"
    object_store.proxy.fail_next(50_000, 0, 150_000)
    fetch_newer_checkpoint(other, URL)
    assert latest_iteration(other) == 10
    assert content(other / "iter_0000010") == content(root / "iter_0000010")
    assert find_damage(other / "iter_0000010") == []
    assert not (other / "iter_0000005").exists()
    for name in ("metrics.jsonl", "run_id.txt"):
        assert (other / name).read_bytes() == (root / name).read_bytes()
    assert not list(other.glob(".*"))


def test_many_processes_of_a_node_copy_once(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader], tmp_path: Path
) -> None:
    upload(root, uploaders, 10)
    other = tmp_path / "other"
    object_store.proxy.num_bytes = 0
    threads = [threading.Thread(target=fetch_newer_checkpoint, args=(other, URL)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert content(other / "iter_0000010") == content(root / "iter_0000010")
    assert object_store.proxy.num_bytes < 2 * 5 * 200_000


def test_the_local_folder_wins_if_it_is_newer_or_went_back(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader]
) -> None:
    upload(root, uploaders, 5, 10)
    make_checkpoint(root, 15)
    fetch_newer_checkpoint(root, URL)
    assert latest_iteration(root) == 15
    (root / LATEST).write_text("5\n")
    fetch_newer_checkpoint(root, URL)
    assert latest_iteration(root) == 5
    shutil.rmtree(root / "iter_0000010")
    fetch_newer_checkpoint(root, URL)
    assert latest_iteration(root) == 10


def test_a_store_that_cannot_be_reached(
    root: Path,
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 2)
    object_store.proxy.go_down()
    with pytest.raises(UserError, match=f"cannot read: {URL}/{LATEST}"):
        fetch_newer_checkpoint(root, URL)
    make_checkpoint(root, 5)
    fetch_newer_checkpoint(root, URL)
    assert f"continuing from the checkpoints in {root}" in caplog.text


def test_a_damaged_checkpoint_gets_no_name(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader], tmp_path: Path
) -> None:
    upload(root, uploaders, 5)
    name = "runs/a/iter_0000005/__0_0.distcp"
    changed = bytearray(object_store.get(name))
    changed[1000] ^= 1
    object_store.put(name, bytes(changed))
    with pytest.raises(UserError, match=f"{URL}/iter_0000005/__0_0.distcp: its hash differs"):
        fetch_newer_checkpoint(tmp_path / "other", URL)
    assert latest_iteration(tmp_path / "other") is None
    assert not (tmp_path / "other" / "iter_0000005").exists()
    object_store.client().delete_object(Bucket="corpora", Key=name)
    with pytest.raises(UserError, match="is damaged: __0_0.distcp is missing"):
        fetch_newer_checkpoint(tmp_path / "other", URL)


def test_a_name_outside_of_the_folder_is_refused(object_store: ObjectStore, tmp_path: Path) -> None:
    object_store.put("runs/a/iter_0000005/state.json", b"{}")
    object_store.put("runs/a/iter_0000005/../../outside", b"x")
    with pytest.raises(UserError, match="is not a file name within the folder"):
        copies.fetch_checkpoint(f"{URL}/iter_0000005", tmp_path / "a" / "b" / "iter_0000005")
    assert not list(tmp_path.rglob("outside*"))


def test_another_run_on_the_store_is_not_overwritten(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader], tmp_path: Path
) -> None:
    check_new_run(root, URL)
    upload(root, uploaders, 5)
    with pytest.raises(UserError, match=r"contains checkpoints of another run.*--load"):
        check_new_run(tmp_path / "new", URL)
    claim_run(tmp_path / "new")
    make_checkpoint(tmp_path / "new", 20)
    with pytest.raises(UserError, match="checkpoints of another run than"):
        fetch_newer_checkpoint(tmp_path / "new", URL)


def test_a_run_or_a_checkpoint_is_copied_to_the_cache(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader], tmp_path: Path
) -> None:
    upload(root, uploaders, 5, 10)
    fetch_run(URL, tmp_path / "cache" / "a")
    found = resolve_checkpoint(tmp_path / "cache" / "a")
    assert found is not None and content(found) == content(root / "iter_0000010")
    object_store.proxy.num_bytes = 0
    fetch_run(URL, tmp_path / "cache" / "a")
    assert object_store.proxy.num_bytes < 100_000
    one = tmp_path / "cache" / "iter_0000005"
    fetch_run(f"{URL}/iter_0000005", one)
    assert resolve_checkpoint(one) == one
    assert content(one) == content(root / "iter_0000005")
    fetch_run("s3://corpora/empty", tmp_path / "cache" / "b")
    assert resolve_checkpoint(tmp_path / "cache" / "b") is None


class SlowUpload:
    """Replaces `remote.upload` by one that waits until `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self._real = remote.upload
        monkeypatch.setattr(remote, "upload", self._upload)

    def _upload(self, *arguments: Any) -> None:
        self.begun.set()
        self.go_on.wait(20)
        self._real(*arguments)


def test_latest_advances_although_uploads_take_longer_than_the_save_interval(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = SlowUpload(monkeypatch)
    make_checkpoint(root, 5)
    uploader = start(uploaders, root)
    uploader.submit(5)
    assert slow.begun.wait(20)
    for iteration in (10, 15):
        make_checkpoint(root, iteration)
        uploader.submit(iteration)
    real = CheckpointUploader._advance_latest

    def advance_and_end(self: CheckpointUploader, iteration: int) -> None:
        real(self, iteration)
        self._cancel.set()

    monkeypatch.setattr(CheckpointUploader, "_advance_latest", advance_and_end)
    slow.go_on.set()
    assert finish(uploader) == "the upload was given up"
    assert object_store.get(f"runs/a/{LATEST}") == b"5\n"


def test_latest_does_not_go_back_when_an_older_checkpoint_follows(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader]
) -> None:
    upload(root, uploaders, 5, 10)
    assert object_store.get(f"runs/a/{LATEST}") == b"10\n"
    (root / LATEST).write_text("5\n")  # the user goes back
    assert finish(start(uploaders, root)) is None
    assert object_store.get(f"runs/a/{LATEST}") == b"5\n"


def test_a_start_that_was_killed_before_it_named_the_copy_is_finished(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    upload(root, uploaders, 5)
    other = tmp_path / "other"
    fetch_newer_checkpoint(other, URL)
    upload(root, uploaders, 10)
    real = copies.write_atomically

    def killed(path: Path, content: Any) -> None:
        if path.name == LATEST:
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(copies, "write_atomically", killed)
        fetch_newer_checkpoint(other, URL)
    assert latest_iteration(other) == 5 and (other / "iter_0000010").exists()
    object_store.proxy.num_bytes = 0
    (other / ".iter_0000007.none.fetching").mkdir()
    (other / f".iter_0000007.{copies.host_name()}.fetching").mkdir()
    fetch_newer_checkpoint(other, URL)
    assert latest_iteration(other) == 10
    assert content(other / "iter_0000010") == content(root / "iter_0000010")
    assert object_store.proxy.num_bytes < 100_000  # not copied again
    assert [path.name for path in other.glob(".*")] == [".iter_0000007.none.fetching"]


def test_the_files_of_another_run_are_never_removed(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    upload(root, uploaders, 5, 10)
    before = {name: object_store.get(name) for name in object_store.names()}
    other = tmp_path / "other"
    claim_run(other)
    make_checkpoint(other, 10, seed=1)
    object_store.proxy.go_down()
    monkeypatch.setattr(remote, "NUM_ATTEMPTS", 1)
    fetch_newer_checkpoint(other, URL)  # goes on, because the store is out of reach
    uploader = start(uploaders, other, retain=1)
    assert finish(uploader) is not None
    object_store.proxy.is_down = False
    problem = finish(uploader)
    assert problem is not None and "checkpoints of another run than" in problem
    assert {name: object_store.get(name) for name in object_store.names()} == before


def test_a_run_that_has_begun_on_the_store_is_recognized(
    root: Path, object_store: ObjectStore, tmp_path: Path
) -> None:
    object_store.put("runs/a/run_id.txt", (root / "run_id.txt").read_bytes())
    check_new_run(root, URL)
    with pytest.raises(UserError, match="contains checkpoints of another run"):
        check_new_run(tmp_path / "new", URL)
    claim_run(tmp_path / "new")
    with pytest.raises(UserError, match="contains checkpoints of another run"):
        check_new_run(tmp_path / "new", URL)
    adopt_run(tmp_path / "new", URL)  # of a run that loads from the store
    check_new_run(tmp_path / "new", URL)
    claim_run(tmp_path / "third")
    make_checkpoint(tmp_path / "third", 5)
    with pytest.raises(UserError, match="checkpoints of another run than"):
        adopt_run(tmp_path / "third", URL)


def test_a_partly_removed_checkpoint_is_not_loaded(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    upload(root, uploaders, 5, 10)
    real = remote.remove

    def interrupted(urls: Any, *arguments: Any) -> None:
        if len(urls) > 1:
            real([url for url in urls if url.endswith(".metadata")], *arguments)
            raise remote.RemoteError("the network is gone")
        real(urls, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "remove", interrupted)
        assert finish(start(uploaders, root, retain=1)) is None
    assert {"upload.json", "__0_0.distcp"} <= set(stored(object_store, 5))
    assert stored(object_store, 5)["upload.json"] == b"removing\n"
    with pytest.raises(UserError, match="was removed, but not completely"):
        fetch_run(f"{URL}/iter_0000005", tmp_path / "cache" / "iter_0000005")
    assert finish(start(uploaders, root, retain=1)) is None
    assert stored(object_store, 5) == {}


@pytest.mark.parametrize("others", [(5,), ()])
def test_latest_does_not_name_a_checkpoint_that_is_replaced(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
    others: tuple[int, ...],
) -> None:
    upload(root, uploaders, *others, 10)
    shutil.rmtree(root / "iter_0000010")
    folder = make_checkpoint(root, 10, seed=1)
    slow = SlowUpload(monkeypatch)
    uploader = start(uploaders, root)
    uploader.submit(10)
    assert slow.begun.wait(20)
    if others:
        assert object_store.get(f"runs/a/{LATEST}") == b"5\n"
    else:
        assert f"runs/a/{LATEST}" not in object_store.names()
    slow.go_on.set()
    assert finish(uploader) is None
    assert object_store.get(f"runs/a/{LATEST}") == b"10\n"
    assert stored(object_store, 10) == content(folder)


def test_an_unexpected_error_does_not_end_the_uploads(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_checkpoint(root, 5)
    uploader = start(uploaders, root)
    with monkeypatch.context() as patch:
        patch.setattr(uploader, "_next", lambda *_: 1 / 0)
        assert finish_in_time(uploader) == "division by zero"
    (result,) = uploader.take_results()
    assert (result.iteration, result.error) == (5, "division by zero")
    assert finish_in_time(uploader) is None


def finish_in_time(uploader: CheckpointUploader) -> str | None:
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(finish(uploader)), daemon=True)
    thread.start()
    thread.join(20)
    assert found, "finish did not return"
    return found[0]


def test_a_damaged_older_checkpoint_stops_neither_others_nor_pruning(
    root: Path, object_store: ObjectStore, uploaders: list[CheckpointUploader]
) -> None:
    for iteration in (5, 10, 15, 20):
        make_checkpoint(root, iteration)
    (root / "iter_0000015" / MANIFEST).write_text("{")
    for iteration in (1, 2):
        object_store.put(f"runs/a/iter_{iteration:07d}/x", b"x")
    uploader = start(uploaders, root, retain=3)
    assert finish(uploader) is None
    results = [(one.iteration, one.error is None) for one in uploader.take_results()]
    assert results == [(20, True), (15, False), (10, True)]
    tops = {name.split("/")[2] for name in object_store.names() if "/iter_" in name}
    assert tops == {"iter_0000002", "iter_0000010", "iter_0000020"}


def test_close_does_not_wait_for_a_request_that_hangs(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = SlowUpload(monkeypatch)
    make_checkpoint(root, 5)
    uploader = start(uploaders, root)
    uploader.submit(5)
    assert slow.begun.wait(20)
    begin = time.monotonic()
    uploader.close()
    assert time.monotonic() - begin < 5
    assert finish(uploader) == "the upload was given up"
    slow.go_on.set()


def test_close_does_not_wait_for_further_attempts(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 60.0)
    make_checkpoint(root, 5)
    object_store.proxy.go_down()
    uploader = start(uploaders, root)
    uploader.submit(5)
    while object_store.proxy.num_cut == 0:
        time.sleep(0.01)
    begin = time.monotonic()
    uploader.close()
    assert time.monotonic() - begin < 25


def test_removing_checkpoints_counts_as_progress_and_takes_few_requests(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    upload(root, uploaders, 5, 10)
    calls: list[int] = []
    real = remote.remove

    def counted(urls: Any, *arguments: Any) -> None:
        calls.append(len(urls))
        time.sleep(0.3)
        real(urls, *arguments)

    monkeypatch.setattr(remote, "remove", counted)
    heartbeats: list[None] = []
    uploader = start(uploaders, root, retain=1)
    assert uploader.finish(lambda: heartbeats.append(None)) is None
    assert calls == [1, len(FILES) + 1, 1] and stored(object_store, 5) == {}
    assert len(heartbeats) >= len(calls)


def test_a_checkpoint_without_hashes_is_copied_once(
    root: Path, object_store: ObjectStore, tmp_path: Path
) -> None:
    for name, data in content(make_checkpoint(root, 5)).items():
        if name != MANIFEST:
            object_store.put(f"runs/a/iter_0000005/{name}", data)
    copy = tmp_path / "cache" / "iter_0000005"
    fetch_run(f"{URL}/iter_0000005", copy)
    assert set(content(copy)) == set(FILES)
    object_store.proxy.num_bytes = 0
    fetch_run(f"{URL}/iter_0000005", copy)
    assert object_store.proxy.num_bytes < 100_000
    object_store.put("runs/a/iter_0000005/.metadata", b"new")
    fetch_run(f"{URL}/iter_0000005", copy)
    assert content(copy)[".metadata"] == b"new"


def test_ranks_without_uploads_wait_for_those_of_rank_0(
    root: Path,
    object_store: ObjectStore,
    uploaders: list[CheckpointUploader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow, meeting = SlowUpload(monkeypatch), HashStore()
    monkeypatch.setattr(writer, "_get_default_store", lambda: meeting)
    make_checkpoint(root, 5)
    heartbeats: list[None] = []
    others = [
        threading.Thread(
            target=wait_for_uploads,
            args=(None, SaveReports("a"), lambda: heartbeats.append(None)),
            daemon=True,
        )
        for _ in range(2)
    ]
    for one in others:
        one.start()
    uploader = start(uploaders, root)
    uploader.submit(5)
    assert slow.begun.wait(20)
    time.sleep(0.3)
    assert all(one.is_alive() for one in others) and heartbeats
    slow.go_on.set()
    assert wait_for_uploads(uploader, SaveReports("a"), lambda: None) is None
    for one in others:
        one.join(20)
        assert not one.is_alive()
