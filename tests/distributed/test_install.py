"""Tests the package installed from its source distribution, outside of the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from made_up_text import made_up_sentences
from tiny_run import TinyRun

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOT_SOURCES = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__"
)
TRAIN_ONCE = """
import sys
import megatron_chatflow
heavy = {"torch", "megatron.core", "numpy"} & sys.modules.keys()
assert not heavy, heavy
from megatron_chatflow import load_config, train
train(load_config(sys.argv[1], ["--save", sys.argv[2]]))
"""


def run(*command: object, cwd: Path) -> str:
    """Runs a command without the checkout on its path and returns its standard output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the source distribution from a copy, so that no earlier build affects it."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "copy", ignore=NOT_SOURCES)
    call = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", call, cwd=folder / "copy")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Builds the wheel from the unpacked source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent / "unpacked")
    (source,) = (sdist.parent / "unpacked").iterdir()
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", sdist.parent]
    run(sys.executable, "-m", "pip", "wheel", source, *flags, cwd=sdist.parent)
    (wheel,) = sdist.parent.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Creates an environment with the wheel and this one's libraries.

    Returns its programs by name.
    """
    environment = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    # torch and the other dependencies come from this environment. A path in a .pth file does not
    # process the .pth files in it, such as that of an editable installation of the checkout.
    (libraries,) = environment.glob("lib/python3*/site-packages")
    (libraries / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return lambda name: environment / "bin" / name


def test_the_sdist_carries_the_sources_of_the_extensions(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {
        str(path.relative_to(ROOT))
        for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh", "*.sh")
        for path in (ROOT / "csrc").rglob(pattern)
    }
    assert len(sources) > 30
    assert sources <= names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names


def test_the_wheel_carries_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megatron_chatflow"}
    copy = wheel.parent / "copy"  # The checkout may have changed since the installation.
    modules = {str(path.relative_to(copy)) for path in (copy / "megatron_chatflow").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "megatron_chatflow/py.typed" in names
    compiled = {name.split(".")[0] for name in names if name.endswith(".so")}
    native = {"blend/_native", "tokenizer/_native", "data/_native", "kernels/_cpu"}
    assert {f"megatron_chatflow/{name}" for name in native} <= compiled
    assert not [name for name in names if "benchmark" in name or "corpus/" in name]


def test_help_starts_without_heavy_imports(program: Callable[[str], Path], tmp_path: Path) -> None:
    command = [program("python"), "-X", "importtime", program("chatflow"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "preprocess" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "megatron_chatflow.cli" in imported
    assert not imported & {"torch", "numpy", "megatron", "pydantic", "yaml"}


def test_a_corpus_becomes_a_trained_checkpoint(
    program: Callable[[str], Path], tmp_path: Path, tiny_run: TinyRun
) -> None:
    chatflow = program("chatflow")
    lines = [json.dumps({"text": text}) for text in made_up_sentences(300, 5)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copy(tiny_run.tokenizer_model, tmp_path / "tokenizer.model")
    job = ["--input", "text.jsonl", "--output-prefix", "made_up", "--append-eod", "--workers", "2"]
    shown = run(chatflow, "preprocess", *job, "--tokenizer-model", "tokenizer.model", cwd=tmp_path)
    assert shown.startswith("text: 300 documents")
    assert "checked" in run(chatflow, "inspect", "made_up_text_document", cwd=tmp_path)

    config = yaml.safe_load(tiny_run.config.read_text())
    config["tokenizer"]["tokenizer_model"] = "tokenizer.model"
    config["data"]["sources"] = {"made_up": {"paths": ["made_up_text_document"]}}
    config["data"]["schedule"] = {"knots": [{"at": 0, "weights": {"made_up": 1.0}}]}
    config["train"]["train_iters"] = 2
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    run(chatflow, "pretrain", "--config", "run.yaml", "--save", "run", cwd=tmp_path)
    by_command = metrics(tmp_path / "run")
    assert len(by_command) == 2
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    run(chatflow, "report", "run", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000

    run(program("python"), "-c", TRAIN_ONCE, "run.yaml", "again", cwd=tmp_path)
    assert metrics(tmp_path / "again") == by_command


def metrics(folder: Path) -> list[float]:
    """Returns the loss of each iteration."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record["lm_loss"] for record in map(json.loads, lines) if "lm_loss" in record]
