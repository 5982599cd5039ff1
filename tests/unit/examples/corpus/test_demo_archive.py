"""Archives are read as data: members by name, nothing outside, nothing that swells."""

import bz2
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from examples.corpus.archive import decompress_bz2, read_member, read_members
from megatron_chatflow.errors import UserError

MEMBERS = {"docs/b.txt": "second", "docs/a.txt": "first", "code.py": "raise SystemExit"}


@pytest.mark.parametrize("name", ["prose-1.0.tar.gz", "prose-1.0-py3-none-any.whl"])
def test_reads_wanted_members_in_the_order_of_names(write_archive, tmp_path, name):
    path = write_archive(tmp_path / name, MEMBERS)
    found = list(read_members(path, lambda member: member.startswith("docs/")))
    assert found == [("docs/a.txt", b"first"), ("docs/b.txt", b"second")]
    assert read_member(path, "docs/b.txt") == b"second"
    with pytest.raises(UserError, match=r"no member docs/c\.txt"):
        read_member(path, "docs/c.txt")


def test_reads_a_zip_within_a_zip(write_archive, tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("words.txt", "word")
    path = write_archive(tmp_path / "p.whl", {"dictionary.zip": inner.getvalue()})
    assert read_member(read_member(path, "dictionary.zip"), "words.txt") == b"word"


@pytest.mark.parametrize("evil", ["../outside.txt", "/etc/outside.txt", "docs/../../outside.txt"])
@pytest.mark.parametrize("kind", ["tar.gz", "whl"])
def test_names_that_point_outside_are_refused(tmp_path: Path, evil, kind):
    path = tmp_path / f"prose-1.0.{kind}"
    if kind == "whl":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(evil, "text")
    else:
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo(evil)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"text"))
    with pytest.raises(UserError, match="points outside"):
        list(read_members(path, lambda name: True))
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_links_in_a_tar_are_not_followed(tmp_path):
    path = tmp_path / "prose-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"prose-1.0/link-{kind.decode()}")
            info.type = kind
            info.linkname = "/etc/passwd"
            archive.addfile(info)
    assert list(read_members(path, lambda name: True)) == []


@pytest.mark.parametrize("name", ["prose-1.0.tar.gz", "prose-1.0.whl"])
def test_swelling_members_are_refused(write_archive, tmp_path, name):
    path = write_archive(tmp_path / name, {"a.txt": bytes(60_000), "b.txt": bytes(60_000)})
    assert len(list(read_members(path, lambda _: True, max_member_bytes=60_000))) == 2
    with pytest.raises(UserError, match="more than expected"):
        list(read_members(path, lambda _: True, max_member_bytes=50_000))
    with pytest.raises(UserError, match="more than expected"):
        list(read_members(path, lambda _: True, max_total_bytes=100_000))


def test_lying_header_does_not_help(write_archive, tmp_path):
    path = write_archive(tmp_path / "p.whl", {"a.txt": bytes(60_000)})
    content = path.read_bytes()
    size = (60_000).to_bytes(4, "little")
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, (10).to_bytes(4, "little")))
    with pytest.raises(UserError):
        list(read_members(path, lambda _: True, max_member_bytes=1000))


@pytest.mark.parametrize("name", ["prose-1.0.tar.gz", "prose-1.0.whl"])
def test_damaged_archives_are_named(write_archive, tmp_path, name):
    path = write_archive(tmp_path / name, {"a.txt": "text " * 1000})
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        list(read_members(path, lambda _: True))


def test_bz2_is_limited():
    data = bz2.compress(bytes(10_000))
    assert decompress_bz2(data, 10_000) == bytes(10_000)
    with pytest.raises(UserError, match="more than expected"):
        decompress_bz2(data, 9_999)
    with pytest.raises(UserError, match="damaged"):
        decompress_bz2(b"not bzip2")
