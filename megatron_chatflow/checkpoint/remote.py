"""Copies of a run's checkpoints on an object store.

A run always saves to a local folder. `CheckpointUploader` copies each published checkpoint to
``checkpoint.save_remote`` in the background, and `fetch_newer_checkpoint` copies the newest one
back into the local folder when a run starts where there is none, such as on another node.

The store has the layout of the local folder. A checkpoint there is complete once it has
``hashes.json``, which is written after all other files; ``latest_checkpointed_iteration.txt``
follows. Until then ``upload.json``, with the same content, says which checkpoint the files belong
to, so that an interrupted upload continues with the files that are missing, and files of another
checkpoint of the same iteration are not taken for its own. While a checkpoint is removed,
``upload.json`` says so.

The store's ``latest_checkpointed_iteration.txt`` names the newest complete checkpoint that is not
newer than the local latest one.
"""

import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_chatflow import remote
from megatron_chatflow.checkpoint.direct_file import hash_file, lower_thread_priority
from megatron_chatflow.checkpoint.files import (
    LATEST,
    MANIFEST,
    find_iterations,
    iteration_folder,
    latest_iteration,
    read_manifest,
    retained,
)
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    FileLock,
    as_user_error,
    host_name,
    sync_folder,
    sync_tree,
    write_atomically,
)
from megatron_chatflow.remote import CancelledError, RemoteError, RemoteFile

logger = logging.getLogger(__name__)

UPLOAD_MARK = "upload.json"
RUN_ID = "run_id.txt"
RUN_FILES = ("config.yaml", "metrics.jsonl", "restarts.jsonl")
"""Small files of a run's folder that accompany its newest checkpoint."""
_NUM_REMOVED = 1000  # files that are removed by one request
_NUM_FILES = 4  # files that are sent or received at the same time
_PAUSE_SECONDS = 0.1
_GIVEN_UP = "the upload was given up"
_CLOSE_SECONDS = 30.0  # how long the end of a run waits for a request that is in flight
_FETCHED = ".fetched_"  # names a file that exists from before a copy until it is the latest
_REMOVING = b"removing\n"  # content of `UPLOAD_MARK`
_MOST_BYTES = 1 << 32  # of one of `RUN_FILES`
_MOST_REMOTE_ERRORS = 2  # checkpoints that fail before the store counts as out of reach


