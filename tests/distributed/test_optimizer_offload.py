"""Tests the optimizer whose state is in host memory, on CPUs.

There, parameters count as on a GPU and their copies as in host memory (`runtime.cpu`), so that
which parameters are offloaded, what is copied, and checkpoints are tested, but no transfer is.
"""

from pathlib import Path

import jobs
import pytest
import torch
from test_resume import _tensors
from tiny_run import TinyRun

from megatron_chatflow.convert.safetensors import HuggingFaceWeights
from megatron_chatflow.convert.to_huggingface import export_checkpoint

pytestmark = pytest.mark.slow

SHARDED = ["--bf16", "--use-distributed-optimizer"]
AWARE = [*SHARDED, "--use-precision-aware-optimizer"]
ALL = [*AWARE, "--optimizer-cpu-offload"]
HALF = [*ALL, "--optimizer-offload-fraction", "0.5"]
OVERLAP = [*HALF, "--overlap-cpu-optimizer-d2h-h2d"]

WHOLE = {"plain": SHARDED, "all": ALL, "half": HALF, "overlap": OVERLAP}
WHOLE["bf16_gradients"] = [*HALF, "--main-grads-dtype", "bf16"]
# By name: the flags until the fourth iteration, and those from there on.
RESUMED = {
    "all_again": (ALL, ALL),
    "half_again": (HALF, HALF),
    "overlap_again": (OVERLAP, OVERLAP),
    "to_half": (SHARDED, HALF),
    "to_plain": (HALF, SHARDED),
    "from_aware": (AWARE, HALF),
}


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Returns a folder with the runs."""
    folder = tiny_run.folder / "optimizer_offload"
    folder.mkdir()
    base = ["--config", tiny_run.config, "--train-iters", 6]
    tasks = [[*base, *flags, "--save", folder / name] for name, flags in WHOLE.items()]
    for name, (before, after) in RESUMED.items():
        run = [*base, "--save", folder / name, "--load", folder / name]
        tasks += [[*run, *before, "--exit-interval", 4], [*run, *after]]
    jobs.run_with_stand_in(2, tasks, folder)
    export_checkpoint(folder / "plain", folder / "huggingface", dtype="fp32")
    one_step = ["--exit-interval", 1, "--eval-interval", 100, "--lr", "1e-30", "--min-lr", 0]
    jobs.run_with_stand_in(
        1,
        [
            [*base, *HALF, *one_step, option, folder / source, "--save", folder / f"from_{source}"]
            for option, source in (
                ("--load-hf", "huggingface"),
                ("--pretrained-checkpoint", "plain"),
            )
        ],
        folder,
    )
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*list(WHOLE)[1:], *RESUMED])
def test_losses_are_those_of_the_plain_optimizer(runs: Path, name: str) -> None:
    expected, _ = jobs.read_metrics(runs / "plain")
    found, _ = jobs.read_metrics(runs / name)
    assert len(found) == len(expected) == 6
    tolerance = 0.02 if name == "bf16_gradients" else 2e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=tolerance)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "same"),
    [("all_again", "all"), ("half_again", "half"), ("overlap_again", "half"), ("overlap", "half")],
)
def test_a_resume_and_overlap_change_no_bit(runs: Path, name: str, same: str) -> None:
    expected = _tensors(runs / same / "iter_0000006")
    found = _tensors(runs / name / "iter_0000006")
    assert found.keys() == expected.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in found)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["all", "half"])
def test_checkpoints_hold_the_state_of_the_plain_optimizer(runs: Path, name: str) -> None:
    expected = _tensors(runs / "plain" / "iter_0000006")
    found = _tensors(runs / name / "iter_0000006")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        difference = (found[key].float() - tensor.float()).abs().max()
        assert difference <= 0.05 * tensor.float().abs().max(), key


@pytest.mark.distributed
@pytest.mark.parametrize("source", ["huggingface", "plain"])
def test_master_weights_begin_with_loaded_weights(runs: Path, source: str, tmp_path: Path) -> None:
    export_checkpoint(runs / f"from_{source}", tmp_path / "found", dtype="fp32")
    found, expected = (HuggingFaceWeights(p) for p in (tmp_path / "found", runs / "huggingface"))
    for tensor in expected.files:
        right = expected.read(tensor)
        assert torch.equal(found.read(tensor)[: len(right)], right), tensor
