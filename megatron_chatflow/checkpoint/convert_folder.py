"""An output folder that appears complete or not at all.

It is written beside its final name, flushed to the disk and renamed. ``.NAME.lock`` keeps a second
process of the same output out. What a killed process left is removed by the next one that writes
into the same parent folder: half a model takes up room.
"""

import errno
import logging
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    FileLock,
    check_output_folder,
    host_name,
    refuse_url,
    sync_folder,
    sync_tree,
)

logger = logging.getLogger(__name__)

_PARTIAL, _OLD = "partial", "old"
_LEFTOVER = re.compile(rf"\.(.+)\.([\w-]+)\.([0-9a-f]{{8}})\.({_PARTIAL}|{_OLD})")
_EARLIER_LEFTOVER = re.compile(rf"\.(.+)\.\d+\.({_PARTIAL}|{_OLD})")  # named by process id


def check_new_folder(output: Path, *, overwrite: bool, mark: str) -> None:
    """Refuses, before any work, what `new_folder` would refuse; leaves nothing behind.

    Args:
        output: The final name.
        overwrite: Whether a folder of that name is replaced.
        mark: A file by which a folder of the kind that is written is known.

    Raises:
        UserError: The folder is there already, or cannot be written.
    """
    refuse_url(output)
    _refuse_existing(output, overwrite=overwrite, mark=mark)
    check_output_folder(output.absolute().parent)


@contextmanager
def new_folder(output: Path, *, overwrite: bool, mark: str, num_bytes: int) -> Iterator[Path]:
    """Gives a folder to write into that becomes ``output`` when the block ends without an error.

    Args:
        output: The final name.
        overwrite: Whether a folder of that name is replaced.
        mark: A file by which a folder of the kind that is written is known: no other is replaced.
        num_bytes: What will be written, about.

    Raises:
        UserError: The folder is there already, or the disk is full, or not writable, or another
            process is writing the same folder.
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
    beside, old = (output.with_name(f".{output.name}.{token}.{kind}") for kind in (_PARTIAL, _OLD))
    try:
        if lock.is_effective:
            _remove_leftovers(output)
            _refuse_existing(output, overwrite=overwrite, mark=mark)  # one may have been restored
        free = shutil.disk_usage(output.parent).free
        if free < num_bytes:
            raise UserError(
                f"{output}: needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
                "free some or name another folder"
            )
        beside.mkdir()
        yield beside
        sync_tree(beside)
        _replace(output, beside, old)
    except OSError as error:
        raise _cannot_be_written(output, error) from error
    finally:
        _remove_tree(beside)
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


def _replace(output: Path, beside: Path, old: Path) -> None:
    """Renames; a folder that was there goes only once the new one stands in its place."""
    try:
        if output.exists():
            output.rename(old)
        beside.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    try:
        sync_folder(output.parent)
    except OSError as error:
        kept = f"; what it replaced is in {old} until the next run" if old.exists() else ""
        raise UserError(f"{output}: {error.strerror}{kept}; check the disk") from error
    _remove_tree(old)


def _remove_leftovers(output: Path) -> None:
    """Removes what killed processes of this host left beside ``output``, which is locked.

    A folder that was to be replaced by one that never came gets its name back. Leftovers of other
    hosts, whose locks may not be seen here, are only reported.
    """
    foreign = []
    try:
        paths = sorted(output.parent.iterdir())
    except PermissionError:  # a folder that may be written to but not listed
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
            with suppress(OSError):  # another user's
                _clear_locked(path, path.with_name(match[1]))
    if foreign:
        logger.warning(
            "%s: %s: left, or being written, by another host or an earlier version; remove it if "
            "nothing runs there",
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
    logger.info("%s: removed, a killed process left it", path)


def _remove_tree(path: Path) -> None:
    if path.is_symlink():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
