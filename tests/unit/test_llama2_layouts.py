"""Tests that every layout of the LLaMA-2 page passes its dry run and fits on 80 GB GPUs."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from tiny_run import TinyRun, write_dataset

from megatron_chatflow.checkpoint.files import LATEST, iteration_folder
from megatron_chatflow.checkpoint.store import RunState
from megatron_chatflow.config import load_config, load_config_from_argv
from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.convert.shape import LlamaShape
from megatron_chatflow.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.train.dry_run import dry_run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "llama2_7b"
VOCAB_SIZE = 40_076


def layouts() -> list[tuple[str, int, tuple[str, ...]]]:
    """Returns configuration, number of GPUs and additional flags of every job on the page."""
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    jobs = []
    for line in page[page.index("## More nodes") :].splitlines():
        if launched := re.fullmatch(r"NNODES=(\d+) examples/llama2_7b/train\.sh (.*)", line):
            nodes, rest = launched.groups()
        elif launched := re.fullmatch(
            r"sbatch --nodes (\d+) examples/\S+/train\.sbatch (.*)", line
        ):
            nodes, rest = launched.groups()
        else:
            continue
        config, *flags = shlex.split(rest)
        jobs.append((config, 8 * int(nodes), tuple(flags)))
    return jobs


@pytest.fixture(scope="module")
def workplace(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creates a working folder with made-up data at the paths of the page's configurations."""
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "data").mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    model = folder / "data" / "tokenizer.model"
    model.write_bytes(tiny_run.tokenizer_model.read_bytes())
    for part in ("", "_valid"):
        for source in ("en{}_text", "zh{}_text", "zh_en{}_text", "chat{}_messages"):
            prefix = folder / "data" / f"{source.format(part)}_document"
            write_dataset(prefix, model, seed=2, num_documents=400)
            if source.startswith("chat"):
                mask = IndexedDatasetWriter(
                    Path(str(prefix).removesuffix("_document") + "_loss_mask"), np.uint8
                )
                data = IndexedDataset(prefix)
                for index in range(len(data)):
                    mask.add_document(np.ones(len(data[index]), np.uint8))
                mask.finalize()
    for size in ("7b", "13b", "70b"):
        write_weights(folder, size)
    return folder


def write_weights(folder: Path, size: str) -> None:
    """Writes the state of the checkpoint that a size starts from. A dry run reads no tensors."""
    settings = load_config(FOLDER / f"{size}.yaml").checkpoint
    assert settings.pretrained_checkpoint is not None
    checkpoint = iteration_folder(folder / settings.pretrained_checkpoint, 0)
    model = load_config(FOLDER / f"{size}.yaml").model
    shape = LlamaShape.of(model, load_tokenizer(folder / "data" / "tokenizer.model").vocab_size)
    checkpoint.mkdir(parents=True)
    state = RunState(0, 0, 0, {}, {}, {}, {}, shape.recorded())
    (checkpoint / "state.json").write_text(json.dumps(asdict(state)))
    (checkpoint.parent / LATEST).write_text("0\n")


def test_the_page_covers_every_size() -> None:
    found = layouts()
    sizes = {name: [gpus for config, gpus, _ in found if config == name] for name, _, _ in found}
    assert (min(sizes["7b.yaml"]), max(sizes["7b.yaml"])) == (8, 256)
    assert (min(sizes["13b.yaml"]), max(sizes["13b.yaml"])) == (8, 256)
    assert (min(sizes["70b.yaml"]), max(sizes["70b.yaml"])) == (32, 256)


@pytest.mark.parametrize(("config", "num_gpus", "flags"), layouts())
def test_a_layout_passes_its_dry_run(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    num_gpus: int,
    flags: tuple[str, ...],
) -> None:
    monkeypatch.chdir(workplace)
    path = FOLDER / config
    options = ["--dry-run", "--world-size", str(num_gpus)]
    run, given = load_config_from_argv(["--config", str(path), *flags, *options])
    text = dry_run(run, given.world_size)
    assert f"{num_gpus} processes" in text and "RANDOM WEIGHTS" not in text
    assert f"starts from the weights of ckpt/llama2_{config.partition('.')[0]}/iter_0000000" in text
    memory = estimate_memory(run, VOCAB_SIZE, num_gpus)
    assert memory.total < 72 * 2**30, f"{memory} leaves too little of 80 GB to the libraries"


def test_the_script_makes_the_dry_run(workplace: Path) -> None:
    command = "NNODES=2:4 examples/llama2_7b/train.sh 13b.yaml --log-straggler --dry-run"
    # The script uses the `python` on the path, as in an activated environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=workplace,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "32 processes: 2 per copy of the model, 16 copies" in done.stdout
    for script in ("train.sh", "train.sbatch"):
        subprocess.run(["bash", "-n", str(FOLDER / script)], check=True)