@dataclass(frozen=True)
class UploadResult:
    """The outcome of an upload, for the log and the metrics."""

    iteration: int
    error: str | None = None  # what failed; None if the store has the checkpoint
    num_bytes: int = 0  # bytes that were sent
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are written to ``metrics.jsonl``."""
        status = {"status": "uploaded"} if self.error is None else {"status": "failed"}
        problem = {} if self.error is None else {"error": self.error}
        return {
            "iteration": self.iteration,
            **status,
            "num_bytes": self.num_bytes,
            "seconds": round(self.seconds, 3),
            **problem,
        }


class CheckpointUploader:
    """Uploads the checkpoints of a run's folder in a background thread, on one rank.

    The newest checkpoint goes first, then older ones that the store does not have yet, for example
    because an upload failed. A failed upload is tried again when the next checkpoint is published.
    The retention rule of the local folder holds on the store as well. Nothing is written or removed
    before the store's folder is known to belong to this run.

    Args:
        root: The run's folder.
        url: The folder on the store.
        retain: How many of the newest checkpoints to keep; all if None.
        keep_every: Also keep checkpoints whose iteration is a multiple of this.
    """

    def __init__(self, root: Path, url: str, *, retain: int | None, keep_every: int | None) -> None:
        self._root = root
        self._url = url
        self._retain, self._keep_every = retain, keep_every
        self._condition = threading.Condition()
        self._is_requested = False
        self._is_working = False
        self._cancel = threading.Event()
        self._is_claimed = False  # whether the folder on the store is known to be this run's
        self._num_sent = 0
        self._num_requests = 0  # that wrote or removed something
        self._current: int | None = None
        self._newest: int | None = None
        self._complete: dict[int, bytes] = {}  # manifests of the checkpoints that the store has
        self._results: list[UploadResult] = []
        self._last_error: str | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-upload", daemon=True)
        self._thread.start()

    def submit(self, iteration: int) -> None:
        """Requests the upload of a checkpoint that was just published, from any thread."""
        with self._condition:
            self._newest = iteration
            self._is_requested = True
            self._condition.notify_all()

    def pinned(self) -> set[int]:
        """Returns the iterations that must stay: being uploaded, or next."""
        with self._condition:
            pinned = {self._current} if self._is_working or self._is_requested else set()
            return {one for one in (*pinned, self._newest) if one is not None}

    def take_results(self) -> list[UploadResult]:
        """Returns the outcomes since the last call."""
        with self._condition:
            results, self._results = self._results, []
        return results

    def finish(self, on_progress: Callable[[], None]) -> str | None:
        """Waits until nothing is left to upload or the upload of the newest checkpoint has failed.

        Uploads what an earlier run of the same folder left, too. ``on_progress`` is called while
        requests succeed.

        Returns:
            Why the newest checkpoint is not on the store; None if it is.
        """
        latest = latest_iteration(self._root)
        if latest is not None:
            self.submit(latest)
        seen = (-1, -1)
        is_announced = False
        while True:
            with self._condition:
                if not (self._is_requested or self._is_working):
                    return self._last_error
                if not self._thread.is_alive():
                    return self._last_error or _GIVEN_UP
                self._condition.wait(_PAUSE_SECONDS)
                now, current = (self._num_sent, self._num_requests), self._current
            if now != seen:
                on_progress()
            if current is not None and not is_announced:
                logger.info("waiting for iteration %d to be uploaded to %s", current, self._url)
                is_announced = True
            seen = now

    def close(self) -> None:
        """Gives up an upload in progress and ends the thread.

        A request in flight cannot be given up. It is waited for `_CLOSE_SECONDS` at most.
        """
        with self._condition:
            self._cancel.set()
            self._condition.notify_all()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            logger.warning("a request to %s did not end in %.0f s", self._url, _CLOSE_SECONDS)

    def _run(self) -> None:
        lower_thread_priority()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._is_requested or self._cancel.is_set())
                if self._cancel.is_set():
                    return
                self._is_requested, self._is_working = False, True
                self._last_error = None
            try:
                self._upload_missing()
            except CancelledError:
                self._last_error = _GIVEN_UP
                return
            except BaseException as error:
                self._fail(self._current or self._newest or 0, error)
            finally:
                with self._condition:
                    self._is_working, self._current = False, None
                    self._condition.notify_all()

    def _fail(self, iteration: int, error: BaseException, seconds: float = 0.0) -> None:
        """Records and logs a failed upload."""
        reason = _one_line(error)
        with self._condition:
            self._results.append(UploadResult(iteration, reason, 0, seconds))
            if iteration >= (self._newest or 0):
                self._last_error = reason
        logger.error(
            "uploading iteration %d failed: %s; the checkpoint is intact in %s, training "
            "continues, and the upload is tried again with the next save",
            iteration,
            reason,
            self._root,
        )

    def _upload_missing(self) -> None:
        if not self._is_claimed:
            _claim_store(self._root, self._url, self._cancel)
            self._is_claimed = True
        failed: set[int] = set()
        num_remote_errors = 0
        while (iteration := self._next(failed)) is not None:
            begin, num_before = time.monotonic(), self._num_sent
            with self._condition:
                self._current = iteration
            try:
                self._upload(iteration)
            except CancelledError:
                raise
            except Exception as error:
                # An older checkpoint may be damaged, or removed meanwhile; others are not.
                failed.add(iteration)
                self._fail(iteration, error, time.monotonic() - begin)
                num_remote_errors += isinstance(error, RemoteError)
                if num_remote_errors == _MOST_REMOTE_ERRORS:
                    break
                continue
            seconds, num_bytes = time.monotonic() - begin, self._num_sent - num_before
            with self._condition:
                self._results.append(UploadResult(iteration, None, num_bytes, seconds))
            logger.info(
                "uploaded iteration %d to %s: %.2f GB in %.1f s",
                iteration,
                self._url,
                num_bytes / 1e9,
                seconds,
            )
        try:
            self._prune()
        except CancelledError:
            raise
        except Exception as caught:
            logger.warning(
                "could not remove old checkpoints in %s: %s", self._url, _one_line(caught)
            )

    def _next(self, failed: Collection[int]) -> int | None:
        """Returns the newest checkpoint that the store should have and does not."""
        latest = latest_iteration(self._root)
        if latest is None:
            return None
        # Those after the latest are of a part of the run that was discarded by going back.
        found = [one for one in find_iterations(self._root) if one <= latest]
        wanted = retained(found, latest, retain=self._retain, keep_every=self._keep_every)
        for iteration in sorted(wanted - set(failed), reverse=True):
            manifest = _manifest(self._root, iteration)
            if manifest is not None and self._complete.get(iteration) != manifest:
                return iteration
        return None

    def _upload(self, iteration: int) -> None:
        folder = iteration_folder(self._root, iteration)
        base = f"{self._url}/{folder.name}"
        manifest = (folder / MANIFEST).read_bytes()
        if not self._has(base, manifest):
            names = self._remaining(iteration, read_manifest(folder).files, manifest)

            def send(name: str) -> None:
                remote.upload(folder / name, f"{base}/{name}", self._count, self._cancel)

            _for_each(names, send, self._cancel)
            self._write(f"{base}/{MANIFEST}", manifest)
            self._remove([f"{base}/{UPLOAD_MARK}"])
        self._advance_latest(iteration)
        self._complete[iteration] = manifest

    def _has(self, base: str, manifest: bytes) -> bool:
        """Returns whether the store has a complete checkpoint with this manifest."""
        if remote.read_bytes(f"{base}/{MANIFEST}", cancel=self._cancel) != manifest:
            return False
        return remote.read_bytes(f"{base}/{UPLOAD_MARK}", cancel=self._cancel) != _REMOVING

    def _advance_latest(self, iteration: int) -> None:
        """Makes the store's latest checkpoint the newest complete one up to the local latest."""
        local, theirs = latest_iteration(self._root), _read_latest(self._url, self._cancel)
        if local is None or iteration > local:
            return
        if theirs is not None and iteration < theirs <= local:
            return
        for name in RUN_FILES:
            with suppress(FileNotFoundError):
                self._write(f"{self._url}/{name}", (self._root / name).read_bytes())
        self._write(f"{self._url}/{LATEST}", f"{iteration}\n".encode())

    def _remaining(self, iteration: int, files: Any, manifest: bytes) -> list[str]:
        """Returns the files that the store lacks, after removing those of another checkpoint."""
        base = f"{self._url}/{iteration_folder(Path(), iteration).name}"
        found = remote.find(base, self._cancel)
        present = {file.url.removeprefix(f"{base}/"): file.num_bytes for file in found}
        mark = f"{base}/{UPLOAD_MARK}"
        if not present:
            self._write(mark, manifest)
        elif remote.read_bytes(mark, cancel=self._cancel) != manifest:
            if _read_latest(self._url, self._cancel) == iteration:
                self._retract_latest(iteration)
            self._remove_files(base, [file.url for file in found])
            self._write(mark, manifest)
            present = {}
        missing = [name for name, one in files.items() if present.get(name) != one.num_bytes]
        return sorted(missing, key=lambda name: -files[name].num_bytes)

    def _retract_latest(self, iteration: int) -> None:
        """Names the newest complete checkpoint before ``iteration`` as the store's latest."""
        found = {file.url.removeprefix(f"{self._url}/") for file in self._find_all()}
        for one in sorted(_iterations(found), reverse=True):
            name = iteration_folder(Path(), one).name
            mark = f"{name}/{UPLOAD_MARK}"
            if one >= iteration or f"{name}/{MANIFEST}" not in found:
                continue
            if mark in found and remote.read_bytes(f"{self._url}/{mark}") == _REMOVING:
                continue
            self._write(f"{self._url}/{LATEST}", f"{one}\n".encode())
            return
        self._remove([f"{self._url}/{LATEST}"])

    def _find_all(self) -> list[RemoteFile]:
        return remote.find(self._url, self._cancel)

    def _prune(self) -> None:
        """Removes checkpoints that the retention rule does not keep."""
        latest = _read_latest(self._url, self._cancel)
        if self._retain is None or latest is None:
            return
        files: dict[int, list[str]] = {}
        for file in self._find_all():
            for iteration in _iterations([file.url.removeprefix(f"{self._url}/")]):
                files.setdefault(iteration, []).append(file.url)
        kept = retained(sorted(files), latest, retain=self._retain, keep_every=self._keep_every)
        for iteration in sorted(set(files) - kept):
            base = f"{self._url}/{iteration_folder(Path(), iteration).name}"
            self._remove_files(base, files[iteration])
            self._remove([f"{base}/{UPLOAD_MARK}"])
            self._complete.pop(iteration, None)

    def _remove_files(self, base: str, urls: list[str]) -> None:
        """Removes the files of a checkpoint, but for a mark that the rest is no checkpoint."""
        mark = f"{base}/{UPLOAD_MARK}"
        self._write(mark, _REMOVING)
        self._remove([f"{base}/{MANIFEST}"])
        rest = [url for url in urls if url != mark]
        for begin in range(0, len(rest), _NUM_REMOVED):
            self._remove(rest[begin : begin + _NUM_REMOVED])
        # A request for many files does not report those that could not be removed.
        for file in remote.find(base, self._cancel):
            if file.url != mark:
                self._remove([file.url])

    def _write(self, url: str, content: bytes) -> None:
        remote.write_bytes(url, content, self._cancel)
        self._num_requests += 1

    def _remove(self, urls: list[str]) -> None:
        remote.remove(urls, self._cancel)
        self._num_requests += 1

    def _count(self, num_bytes: int) -> None:
        with self._condition:
            self._num_sent += num_bytes
        if self._cancel.is_set():
            raise CancelledError("the run ends")


