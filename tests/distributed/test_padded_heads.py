"""Tests that head padding for tensor parallelism does not change training.

The model has 3 query groups, as SmolLM2-135M, and heads wider than hidden size / heads, as in
Mistral NeMo. With 2 processes one group is padding, with 4 the last process holds only padding. For
the tolerance see `test_layouts`.
"""

import sys
from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

from megatron_chatflow.checkpoint.index import read_index

TOLERANCE = 2e-5

ODD = ["--hidden-size", "48", "--num-attention-heads", "6", "--num-query-groups", "3"]
ODD += ["--kv-channels", "12"]
SEQUENCE = ["--sequence-parallel", "--pad-attention-heads", "--tensor-model-parallel-size"]
PADDED = ["--pad-attention-heads", "--tensor-model-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer"]
STOP = ["--exit-interval", "5"]
NAMES = ("two", "four", "single_to_two", "four_to_single", "from_huggingface")


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Returns a folder with one run per layout and a Hugging Face folder of the first weights."""
    folder = tiny_run.folder / "padded"
    folder.mkdir()
    base = ["--config", tiny_run.config, *ODD]
    moved = {
        name: [*base, "--save", folder / name, "--load", folder / name]
        for name in ("single_to_two", "four_to_single")
    }
    still = ["--lr", "1e-30", "--min-lr", "0", "--exit-interval", "1"]
    none = [*base, "--save", folder / "none", *still]
    jobs.run_layouts(
        1, [[*base, "--save", folder / "single"], none, [*moved["single_to_two"], *STOP]], folder
    )
    tool = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
    huggingface = folder / "huggingface"
    jobs.run(
        [sys.executable, tool, "export", "--checkpoint", folder / "none"]
        + ["--output", huggingface, "--tokenizer-model", tiny_run.tokenizer_model]
        + ["--dtype", "fp32"]
    )
    from_huggingface = [*base, "--save", folder / "from_huggingface", "--load-hf", huggingface]
    jobs.run_layouts(
        2,
        [
            [*base, "--save", folder / "two", *PADDED],
            [*moved["single_to_two"], *PADDED],
            [*from_huggingface, *PADDED],
        ],
        folder,
    )
    jobs.run_layouts(
        4,
        [
            [*base, "--save", folder / "four", *SEQUENCE, "4"],
            [*moved["four_to_single"], *SEQUENCE, "2", *SHARDED, *STOP],
        ],
        folder,
    )
    jobs.run_layouts(1, [[*moved["four_to_single"], *SHARDED]], folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_losses_equal_those_without_padding(runs: Path, name: str) -> None:
    expected, expected_validation = jobs.read_metrics(runs / "single")
    found, found_validation = jobs.read_metrics(runs / name)
    assert len(found) == len(expected) == 10
    assert expected[-1]["lm_loss"] < expected[0]["lm_loss"] - 0.2, "the run has to learn something"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch_digest"] == theirs["batch_digest"]
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for ours, theirs in zip(found_validation, expected_validation, strict=True):
        for source, values in theirs["validation"].items():
            loss = ours["validation"][source]["loss"]
            assert loss == pytest.approx(values["loss"], abs=TOLERANCE)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["two", "four", "single_to_two"])
def test_a_checkpoint_holds_the_models_own_heads_only(runs: Path, name: str) -> None:
    def sizes(run: str) -> dict[str, tuple[int, ...]]:
        index = read_index(runs / run / "iter_0000010").state_dict_metadata
        return {key: tuple(entry.size) for key, entry in index.items() if hasattr(entry, "size")}

    assert sizes(name) == sizes("single")
