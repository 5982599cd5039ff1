"""Tests that members of archives are read by name, without unpacking the archive."""

import io
import zipfile

import pytest

from examples.corpus.archive import read_member, read_members
from megatron_chatflow.errors import UserError

MEMBERS = {"docs/b.txt": "second", "docs/a.txt": "first", "code.py": "raise SystemExit"}


@pytest.mark.parametrize("name", ["prose-1.0.tar.gz", "prose-1.0-py3-none-any.whl"])
def test_reads_wanted_members_in_the_order_of_names(write_archive, tmp_path, name):
    path = write_archive(tmp_path / name, MEMBERS)
    found = list(read_members(path, "docs/.*"))
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
