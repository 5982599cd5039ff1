"""Tests that the current code continues and exports a run written by version 0.1.0.

`tests/fixtures/version_0_1/README.md` describes the run and how it was made.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import jobs
import pytest

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "version_0_1"


@pytest.mark.distributed
@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
def test_a_run_of_version_0_1_continues(tmp_path: Path, layers: str) -> None:
    folder = tmp_path / "version_0_1"
    shutil.copytree(FIXTURE, folder)
    # The paths in the run's configuration are relative to its folder.
    paths = [str(jobs.STANDIN)] if layers == "transformer_engine" else []
    paths += [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = {"PYTHONPATH": os.pathsep.join(paths)}
    command = jobs.pretrain("--config", "run.yaml", "--save", "run", "--load", "run")
    command += ["--transformer-impl", layers]
    output = jobs.run(command, folder=folder, extra_environment=path, fresh=True)
    is_theirs = "layers: transformer-engine 2.9.0" in output
    assert is_theirs == (layers == "transformer_engine")
    # The two findings concern chats longer than a sample, not the files.
    warnings = [line for line in output.splitlines() if " WARNING " in line]
    assert len(warnings) == 1 and warnings[0].endswith(" WARNING 2 findings:"), warnings
    lines = (FIXTURE / "iterations_3_and_4.jsonl").read_text(encoding="utf-8").splitlines()
    expected = [entry for entry in map(json.loads, lines) if "lm_loss" in entry]
    iterations, _ = jobs.read_metrics(folder / "run")
    assert [entry["iteration"] for entry in iterations] == [1, 2, 3, 4]
    assert len(expected) == 2
    for found, old in zip(iterations[2:], expected, strict=True):
        assert found["batch_digest"] == old["batch_digest"]
        assert found["learning_rate"] == old["learning_rate"]
        # Other CPUs and library versions split fp32 sums differently.
        assert found["lm_loss"] == pytest.approx(old["lm_loss"], abs=1e-4)
        assert found["grad_norm"] == pytest.approx(old["grad_norm"], rel=1e-3)

    export = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", "export"]
    checkpoint = ["--checkpoint", "run", "--output", "huggingface"]
    tokenizer = ["--tokenizer-model", "tokenizer.model"]
    jobs.run([*export, *checkpoint, *tokenizer], folder=folder, extra_environment=path, fresh=True)
    assert (folder / "huggingface" / "model.safetensors").stat().st_size > 0
