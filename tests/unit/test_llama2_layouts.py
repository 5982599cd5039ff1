"""Tests that every layout of the LLaMA-2 page passes its dry run and fits on 80 GB GPUs."""

import re
import shlex
from pathlib import Path

import pytest
from llama2_workplace import FOLDER, make_workplace
from tiny_run import TinyRun

from megatron_chatflow.config import load_config_from_argv
from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.training.dry_run import dry_run

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
    return make_workplace(tmp_path_factory.mktemp("llama2"), tiny_run)


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
