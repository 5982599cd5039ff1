"""An output folder that appears whole or not at all.

In: the folder's final name. Out: a context that gives a folder beside it to write into, and renames
it once everything in it is on the disk.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_chatflow.checkpoint.files import fsync_path, fsync_tree
from megatron_chatflow.errors import UserError


@contextmanager
def new_folder(output: Path, *, overwrite: bool, mark: str, num_bytes: int) -> Iterator[Path]:
    """Gives a folder to write into that becomes ``output`` when the block ends without an error.

    Args:
        output: The final name.
        overwrite: Whether a folder of that name is replaced.
        mark: A file by which a folder of the kind that is written is known: no other is replaced.
        num_bytes: What will be written, about.

    Raises:
        UserError: The folder is there already, or the disk is full, or not writable.
    """
    _refuse_existing(output, overwrite=overwrite, mark=mark)
    beside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < num_bytes:
            raise UserError(
                f"{output}: needs {num_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there; "
                "free some or name another folder"
            )
        beside.mkdir()
        yield beside
        fsync_tree(beside)
        _replace(output, beside)
    except OSError as error:
        reason = "no space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(f"{output}: cannot be written ({reason}); name another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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


def _replace(output: Path, beside: Path) -> None:
    """Renames; a folder that was there goes only once the new one stands in its place."""
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    if output.exists():
        output.rename(old)
    try:
        beside.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    fsync_path(output.parent)
    shutil.rmtree(old, ignore_errors=True)
