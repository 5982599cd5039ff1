"""Tests weights that are stored in FP8, with the stand-in for transformer-engine.

Its FP8 weights have one scale each, as the operands of its products have; with mxfp8, both have a
scale for 32 values. Before they are drawn or loaded, what transformer-engine would initialize
master weights with is NaN.
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

# Sizes that fit FP8, also halved by tensor parallelism. Gradients are not clipped: FP8 and bf16
# weights lie in other places of the gradient buffer, so their norm is summed in another order, and
# its last bit can move a weight to the next bf16 value.
SIZES = ["--ffn-hidden-size", "192", "--bf16", "--num-query-groups", "4", "--clip-grad", "0"]
PLAIN = [*SIZES, "--use-distributed-optimizer", "--fp8-format", "hybrid"]
FP8 = [*PLAIN, "--fp8-param-gather"]
PLAIN_MX = [*PLAIN, "--fp8-recipe", "mxfp8"]
MX = [*PLAIN_MX, "--fp8-param-gather", "--reuse-grad-buf-for-mxfp8-param-ag"]
TENSOR = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
TOLERANCE = 0.05  # FP8 amplifies differences in rounding
AWARE = ["--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16"]
AWARE += ["--exp-avg-sq-dtype", "bf16"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]

WHOLE = {
    "plain": PLAIN,
    "fp8": FP8,
    "blockwise": [*FP8, "--fp8-recipe", "blockwise"],
    "overlap": [*FP8, *OVERLAP],
    "first_last": [*FP8, "--first-last-layers-bf16"],
    "aware": [*FP8, *AWARE],
    "tensor": [*FP8, *TENSOR],
    "pipeline": [*FP8, "--pipeline-model-parallel-size", "2"],
    "virtual": [
        *FP8,
        *("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
    ],
    "context": [*FP8, "--context-parallel-size", "2"],
    "mx_plain": PLAIN_MX,
    "mx": MX,
    "mx_bf16_gradients": [*MX, "--grad-reduce-in-bf16"],
    "mx_first_last": [*MX, "--first-last-layers-bf16"],
    "mx_tensor": [*MX, *TENSOR],
    "mx_pipeline": [*MX, "--pipeline-model-parallel-size", "2"],
}
CLIPPED = {name: [*WHOLE[name], "--clip-grad", "0.1"] for name in ("plain", "fp8")}
# By name: the flags until the fourth iteration, and those from there on.
RESUMED = {
    "fp8_again": (FP8, FP8),
    "aware_again": ([*FP8, *AWARE], [*FP8, *AWARE]),
    "mx_again": (MX, MX),
    "to_mx": (PLAIN_MX, MX),
    "mx_to_tensor": (MX, [*MX, *TENSOR]),
    "to_fp8": (PLAIN, FP8),
    "to_plain": (FP8, PLAIN),
    "to_tensor": (FP8, [*FP8, *TENSOR]),
}


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Returns a folder with the runs."""
    folder = tiny_run.folder / "fp8_weights"
    folder.mkdir()
    base = ["--config", tiny_run.config, "--train-iters", 6]
    tasks = [[*base, *flags, "--save", folder / name] for name, flags in WHOLE.items()]
    tasks += [
        [*base, *flags, "--save", folder / f"clipped_{name}", "--exit-interval", 3]
        for name, flags in CLIPPED.items()
    ]
    jobs.run_with_stand_in(2, tasks, folder)
    tasks = []
    for name, (before, after) in RESUMED.items():
        run = [*base, "--save", folder / name, "--load", folder / name]
        tasks += [[*run, *before, "--exit-interval", 4], [*run, *after]]
    one_step = ["--exit-interval", 1, "--eval-interval", 100, "--lr", "1e-30", "--min-lr", 0]
    tasks += [
        [*base, *flags, *one_step, "--save", folder / f"begun_{name}"]
        for name, flags in (
            *(("plain", PLAIN), ("fp8", FP8), ("tensor", [*FP8, *TENSOR])),
            *(("mx", MX), ("mx_tensor", [*MX, *TENSOR])),
        )
    ]
    jobs.run_with_stand_in(2, tasks, folder)
    export_checkpoint(folder / "plain", folder / "huggingface", dtype="fp32")
    jobs.run_with_stand_in(
        2,
        [
            [*base, *flags, *one_step, option, source, "--save", folder / f"{name}_{layout}"]
            for layout, flags in (("data", FP8), ("tensor", [*FP8, *TENSOR]), ("mx", MX))
            for name, option, source in (
                ("loaded", "--load-hf", folder / "huggingface"),
                ("pretrained", "--pretrained-checkpoint", folder / "plain"),
            )
        ],
        folder,
    )
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", [*list(WHOLE)[1:], *RESUMED])
def test_losses_stay_close_to_those_of_bf16_weights(runs: Path, name: str) -> None:
    expected, expected_validation = jobs.read_metrics(runs / "plain")
    found, found_validation = jobs.read_metrics(runs / name)
    assert len(found) == len(expected) == 6
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=TOLERANCE)
    for ours, theirs in zip(found_validation, expected_validation, strict=True):
        for source, values in theirs["validation"].items():
            assert ours["validation"][source]["loss"] == pytest.approx(
                values["loss"], abs=TOLERANCE
            )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", ["fp8", "blockwise", "overlap", "to_fp8", "to_plain", "mx", "mx_again", "to_mx"]
)
def test_weights_in_fp8_are_the_bf16_weights_in_fp8(runs: Path, name: str) -> None:
    expected, _ = jobs.read_metrics(runs / ("mx_plain" if "mx" in name else "plain"))
    found, _ = jobs.read_metrics(runs / name)
    assert [step["lm_loss"] for step in found] == [step["lm_loss"] for step in expected]


