"""Atomic writes: files and folders appear under their final names complete, or not at all.

Everything is written under a temporary name in the same folder, flushed to the disk and renamed:

* `write_atomically` for the content of a small file,
* `StagedFile` and `publish_all` for large files that are written as a stream,
* `new_folder` and `replace_folder` for whole folders.

A file under a temporary name is locked with `flock`. The kernel releases the lock when the process
ends, however it ends, so a temporary file that can be locked was left by a killed process. Process
ids are not used, because they are reused and differ between containers. On a shared file system
`flock` may be local to each machine, so temporary names contain the machine's name and only
leftovers of the same machine are removed.

`DirectWriter` is the one place that writes past the page cache.
"""

import errno
import fcntl
import functools
import hashlib
import logging
import mmap
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_chatflow.errors import DISK_FULL, UserError

logger = logging.getLogger(__name__)

ALIGNMENT = 1 << 12
"""Direct writes need positions, lengths and memory addresses that are multiples of this."""
COPY_BYTES = 1 << 23
"""Bytes that `StagedFile.append_file` reads ahead, hashes and writes at a time."""
PARTIAL_SUFFIX = ".partial"

_LARGE_BYTES = 1 << 22  # from here on, a second thread hashes while the bytes are written
_PROBE_BYTES = 4096
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a Path keeps one of the two slashes
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_PARTIAL, _OLD = "partial", "old"
_LEFTOVER = re.compile(rf"\.(.+)\.([\w-]+)\.([0-9a-f]{{8}})\.({_PARTIAL}|{_OLD})")
_EARLIER_LEFTOVER = re.compile(rf"\.(.+)\.\d+\.({_PARTIAL}|{_OLD})")  # with a process id


def is_disk_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit on file sizes is exhausted."""
    return error.errno in DISK_FULL


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turns an `OSError` of writing ``path`` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write: {path}: {error.strerror or error}") from error


@functools.cache
def host_name(
    id_files: tuple[str, ...] = ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"),
) -> str:
    """Returns this machine's name for use in temporary names; it contains no dots.

    Machines that share a file system may have the same host name (``localhost``, containers), so
    eight digits of a hash of the machine id follow it, or of the boot id where there is none.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", os.uname().nodename) or "host"
    for path in id_files:
        with suppress(OSError):
            if machine := Path(path).read_bytes().strip():
                return f"{name}-{hashlib.sha256(machine).hexdigest()[:8]}"
    return name


