"""Tests that every tool refuses an unwritable output before it does any work.

The inputs of these commands do not exist, but the error of each must name the output.
"""

import runpy
import sys
from pathlib import Path

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import check_output_file, check_output_folder

TOOLS = Path(__file__).parents[3] / "tools"

WITH_FILES = {
    "evaluate": ["evaluate.py", "absent", "--tasks", "mmlu", "--output"],
    "plot_run": ["plot_run.py", "absent", "--output"],
    "plot_run --follow": ["plot_run.py", "absent", "--follow", "--output"],
    "docs_pictures": ["docs_pictures.py", "report", "absent", "--output"],
    "benchmark": ["benchmark.py", "blend", "--output"],
    "record_signatures": ["record_signatures.py", "absent", "--output"],
}
WITH_FOLDERS = {
    "export": ["convert_checkpoint.py", "export", "--checkpoint", "absent", "--output"],
    "import": ["convert_checkpoint.py", "import", "--hf", "absent", "--output"],
    "merge models": ["merge_checkpoints.py", "--models", "absent", "absent", "--output"],
    "extend_vocab": ["extend_vocab.py", "--tokenizer-model", "a", "--list", "b", "--output-dir"],
    "plan_blend": ["plan_blend.py", "--config", "absent", "--output"],
    "fetch_demo_model": ["fetch_demo_model.py", "--output-dir"],
    "fetch_demo_corpus": ["fetch_demo_corpus.py", "--output-dir"],
}
BAD_PLACES = {
    "below a file": "{file}/below/out",
    "in /proc": "/proc/out",
    "on a bucket": "s3://bucket/out",
    "behind a broken link": "{link}/out",
}


def run_tool(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """Runs the tool's `main`. `run_main` would print its errors."""
    monkeypatch.setattr(sys, "argv", [str(TOOLS / command[0]), *command[1:]])
    status = runpy.run_path(str(TOOLS / command[0]), run_name="tool")["main"]()
    assert not status


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    file, link, folder = tmp_path / "file", tmp_path / "link", tmp_path / "folder"
    file.write_text("kept")
    link.symlink_to(tmp_path / "nowhere")
    folder.mkdir()
    (folder / "other").write_text("kept")
    return {"file": file, "link": link, "folder": folder}


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("place", BAD_PLACES.values(), ids=BAD_PLACES)
@pytest.mark.parametrize("tool", [*WITH_FILES, *WITH_FOLDERS])
def test_places_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    places: dict[str, Path],
    tool: str,
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    output = place.format(**places)
    with pytest.raises(UserError, match=r"cannot write|is a URL") as caught:
        run_tool(monkeypatch, [*(WITH_FILES | WITH_FOLDERS)[tool], output])
    assert Path(output).parts[-2] in str(caught.value)
    assert contents(tmp_path) == before
    assert places["file"].read_text() == "kept"


@pytest.mark.parametrize("tool", WITH_FILES)
def test_a_folder_where_a_file_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: dict[str, Path], tool: str
) -> None:
    before = contents(tmp_path)
    with pytest.raises(UserError, match="folder: is a folder; give the path of a file"):
        run_tool(monkeypatch, [*WITH_FILES[tool], str(places["folder"])])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("tool", WITH_FILES)
def test_a_device_is_never_replaced(monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    with pytest.raises(UserError, match="/dev/null: is a device"):
        run_tool(monkeypatch, [*WITH_FILES[tool], "/dev/null"])


@pytest.mark.parametrize("tool", WITH_FOLDERS)
def test_a_file_where_a_folder_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: dict[str, Path], tool: str
) -> None:
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"file: (is a file|Not a directory)"):
        run_tool(monkeypatch, [*WITH_FOLDERS[tool], str(places["file"])])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["preprocess", "merge"])
@pytest.mark.parametrize("place", ["{file}/out", "/proc/out"])
def test_datasets_are_checked_before_their_inputs_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    places: dict[str, Path],
    command: str,
    place: str,
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "bana"}\n')
    before = contents(tmp_path)
    words = ["merge_datasets.py", "--input", "absent"]
    if command == "preprocess":
        words = ["preprocess_data.py", "--input", str(tmp_path / "a.jsonl")]
        words += ["--tokenizer-model", "absent"]
    with pytest.raises(UserError, match="cannot write: "):
        run_tool(monkeypatch, [*words, "--output-prefix", place.format(**places)])
    assert contents(tmp_path) == before


def test_a_folder_in_the_place_of_a_datasets_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out_text_document.json").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "bana"}\n')
    command = ["preprocess_data.py", "--input", str(tmp_path / "a.jsonl"), "--overwrite"]
    command += ["--tokenizer-model", "absent", "--output-prefix", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"out_text_document\.json: is a folder"):
        run_tool(monkeypatch, command)


def test_a_full_disk_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(
        "megatron_chatflow.files.tempfile.TemporaryFile", lambda dir: open("/dev/full", "wb")
    )
    for check in (check_output_file, check_output_folder):
        with pytest.raises(UserError, match="No space left on device"):
            check(tmp_path / "out")


def test_what_can_be_written_passes_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for path in (tmp_path / "a" / "b" / "c.json", tmp_path / "old.json", Path("relative.json")):
        check_output_file(path)
    check_output_folder(tmp_path / "deep" / "folder")
    check_output_folder(tmp_path)
    assert contents(tmp_path) == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"
