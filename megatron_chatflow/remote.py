"""Files on object stores and web servers, named by URLs and reached through fsspec.

This is the only module that imports fsspec, which happens with the first request. Local paths are
only looked at by `parse_location`, and then take the same code as without this module.
``file://`` URLs are local paths.

* `parse_location` checks a path or URL from the user. URLs with credentials are refused, because
  settings are written to logs, `config.yaml` and metrics; credentials belong into the environment
  or the configuration files of fsspec and the store (``AWS_PROFILE``, ``HF_TOKEN``, ...).
* `find` and `RemoteFile.open` list files and read them as streams, in blocks.
* `download` copies a file to the local disk once and verifies it; `CachedPath` is the path of such
  a copy.
* `upload` writes a file. Object stores show an object only once it is complete, which takes the
  place of the temporary names of `megatron_chatflow.files`.

Every request is repeated a bounded number of times. A request that still fails raises a `UserError`
with one line.
"""

import glob
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PosixPath
from typing import IO, Any, TypeVar
from urllib.parse import unquote, urlsplit

from megatron_chatflow.errors import LocalError, UserError
from megatron_chatflow.files import (
    PARTIAL_SUFFIX,
    FileLock,
    as_user_error,
    sync_folder,
    write_atomically,
)

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MEGATRON_CHATFLOW_CACHE"
"""Environment variable with the folder for local copies of remote files."""
NUM_ATTEMPTS = 6
"""How often a request is sent before it counts as failed. s3fs repeats requests itself as well."""
FIRST_PAUSE_SECONDS = 0.5  # doubled after every attempt: 15.5 s in all
TIMEOUT_SECONDS = 60.0  # without a byte from a web server; stores have their own settings
BLOCK_BYTES = 8 << 20
"""Size of a read request. Stores answer many requests at once, each at a limited rate."""
NUM_STREAMS = 8  # requests of one file that are in flight at the same time: 64 MiB of memory

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
_WEB = ("http", "https")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# The user, and a password that has slashes; `host:80/name@2` of a web server has neither.
_USER = re.compile(
    r"(://)(?:(?:(?<!http://)(?<!https://)|(?=[^/@\s:]*:(?!\d{1,5}/)))[^/@\s:]*:\S*|[^/\s]*)@",
    re.IGNORECASE,
)
_QUERY = re.compile(r"\?[^\s'\"]*")
_FRAGMENT = re.compile(r"(://[^\s'\"#]*)#[^\s'\"]*")
_SECRET = re.compile(
    r"token|secret|passw|credential|signature|authorization|accesskey|accessid|apikey"
    r"|(^|[-_.])(sig|sas|key|auth|pwd|jwt)([-_.]|$)",
    re.IGNORECASE,
)
_HOST = re.compile(r"[^:]*(:\d{1,5})?")
_VERSION_FIELDS = (
    "ETag etag generation md5Hash blob_id sha256 Content-MD5 Digest Last-Modified".split()
)
# Repeating a request does not help here. The errors are recognized by name, because their packages
# may not be installed.
_NO_CREDENTIALS = (
    "NoCredentialsError PartialCredentialsError ProfileNotFound GatedRepoError".split()
)
_DENIED = (401, 403, 407)
_GONE = (404, 410)
_BUSY = (408, 425, 429)
# Their errors of connections are not all of `OSError`.
_NETWORK_PACKAGES = (
    "aiohttp aiobotocore botocore urllib3 requests httpx httpcore google gcsfs fsspec asyncio"
).split()
_BULK = ("s3", "s3a", "gs", "gcs")  # stores that remove many objects in one request
_BULK_FILES = 1000  # the most that S3 takes

_Result = TypeVar("_Result")


class RemoteError(LocalError):
    """A remote file could not be read or written. Other processes may not have the problem."""


class CancelledError(UserError):
    """A request was given up because its caller set ``cancel``."""


class _ChangedError(RemoteError):
    """A file changed while it was read, so what was read is of no version."""


