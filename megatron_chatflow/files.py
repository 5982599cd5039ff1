"""Files and folders that appear under their final name complete, or not at all.

Everything is written beside its final name, flushed to the disk and renamed. What is being written
is locked with `flock`. The kernel releases the lock when its process ends, however it ends, so what
a killed process left is told by a lock that can be taken: process ids, which are reused and which
differ between containers, play no part. On a shared file system `flock` may be local to each
machine, so names carry the machine, and only this machine's leftovers are removed.
"""

import errno
import fcntl
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_chatflow.errors import DISK_FULL, UserError

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


def is_for_want_of_room(error: OSError) -> bool:
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
