"""Files and folders that appear under their final name complete, or not at all.

Everything is written beside its final name, flushed to the disk and renamed. What is being written
is locked with `flock`. The kernel releases the lock when its process ends, however it ends, so what
a killed process left is told by a lock that can be taken: process ids, which are reused and which
differ between containers, play no part. On a shared file system `flock` may be local to each
machine, so names carry the machine, and only this machine's leftovers are removed.

Appends whole files to a file at the speed of the disk.

In: a file, and one that grows. Out: the bytes behind those that are there, hashed on the way.

Blocks are read ahead while the block before them is hashed and written. They are written past the
page cache where the system and the file's position allow it: copying into the cache costs more
time than the disk itself does, and pushes out what others keep there.

Files that appear under their final name only when they are complete and on disk.

In: bytes, in order. Out: a file beside its target (`<name>.partial`), then, after an fsync, the
file under its own name. A killed job leaves at most `.partial` files; the next one overwrites them.
"""

import errno
import fcntl
import functools
import hashlib
import mmap
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from megatron_chatflow.errors import DISK_FULL, UserError

BLOCK_BYTES = 1 << 23
ALIGNMENT = 1 << 12


def append_file(
    source: Path,
    target: Path,
    num_before: int,
    append: Callable[[memoryview], object],
    hash_update: Callable[[memoryview], object],
) -> int:
    """Appends a file's bytes.

    Args:
        source: What is read.
        target: What grows; nothing of it waits in a buffer of this process.
        num_before: Bytes that it has.
        append: Writes bytes behind it, to be on it when the call returns.
        hash_update: Takes every byte in order.

    Returns:
        The number of bytes.

    Raises:
        UserError: The source cannot be read, or becomes shorter meanwhile.
        OSError: The target cannot be written.
    """
    with ExitStack() as stack:
        try:
            reading = stack.enter_context(source.open("rb", buffering=0)).fileno()
        except OSError as error:
            raise UserError(f"cannot read: {source}: {error.strerror}") from error
        direct = _open_direct(target)
        if direct is not None:
            stack.callback(os.close, direct)
        pool = stack.enter_context(ThreadPoolExecutor(2))
        buffers = [memoryview(mmap.mmap(-1, BLOCK_BYTES)) for _ in range(2)]
        num_bytes = os.fstat(reading).st_size
        blocks = list(_blocks(num_before, num_bytes))

        def read(number: int) -> memoryview:
            begin, end = blocks[number]
            return _read(reading, source, begin, buffers[number % 2][: end - begin])

        ahead = pool.submit(read, 0) if blocks else None
        for number, (begin, _) in enumerate(blocks):
            assert ahead is not None
            block = ahead.result()
            ahead = pool.submit(read, number + 1) if number + 1 < len(blocks) else None
            hashing = pool.submit(hash_update, block)
            try:
                if direct is None or not _write_direct(direct, block, num_before + begin):
                    append(block)
            finally:
                hashing.result()
    return num_bytes


