"""Tests that parallel text in any form gives the same bytes at every number of workers."""

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
from parallel_files import PAIRS, aligned_text, tmx, unit, write_opus_archive

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
FILTERS = ["--pair-numbers", "same", "--pair-dedup", "either", "--pair-direction", "both"]


def write(folder: Path) -> dict[str, list[str]]:
    """Writes the same pairs in several forms; returns the inputs of each."""
    pairs = [*PAIRS, *PAIRS[:20], ("bana 11", "\u53e5 12")] * 40
    (folder / "a.en").write_bytes(aligned_text(pairs, 0))
    (folder / "a.zh").write_bytes(aligned_text(pairs, 1))
    write_opus_archive(folder / "en-zh.txt.zip", pairs)
    (folder / "a.tmx").write_text(tmx([unit(en=en, zh=zh) for en, zh in pairs]), encoding="utf-8")
    rows = io.StringIO()
    csv.writer(rows).writerows([("en", "zh"), *pairs])
    (folder / "a.csv").write_text(rows.getvalue(), encoding="utf-8", newline="")
    (folder / "a.txt").write_text("".join(f"{en} ||| {zh}\n" for en, zh in pairs), "utf-8")
    names = (["a.en", "a.zh"], ["en-zh.txt.zip"], ["a.tmx"], ["a.csv"], ["a.txt"])
    return {form[0]: [str(folder / name) for name in form] for form in names}


@pytest.mark.slow
def test_every_form_and_number_of_workers(tmp_path: Path, tiny_sentencepiece_model: Path) -> None:
    outputs = set()
    for form, inputs in write(tmp_path).items():
        for num_workers in (1, 3):
            prefix = tmp_path / "out"
            command = [sys.executable, str(TOOL), "--format", "pairs", "--input", *inputs, *FILTERS]
            command += [
                "--output-prefix",
                str(prefix),
                "--overwrite",
                "--workers",
                str(num_workers),
            ]
            command += ["--tokenizer-model", str(tiny_sentencepiece_model)]
            command += ["--max-dropped-share", "1"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{form}: {done.stderr}"
            assert "'duplicate': " in done.stdout and "'different_numbers': 40" in done.stdout
            names = ("document.bin", "document.idx", "loss_mask.bin", "loss_mask.idx")
            outputs.add(tuple((tmp_path / f"out_text_{name}").read_bytes() for name in names))
    assert len(outputs) == 1


def test_sides_of_different_length_leave_nothing(
    tmp_path: Path, tiny_sentencepiece_model: Path
) -> None:
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.zh").write_text("one line\n")
    command = [sys.executable, str(TOOL), "--format", "pairs", "--workers", "1"]
    command += ["--input", str(tmp_path / "a.en"), str(tmp_path / "a.zh")]
    command += ["--output-prefix", str(tmp_path / "out")]
    command += ["--tokenizer-model", str(tiny_sentencepiece_model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: not aligned by line: a.en has 2 lines, a.zh has 1 lines")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.en", "a.zh"]
