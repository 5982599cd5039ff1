"""Reads members of package archives by name, as data: nothing is unpacked to disk.

In: a wheel or zip (a path or its bytes) or a `.tar.gz`. Out: (name, bytes) of the members asked
for, in the order of their names. Names that point outside the archive, members or archives that
swell beyond their limits, and anything but plain files are refused or skipped; sizes are counted
while reading, so a header that lies does not help.
"""

import bz2
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from megatron_chatflow.errors import UserError

MAX_MEMBER_BYTES = 64 << 20
MAX_TOTAL_BYTES = 1 << 30
_MAX_MEMBERS = 200_000
_CHUNK_BYTES = 1 << 20


def read_members(
    archive: Path | bytes,
    wanted: Callable[[str], bool],
    *,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    max_total_bytes: int = MAX_TOTAL_BYTES,
) -> Iterator[tuple[str, bytes]]:
    """Yields the members whose names are wanted, sorted by name.

    Args:
        archive: Path of a zip, wheel or gzipped tar, or the bytes of a zip.
        wanted: Told a member's name; for a tar, the name below its one top folder.
        max_member_bytes: Limit for one member.
        max_total_bytes: Limit for all of them together.

    Yields:
        Name (below the top folder for a tar) and content.

    Raises:
        UserError: The archive is damaged, has unsafe names, or exceeds a limit.
    """
    label = archive.name if isinstance(archive, Path) else "an archive within an archive"
    budget = _Budget(label, max_member_bytes, max_total_bytes)
    try:
        if isinstance(archive, Path) and archive.name.endswith((".tar.gz", ".tgz")):
            yield from _read_tar(archive, wanted, budget)
        else:
            source = archive if isinstance(archive, Path) else io.BytesIO(archive)
            yield from _read_zip(source, wanted, budget)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(
            f"{label}: cannot be read as an archive ({error}): remove it, then fetch it again"
        ) from error


def read_member(
    archive: Path | bytes, name: str, *, max_member_bytes: int = MAX_MEMBER_BYTES
) -> bytes:
    """Returns one member's content.

    Raises:
        UserError: It is not in the archive, or `read_members` refuses.
    """
    limit = max_member_bytes
    for _, content in read_members(archive, lambda member: member == name, max_member_bytes=limit):
        return content
    label = archive.name if isinstance(archive, Path) else "an archive within an archive"
    raise UserError(f"{label}: has no member {name}: is it the pinned file?")


def decompress_bz2(data: bytes, max_num_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Returns unpacked bzip2 data.

    Raises:
        UserError: It is damaged or unpacks to more than the limit.
    """
    unpacker = bz2.BZ2Decompressor()
    try:
        content = unpacker.decompress(data, max_num_bytes + 1)
    except (OSError, EOFError) as error:
        raise UserError(f"bzip2 data: damaged ({error}): fetch the archive again") from error
    if len(content) > max_num_bytes:
        raise UserError("bzip2 data: unpacks to more than expected: do not use this file")
    return content


class _Budget:
    """Counts what is read against the limits."""

    def __init__(self, label: str, max_member_bytes: int, max_total_bytes: int) -> None:
        self._label = label
        self._max_member_bytes = max_member_bytes
        self._left = max_total_bytes
        self._num_members = 0

    def admit(self, name: str) -> None:
        """Checks a member's name; counts members."""
        self._num_members += 1
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{self._label}: member {name!r} points outside the archive: do not use this file"
            )
        if self._num_members > _MAX_MEMBERS:
            raise UserError(
                f"{self._label}: more than {_MAX_MEMBERS} members: do not use this file"
            )

    def read(self, name: str, stream: IO[bytes]) -> bytes:
        """Reads a member to its end or to the limit."""
        chunks: list[bytes] = []
        num_bytes = 0
        while chunk := stream.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            self._left -= len(chunk)
            if num_bytes > self._max_member_bytes or self._left < 0:
                raise UserError(
                    f"{self._label}: member {name!r} unpacks to more than expected: "
                    "do not use this file"
                )
            chunks.append(chunk)
        return b"".join(chunks)


def _read_zip(
    source: Path | IO[bytes], wanted: Callable[[str], bool], budget: _Budget
) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(source) as archive:
        infos = []
        for info in archive.infolist():
            budget.admit(info.filename)
            if not info.is_dir() and wanted(info.filename):
                infos.append(info)
        for info in sorted(infos, key=lambda item: item.filename):
            with archive.open(info) as stream:
                yield info.filename, budget.read(info.filename, stream)


def _read_tar(
    path: Path, wanted: Callable[[str], bool], budget: _Budget
) -> Iterator[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    num_bytes = 0
    with tarfile.open(path, "r|gz") as archive:
        for info in archive:
            budget.admit(info.name)
            num_bytes += info.size
            if num_bytes > MAX_TOTAL_BYTES:  # unwanted members are unpacked too, to get past them
                raise UserError(f"{path.name}: unpacks to more than expected: do not use this file")
            name = info.name.partition("/")[2]
            if not info.isreg() or not wanted(name):
                continue
            if stream := archive.extractfile(info):
                found.append((name, budget.read(name, stream)))
    yield from sorted(found)
