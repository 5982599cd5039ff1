"""Reads files in zip archives, such as those that OPUS publishes, without unpacking them."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO

from megatron_chatflow.errors import UserError

_ENCRYPTED = 0x1  # flag of a member


def members_of(archive: IO[bytes], name: str) -> list[zipfile.ZipInfo]:
    """Returns the visible files of a zip archive, sorted by name.

    Raises:
        UserError: The archive is damaged, or a file in it is encrypted.
    """
    with _open(archive, name) as content:
        members = [
            info
            for info in content.infolist()
            if not info.is_dir()
            and not any(
                part.startswith(".") or part == "__MACOSX"
                for part in PurePosixPath(info.filename).parts
            )
        ]
    for info in members:
        if info.flag_bits & _ENCRYPTED:
            raise UserError(f"cannot read: {name}: {info.filename} is encrypted: decrypt it first")
    return sorted(members, key=lambda info: info.filename)


@contextmanager
def open_member(archive: IO[bytes], member: str, name: str) -> Iterator[IO[bytes]]:
    """Opens a file of a zip archive.

    Raises:
        UserError: The archive is damaged or uses an unknown compression.
    """
    with _open(archive, name) as content:
        try:
            stream = content.open(member)
        except (KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise UserError(f"cannot read: {name}: {error}: unpack it first") from error
        with stream:
            yield stream


def _open(archive: IO[bytes], name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"cannot read: {name}: not a complete zip archive ({error}): download it again"
        ) from error
