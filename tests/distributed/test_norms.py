"""Tests the logged norms of weights and gradients, which are the same at every layout."""

import math
from pathlib import Path
from typing import Any

import jobs
import pytest
from tiny_run import TinyRun

from megatron_chatflow.convert.distributed import DistributedReader

LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "interleaved": [
        *("--pipeline-model-parallel-size", "2"),
        *("--num-virtual-stages-per-pipeline-rank", "2"),
    ],
    "sharded": ["--use-distributed-optimizer", "--context-parallel-size", "2"],
    "replicated": [],
}
TIED = "--no-untie-embeddings-and-output-weights"


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    folder = tiny_run.folder / "norms"
    folder.mkdir()

    def job(name: str, *flags: str) -> list[str]:
        lengths = ["--exit-interval", "4", "--log-interval", "2", "--eval-iters", "0"]
        norms = ["--log-params-norm", "--log-layer-norms"]
        config = ["--config", str(tiny_run.config), "--save", str(folder / name)]
        return [*config, *lengths, *norms, *flags]

    jobs.run_layouts(1, [job("single"), job("tied", TIED)], folder)
    commands = [job(name, *flags) for name, flags in LAYOUTS.items()]
    jobs.run_layouts(2, [*commands, job("tied_interleaved", TIED, *LAYOUTS["interleaved"])], folder)
    return folder


def steps(folder: Path) -> list[dict[str, Any]]:
    return jobs.read_metrics(folder)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["single", "tied"])
def test_norms_are_those_of_weights_and_gradients(runs: Path, name: str) -> None:
    found = steps(runs / name)
    assert ["params_norm" in step for step in found] == [False, True, False, True]
    last = found[-1]
    names = ["embedding", *(f"layers.{n}" for n in range(4)), "final_norm", "output"]
    assert list(last["layer_norms"]) == names[: 6 if name == "tied" else 7]
    grads = [norms["grads"] for norms in last["layer_norms"].values()]
    assert math.hypot(*grads) == pytest.approx(last["grad_norm"], rel=1e-5)
    reader = DistributedReader(runs / name / "iter_0000004")
    weights = {n: reader.read_whole(n) for n in reader.tensors if not n.startswith("optimizer.")}
    squares = {n: float(weight.double().square().sum()) for n, weight in weights.items()}
    assert last["params_norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-6)
    embedding = squares["embedding.word_embeddings.weight"]
    assert last["layer_norms"]["embedding"]["params"] == pytest.approx(math.sqrt(embedding))
    third = sum(
        float(weight[2].double().square().sum())
        for n, weight in weights.items()
        if n.startswith("decoder.layers.")
    )
    assert last["layer_norms"]["layers.2"]["params"] == pytest.approx(math.sqrt(third))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*LAYOUTS, "tied_interleaved"])
def test_every_layout_has_the_same_norms(runs: Path, name: str) -> None:
    expected = steps(runs / ("tied" if name.startswith("tied") else "single"))
    for ours, theirs in zip(steps(runs / name), expected, strict=True):
        assert ("params_norm" in ours) == ("params_norm" in theirs)
        norm = theirs.get("params_norm", 0.0)
        assert ours.get("params_norm", 0.0) == pytest.approx(norm, rel=1e-5)
        for layer, norms in theirs.get("layer_norms", {}).items():
            assert ours["layer_norms"][layer] == pytest.approx(norms, rel=1e-3, abs=1e-7), layer
