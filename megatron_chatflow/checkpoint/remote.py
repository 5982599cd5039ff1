"""Copies of a run's checkpoints on an object store.

A run always saves to a local folder. `CheckpointUploader` copies each published checkpoint to
``checkpoint.save_remote`` in the background, and `fetch_newer_checkpoint` copies the newest one
back into the local folder when a run starts where there is none, such as on another node.

The store has the layout of the local folder. A checkpoint there is complete once it has
``hashes.json``, which is written after all other files; ``latest_checkpointed_iteration.txt``
follows. Until then ``upload.json``, with the same content, says which checkpoint the files belong
to, so that an interrupted upload continues with the files that are missing, and files of another
checkpoint of the same iteration are not taken for its own.
"""

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
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
from megatron_chatflow.remote import RemoteError, RemoteFile

logger = logging.getLogger(__name__)

UPLOAD_MARK = "upload.json"
RUN_ID = "run_id.txt"
RUN_FILES = ("config.yaml", "metrics.jsonl", "restarts.jsonl")
"""Small files of a run's folder that accompany its newest checkpoint."""
_NUM_FILES = 4  # files that are sent or received at the same time
_PAUSE_SECONDS = 0.1


class _CancelledError(UserError):
    """The run ends, so an upload is given up. Like any `UserError`, it ends a request for good."""


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
    The retention rule of the local folder holds on the store as well.

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
        self._is_cancelled = False
        self._num_sent = 0
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
        """Waits until nothing is left to upload or an upload has failed.

        Uploads what an earlier run of the same folder left, too. ``on_progress`` is called while
        bytes are sent.

        Returns:
            What failed; None if the store has every checkpoint.
        """
        latest = latest_iteration(self._root)
        if latest is not None:
            self.submit(latest)
        seen = -1
        is_announced = False
        while True:
            with self._condition:
                if not (self._is_requested or self._is_working):
                    return self._last_error
                self._condition.wait(_PAUSE_SECONDS)
                num_sent, current = self._num_sent, self._current
            if num_sent != seen:
                on_progress()
            if current is not None and not is_announced:
                logger.info("waiting for iteration %d to be uploaded to %s", current, self._url)
                is_announced = True
            seen = num_sent

    def close(self) -> None:
        """Gives up an upload in progress and ends the thread."""
        with self._condition:
            self._is_cancelled = True
            self._condition.notify_all()
        self._thread.join()

    def _run(self) -> None:
        lower_thread_priority()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._is_requested or self._is_cancelled)
                if self._is_cancelled:
                    return
                self._is_requested, self._is_working = False, True
            try:
                self._upload_missing()
            except _CancelledError:
                return
            finally:
                with self._condition:
                    self._is_working, self._current = False, None
                    self._condition.notify_all()

    def _upload_missing(self) -> None:
        self._last_error = None
        while (iteration := self._next()) is not None:
            begin, num_before = time.monotonic(), self._num_sent
            with self._condition:
                self._current = iteration
            error = None
            try:
                self._upload(iteration)
            except _CancelledError:
                raise
            except Exception as caught:
                error = _one_line(caught)
            seconds, num_bytes = time.monotonic() - begin, self._num_sent - num_before
            with self._condition:
                self._results.append(UploadResult(iteration, error, num_bytes, seconds))
            if error is not None:
                self._last_error = error
                logger.error(
                    "uploading iteration %d failed: %s; the checkpoint is intact in %s, training "
                    "continues, and the upload is tried again with the next save",
                    iteration,
                    error,
                    self._root,
                )
                return
            logger.info(
                "uploaded iteration %d to %s: %.2f GB in %.1f s",
                iteration,
                self._url,
                num_bytes / 1e9,
                seconds,
            )
        try:
            self._prune()
        except Exception as caught:
            logger.warning("could not remove old checkpoints in %s: %s", self._url, caught)

    def _next(self) -> int | None:
        """Returns the newest checkpoint that the store should have and does not."""
        latest = latest_iteration(self._root)
        if latest is None:
            return None
        # Those after the latest are of a part of the run that was discarded by going back.
        found = [one for one in find_iterations(self._root) if one <= latest]
        wanted = retained(found, latest, retain=self._retain, keep_every=self._keep_every)
        for iteration in sorted(wanted, reverse=True):
            manifest = _manifest(self._root, iteration)
            if manifest is not None and self._complete.get(iteration) != manifest:
                return iteration
        return None

    def _upload(self, iteration: int) -> None:
        folder = iteration_folder(self._root, iteration)
        base = f"{self._url}/{folder.name}"
        manifest = (folder / MANIFEST).read_bytes()
        if remote.read_bytes(f"{base}/{MANIFEST}") != manifest:
            names = _remaining(base, read_manifest(folder).files, manifest)
            with ThreadPoolExecutor(_NUM_FILES, thread_name_prefix="upload") as pool:
                tasks = [
                    pool.submit(remote.upload, folder / name, f"{base}/{name}", self._count)
                    for name in names
                ]
                try:
                    for task in tasks:
                        task.result()
                except BaseException:
                    for task in tasks:
                        task.cancel()
                    raise
            remote.write_bytes(f"{base}/{MANIFEST}", manifest)
            remote.remove([f"{base}/{UPLOAD_MARK}"])
        if iteration == latest_iteration(self._root):
            for name in (RUN_ID, *RUN_FILES):
                with suppress(FileNotFoundError):
                    remote.write_bytes(f"{self._url}/{name}", (self._root / name).read_bytes())
            remote.write_bytes(f"{self._url}/{LATEST}", f"{iteration}\n".encode())
        self._complete[iteration] = manifest

    def _count(self, num_bytes: int) -> None:
        with self._condition:
            self._num_sent += num_bytes
            if self._is_cancelled:
                raise _CancelledError

    def _prune(self) -> None:
        """Removes checkpoints that the retention rule does not keep."""
        latest = _read_latest(self._url)
        if self._retain is None or latest is None:
            return
        files: dict[int, list[str]] = {}
        for file in remote.find(self._url):
            folder = file.url.removeprefix(f"{self._url}/").partition("/")[0]
            if folder.startswith("iter_") and folder[5:].isdecimal():
                files.setdefault(int(folder[5:]), []).append(file.url)
        kept = retained(sorted(files), latest, retain=self._retain, keep_every=self._keep_every)
        for iteration in sorted(set(files) - kept):
            # Without its manifest, what is left does not count as a checkpoint.
            remote.remove(sorted(files[iteration], key=lambda url: not url.endswith(MANIFEST)))
            self._complete.pop(iteration, None)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, UserError):
        return f"{error.filename or 'a local file'}: {error.strerror or error}"
    return " ".join((str(error) or type(error).__name__).split())