def mask(text: str) -> str:
    """Replaces the user, the password, the query and the fragment of URLs by ``***``."""
    if "://" not in text:
        return text
    return _FRAGMENT.sub(r"\1#***", _QUERY.sub("?***", _USER.sub(r"\1***@", text)))


def parse_location(location: str) -> str:
    """Checks a path or URL. Returns a local path, also for ``file://``, or a URL.

    Raises:
        UserError: The scheme is not supported, or the URL has credentials or is ambiguous.
    """
    match = _URL.match(location)
    if match is None:
        return location
    scheme, shown, rest = match[1].lower(), mask(location), location[match.end() :]
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise UserError(f"{shown}: must be a local path, such as file:///data/en.jsonl")
        return unquote(slash + path)
    try:
        parts = urlsplit(location)
    except ValueError:
        raise UserError(f"{shown}: is not a valid URL") from None
    host = parts.netloc.rpartition("]")[2]  # IPv6 addresses have brackets
    options = [*re.split("[&;]", parts.query), *re.split("[&;]", parts.fragment)]
    if (
        "@" in host
        or (_HOST.fullmatch(host) is None if scheme in _WEB else ":" in host)
        or any(_SECRET.search(unquote(one.partition("=")[0])) for one in options)
    ):
        raise UserError(
            f"{shown}: has credentials in the URL, which logs and config.yaml would show; remove "
            "them and set them in the environment or in the store's own configuration files "
            "(AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, FSSPEC_...)"
        )
    if scheme not in _PACKAGES:
        known = ", ".join(f"{name}://" for name in ("file", *_PACKAGES))
        raise UserError(
            f"{shown}: {scheme}:// is not supported; use one of {known}, or copy the files to a "
            "local disk"
        )
    if "#" in rest or "::" in rest:
        raise UserError(f"{shown}: must not contain # or ::, which do not belong to names in URLs")
    names = rest.rstrip("/").split("/")
    if any(name in ("", ".", "..") for name in names) or not location.isprintable():
        raise UserError(f"{shown}: must be a bucket or host and names separated by single slashes")
    return scheme + location[len(match[1]) :]


def refuse_magic(url: str) -> None:
    """Raises `UserError` if a URL is a glob or has a query, where it must name one thing."""
    if any(character in url for character in "*?["):
        raise UserError(f"{mask(url)}: must not contain * ? or [, because it names one thing")


def refuse_web(url: str) -> None:
    """Raises `UserError` if files cannot be written or listed, as on web servers."""
    if url.startswith(tuple(f"{scheme}://" for scheme in _WEB)):
        raise UserError(
            f"{mask(url)}: web servers can only be read, one file at a time; use a store such as "
            "s3:// instead"
        )


def cache_folder() -> Path:
    """Returns the folder for local copies: ``$MEGATRON_CHATFLOW_CACHE``, or one in the home."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    parent = Path(base).expanduser().absolute() if base else Path.home() / ".cache"
    return parent / "megatron_chatflow" / "remote"


class CachedPath(PosixPath):
    """The path of the local copy of a remote file or folder.

    It is ``<cache folder>/<scheme>/<bucket>/<name>``, so `url` needs no record. Whoever holds one
    must have called `download` before it is read.
    """

    @classmethod
    def of(cls, url: str) -> "CachedPath":
        """Returns the path of the copy of ``url``, without any request.

        Raises:
            UserError: The path would not be in the cache.
        """
        _check_names(url.rstrip("/"))
        scheme, _, name = url.partition("://")
        return cls(cache_folder(), scheme, *name.rstrip("/").split("/"))

    @property
    def url(self) -> str:
        """The URL that this is a copy of."""
        scheme, *names = self.relative_to(cache_folder()).parts
        return f"{scheme}://{'/'.join(names)}"


@dataclass(frozen=True)
class RemoteFile:
    """A file on a store or web server, as it was when it was found."""

    url: str
    num_bytes: int | None  # None if the web server does not say
    version: str  # changes with the content
    has_ranges: bool = True  # whether the server sends parts of the file

    def __str__(self) -> str:
        """Returns the URL with its query masked."""
        return mask(self.url)

    @property
    def name(self) -> str:
        """The last part of the URL's path, without a query."""
        path = urlsplit(self.url).path if self.url.startswith(_WEB) else self.url
        return path.rpartition("/")[2]

    def open(self) -> IO[bytes]:
        """Opens the file for reading, unbuffered and seekable.

        A file of a server that does not send parts is copied to an unnamed temporary file first.

        Raises:
            RemoteError: The file cannot be read, here or while it is read.
        """
        if self.has_ranges and self.num_bytes is not None:
            return _BlockReader(self)  # type: ignore[return-value]
        with as_user_error(Path(tempfile.gettempdir())):
            file = tempfile.TemporaryFile()  # noqa: SIM115
            for block in _stream(self):
                file.write(block)
            file.seek(0)
        return file

    def absolute(self) -> "RemoteFile":
        """Returns the file itself; a `Path` has this method too."""
        return self

    def is_file(self) -> bool:
        """Returns True; a `Path` has this method too."""
        return True


