"""Tests that every parallel layout reproduces the losses of a single process up to rounding.

Covers each axis, each pair of interacting axes, and three axes at a time. All text is packed, one
source isolates attention to its documents, and the vocabulary of 600 is padded to 640 rows. All
runs start from the weights of the seed, which are the same in every layout.

Tolerance: all runs compute in fp32 and differ only in the order of sums over ranks, a relative
error of about 1e-7 per reduction, which ten AdamW steps at 3e-3 amplify. The largest observed
difference is 1.2e-7 on losses of about 6. A wrong gradient, mask or batch changes the leading
digits. The layouts stop after five of the ten iterations of a single process.
"""

from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

TOLERANCE = 2e-5

TENSOR = ["--tensor-model-parallel-size", "2"]
SEQUENCE = [*TENSOR, "--sequence-parallel"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
VIRTUAL = [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2"]
CONTEXT = ["--context-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer"]
OVERLAP = [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"]
TIED = ["--no-untie-embeddings-and-output-weights"]
SELECTIVE = ["--recompute-granularity", "selective"]
FULL = ["--recompute-granularity", "full", "--recompute-num-layers", "1", "--recompute-method"]

# Layouts by number of processes. Ranks that do not shard the model are data-parallel.
LAYOUTS = {
    2: {
        "tp": TENSOR,
        "tp_sequence": SEQUENCE,
        "pp": PIPELINE,
        "pp_virtual": VIRTUAL,
        "dp": [],
        "dp_sharded": SHARDED,
        "dp_overlap": OVERLAP,
        "dp_overlapped_reduce": ["--overlap-grad-reduce"],
        "dp_other_micro_batch": ["--micro-batch-size", "1"],
        "cp": CONTEXT,
        "tp_recompute_full": [*TENSOR, *FULL, "uniform"],
        "tp_sequence_recompute_selective": [*SEQUENCE, *SELECTIVE],
        "tp_sequence_recompute_mlp": [*SEQUENCE, *SELECTIVE, "--recompute-modules", "mlp"],
        "pp_recompute_selective": [*PIPELINE, *SELECTIVE],
        "pp_virtual_recompute_full": [*VIRTUAL, *FULL, "block"],
        "tied_tp": [*TENSOR, *TIED],
        "tied_pp": [*PIPELINE, *TIED],
        "tied_pp_virtual": [*VIRTUAL, *TIED],
    },
    4: {
        "tp_sequence_pp": [*SEQUENCE, *PIPELINE],
        "tp_cp": [*TENSOR, *CONTEXT],
        "tp_sequence_cp": [*SEQUENCE, *CONTEXT],
        "pp_cp": [*PIPELINE, *CONTEXT],
        "pp_virtual_cp": [*VIRTUAL, *CONTEXT],
        "tp_dp_sharded": [*TENSOR, *SHARDED],
        "pp_virtual_dp_overlap": [*VIRTUAL, *OVERLAP],
        "cp_dp_sharded": [*CONTEXT, *SHARDED],
        "tied_tp_pp": [*TENSOR, *PIPELINE, *TIED],
        "four_stages": ["--pipeline-model-parallel-size", "4"],
    },
    8: {
        "tp_sequence_pp_virtual_dp_overlap": [*SEQUENCE, *VIRTUAL, *OVERLAP],
        "tp_pp_cp_recompute_full": [*TENSOR, *PIPELINE, *CONTEXT, *FULL, "uniform"],
    },
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]
# Runs that stop after 5 iterations in one layout and continue in another.
MOVES = ("from_single_to_virtual", "from_virtual_to_tensor")


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Returns a folder with one run per layout."""
    folder = tiny_run.folder / "layouts"
    folder.mkdir()
    base = ["--config", tiny_run.config]
    moved = {
        name: [*base, "--save", folder / name, "--load", folder / name, *SHARDED] for name in MOVES
    }
    stop = ["--exit-interval", "5"]
    extra = {
        1: [
            [*base, "--save", folder / "single"],
            [*base, "--save", folder / "single_tied", *TIED],
            [*moved["from_single_to_virtual"], *stop],
        ],
        2: [
            [*moved["from_single_to_virtual"], *VIRTUAL],
            [*moved["from_virtual_to_tensor"], *VIRTUAL, *stop],
        ],
        4: [[*moved["from_virtual_to_tensor"], *SEQUENCE]],
    }
    for num_processes in (1, *LAYOUTS):
        layouts = LAYOUTS.get(num_processes, {})
        commands = [
            [*base, "--save", folder / name, *flags, *stop] for name, flags in layouts.items()
        ]
        jobs.run_layouts(num_processes, [*extra.get(num_processes, []), *commands], folder)
    return folder


def _num_iterations(layout: str) -> int:
    return 10 if layout in MOVES else 5


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [*NAMES, *MOVES])
def test_losses_equal_a_single_process(runs: Path, layout: str) -> None:
    reference = runs / ("single_tied" if layout.startswith("tied") else "single")
    expected, expected_validation = jobs.read_metrics(reference)
    found, found_validation = jobs.read_metrics(runs / layout)
    assert expected[-1]["lm_loss"] < expected[0]["lm_loss"] - 0.3, "the run has to learn something"
    assert (len(found), len(expected)) == (_num_iterations(layout), 10)
    for ours, theirs in zip(found, expected, strict=False):
        assert ours["batch_digest"] == theirs["batch_digest"]
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        for name, source in theirs["sources"].items():
            assert ours["sources"][name]["loss_tokens"] == source["loss_tokens"]
            assert ours["sources"][name]["loss"] == pytest.approx(source["loss"], abs=TOLERANCE)
    # The first validation is before iteration 1.
    assert (len(found_validation), len(expected_validation)) == (1 + len(found) // 5, 3)
    for ours, theirs in zip(found_validation, expected_validation, strict=False):
        for name, source in theirs["validation"].items():
            assert ours["validation"][name]["loss"] == pytest.approx(source["loss"], abs=TOLERANCE)
            assert ours["validation"][name]["bits_per_byte"] == pytest.approx(
                source["bits_per_byte"], abs=TOLERANCE
            )


@pytest.mark.distributed
def test_every_layout_sees_the_same_batches(runs: Path) -> None:
    digests = {
        name: [entry["batch_digest"] for entry in jobs.read_metrics(runs / name)[0]]
        for name in ("single", *NAMES, *MOVES)
    }
    single = digests.pop("single")
    assert len(set(single)) == 10
    for name, found in digests.items():
        assert found == single[: _num_iterations(name)], name