def _blocks(num_before: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Begin and end of blocks that, but for the first and last, are whole and aligned behind."""
    begin = 0
    while begin < num_bytes:
        odd = (num_before + begin) % ALIGNMENT
        length = ALIGNMENT - odd if odd else BLOCK_BYTES
        end = min(begin + length, num_bytes)
        if end - begin > ALIGNMENT and end == num_bytes:
            end -= (num_before + end) % ALIGNMENT  # what is left is a block of its own
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
    if hasattr(os, "posix_fadvise"):  # it is read once: make room for what is read next
        os.posix_fadvise(descriptor, begin, len(block), os.POSIX_FADV_DONTNEED)
    return block


def _open_direct(path: Path) -> int | None:
    """A descriptor that writes past the page cache; None where there is no such thing."""
    with suppress(OSError, AttributeError):  # AttributeError: a system without the flag
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    return None


def _write_direct(descriptor: int, block: memoryview, position: int) -> bool:
    """Writes an aligned block; False where it is not, or where the file system will not."""
    if position % ALIGNMENT or len(block) % ALIGNMENT or len(block) == 0:
        return False
    at = 0
    while at < len(block):
        try:
            num_written = os.pwrite(descriptor, block[at:], position + at)
        except OSError:
            if at == 0:
                return False  # the ordinary way finds out whether it is the disk
            raise
        if num_written % ALIGNMENT:
            raise OSError(5, "a write was cut short")
        at += num_written
    return True


_PROBE_BYTES = 4096
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a Path has only one of two slashes
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@functools.cache
def host_name(
    id_files: tuple[str, ...] = ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"),
) -> str:
    """A name of this machine, without dots, as temporary names carry it.

    Machines that share a file system may have one host name in common (``localhost``, containers),
    so eight digits of a hash of the machine's id follow it; where it has none, of its boot's id.
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
    """Makes the names in a folder durable, where its file system can do that for folders.

    Raises:
        OSError: The disk fails. What was renamed before has its final name all the same, which the
            error says.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to but not listed
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
    """Flushes every file below ``folder``, and every folder's entries."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(parent) / name)
        sync_folder(Path(parent))


def is_disk_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit on files is exhausted, which may pass."""
    return error.errno in DISK_FULL


class FileLock:
    """An exclusive lock on a path that ends with its process.

    Attributes:
        is_effective: False on a file system without locks, where nothing is known of others.
    """

    def __init__(self, path: Path, descriptor: int, *, is_effective: bool) -> None:
        """Takes over an open descriptor; use `acquire`."""
        self.is_effective = is_effective
        self.descriptor = descriptor
        self._path = path

    @classmethod
    def acquire(cls, path: Path, *, wait: bool = False) -> "FileLock | None":
        """Opens the file, made if it is missing, and locks it.

        Args:
            path: A file of the lock's own, or the temporary file to be written.
            wait: Whether to wait for another process to release it.

        Returns:
            The lock; None while another process holds it.

        Raises:
            OSError: The file cannot be opened.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except PermissionError as error:
                try:  # another user's, which can be locked all the same
                    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                except FileNotFoundError:  # there is none, and none may be made
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
    """Refuses ``s3://bucket/name`` and the like where a file's path belongs.

    Raises:
        UserError: It is a URL.
    """
    if _URL.match(str(path)):
        raise UserError(
            f"{path}: is a URL, and files are read from and written to disks alone: copy it to a "
            "disk, or mount the bucket, and give the path there"
        )


def check_output_file(path: Path) -> None:
    """Checks, before any work, that a file can be written; leaves nothing behind.

    Raises:
        UserError: It is a folder or a device, or its folder cannot be made or written.
    """
    refuse_url(path)
    refuse_other_than_file(path)
    _try_to_write(path, path.absolute().parent)


def check_output_folder(path: Path) -> None:
    """As `check_output_file`, for a folder, which may be there already.

    Raises:
        UserError: It is a file, or cannot be made or written.
    """
    refuse_url(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot write: {path}: is a file; name a folder")
    _try_to_write(path, path.absolute())


def refuse_other_than_file(path: Path) -> None:
    """Refuses a name that a file could not get by renaming, or only in place of a device.

    Raises:
        UserError: It is a folder, a device or the like.
    """
    if path.is_dir():
        raise UserError(f"cannot write: {path}: is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write: {path}: is a device or a pipe; name a file")


def _try_to_write(path: Path, folder: Path) -> None:
    """Writes into a file without a name in a folder, or in the one in which it would be made."""
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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a small file: a reader sees the old content or the new, never a part.

    What is written beside it has a fixed name for each user of a host, so that the next process
    reuses what a killed one left. Two processes that have the name in common take turns.

    Raises:
        OSError: It cannot be written; `path` is then as it was, unless only the sync of its folder
            failed, as `sync_folder` says.
    """
    data = content.encode() if isinstance(content, str) else content
    owner = f"{host_name()}-{os.geteuid()}"
    beside = path.with_name(f".{path.name}.{owner}.partial")
    lock = FileLock.acquire(beside, wait=True)
    assert lock is not None
    try:
        if not lock.is_effective:  # nothing keeps others out: take a file of our own
            lock.release()
            beside = path.with_name(f".{path.name}.{owner}.{os.getpid()}.partial")
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            lock = FileLock(beside, descriptor, is_effective=False)
        with open(lock.descriptor, "wb", closefd=False) as file:
            file.truncate(0)
            file.write(data)
            file.flush()
            os.fsync(lock.descriptor)
        os.replace(beside, path)
    except BaseException:
        lock.release()
        raise
    lock.release(remove=False)
    sync_folder(path.parent)


def write_output_file(path: Path, content: str | bytes) -> None:
    """As `write_atomically`, for a file that the user named; missing folders are made.

    Raises:
        UserError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write: {path}: {error.strerror or error}") from error


@contextmanager
def scratch_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder for the time of the block.

    Folders of the same prefix that killed processes of this user and host left are removed first.

    Args:
        prefix: Begins its name.
        parent: Where it lies; the system's folder for temporary files if None.

    Raises:
        UserError: It cannot be made.
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
    """Makes a folder and locks it; returns it and the descriptor that holds the lock."""
    while True:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # as below
            continue
        with suppress(OSError):  # there may be no locks on folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_same_file(descriptor, made):
            return made, descriptor
        os.close(descriptor)  # before it was locked, another process took it for left behind


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


PARTIAL_SUFFIX = ".partial"
LARGE_BYTES = 1 << 22  # from here on a thread of its own hashes while the bytes are being written


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write a file into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write: {path}: {error.strerror or error}") from error


def remove_file(path: Path) -> None:
    """Removes a file, if it is there.

    Raises:
        UserError: It cannot be removed, as on a read-only disk.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove: {path}: {error.strerror}") from error


class StagedFile:
    """A file being written beside its final name.

    Use `write`, then `seal` (fsync), then `publish`; leaving the ``with`` block before `publish`
    removes what was written.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens `<path>.partial`, and locks it against a second job that writes the same file.

        Args:
            path: The final name; missing folders are made.

        Raises:
            UserError: The file cannot be made there, or another process is writing it.
        """
        refuse_url(path)
        self.path = Path(path)
        refuse_other_than_file(self.path)
        self.partial_path = self.path.with_name(self.path.name + PARTIAL_SUFFIX)
        self.num_bytes = 0
        self._hash = hashlib.sha256()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.partial_path, "ab", buffering=1 << 20)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write: {self.partial_path}: {error.strerror}") from error
        self._lock()
        with as_user_error(self.partial_path):
            self._file.truncate(0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True  # a file system without locks: two jobs on one prefix are not noticed
        else:
            # Between our open and our lock, the other job may have published this very file.
            mine = self.partial_path.exists() and os.path.samestat(
                os.fstat(self._file.fileno()), self.partial_path.stat()
            )
        if not mine:
            self._file.close()
            raise UserError(
                f"another job is writing: {self.partial_path}: wait for it or choose another prefix"
            )

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes, and takes them into the hash.

        Raises:
            UserError: They cannot be written, as when the disk is full.
        """
        if len(data) < LARGE_BYTES:
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
        """Appends a whole file, and takes it into the hash.

        Returns:
            The number of its bytes.

        Raises:
            UserError: It cannot be read, or these bytes cannot be written.
        """
        with as_user_error(self.partial_path):
            self._file.flush()
            num_bytes = append_file(
                source, self.partial_path, self.num_bytes, self._append, self._hash.update
            )
        self.num_bytes += num_bytes
        return num_bytes

    def _append(self, data: memoryview) -> None:
        self._file.write(data)
        self._file.flush()

    @property
    def sha256(self) -> str:
        """The hash, in hex, of everything written so far."""
        return self._hash.hexdigest()

    def seal(self) -> None:
        """Brings every byte written so far to the disk."""
        with as_user_error(self.partial_path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Gives the file its final name; nothing may be written after it.

        Raises:
            UserError: The name cannot be given, as when a folder has it.
        """
        with as_user_error(self.path):
            os.replace(self.partial_path, self.path)
        self._file.close()

    def discard(self) -> None:
        """Removes the file, unless it has been published."""
        if not self._file.closed:
            with suppress(OSError):  # a disk that has become read-only keeps the file
                self.partial_path.unlink(missing_ok=True)
            with suppress(OSError):  # what is still buffered may not fit on the disk
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
        """Discards what has not been published."""
        self.discard()


class Spool:
    """Bytes that wait on the disk, in a file without a name, until they are read once more."""

    def __init__(self, folder: Path) -> None:
        """Opens the file.

        Args:
            folder: On whose disk it lies.
        """
        self._folder = folder
        with as_user_error(folder):
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)

    def write(self, data: bytes) -> None:
        """Appends bytes.

        Raises:
            UserError: They cannot be written, as when the disk is full.
        """
        with as_user_error(self._folder):
            self._file.write(data)

    def blocks(self) -> Iterator[bytes]:
        """Everything from the beginning, a mebibyte at a time."""
        with as_user_error(self._folder):
            self._file.seek(0)
            while block := self._file.read(1 << 20):
                yield block

    def close(self) -> None:
        """Gives the space back."""
        with suppress(OSError):  # what is still buffered may not fit on the disk
            self._file.close()


def publish_all(files: Iterable[StagedFile]) -> None:
    """Seals every file, renames them in the given order, and makes the names durable.

    Args:
        files: In the order in which the names may appear: what others are found by goes last.

    Raises:
        UserError: A file cannot be written or renamed; or all of them have their names, but the
            disk fails to make the names durable.
    """
    files = list(files)
    for file in files:
        file.seal()
    for file in files:
        file.publish()
    for folder in dict.fromkeys(file.path.parent for file in files):
        try:
            _sync_folder(folder)
        except OSError as error:
            first = next(file.path for file in files if file.path.parent == folder)
            raise UserError(
                f"cannot sync the folder of {first}: {folder}: {error.strerror}: the files are "
                "complete under their names, which a crash of the machine may undo: check the "
                "disk, then run this again"
            ) from error


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where its file system can do that for folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