@pytest.mark.distributed
def test_gradients_are_clipped_to_the_same_norm(runs: Path) -> None:
    expected, _ = jobs.read_metrics(runs / "clipped_plain")
    found, _ = jobs.read_metrics(runs / "clipped_fp8")
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs["grad_norm"] > 0.1
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "same"),
    [("fp8_again", "fp8"), ("aware_again", "aware"), ("overlap", "fp8"), ("mx_again", "mx")],
)
def test_a_resume_and_overlap_change_no_bit(runs: Path, name: str, same: str) -> None:
    expected = _tensors(runs / same / "iter_0000006")
    found = _tensors(runs / name / "iter_0000006")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name",
    ["fp8", "tensor", "virtual", "first_last", "aware", "mx", "mx_tensor", "mx_first_last"],
)
def test_checkpoints_hold_weights_in_bf16(runs: Path, name: str) -> None:
    expected = _tensors(runs / "plain" / "iter_0000006")
    found = _tensors(runs / name / "iter_0000006")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.shape == expected[key].shape
        master = found.get(f"optimizer.state.fp32_param.{key}")
        if master is not None:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, master.bfloat16()), key


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["fp8", "tensor", "mx", "mx_tensor"])
def test_master_weights_begin_with_drawn_weights(runs: Path, name: str) -> None:
    expected = _tensors(runs / "begun_plain" / "iter_0000001")
    found = _tensors(runs / f"begun_{name}" / "iter_0000001")
    for key, tensor in expected.items():
        if not key.startswith("optimizer.state.exp_avg"):
            rows = min(len(tensor), len(found[key]))
            assert torch.equal(found[key][:rows], tensor[:rows]), key


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["data", "tensor", "mx"])
@pytest.mark.parametrize("source", ["loaded", "pretrained"])
def test_master_weights_begin_with_loaded_weights(
    runs: Path, source: str, layout: str, tmp_path: Path
) -> None:
    export_checkpoint(runs / f"{source}_{layout}", tmp_path / "found", dtype="fp32")
    found, expected = (HuggingFaceWeights(p) for p in (tmp_path / "found", runs / "huggingface"))
    for tensor in expected.files:
        right = expected.read(tensor)
        assert torch.equal(found.read(tensor)[: len(right)], right), tensor