def _for_each(items: Collection[str], work: Callable[[str], None], cancel: threading.Event) -> None:
    """Calls ``work`` for every item in a few threads, until one fails.

    Unlike with a thread pool, neither the caller nor the end of the process waits for a request
    that is in flight when ``cancel`` is set.
    """
    waiting, lock = iter(items), threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        lower_thread_priority()
        while not errors and not cancel.is_set():
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            try:
                work(item)
            except BaseException as error:
                errors.append(error)

    number = min(_NUM_FILES, len(items))
    threads = [threading.Thread(target=run, name="upload", daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(_PAUSE_SECONDS)
            if cancel.is_set():
                raise CancelledError("the run ends")
    if errors:
        raise errors[0]
    if cancel.is_set():
        raise CancelledError("the run ends")


def _iterations(names: Collection[str]) -> set[int]:
    """Returns the iterations whose folders are the first parts of some names."""
    tops = {name.partition("/")[0] for name in names if "/" in name}
    return {int(top[5:]) for top in tops if top.startswith("iter_") and top[5:].isdecimal()}


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, UserError):
        return f"{error.filename or 'a local file'}: {error.strerror or error}"
    return remote.mask(" ".join((str(error) or type(error).__name__).split()))


def _manifest(root: Path, iteration: int) -> bytes | None:
    with suppress(OSError):
        return (iteration_folder(root, iteration) / MANIFEST).read_bytes()
    return None  # of another program or an earlier version, or being removed


def _read_latest(url: str, cancel: threading.Event | None = None) -> int | None:
    """Returns the iteration that a folder on the store names as its latest; None without one."""
    content = remote.read_bytes(f"{url}/{LATEST}", cancel=cancel)
    if content is None:
        return None
    text = content.decode(errors="replace").strip()
    if not text.isdecimal() or len(text) > 18:
        raise UserError(f"{url}/{LATEST}: {text[:40]!r} is not an iteration number; correct it")
    return int(text)


def fetch_newer_checkpoint(root: Path, url: str) -> None:
    """Copies the newest checkpoint of a run from the store into its folder, if it is newer there.

    Rank 0 alone calls it, because all ranks share the folder. A folder without checkpoints takes
    the id of the run on the store.

    Raises:
        UserError: The folder on the store belongs to another run, or a file is damaged or does not
            fit on the disk.
        RemoteError: The store cannot be reached, and the local folder has no checkpoint.
    """
    local = latest_iteration(root)
    try:
        iteration = _read_latest(url)
        _adopt_run_id(root, url, local)
    except RemoteError as error:
        if local is None:
            raise
        logger.warning("%s; continuing from the checkpoints in %s", error, root)
        return
    with _locked(root):
        local = latest_iteration(root)
        if (iteration is None) or (local is not None and local >= iteration):
            _clean_up(root)
            return
        target = iteration_folder(root, iteration)
        source, mark = f"{url}/{target.name}", root / f"{_FETCHED}{iteration}"
        is_marked = mark.exists()
        if (local is not None) and (target / MANIFEST).exists() and not is_marked:
            return  # the user went back to an earlier one
        files = {name: remote.read_bytes(f"{url}/{name}", _MOST_BYTES) for name in RUN_FILES}
        # A process that is killed before it has written `LATEST` did not go back.
        with as_user_error(root):
            write_atomically(mark, "")
        manifest = remote.read_bytes(f"{source}/{MANIFEST}")
        if not is_marked or manifest is None or _manifest(root, iteration) != manifest:
            fetch_checkpoint(source, target)
        with as_user_error(root):
            for name, content in files.items():
                if content is not None and not (root / name).exists():
                    write_atomically(root / name, content)
            write_atomically(root / LATEST, f"{iteration}\n")
            _clean_up(root)
    logger.info("copied iteration %d from %s to %s", iteration, url, root)


def _clean_up(root: Path) -> None:
    """Removes marks and unfinished copies of earlier starts on this machine."""
    with suppress(OSError):
        for mark in root.glob(f"{_FETCHED}*"):
            mark.unlink(missing_ok=True)
        for left in root.glob(f".iter_*.{host_name()}.fetching"):
            shutil.rmtree(left, ignore_errors=True)


def check_new_run(root: Path, url: str) -> None:
    """Checks that a new run would not overwrite checkpoints of another run on the store.

    Raises:
        UserError: There are checkpoints of another run, or one has begun there.
        RemoteError: The store cannot be reached.
    """
    if _read_latest(url) is None:
        theirs = remote.read_bytes(f"{url}/{RUN_ID}")
        if theirs is None or theirs == _run_id(root):
            return
    raise UserError(
        f"checkpoint.save_remote: {url} contains checkpoints of another run, which this run would "
        f"overwrite; continue that run with --load {root}, or use another URL"
    )


def claim_run(root: Path) -> None:
    """Gives a run an id, by which its folder on the store is recognized."""
    with as_user_error(root):
        root.mkdir(parents=True, exist_ok=True)
        if not (root / RUN_ID).exists():
            write_atomically(root / RUN_ID, f"{secrets.token_hex(16)}\n")


def adopt_run(root: Path, url: str) -> None:
    """Gives a run's folder the id of the run on the store, which it continues.

    Raises:
        UserError: The folder has checkpoints of another run.
        RemoteError: The store cannot be reached.
    """
    _adopt_run_id(root, url, latest_iteration(root))


def _run_id(root: Path) -> bytes | None:
    path = root / RUN_ID
    return path.read_bytes() if path.exists() else None


def _adopt_run_id(root: Path, url: str, local: int | None) -> None:
    theirs, mine = remote.read_bytes(f"{url}/{RUN_ID}"), _run_id(root)
    if theirs is None or theirs == mine:
        return
    if local is not None:
        raise _another_run(root, url)
    with as_user_error(root):
        root.mkdir(parents=True, exist_ok=True)
        write_atomically(root / RUN_ID, theirs)


def _claim_store(root: Path, url: str, cancel: threading.Event) -> None:
    """Writes the run's id to the store, unless another run's is there."""
    mine, theirs = _run_id(root), remote.read_bytes(f"{url}/{RUN_ID}", cancel=cancel)
    if mine is None:
        raise UserError(f"{root / RUN_ID}: is missing; copy it back, or start the run again")
    if theirs is None:
        remote.write_bytes(f"{url}/{RUN_ID}", mine, cancel)
    elif theirs != mine:
        raise _another_run(root, url)


def _another_run(root: Path, url: str) -> UserError:
    return UserError(
        f"checkpoint.save_remote: {url} contains checkpoints of another run than {root}; use "
        "another URL, or an empty --save to continue the run on the store"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire(folder / ".fetch.lock", wait=True, for_writing=True)
    assert lock is not None
    remote.check_lock(lock, folder)
    try:
        yield
    finally:
        lock.release()


def fetch_checkpoint(url: str, target: Path) -> None:
    """Copies a checkpoint from the store and compares every file with its recorded hash.

    It has its final name only once it is complete. An interrupted copy continues.

    Raises:
        UserError: The checkpoint is missing, incomplete or damaged, or does not fit on the disk.
        RemoteError: The store cannot be reached.
    """
    found = {file.url.removeprefix(f"{url}/"): file for file in remote.find(url)}
    if not found:
        raise UserError(f"{url}: does not exist; give the folder of a run or of a checkpoint")
    if UPLOAD_MARK in found and remote.read_bytes(f"{url}/{UPLOAD_MARK}") == _REMOVING:
        raise UserError(f"{url}: was removed, but not completely; load another checkpoint")
    if MANIFEST not in found and UPLOAD_MARK in found:
        raise UserError(
            f"{url}: its upload was interrupted; run the job that wrote it again, or load another "
            "checkpoint"
        )
    # Machines that share the folder may not see each other's locks.
    temporary = target.with_name(f".{target.name}.{host_name()}.fetching")
    with as_user_error(target):
        temporary.mkdir(parents=True, exist_ok=True)
    checks = {}
    if (file := found.pop(MANIFEST, None)) is not None:
        remote.download(file, temporary / MANIFEST)
        manifest = read_manifest(temporary)
        if missing := sorted(set(manifest.files) - set(found)):
            raise UserError(f"{url}: is damaged: {missing[0]} is missing; load another checkpoint")
        checks = manifest.files
        found = {name: found[name] for name in checks}
    else:
        logger.warning("%s: has no %s, so its copy is compared by size only", url, MANIFEST)

    def fetch(name: str, file: RemoteFile) -> None:
        expected = checks.get(name)

        def find_damage(path: Path) -> str | None:
            if expected is None or hash_file(path, manifest.algorithm) == expected:
                return None
            return f"its hash differs from {MANIFEST}"

        remote.download(file, temporary / name, find_damage=find_damage)

    with ThreadPoolExecutor(_NUM_FILES) as pool:
        for _ in pool.map(lambda item: fetch(*item), found.items()):
            pass
    with as_user_error(target):
        for record in temporary.rglob(".*.remote.json"):
            record.unlink()
        sync_tree(temporary)
        if target.exists():  # of a part of the run that was discarded, or another machine's copy
            doomed = target.with_name(f".{target.name}.removed")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(target, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        os.rename(temporary, target)
        sync_folder(target.parent)


def fetch_run(url: str, target: Path) -> None:
    """Copies a checkpoint, or the latest one of a run's folder, into a folder of the cache.

    If the folder on the store has no checkpoint, the copy has none either.

    Raises:
        UserError, RemoteError: As `fetch_checkpoint`.
    """
    with _locked(target.parent):
        is_checkpoint = bool(_iterations([f"{url.rpartition('/')[2]}/"]))
        if is_checkpoint or remote.stat(f"{url}/state.json") is not None:
            _fetch_unless_same(url, target)
            return
        iteration = _read_latest(url)
        if iteration is None:
            with suppress(OSError):
                (target / LATEST).unlink()
            return
        folder = iteration_folder(target, iteration)
        _fetch_unless_same(f"{url}/{folder.name}", folder)
        with as_user_error(target):
            write_atomically(target / LATEST, f"{iteration}\n")


def _fetch_unless_same(url: str, target: Path) -> None:
    content = remote.read_bytes(f"{url}/{MANIFEST}")
    if content is not None:
        with suppress(OSError):
            if (target / MANIFEST).read_bytes() == content:
                return
        fetch_checkpoint(url, target)
        return
    # The record lies outside, because all files of the folder belong to the checkpoint.
    record = target.with_name(f".{target.name}.versions.json")
    versions = {file.url.removeprefix(f"{url}/"): file.version for file in remote.find(url)}
    with suppress(OSError, ValueError):
        if target.is_dir() and json.loads(record.read_bytes()) == versions:
            return
    record.unlink(missing_ok=True)
    fetch_checkpoint(url, target)
    with as_user_error(record):
        write_atomically(record, json.dumps(versions) + "\n")