def _filesystem(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and the path in it."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        conf = fsspec.config.conf
        options: dict[str, Any] = {}
        if scheme in _WEB:
            from aiohttp import ClientTimeout

            own = conf.get(scheme, {})
            # The size of a compressed answer is not that of the file.
            headers = {**own.get("headers", {}), "Accept-Encoding": "identity"}
            # aiohttp's default limits the whole answer to five minutes.
            timeout = ClientTimeout(
                total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS
            )
            client = {"timeout": timeout, **own.get("client_kwargs", {})}
            options = {"headers": headers, "client_kwargs": client}
        else:
            options = {"use_listings_cache": False}
        fs, path = fsspec.core.url_to_fs(url, **options)
        return fs, path
    except ImportError as error:
        raise UserError(
            f"{mask(url)}: needs the package {_PACKAGES[scheme]}: pip install "
            f"'megatron_chatflow[remote]' ({_reason(error)})"
        ) from error
    except Exception as error:
        raise RemoteError(
            f"cannot open: {mask(url)}: {_reason(error)}: check the URL and the settings of fsspec "
            "(FSSPEC_...)"
        ) from error


def _reason(error: BaseException) -> str:
    """Returns the cause of an error in one line without credentials."""
    while not str(error).strip() and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror and not error.filename:
        text = error.strerror
    return mask(" ".join(text.split()))[:300]


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)  # aiohttp
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)  # huggingface_hub
    return status if isinstance(status, int) else None


def _may_pass(error: Exception) -> bool:
    """Returns whether the same request may succeed later: the network or the server failed."""
    status = _status(error)
    if status is not None:
        return status in _BUSY or status >= 500
    packages = {one.__module__.partition(".")[0] for one in type(error).__mro__}
    return isinstance(error, OSError) or not packages.isdisjoint(_NETWORK_PACKAGES)


def _attempt(
    url: str,
    what: str,
    request: Callable[[], _Result],
    cancel: threading.Event | None = None,
) -> _Result:
    """Sends a request until it succeeds, at most `NUM_ATTEMPTS` times.

    Raises:
        FileNotFoundError: There is no such file.
        RemoteError: Access is denied, repeating does not help, or every attempt failed.
        CancelledError: ``cancel`` is set.
    """
    cancel = threading.Event() if cancel is None else cancel
    for number in range(1, NUM_ATTEMPTS + 1):
        if cancel.is_set():
            raise CancelledError(f"given up: cannot {what}: {mask(url)}")
        try:
            return request()
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:
            status, name = _status(error), type(error).__name__
            if status in _GONE or name == "RepositoryNotFoundError":
                raise FileNotFoundError(url) from error
            is_denied = isinstance(error, PermissionError) or status in _DENIED
            if is_denied or name in _NO_CREDENTIALS:
                raise RemoteError(
                    f"cannot {what}: {mask(url)}: {_reason(error)}: check the credentials, which "
                    "are read from the environment and the store's own configuration files"
                ) from error
            if number == NUM_ATTEMPTS or not _may_pass(error):
                times = "1 attempt" if number == 1 else f"{number} attempts"
                raise RemoteError(
                    f"cannot {what}: {mask(url)}: {_reason(error)} ({times}): check the network "
                    "and the address, and run the same command again"
                ) from error
            logger.info(
                "cannot %s: %s: %s; attempt %d follows", what, mask(url), _reason(error), number + 1
            )
            cancel.wait(FIRST_PAUSE_SECONDS * 2 ** (number - 1))
    raise AssertionError("unreachable")


