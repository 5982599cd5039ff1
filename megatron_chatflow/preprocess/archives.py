"""Reads files in zip archives, such as those that OPUS publishes, without unpacking them."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import IO

from megatron_chatflow.errors import UserError

_ENCRYPTED = 0x1  # flag of a member
# zipfile limits the output of a read for these methods only. A few bytes in others can expand to
# any amount of memory.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def members_of(archive: IO[bytes], name: str) -> tuple[list[zipfile.ZipInfo], int]:
    """Returns the visible files of a zip archive, sorted by name, and the number of hidden ones.

    Raises:
        UserError: The archive is damaged, or a visible file in it is encrypted or compressed by
            another method than deflate.
    """
    with _open(archive, name) as content:
        files = [info for info in content.infolist() if not info.is_dir()]
    members = [
        info
        for info in files
        if not any(
            part.startswith(".") or part == "__MACOSX"
            for part in PurePosixPath(info.filename).parts
        )
    ]
    for info in members:
        if info.flag_bits & _ENCRYPTED:
            raise UserError(f"cannot read: {name}: {info.filename} is encrypted: decrypt it first")
        if info.compress_type not in _METHODS:
            raise UserError(
                f"cannot read: {name}: {info.filename} is not compressed by deflate: unpack the "
                "archive first"
            )
    return sorted(members, key=lambda info: info.filename), len(files) - len(members)


class OpenArchives:
    """Keeps an archive open until a file of another one is read.

    The directory of an archive is read when it is opened. Files that are read at the same time, as
    the sides of aligned text, have a stream each, so that reads ahead of a remote stream are used.
    """

    def __init__(self) -> None:
        self._path: object = None
        self._unused: list[tuple[IO[bytes], zipfile.ZipFile]] = []

    @contextmanager
    def open_member(
        self, path: object, open_archive: Callable[[], IO[bytes]], member: str, name: str
    ) -> Iterator[IO[bytes]]:
        """Opens a file of the zip archive at ``path``, which ``open_archive`` opens.

        Raises:
            UserError: The archive is damaged.
        """
        if path != self._path:
            self.close()
            self._path = path
        if self._unused:
            stream, archive = self._unused.pop()
        else:
            stream = open_archive()
            try:
                archive = _open(stream, name)
            except BaseException:
                stream.close()
                raise
        try:
            try:
                content = archive.open(member)
            except (KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
                raise UserError(f"cannot read: {name}: {error}: unpack it first") from error
            with content:
                yield content
        finally:
            self._unused.append((stream, archive))
            if path != self._path:
                self.close()

    def close(self) -> None:
        """Closes the archives that are not in use."""
        for stream, archive in self._unused:
            archive.close()
            stream.close()
        self._path, self._unused = None, []


def _open(archive: IO[bytes], name: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"cannot read: {name}: not a complete zip archive ({error}): download it again"
        ) from error
