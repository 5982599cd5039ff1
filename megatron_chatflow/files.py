"""Atomic writes: files and folders have their final names only once they are complete.

All data is written under a temporary name in the same folder, flushed to disk and renamed:

* `write_atomically` for the content of a small file,
* `StagedFile` and `publish_all` for large files that are written as a stream,
* `new_folder` and `replace_folder` for whole folders.

Temporary files are locked with `flock`. The kernel releases the lock whenever the process ends,
even if it is killed, so a temporary file that can be locked was left by a killed process. Process
ids are not used, because they are reused and differ between containers. On a shared file system,
`flock` may be local to each machine. Temporary names therefore contain the name of the machine, and
only temporary files of the same machine are removed.

`DirectWriter` bypasses the page cache. It is the only writer that does so.
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
"""Positions, lengths and memory addresses of direct writes must be multiples of this, in bytes."""
COPY_BYTES = 1 << 23
"""Size of the blocks that `StagedFile.append_file` reads, hashes and writes, in bytes."""
PARTIAL_SUFFIX = ".partial"

_LARGE_BYTES = 1 << 22  # blocks of this size or more are hashed in a second thread
_PROBE_BYTES = 4096
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a Path collapses the two slashes
# As in `remote`, but with one slash or two.
_USER = re.compile(
    r"(:/+)(?:(?:(?<!http:/)(?<!http://)(?<!https:/)(?<!https://)|(?=[^/:@]*:(?!\d{1,5}/)))"
    r"[^/:@]*:.*|[^/]*)@",
    re.IGNORECASE,
)
_QUERY = re.compile(r"([?#]).*", re.DOTALL)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
_PARTIAL, _OLD = "partial", "old"
_LEFTOVER = re.compile(rf"\.(.+)\.([\w-]+)\.([0-9a-f]{{8}})\.({_PARTIAL}|{_OLD})")
# Earlier versions used a process id.
_EARLIER_LEFTOVER = re.compile(rf"\.(.+)\.\d+\.({_PARTIAL}|{_OLD})")


def is_disk_full(error: OSError) -> bool:
    """Returns whether a disk is full, or a quota or a limit on file sizes is exceeded."""
    return error.errno in DISK_FULL


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Converts an `OSError` in the block to a `UserError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write: {path}: {error.strerror or error}") from error


@functools.cache
def host_name(
    id_files: tuple[str, ...] = ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"),
) -> str:
    """Returns a name of this machine for temporary files. It contains no dots.

    Machines that share a file system may have the same host name (``localhost``, containers). The
    name therefore ends with eight digits of a hash of the machine id, or of the boot id if there is
    no machine id.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", os.uname().nodename) or "host"
    for path in id_files:
        with suppress(OSError):
            if machine := Path(path).read_bytes().strip():
                return f"{name}-{hashlib.sha256(machine).hexdigest()[:8]}"
    return name


