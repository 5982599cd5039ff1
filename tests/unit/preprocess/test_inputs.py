"""Tests finding inputs: no file is silently omitted, and none is read twice."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from preprocess_jobs import write_lines

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.readers import InputFile, find_inputs

LINE = b'{"text": "a"}\n'
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files of one line each."""
    return partial(write_lines, tmp_path)


def names(*inputs: Path | str) -> list[str]:
    return [file.name for file in find_inputs([str(name) for name in inputs])]


def test_what_is_left_out_of_a_folder_is_counted(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write(
        "a.jsonl", "b.jsonl.zstd", "c.JSONL.GZIP", "sub/d.txt", "README.txt", "sub/LICENSE-MIT.txt"
    )
    write("sub/readme_zh.txt", "x.py", "y.py", "z.md", "part-00000", ".git/x.txt", ".hidden.txt")
    write("out_text_document.json", "out_text_document.idx", "dataset_info.json", "sha256sums.txt")
    assert names(tmp_path) == ["a.jsonl", "b.jsonl.zstd", "c.JSONL.GZIP", "sub/d.txt"]
    (message,) = caplog.messages
    assert message == (
        f"ignored in {tmp_path}: 2 .py, 2 hidden, 1 .idx, 1 .md, 1 LICENSE-MIT.txt, 1 README.txt, "
        "1 dataset_info.json, 1 out_text_document.json, 1 readme_zh.txt, 1 sha256sums.txt, "
        "1 without an extension"
    )


def test_text_that_is_named_like_documentation_is_read_when_named(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("README.txt", "readmission.txt", "license_plates.txt", "a.txt")
    assert names(tmp_path / "README.txt") == ["README.txt"]
    assert not caplog.messages
    assert names(tmp_path) == ["a.txt", "license_plates.txt", "readmission.txt"]
    caplog.clear()
    assert names(tmp_path / "*.txt") == ["a.txt", "license_plates.txt", "readmission.txt"]
    assert caplog.messages == [f"ignored in {tmp_path}/*.txt: 1 README.txt"]


@pytest.mark.parametrize(
    "name",
    ["b.jsonl.lzma", "b.jsonl.br", "b.avro", "b.xml.gz", "part-0000.gz", "b.tar.gz", "b.orc"],
)
def test_data_that_cannot_be_read_is_an_error(tmp_path: Path, write: Write, name: str) -> None:
    write("a.jsonl", f"sub/{name}", f"sub/c{name}")
    ending = "".join(Path(name).suffixes[-2:])
    with pytest.raises(UserError, match=f"2 files in {tmp_path}: 2 {ending} .*sub/{name}"):
        find_inputs([str(tmp_path)])
    assert names(tmp_path / "**" / "*.jsonl") == ["a.jsonl"]


def test_links_are_followed_once_and_cycles_end(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("elsewhere/x.jsonl", "elsewhere/deep/y.jsonl", "in/b/z.jsonl", "blobs/0123")
    (tmp_path / "in" / "a").symlink_to(tmp_path / "in" / "b")  # another name of a folder
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "b" / "itself").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "0.jsonl").symlink_to(tmp_path / "in" / "b" / "z.jsonl")
    (tmp_path / "in" / "w.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    assert names(tmp_path / "in") == [
        "b/z.jsonl",
        "link/deep/y.jsonl",
        "link/x.jsonl",
        "w.jsonl",
    ]
    assert caplog.messages == [
        f"ignored in {tmp_path}/in: 3 other links to the same folders, 1 links to a folder above, "
        "1 other links to the same files"
    ]


def test_a_link_into_a_store_of_files_without_endings(tmp_path: Path, write: Write) -> None:
    """The layout of the Hugging Face hub's cache."""
    write("blobs/0123")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "a.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    assert names(tmp_path) == ["snapshots/a.jsonl"]


def test_a_link_to_nowhere_is_an_error(tmp_path: Path, write: Write) -> None:
    write("a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "absent")
    for pattern in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=r"b.jsonl: the link is broken"):
            find_inputs([str(pattern)])


def test_folders_that_a_glob_matches_are_counted(
    tmp_path: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("a.jsonl", "sub/b.jsonl")
    assert names(tmp_path / "*") == ["a.jsonl"]
    assert caplog.messages == [f"ignored in {tmp_path}/*: 1 folders"]
    caplog.clear()
    assert names(tmp_path / "**" / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert not caplog.messages


def test_an_input_given_twice_is_an_error(tmp_path: Path, write: Write) -> None:
    write("a.jsonl", "b.jsonl")
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "a.jsonl")
    for inputs in (["a.jsonl", "a.jsonl"], ["*.jsonl", "./a.jsonl"], ["", "b.jsonl"]):
        with pytest.raises(UserError, match="input given twice: .*list it once"):
            find_inputs([str(tmp_path / name) for name in inputs])
    with pytest.raises(UserError, match="input given twice: <stdin> and <stdin>"):
        find_inputs(["-", "/dev/stdin"])
    assert names(tmp_path / "*.jsonl") == ["a.jsonl", "b.jsonl"]


def test_addresses_that_no_store_serves() -> None:
    with pytest.raises(UserError, match="ftp://a.b/c.jsonl: ftp:// is not supported; use one of"):
        find_inputs(["ftp://a.b/c.jsonl"])


@pytest.mark.parametrize("name", ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_names_of_standard_input(name: str) -> None:
    assert find_inputs([name]) == [InputFile(None, "<stdin>", "lines", 0)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(tmp_path: Path, write: Write) -> None:
    write("a.jsonl", "sub/b.jsonl")
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(UserError, match=r"cannot read: .*a.jsonl: permission denied"):
        find_inputs([str(tmp_path)])
    (tmp_path / "sub").chmod(0)
    with pytest.raises(UserError, match=r"cannot read: .*sub: Permission denied"):
        find_inputs([str(tmp_path)])
    (tmp_path / "sub").chmod(0o700)