def _remote_file(url: str, entry: dict[str, Any]) -> RemoteFile:
    fields = [str(entry[name]) for name in _VERSION_FIELDS if entry.get(name)]
    fields = fields or [str(entry.get("LastModified") or entry.get("mtime") or "")]
    size = entry.get("size")
    return RemoteFile(
        url,
        None if size is None else int(size),
        hashlib.sha256(f"{size} {fields}".encode()).hexdigest()[:16],
        # fsspec reports this for web servers only.
        has_ranges=bool(entry.get("partial", not url.startswith(tuple(_WEB)))),
    )


def stat(url: str, cancel: threading.Event | None = None) -> RemoteFile | None:
    """Returns the file with this URL; None if there is none, or if it is a folder.

    Setting ``cancel``, here and in the functions below, gives the request up between two attempts.

    Raises:
        RemoteError: The store cannot be reached or denies access.
    """
    fs, path = _filesystem(url)

    def request() -> Any:
        fs.invalidate_cache()
        return fs.info(path)

    try:
        entry = _attempt(url, "read", request, cancel)
    except FileNotFoundError:
        return None
    return _remote_file(url, entry) if entry["type"] == "file" else None


def find(url: str, cancel: threading.Event | None = None) -> list[RemoteFile]:
    """Returns the files of a glob, or the file or all files below a folder, sorted by URL.

    Raises:
        UserError: A name cannot be that of a local file, such as ``a/../b``.
        RemoteError: The store cannot be reached or denies access.
    """
    if url.startswith(tuple(f"{scheme}://" for scheme in _WEB)):
        file = stat(url)
        return [] if file is None else [file]
    fs, path = _filesystem(url)

    def request() -> dict[str, dict[str, Any]]:
        fs.invalidate_cache()
        if has_magic(url):
            found: dict[str, dict[str, Any]] = fs.glob(path, detail=True)
            return found
        entry = fs.info(path)
        if entry["type"] == "file":
            return {path: entry}
        found = fs.find(path, detail=True)
        return found

    try:
        entries = _attempt(url, "list", request, cancel)
    except FileNotFoundError:
        return []
    scheme = url.partition("://")[0]
    found = []
    for name, entry in sorted(entries.items()):
        if entry["type"] == "file" and not name.endswith("/"):  # consoles create empty folders
            _check_names(f"{scheme}://{name}")
            found.append(_remote_file(f"{scheme}://{name}", entry))
    return found


def _check_names(url: str) -> None:
    """Raises `UserError` if a URL, whose copy is named like it, could leave its folder."""
    names = url.partition("://")[2].split("/")
    if "\0" in url or any(name in ("", ".", "..") for name in names):
        raise UserError(
            f"{mask(url)!r}: is not a file name within the folder; rename it or remove it from the "
            "store"
        )


def has_magic(url: str) -> bool:
    """Returns whether a URL is a glob. Queries of web servers are not."""
    return not url.startswith(tuple(_WEB)) and any(character in url for character in "*?[")


def read_bytes(
    url: str, limit: int = 16 << 20, cancel: threading.Event | None = None
) -> bytes | None:
    """Returns the content of a small file; None if there is none.

    Raises:
        RemoteError: The file is larger than ``limit`` bytes, or cannot be read.
    """
    file = stat(url, cancel)
    if file is None:
        return None
    if file.num_bytes is not None and file.num_bytes > limit:
        raise RemoteError(f"cannot read: {mask(url)}: {file.num_bytes} bytes are too many")
    fs, path = _filesystem(url)

    def request() -> bytes:
        fs.invalidate_cache()
        size, data = fs.info(path).get("size"), fs.cat_file(path)
        if size not in (None, len(data)):
            raise OSError(f"the server sent {len(data)} bytes instead of {size}")
        return bytes(data)

    try:
        return _attempt(url, "read", request, cancel)
    except FileNotFoundError:
        return None