def fsync_path(path: Path) -> None:
    """Flushes a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes the entries of a folder to disk, if its file system supports this.

    If this fails, files that were renamed before keep their final names.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # the folder is writable but not readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _NO_FOLDER_SYNC:
            return
        raise OSError(
            error.errno,
            f"{error.strerror}, while the folder was synced: the output is complete under its "
            "final name, but a crash of the machine may undo this",
            str(folder),
        ) from error
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes all files below ``folder`` and the entries of all folders to disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(parent) / name)
        sync_folder(Path(parent))


class FileLock:
    """An exclusive lock on a path, which the kernel releases when the process ends.

    ``is_effective`` is False if the file system does not support locks, so that other processes are
    not excluded. ``descriptor`` belongs to the locked file.
    """

    def __init__(self, path: Path, descriptor: int, *, is_effective: bool) -> None:
        """Initializes the lock with a descriptor, which it will close. Use `acquire` instead."""
        self.is_effective = is_effective
        self.descriptor = descriptor
        self._path = path

    @classmethod
    def acquire(
        cls, path: Path, *, wait: bool = False, for_writing: bool = False
    ) -> "FileLock | None":
        """Opens a lock file or a temporary file, creating it if it is missing, and locks it.

        Args:
            path: The file.
            wait: Whether to wait until another process releases the lock.
            for_writing: Whether the caller writes to the file. If not, a file of another user is
                opened read-only, which is sufficient to lock it.

        Returns:
            The lock; None if another process holds it and ``wait`` is False.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except PermissionError as error:
                if for_writing:
                    raise
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                except FileNotFoundError:  # the file is missing and cannot be created
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
            # The previous owner may have removed or renamed the file between `open` and `flock`.
            if _is_same_file(descriptor, path):
                return cls(path, descriptor, is_effective=True)
            os.close(descriptor)

    def release(self, *, remove: bool = True) -> None:
        """Releases the lock, before which the file is removed if ``remove`` is set."""
        if remove:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)
        os.close(self.descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def is_url(path: str | Path) -> bool:
    """Returns whether a path is a URL such as ``s3://bucket/name``."""
    return isinstance(path, str) and "://" in path and _URL.match(path) is not None


def refuse_url(path: str | Path) -> None:
    """Raises `UserError` if a path is a URL such as ``s3://bucket/name``."""
    if _URL.match(str(path)):
        shown = _QUERY.sub(r"\1***", _USER.sub(r"\1***@", str(path)))
        raise UserError(
            f"{shown}: is a URL, and only local paths are supported here: copy it to a disk, or "
            "mount the bucket, and give the path there"
        )


def check_output_file(path: Path) -> None:
    """Checks that a file can be written, without creating it.

    Raises:
        UserError: The path is a URL, a folder or a device, or its folder is not writable and cannot
            be created.
    """
    refuse_url(path)
    check_regular_file(path)
    _try_to_write(path, path.absolute().parent)


def check_output_folder(path: Path) -> None:
    """Checks that a folder is writable or can be created, without creating it."""
    refuse_url(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write: {path}: is a file; give the path of a folder")
    _try_to_write(path, path.absolute())


def check_regular_file(path: Path) -> None:
    """Raises `UserError` if a path exists and is not a regular file, so it must not be replaced."""
    if path.is_dir():
        raise UserError(f"cannot write: {path}: is a folder; give the path of a file")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write: {path}: is a device or a pipe; give the path of a file")


def _try_to_write(path: Path, folder: Path) -> None:
    """Writes an unnamed file in a folder, or in its nearest existing parent."""
    while not folder.exists() and folder != folder.parent:
        if folder.is_symlink():
            raise UserError(
                f"cannot write: {path}: {folder} is a dangling symbolic link; choose another path"
            )
        folder = folder.parent
    try:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise UserError(
            f"cannot write: {path}: {folder}: {error.strerror or error}; choose another path"
        ) from error


def write_and_sync(path: Path, content: bytes) -> None:
    """Writes a file in place and flushes it to disk. The caller renames it or its folder."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a small file atomically. Readers see either the old or the new content.

    The name of the temporary file is fixed for each user of a host, so that a file left by a killed
    process is reused. Processes with the same temporary file wait for each other.

    Raises:
        OSError: The file cannot be written. ``path`` is then unchanged, unless only the flush of
            its folder failed; see `sync_folder`.
    """
    data = content.encode() if isinstance(content, str) else content
    owner = f"{host_name()}-{os.geteuid()}"
    temporary = path.with_name(f".{path.name}.{owner}.partial")
    lock = FileLock.acquire(temporary, wait=True, for_writing=True)
    assert lock is not None
    try:
        if not lock.is_effective:  # other processes are not excluded, so use a unique name
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
    """Replaces a file as `write_atomically` does, creates folders, and raises `UserError`."""
    with as_user_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)


def remove_file(path: Path) -> None:
    """Removes a file if it exists."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove: {path}: {error.strerror}") from error


def check_new_folder(output: Path, *, overwrite: bool, mark: str) -> None:
    """Checks that `new_folder` can create a folder, without creating it."""
    refuse_url(output)
    _refuse_existing(output, overwrite=overwrite, mark=mark)
    check_output_folder(output.absolute().parent)


@contextmanager
def new_folder(output: Path, *, overwrite: bool, mark: str, num_bytes: int) -> Iterator[Path]:
    """Creates a temporary folder and renames it to ``output`` if the block ends without an error.

    The lock file ``.NAME.lock`` excludes other processes with the same output. Temporary folders
    that killed processes left in the parent folder are removed first.

    Args:
        output: The final path.
        overwrite: Whether an existing folder may be replaced.
        mark: Name of a file that every folder of this kind contains. Other folders are not
            replaced.
        num_bytes: Estimated number of bytes that will be written.

    Raises:
        UserError: The folder exists and may not be replaced, the disk is full or not writable, or
            another process is writing the same folder.
    """
    _refuse_existing(output, overwrite=overwrite, mark=mark)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire(_lock_path(output))
    except OSError as error:
        raise _cannot_be_written(output, error) from error
    if lock is None:
        raise UserError(
            f"{output}: another process is writing it; wait until it finishes, or choose another "
            "folder"
        )
    token = f"{host_name()}.{secrets.token_hex(4)}"
    temporary, old = (
        output.with_name(f".{output.name}.{token}.{kind}") for kind in (_PARTIAL, _OLD)
    )
    try:
        if lock.is_effective:
            _remove_leftovers(output)
            # `_remove_leftovers` may have restored the folder.
            _refuse_existing(output, overwrite=overwrite, mark=mark)
        free = shutil.disk_usage(output.parent).free
        if free < num_bytes:
            raise UserError(
                f"{output}: needs {num_bytes / 1e9:.2f} GB and "
                f"{free / 1e9:.2f} GB are free; free some space or choose another folder"
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
    return UserError(f"{output}: cannot be written ({reason}); choose another folder")


def _lock_path(output: Path) -> Path:
    return output.with_name(f".{output.name}.lock")


def _refuse_existing(output: Path, *, overwrite: bool, mark: str) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; give the path of a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: already exists; use --overwrite to replace it")
    if not (output / mark).exists():
        raise UserError(
            f"{output}: has no {mark}, so --overwrite does not replace it; choose another folder"
        )


def replace_folder(output: Path, temporary: Path, old: Path) -> None:
    """Renames a complete and flushed folder to its final name.

    An existing folder is first renamed to ``old`` and removed at the end. It is restored if the new
    one cannot be renamed, and stays under that name if the parent folder cannot be flushed.
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
        kept = f"; the replaced folder is in {old} until the next run" if old.exists() else ""
        raise UserError(f"{output}: {error.strerror}{kept}; check the disk") from error


def _remove_leftovers(output: Path) -> None:
    """Removes temporary folders that killed processes of this host left next to ``output``.

    The caller must hold the lock of ``output``. A folder that a killed process had moved to a
    temporary name is restored if its final name is free. Temporary folders of other hosts are only
    logged, because their locks may not be visible here.
    """
    foreign = []
    try:
        paths = sorted(output.parent.iterdir())
    except PermissionError:  # the folder is writable but not readable
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
            with suppress(OSError):  # the folder may belong to another user
                _clear_locked(path, path.with_name(match[1]))
    if foreign:
        logger.warning(
            "%s: %s was left or is being written by another host or an earlier version; remove "
            "it if no job is running there",
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
        logger.info("%s: restored from %s, which a killed process left behind", output, path.name)
        return
    _remove_tree(path)
    logger.info("%s: removed; a killed process had left it behind", path)


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


class StagedFile:
    """A large file that is written as a stream to ``<path>.partial``.

    Call `write` and `append_file`, then `publish_all`. Leaving the ``with`` block without
    publishing removes the file. A killed job leaves only ``.partial`` files, which the next job
    overwrites.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens and locks ``<path>.partial``, so that no other job writes the same file."""
        refuse_url(path)
        self.path = Path(path)
        check_regular_file(self.path)
        self.partial_path = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self.num_bytes = 0
        self._hash = hashlib.sha256()
        with as_user_error(self.partial_path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock.acquire(self.partial_path, for_writing=True)
        if lock is None:
            raise UserError(
                f"another job is writing: {self.partial_path}: wait until it finishes, or choose "
                "another prefix"
            )
        self._file = open(lock.descriptor, "wb", buffering=1 << 20)  # noqa: SIM115
        with as_user_error(self.partial_path):
            self._file.truncate(0)

    def write(self, data: bytes | memoryview) -> None:
        """Appends and hashes bytes."""
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
        """Appends and hashes a whole file; returns the number of its bytes.

        Each block is read while the previous one is hashed and written. Most blocks bypass the page
        cache, because copying into it takes longer than writing to disk and evicts other data.
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
        """Flushes all bytes written so far to disk."""
        with as_user_error(self.partial_path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Renames the file to its final name. Nothing may be written afterwards."""
        with as_user_error(self.path):
            os.replace(self.partial_path, self.path)
        self._file.close()

    def discard(self) -> None:
        """Removes the file, unless it has been published."""
        if not self._file.closed:
            with suppress(OSError):  # the disk may have become read-only
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
    """Yields the begins and ends of blocks of a source file.

    Begins and ends are relative to the source. The positions in the destination, which has
    ``num_before`` bytes already, are aligned except for short blocks at both ends.
    """
    begin = 0
    while begin < num_bytes:
        odd = (num_before + begin) % ALIGNMENT
        length = ALIGNMENT - odd if odd else COPY_BYTES
        end = min(begin + length, num_bytes)
        if end - begin > ALIGNMENT and end == num_bytes:
            end -= (num_before + end) % ALIGNMENT  # the rest becomes a separate block
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
            raise UserError(f"cannot read: {path}: it was truncated while it was copied")
        at += num_read
    if hasattr(os, "posix_fadvise"):  # the block is read only once, so drop it from the page cache
        os.posix_fadvise(descriptor, begin, len(block), os.POSIX_FADV_DONTNEED)
    return block


def publish_all(files: Iterable[StagedFile]) -> None:
    """Flushes all files, renames them in the given order, and flushes their folders.

    The file that makes the others visible must be last.
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
    """An unnamed temporary file on the disk of a folder, for bytes that are read back later."""

    def __init__(self, folder: Path) -> None:
        """Creates the file."""
        self._folder = folder
        with as_user_error(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)

    def write(self, data: bytes) -> None:
        """Appends bytes."""
        with as_user_error(self._folder):
            self._file.write(data)

    def blocks(self) -> Iterator[bytes]:
        """Yields all bytes from the begin of the file, in blocks of 1 MiB."""
        with as_user_error(self._folder):
            self._file.seek(0)
            while block := self._file.read(1 << 20):
                yield block

    def close(self) -> None:
        """Closes the file, which frees its space on the disk."""
        with suppress(OSError):  # buffered bytes may not fit on the disk
            self._file.close()


class DirectWriter:
    """Writes a file directly, bypassing the page cache; several threads may write at the same time.

    Writes through the page cache copy every byte once more, and the disk is idle during the copy.
    Data is written directly if its position, length and address are multiples of `ALIGNMENT`. Other
    data, and all data on file systems without direct writes, is written through the page cache.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Opens a file; ``create`` also creates it, or truncates an existing one."""
        flags = os.O_CREAT | os.O_TRUNC if create else 0
        self.descriptor = os.open(path, os.O_WRONLY | flags, 0o644)
        self._direct = _open_direct(path)
        self._is_direct = self._direct is not None

    def write(self, data: memoryview, position: int) -> None:
        """Writes bytes at a position in the file."""
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
                    # Some file systems accept O_DIRECT in `open` but not in writes.
                    self._is_direct = False
                    continue
                num_written &= -ALIGNMENT  # after a short write, continue at an aligned position
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
    """Returns a descriptor for direct writes; None if they are not supported."""
    with suppress(OSError, AttributeError):  # AttributeError: this system has no O_DIRECT
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Creates a temporary folder and removes it when the block ends.

    Folders with the same prefix that killed processes of this user and host left are removed first.
    By default, the parent is the system's temporary folder.
    """
    prefix = f"{prefix}{host_name()}."
    try:
        folder = Path(tempfile.gettempdir()) if parent is None else parent
        with suppress(OSError):  # the folder may not be readable
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
    """Creates and locks a folder. Returns the folder and the descriptor of the lock."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # removed by another process, as below
            continue
        with suppress(OSError):  # the file system may not lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_same_file(descriptor, made):
            return made, descriptor
        os.close(descriptor)  # another process removed the folder before it was locked


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
    except OSError:  # the folder is in use, or the file system does not support locks
        return
    finally:
        os.close(descriptor)