def _manifest(root: Path, iteration: int) -> bytes | None:
    with suppress(OSError):
        return (iteration_folder(root, iteration) / MANIFEST).read_bytes()
    return None  # of another program or an earlier version, or being removed


def _remaining(base: str, files: Any, manifest: bytes) -> list[str]:
    """Returns the files that the store lacks, after removing those of another checkpoint."""
    present = {file.url.removeprefix(f"{base}/"): file for file in remote.find(base)}
    mark = f"{base}/{UPLOAD_MARK}"
    if present and remote.read_bytes(mark) != manifest:
        ordered = sorted(present.values(), key=lambda file: not file.url.endswith(MANIFEST))
        remote.remove([file.url for file in ordered])
        present = {}
    if UPLOAD_MARK not in present:
        remote.write_bytes(mark, manifest)
    sizes = {name: file.num_bytes for name, file in present.items()}
    missing = [name for name, one in files.items() if sizes.get(name) != one.num_bytes]
    return sorted(missing, key=lambda name: -files[name].num_bytes)


def _read_latest(url: str) -> int | None:
    """Returns the iteration that a folder on the store names as its latest; None without one."""
    content = remote.read_bytes(f"{url}/{LATEST}")
    if content is None:
        return None
    text = content.decode(errors="replace").strip()
    if not text.isdecimal() or len(text) > 18:
        raise UserError(f"{url}/{LATEST}: {text[:40]!r} is not an iteration number; correct it")
    return int(text)


def fetch_newer_checkpoint(root: Path, url: str) -> None:
    """Copies the newest checkpoint of a run from the store into its folder, if it is newer there.

    Every process may call it; processes of one node wait for each other.

    Raises:
        UserError: The folder on the store belongs to another run, or a file is damaged or does not
            fit on the disk.
        RemoteError: The store cannot be reached, and the local folder has no checkpoint.
    """
    local = latest_iteration(root)
    try:
        iteration = _read_latest(url)
        if iteration is None:
            return
        _check_run_id(root, url, local)
    except RemoteError as error:
        if local is None:
            raise
        logger.warning("%s; continuing from the checkpoints in %s", error, root)
        return
    if local is not None:
        # If the newer one is here as well, the user went back to an earlier one.
        is_here = (iteration_folder(root, iteration) / MANIFEST).exists()
        if local >= iteration or is_here:
            return
    with _locked(root):
        if (local := latest_iteration(root)) is not None and local >= iteration:
            return  # another process has copied it
        target = iteration_folder(root, iteration)
        fetch_checkpoint(f"{url}/{target.name}", target)
        for name in (RUN_ID, *RUN_FILES):
            if not (root / name).exists() or name == RUN_ID:
                content = remote.read_bytes(f"{url}/{name}", limit=1 << 32)
                if content is not None:
                    write_atomically(root / name, content)
        write_atomically(root / LATEST, f"{iteration}\n")
    logger.info("copied iteration %d from %s to %s", iteration, url, root)


def check_new_run(root: Path, url: str) -> None:
    """Checks that a new run would not overwrite checkpoints of another run on the store.

    Raises:
        UserError: There are checkpoints of another run.
        RemoteError: The store cannot be reached.
    """
    if _read_latest(url) is None:
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


def _check_run_id(root: Path, url: str, local: int | None) -> None:
    theirs = remote.read_bytes(f"{url}/{RUN_ID}")
    path = root / RUN_ID
    mine = path.read_bytes() if path.exists() else None
    if local is not None and theirs is not None and mine != theirs:
        raise UserError(
            f"checkpoint.save_remote: {url} contains checkpoints of another run than {root}; use "
            "another URL, or an empty --save to continue the run on the store"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire(folder / ".fetch.lock", wait=True, for_writing=True)
    assert lock is not None
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
    for name in found:
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"{url}: {name!r} is not a file name within the folder; remove it")
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
        if remote.stat(f"{url}/state.json") is not None:
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
    with suppress(OSError):
        if content is not None and (target / MANIFEST).read_bytes() == content:
            return
    fetch_checkpoint(url, target)