def write_bytes(url: str, content: bytes, cancel: threading.Event | None = None) -> None:
    """Writes a small file. Readers see either the old or the new content.

    Raises:
        RemoteError: The file cannot be written.
    """
    refuse_web(url)
    fs, path = _filesystem(url)
    try:
        _attempt(url, "write", lambda: fs.pipe_file(path, content), cancel)
    except FileNotFoundError as error:
        raise _no_bucket(url) from error


def remove(urls: Sequence[str], cancel: threading.Event | None = None) -> None:
    """Removes files of one bucket, in any order, many in a request; missing ones are ignored.

    Raises:
        RemoteError: A file cannot be removed.
    """
    paths = []
    for url in urls:
        fs, path = _filesystem(url)
        # fsspec would take such names for globs and remove what they match.
        if len(urls) > 1 and url.startswith(tuple(f"{one}://" for one in _BULK)):
            if not has_magic(url):
                paths.append(path)
                continue
        with suppress(FileNotFoundError):
            _attempt(url, "remove", lambda fs=fs, path=path: fs.rm_file(path), cancel)  # type: ignore[misc]
    for begin in range(0, len(paths), _BULK_FILES):
        part = paths[begin : begin + _BULK_FILES]
        with suppress(FileNotFoundError):
            _attempt(urls[0], "remove", lambda part=part: fs.rm(part), cancel)  # type: ignore[misc]


def _no_bucket(url: str) -> RemoteError:
    return RemoteError(f"cannot write: {mask(url)}: the bucket does not exist; create it first")