def fsync_path(path: Path) -> None:
    """Flushes a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where its file system supports that for folders.

    Raises:
        OSError: The disk fails. Files that were renamed before keep their final names.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the folder can be written to but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC:
            return
        raise OSError(
            error.errno,
            f"{error.strerror}, when the folder was synced: what was written is complete under its "
            "name, which a crash of the machine may undo",
            str(folder),
        ) from error
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes every file below ``folder``, and the entries of every folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(parent) / name)
        sync_folder(Path(parent))


class FileLock:
    """An exclusive lock on a path, released when its process ends.

    Attributes:
        is_effective: False on a file system without locks, where other processes go unnoticed.
        descriptor: The open file.
    """

    def __init__(self, path: Path, descriptor: int, *, is_effective: bool) -> None:
        """Takes ownership of an open descriptor. Use `acquire` instead."""
        self.is_effective = is_effective
        self.descriptor = descriptor
        self._path = path

    @classmethod
    def acquire(
        cls, path: Path, *, wait: bool = False, for_writing: bool = False
    ) -> "FileLock | None":
        """Opens the file, creating it if it is missing, and locks it.

        Args:
            path: A lock file, or the temporary file to be written.
            wait: Whether to wait for another process to release it.
            for_writing: Whether the caller writes to the file. If not, a file of another user is
                opened read-only, which is enough to lock it.

        Returns:
            The lock; None while another process holds it.

        Raises:
            OSError: The file cannot be opened.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except PermissionError as error:
                if for_writing:
                    raise
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                except FileNotFoundError:  # it could not be created
                    raise error from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError:
                return cls(path, descriptor, is_effective=False)
            except BaseException:
                os.close(descriptor)
                raise
            # Between our open and our lock, the owner before us may have removed or renamed it.
            if _is_same_file(descriptor, path):
                return cls(path, descriptor, is_effective=True)
            os.close(descriptor)

    def release(self, *, remove: bool = True) -> None:
        """Releases the lock, and first removes its file."""
        if remove:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        os.close(self.descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def refuse_url(path: str | Path) -> None:
    """Raises `UserError` for a URL such as ``s3://bucket/name`` in place of a file's path."""
    if _URL.match(str(path)):
        raise UserError(
            f"{path}: is a URL, and only local paths are supported: copy it to a disk, or mount "
            "the bucket, and give the path there"
        )


def check_output_file(path: Path) -> None:
    """Checks that a file can be written, without leaving anything behind.

    Raises:
        UserError: It is a folder or a device, or its folder cannot be created or written.
    """
    refuse_url(path)
    refuse_other_than_file(path)
    _try_to_write(path, path.absolute().parent)


def check_output_folder(path: Path) -> None:
    """Checks that a folder, which may exist, can be written, without leaving anything behind.

    Raises:
        UserError: It is a file, or cannot be created or written.
    """
    refuse_url(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write: {path}: is a file; name a folder")
    _try_to_write(path, path.absolute())


def refuse_other_than_file(path: Path) -> None:
    """Raises `UserError` for a path that renaming a file could not, or must not, replace."""
    if path.is_dir():
        raise UserError(f"cannot write: {path}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write: {path}: is a device or a pipe; name a file")


def _try_to_write(path: Path, folder: Path) -> None:
    """Writes a nameless file in a folder, or in the nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        if folder.is_symlink():
            raise UserError(f"cannot write: {path}: {folder} is a link to nothing; name another")
        folder = folder.parent
    try:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise UserError(
            f"cannot write: {path}: {folder}: {error.strerror or error}; name another place"
        ) from error


def write_and_sync(path: Path, content: bytes) -> None:
    """Writes a file in place and flushes it to the disk; the caller renames it or its folder."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a small file: readers see either the old content or the new.

    The temporary file has a fixed name for each user of a host, so that the next process reuses
    what a killed one left. Processes that share the name wait for each other.

    Raises:
        OSError: The file cannot be written. `path` is unchanged then, unless only the sync of its
            folder failed; see `sync_folder`.
    """
    data = content.encode() if isinstance(content, str) else content
    owner = f"{host_name()}-{os.geteuid()}"
    temporary = path.with_name(f".{path.name}.{owner}.partial")
    lock = FileLock.acquire(temporary, wait=True, for_writing=True)
    assert lock is not None
    try:
        if not lock.is_effective:  # nothing excludes other processes: use a file of our own
            lock.release()
            temporary = path.with_name(f".{path.name}.{owner}.{os.getpid()}.partial")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            lock = FileLock(temporary, descriptor, is_effective=False)
        with open(lock.descriptor, "wb", closefd=False) as file:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(lock.descriptor)
        os.replace(temporary, path)
    except BaseException:
        lock.release()
        raise
    lock.release(remove=False)
    sync_folder(path.parent)


def write_output_file(path: Path, content: str | bytes) -> None:
    """Writes a file that the user named as `write_atomically` does, and creates missing folders.

    Raises:
        UserError: It cannot be written.
    """
    with as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def remove_file(path: Path) -> None:
    """Removes a file if it exists.

    Raises:
        UserError: It cannot be removed, for example on a read-only disk.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove: {path}: {error.strerror}") from error


def check_new_folder(output: Path, *, overwrite: bool, mark: str) -> None:
    """Checks, without leaving anything behind, that `new_folder` can create a folder.

    Args:
        output: The final name.
        overwrite: Whether an existing folder of that name is replaced.
        mark: A file that every folder of this kind contains.

    Raises:
        UserError: The folder exists, or cannot be written.
    """
    refuse_url(output)
    _refuse_existing(output, overwrite=overwrite, mark=mark)
    check_output_folder(output.absolute().parent)


@contextmanager
def new_folder(output: Path, *, overwrite: bool, mark: str, num_bytes: int) -> Iterator[Path]:
    """Creates a temporary folder that becomes ``output`` when the block ends without an error.

    ``.NAME.lock`` excludes a second process with the same output. What killed processes left in the
    parent folder is removed first.

    Args:
        output: The final name.
        overwrite: Whether an existing folder of that name is replaced.
        mark: A file that every folder of this kind contains; no other folder is replaced.
        num_bytes: About how many bytes will be written.

    Raises:
        UserError: The folder exists, the disk is full or not writable, or another process is
            writing the same folder.
    """
    _refuse_existing(output, overwrite=overwrite, mark=mark)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire(_lock_path(output))
    except OSError as error:
        raise _cannot_be_written(output, error) from error
    if lock is None:
        raise UserError(f"{output}: another process is writing it; wait for it or name another")
    token = f"{host_name()}.{secrets.token_hex(4)}"
    temporary, old = (
        output.with_name(f".{output.name}.{token}.{kind}") for kind in (_PARTIAL, _OLD)
    )
    try:
        if lock.is_effective:
            _remove_leftovers(output)
            _refuse_existing(output, overwrite=overwrite, mark=mark)  # it may have been restored
        free = shutil.disk_usage(output.parent).free
        if free < num_bytes:
            raise UserError(
                f"{output}: needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
                "free some or name another folder"
            )
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        _publish(output, temporary, old)
    except OSError as error:
        raise _cannot_be_written(output, error) from error
    finally:
        _remove_tree(temporary)
        lock.release()


def _cannot_be_written(output: Path, error: OSError) -> UserError:
    reason = "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
    return UserError(f"{output}: cannot be written ({reason}); name another folder")


def _lock_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _refuse_existing(output: Path, *, overwrite: bool, mark: str) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: is there already; give --overwrite to replace it")
    if not (output / mark).exists():
        raise UserError(
            f"{output}: holds something else (no {mark}), which --overwrite does not replace; "
            "name another folder"
        )


def replace_folder(output: Path, temporary: Path, old: Path) -> None:
    """Renames a complete and synced folder to its final name.

    Args:
        output: The final name. An existing folder is removed once the new one has its name.
        temporary: The folder, in the same parent folder.
        old: A temporary name for the existing folder. After an error of the last sync it stays
            there.

    Raises:
        OSError: It cannot be renamed, in which case an existing folder stays as it was, or the
            disk fails to make the name durable.
    """
    _remove_tree(old)
    try:
        if output.exists():
            output.rename(old)
        temporary.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    sync_folder(output.parent)
    _remove_tree(old)


def _publish(output: Path, temporary: Path, old: Path) -> None:
    try:
        replace_folder(output, temporary, old)
    except OSError as error:
        if temporary.exists():
            raise
        kept = f"; what it replaced is in {old} until the next run" if old.exists() else ""
        raise UserError(f"{output}: {error.strerror}{kept}; check the disk") from error


def _remove_leftovers(output: Path) -> None:
    """Removes what killed processes of this host left in the folder of ``output``, which is locked.

    A folder that a killed process had moved away gets its name back. Leftovers of other hosts,
    whose locks may not be visible here, are only logged.
    """
    foreign = []
    try:
        paths = sorted(output.parent.iterdir())
    except PermissionError:  # the folder can be written to but not listed
        return
    for path in paths:
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or match[2] != host_name():
            known = match or _EARLIER_LEFTOVER.fullmatch(path.name)
            if known is not None and known[1] == output.name:
                foreign.append(path.name)
        elif match[1] == output.name:
            _clear(path, output)
        else:
            with suppress(OSError):  # it belongs to another user
                _clear_locked(path, path.with_name(match[1]))
    if foreign:
        logger.warning(
            "%s: %s: left, or being written, by another host or an earlier version; remove it if "
            "no job is running there",
            output.parent,
            ", ".join(foreign),
        )


def _clear_locked(path: Path, output: Path) -> None:
    lock = FileLock.acquire(_lock_path(output))
    if lock is None:
        return
    try:
        if lock.is_effective:
            _clear(path, output)
    finally:
        lock.release()


def _clear(path: Path, output: Path) -> None:
    if path.name.endswith(_OLD) and not output.exists():
        path.rename(output)
        logger.info("%s: restored from %s, which a killed process left", output, path.name)
        return
    _remove_tree(path)
    logger.info("%s: removed; a killed process had left it", path)


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


class StagedFile:
    """A large file that is written as a stream to ``<path>.partial``.

    Call `write` and `append_file`, then `publish_all`. Leaving the ``with`` block before that
    removes what was written. A killed job leaves at most ``.partial`` files, which the next job
    overwrites.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens ``<path>.partial`` and locks it against a second job that writes the same file.

        Args:
            path: The final name. Missing folders are created.

        Raises:
            UserError: The file cannot be created there, or another process is writing it.
        """
        refuse_url(path)
        self.path = Path(path)
        refuse_other_than_file(self.path)
        self.partial_path = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self.num_bytes = 0
        self._hash = hashlib.sha256()
        with as_user_error(self.partial_path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock.acquire(self.partial_path, for_writing=True)
        if lock is None:
            raise UserError(
                f"another job is writing: {self.partial_path}: wait for it or choose another prefix"
            )
        self._file = open(lock.descriptor, "wb", buffering=1 << 20)  # noqa: SIM115
        with as_user_error(self.partial_path):
            self._file.truncate(0)

    def write(self, data: bytes | memoryview) -> None:
        """Appends and hashes bytes.

        Raises:
            UserError: They cannot be written, for example because the disk is full.
        """
        if len(data) < _LARGE_BYTES:
            self._hash.update(data)
            with as_user_error(self.partial_path):
                self._file.write(data)
        else:
            hashing = threading.Thread(target=self._hash.update, args=(data,))
            hashing.start()
            try:
                with as_user_error(self.partial_path):
                    self._file.write(data)
            finally:
                hashing.join()
        self.num_bytes += len(data)

    def append_file(self, source: Path) -> int:
        """Appends and hashes a whole file.

        Blocks are read ahead while the previous one is hashed and written. Most are written past
        the page cache: copying into the cache takes longer than the disk does, and evicts what
        others keep there.

        Returns:
            The number of bytes.

        Raises:
            UserError: The source cannot be read or shrinks meanwhile, or the bytes cannot be
                written.
        """
        with as_user_error(self.partial_path):
            self._file.flush()
            num_bytes = self._copy(source)
            self._file.seek(self.num_bytes + num_bytes)
        self.num_bytes += num_bytes
        return num_bytes

    def _copy(self, source: Path) -> int:
        with ExitStack() as stack:
            try:
                file = stack.enter_context(source.open("rb", buffering=0))
            except OSError as error:
                raise UserError(f"cannot read: {source}: {error.strerror}") from error
            writer = stack.enter_context(closing(DirectWriter(self.partial_path)))
            pool = stack.enter_context(ThreadPoolExecutor(2))
            buffers = [memoryview(mmap.mmap(-1, COPY_BYTES)) for _ in range(2)]
            num_bytes = os.fstat(file.fileno()).st_size
            blocks = list(_blocks(self.num_bytes, num_bytes))

            def read(number: int) -> memoryview:
                begin, end = blocks[number]
                return _read(file.fileno(), source, begin, buffers[number % 2][: end - begin])

            ahead = pool.submit(read, 0) if blocks else None
            for number, (begin, _) in enumerate(blocks):
                assert ahead is not None
                block = ahead.result()
                ahead = pool.submit(read, number + 1) if number + 1 < len(blocks) else None
                hashing = pool.submit(self._hash.update, block)
                try:
                    writer.write(block, self.num_bytes + begin)
                finally:
                    hashing.result()
        return num_bytes

    @property
    def sha256(self) -> str:
        """The SHA-256 of everything written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def seal(self) -> None:
        """Flushes every byte written so far to the disk."""
        with as_user_error(self.partial_path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Gives the file its final name. Nothing may be written afterwards.

        Raises:
            UserError: The name cannot be given, for example because a folder has it.
        """
        with as_user_error(self.path):
            os.replace(self.partial_path, self.path)
        self._file.close()

    def discard(self) -> None:
        """Removes the file, unless it has been published."""
        if not self._file.closed:
            with suppress(OSError):  # a disk that has become read-only keeps the file
                self.partial_path.unlink(missing_ok=True)
            with suppress(OSError):  # buffered bytes may not fit on the disk
                self._file.close()

    def __enter__(self) -> "StagedFile":
        """Returns the file itself."""
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Discards the file, unless it has been published."""
        self.discard()


def _blocks(num_before: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields begin and end of blocks; all but short ones at the ends have aligned positions."""
    begin = 0
    while begin < num_bytes:
        odd = (num_before + begin) % ALIGNMENT
        length = ALIGNMENT - odd if odd else COPY_BYTES
        end = min(begin + length, num_bytes)
        if end - begin > ALIGNMENT and end == num_bytes:
            end -= (num_before + end) % ALIGNMENT  # the rest becomes a block of its own
        yield begin, end
        begin = end


def _read(descriptor: int, path: Path, begin: int, block: memoryview) -> memoryview:
    at = 0
    while at < len(block):
        try:
            num_read = os.preadv(descriptor, [block[at:]], begin + at)
        except OSError as error:
            raise UserError(f"cannot read: {path}: {error.strerror}") from error
        if num_read == 0:
            raise UserError(f"cannot read: {path}: it became shorter while it was copied")
        at += num_read
    if hasattr(os, "posix_fadvise"):  # it is read once, so it need not stay in the page cache
        os.posix_fadvise(descriptor, begin, len(block), os.POSIX_FADV_DONTNEED)
    return block


def publish_all(files: Iterable[StagedFile]) -> None:
    """Flushes every file, renames them in the given order, and makes the names durable.

    Args:
        files: In the order in which the names may appear: the file by which the others are found
            goes last.

    Raises:
        UserError: A file cannot be written or renamed; or all files have their names, but the disk
            fails to make the names durable.
    """
    files = list(files)
    for file in files:
        file.seal()
    for file in files:
        file.publish()
    for folder in dict.fromkeys(file.path.parent for file in files):
        try:
            sync_folder(folder)
        except OSError as error:
            first = next(file.path for file in files if file.path.parent == folder)
            raise UserError(f"cannot write: {first}: {error.strerror}; check the disk") from error


class Spool:
    """Bytes kept in a nameless temporary file until they are read again."""

    def __init__(self, folder: Path) -> None:
        """Opens the file.

        Args:
            folder: A folder on the disk to use.
        """
        self._folder = folder
        with as_user_error(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)

    def write(self, data: bytes) -> None:
        """Appends bytes.

        Raises:
            UserError: They cannot be written, for example because the disk is full.
        """
        with as_user_error(self._folder):
            self._file.write(data)

    def blocks(self) -> Iterator[bytes]:
        """Yields everything from the beginning, a mebibyte at a time."""
        with as_user_error(self._folder):
            self._file.seek(0)
            while block := self._file.read(1 << 20):
                yield block

    def close(self) -> None:
        """Frees the space."""
        with suppress(OSError):  # buffered bytes may not fit on the disk
            self._file.close()


class DirectWriter:
    """Writes a file past the page cache.

    Writing through the page cache copies every byte once more and leaves the disk idle meanwhile.
    Blocks whose position, length and address are multiples of `ALIGNMENT` are written directly.
    The rest, and everything on a file system without direct writes, goes through the page cache.
    Several threads may write at the same time.

    Attributes:
        descriptor: The file, opened for ordinary writes.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Opens a file.

        Args:
            path: The file.
            create: Whether to create the file, or to empty an existing one.

        Raises:
            OSError: It cannot be opened.
        """
        flags = os.O_CREAT | os.O_TRUNC if create else 0
        self.descriptor = os.open(path, os.O_WRONLY | flags, 0o644)
        self._direct = _open_direct(path)
        self._is_direct = self._direct is not None

    def write(self, data: memoryview, position: int) -> None:
        """Writes bytes at a position in the file.

        Raises:
            OSError: They cannot be written, for example because the disk is full.
        """
        done = 0
        while done < len(data):
            rest = data[done:]
            num_direct = 0 if (position + done) % ALIGNMENT else len(rest) & -ALIGNMENT
            if self._is_direct and num_direct:
                assert self._direct is not None
                try:
                    num_written = os.pwrite(self._direct, rest[:num_direct], position + done)
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                    self._is_direct = False  # it can be opened for direct writes and refuses them
                    continue
                num_written &= -ALIGNMENT  # after a short write, continue at a block's begin
            else:
                num_written = os.pwrite(self.descriptor, rest, position + done)
            if num_written == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += num_written

    def close(self) -> None:
        """Closes the file without flushing it."""
        if self._direct is not None:
            os.close(self._direct)
        os.close(self.descriptor)


def _open_direct(path: Path) -> int | None:
    """Returns a descriptor for direct writes; None where they are not supported."""
    with suppress(OSError, AttributeError):  # AttributeError: a system without the flag
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Creates a temporary folder and removes it when the block ends.

    Folders of the same prefix that killed processes of this user and host left are removed first.

    Args:
        prefix: The beginning of its name.
        parent: The folder to create it in; the system's temporary folder if None.

    Raises:
        UserError: It cannot be created.
    """
    prefix = f"{prefix}{host_name()}."
    try:
        folder = Path(tempfile.gettempdir()) if parent is None else parent
        with suppress(OSError):  # a folder that may not be listed
            for path in list(folder.iterdir()):
                if path.name.startswith(prefix):
                    _remove_if_dead(path)
        made, descriptor = _make_locked(prefix, folder)
    except OSError as error:
        where = "a temporary folder (TMPDIR)" if parent is None else parent
        raise UserError(f"cannot write: {where}: {error.strerror or error}") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(descriptor)


def _make_locked(prefix: str, parent: Path) -> tuple[Path, int]:
    """Creates and locks a folder; returns it and the descriptor that holds the lock."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # as below
            continue
        with suppress(OSError):  # the file system may not lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_same_file(descriptor, made):
            return made, descriptor
        os.close(descriptor)  # before it was locked, another process removed it


def _remove_if_dead(folder: Path) -> None:
    """Removes a scratch folder whose process has ended."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # it is in use, or there are no locks here
        return
    finally:
        os.close(descriptor)