def upload(
    source: Path,
    url: str,
    on_bytes: Callable[[int], None] | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Writes a local file to a store. It appears under its name only when it is complete.

    A file that is sent in parts repeats a part that failed; other failures repeat the file.

    Args:
        source: The local file.
        url: Where to write it.
        on_bytes: Called with the number of bytes that were sent. A `UserError` that it raises ends
            the upload.
        cancel: Gives the upload up between two attempts when it is set.

    Raises:
        RemoteError: The file cannot be written.
        UserError: The local file cannot be read.
    """
    refuse_web(url)
    fs, path = _filesystem(url)
    import fsspec

    class Progress(fsspec.callbacks.Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if on_bytes is not None:
                on_bytes(inc)

    def request() -> None:
        try:
            num_bytes = source.stat().st_size
        except OSError as error:
            raise UserError(f"cannot read: {source}: {error.strerror}") from error
        fs.put_file(str(source), path, callback=Progress())
        fs.invalidate_cache()
        if (found := fs.info(path)["size"]) != num_bytes:
            raise OSError(f"the store has {found} bytes instead of {num_bytes}")

    try:
        _attempt(url, "write", request, cancel)
    except FileNotFoundError as error:
        raise _no_bucket(url) from error


def _read_block(file: RemoteFile, begin: int, end: int) -> bytes:
    fs, path = _filesystem(file.url)

    def request() -> bytes:
        data: bytes = fs.cat_file(path, start=begin, end=end)
        if len(data) != end - begin:
            raise OSError(f"the server sent {len(data)} bytes instead of {end - begin}")
        return data

    try:
        return _attempt(file.url, "read", request)
    except FileNotFoundError as error:
        raise RemoteError(
            f"cannot read: {file}: it was removed while it was read; run the same command again"
        ) from error


def _check_unchanged(file: RemoteFile) -> None:
    if (now := stat(file.url)) is None or now.version != file.version:
        raise _ChangedError(
            f"cannot read: {file}: it changed while it was read; run the same command again"
        )


def _stream(file: RemoteFile, begin: int = 0) -> Iterator[bytes]:
    """Yields the content from ``begin`` on in blocks, and checks that it did not change."""
    if file.has_ranges and file.num_bytes is not None:
        with ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="remote") as pool:
            starts = iter(range(begin, file.num_bytes, BLOCK_BYTES))
            ends = file.num_bytes

            def submit(start: int) -> Future[bytes]:
                return pool.submit(_read_block, file, start, min(start + BLOCK_BYTES, ends))

            waiting = [submit(start) for start in islice(starts, NUM_STREAMS)]
            try:
                while waiting:
                    yield waiting.pop(0).result()
                    waiting += [submit(start) for start in islice(starts, 1)]
            finally:
                for future in waiting:
                    future.cancel()
    else:
        yield from _whole_stream(file, begin)
    _check_unchanged(file)


def _whole_stream(file: RemoteFile, begin: int) -> Iterator[bytes]:
    """Yields the content of a file whose server cannot send parts.

    After a failure, the file is requested again and the bytes before it are skipped.
    """
    fs, path = _filesystem(file.url)
    position = begin
    stream: Any = None

    def request() -> bytes:
        nonlocal stream
        try:
            if stream is None:
                stream = fs.open(path, "rb", block_size=0)
                num_skipped = 0
                while num_skipped < position:
                    skipped = stream.read(min(1 << 20, position - num_skipped))
                    if not skipped:
                        raise OSError(f"the connection ended after {num_skipped} bytes")
                    num_skipped += len(skipped)
            data: bytes = stream.read(1 << 20)
            if not data and file.num_bytes not in (None, position):
                raise OSError(f"the connection ended after {position} bytes")
        except BaseException:
            stream = None
            raise
        return data

    while data := _attempt(file.url, "read", request):
        position += len(data)
        yield data
    if stream is not None:
        stream.close()


class _BlockReader(io.RawIOBase):
    """Reads a remote file in blocks, ahead of a reader that goes on where it stopped."""

    def __init__(self, file: RemoteFile) -> None:
        assert file.num_bytes is not None
        self._file = file
        self._num_bytes = file.num_bytes
        self._position = 0
        self._next = 0  # number of the block that continues a sequential read
        self._blocks: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(NUM_STREAMS, thread_name_prefix="remote")
        self._is_checked = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._num_bytes:
            if view and not self._is_checked:
                self._is_checked = True
                _check_unchanged(self._file)
            return 0
        number, offset = divmod(self._position, BLOCK_BYTES)
        data = self._block(number)[offset : offset + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _block(self, number: int) -> bytes:
        num_ahead = NUM_STREAMS if number in (self._next - 1, self._next) else 1
        self._next = number + 1
        last = -(-self._num_bytes // BLOCK_BYTES)
        wanted = range(number, min(number + num_ahead, last))
        for old in [one for one in self._blocks if one not in wanted]:
            self._blocks.pop(old).cancel()
        for one in wanted:
            if one not in self._blocks:
                begin = one * BLOCK_BYTES
                end = min(begin + BLOCK_BYTES, self._num_bytes)
                self._blocks[one] = self._pool.submit(_read_block, self._file, begin, end)
        return self._blocks[number].result()

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def download(
    file: RemoteFile, target: Path, *, find_damage: Callable[[Path], str | None] | None = None
) -> bool:
    """Copies a remote file to the local disk, unless the copy there is of the same version.

    An interrupted copy continues where it stopped. Processes that copy the same file wait for each
    other. The copy has its final name only when it is complete and verified.

    Args:
        file: The remote file.
        target: The local path.
        find_damage: Returns what is wrong with a complete copy; None if nothing is.

    Returns:
        Whether the file was copied.

    Raises:
        UserError: The disk is full or not writable, or the copy is damaged.
        RemoteError: The file cannot be read.
    """
    record = _record(target)
    partial = target.with_name(f".{target.name}.{file.version}{PARTIAL_SUFFIX}")
    if is_copy(target, file):
        return False
    with as_user_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire(partial, wait=True, for_writing=True)
    assert lock is not None
    check_lock(lock, target.parent)
    try:
        if is_copy(target, file):  # by the process that had the lock
            return False
        _copy(file, partial, target)
        damage = None if find_damage is None else find_damage(partial)
        if damage is not None:
            raise UserError(
                f"{file}: {damage}: the file on the store is damaged or does not belong to its "
                "hashes; upload it again"
            )
        with as_user_error(target):
            record.unlink(missing_ok=True)  # it would describe the new file wrongly
            os.replace(partial, target)
            sync_folder(target.parent)
            for old in target.parent.glob(glob.escape(f".{target.name}.") + f"*{PARTIAL_SUFFIX}"):
                old.unlink(missing_ok=True)  # of another version
            content = {"version": file.version, "num_bytes": target.stat().st_size}
            write_atomically(record, json.dumps(content) + "\n")
    except RemoteError as error:
        # The next start continues with what was copied.
        lock.release(remove=isinstance(error, _ChangedError))
        raise
    except BaseException as error:
        lock.release(remove=not isinstance(error, KeyboardInterrupt))
        raise
    lock.release(remove=False)
    return True


def check_lock(lock: FileLock, folder: Path) -> None:
    """Raises `UserError` if a lock in the cache does not exclude the node's other processes."""
    if not lock.is_effective and folder.is_relative_to(cache_folder()):
        lock.release(remove=False)
        raise UserError(
            f"{folder}: its file system has no file locks, without which processes would write the "
            f"same copies; set {CACHE_VARIABLE} to a folder on a local disk"
        )


def _record(target: Path) -> Path:
    return target.with_name(f".{target.name}.remote.json")


def is_copy(target: Path, file: RemoteFile) -> bool:
    """Returns whether `download` has copied this version of a file to a path."""
    with suppress(OSError, ValueError):
        content = json.loads(_record(target).read_bytes())
        size = target.stat().st_size
        return bool(content == {"version": file.version, "num_bytes": size})
    return False


def _copy(file: RemoteFile, partial: Path, target: Path) -> None:
    begin_time = time.monotonic()
    with as_user_error(target), open(partial, "ab") as output:
        begin = output.tell()
        if file.num_bytes is None or begin > file.num_bytes or not file.has_ranges:
            begin = 0
            output.truncate(0)
        missing = (file.num_bytes or 0) - begin
        free = shutil.disk_usage(partial.parent).free
        if missing > free:
            raise UserError(
                f"{partial.parent}: needs {missing / 1e9:.2f} GB for a copy of {file} and "
                f"{free / 1e9:.2f} GB are free; free some space, or set {CACHE_VARIABLE} to a "
                "folder on another disk"
            )
        for block in _stream(file, begin):
            output.write(block)
        if file.num_bytes not in (None, output.tell()):
            raise RemoteError(f"cannot read: {file}: got {output.tell()} of {file.num_bytes} bytes")
        output.flush()
        os.fsync(output.fileno())
    if missing >= BLOCK_BYTES:
        seconds = max(time.monotonic() - begin_time, 1e-9)
        logger.info("copied %s to %s: %.2f GB in %.1f s", file, target, missing / 1e9, seconds)


def download_folder(folder: CachedPath, suffixes: tuple[str, ...], needed: str) -> None:
    """Copies the files with some suffixes that lie directly in a folder.

    Raises:
        UserError: There is no file named ``needed``, or the disk is full.
        RemoteError: The store cannot be reached.
    """
    top = f"{folder.url}/"
    found = {file.url.removeprefix(top): file for file in find(folder.url)}
    if needed not in found:
        raise UserError(f"{folder.url}: has no {needed}; check the URL of the folder")
    for name, file in found.items():
        if "/" not in name and name.endswith(suffixes):
            download(file, folder / name)


def sha256_damage(expected: str) -> Callable[[Path], str | None]:
    """Returns a check for `download` that compares the SHA-256 of a copy."""

    def find_damage(path: Path) -> str | None:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return None if digest.hexdigest() == expected else "its SHA-256 is not the recorded one"

    return find_damage
