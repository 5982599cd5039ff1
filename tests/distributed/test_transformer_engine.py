"""Tests that transformer-engine's layers train as the local ones do, with a stand-in for CUDA.

The stand-in of ``tests/te_standin`` is transformer-engine's interface in plain PyTorch, so that
what is tested is our use of it: specs, packed documents, rotary embedding, context parallelism,
names in checkpoints. It is imported by forks of a server of its own, because its presence changes
megatron-core everywhere. For the tolerance see `test_layouts`.
"""

import sys
from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

from megatron_chatflow.convert.distributed import DistributedReader
from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.tokenizer import load_tokenizer
from megatron_chatflow.tokenizer.extend import extend_tokenizer

TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
TOLERANCE = 2e-5

SEQUENCE = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
CONTEXT = ["--context-parallel-size", "2"]
SHARDED = ["--use-distributed-optimizer"]
FULL = ["--recompute-granularity", "full", "--recompute-num-layers", "1", "--recompute-method"]
ODD = ["--hidden-size", "48", "--num-attention-heads", "6", "--num-query-groups", "3"]
ODD += ["--kv-channels", "12"]
SCALED = ["--rope-scaling-type", "linear", "--rope-scaling-factor", "4"]
YARN = ["--rope-scaling-type", "yarn", "--rope-scaling-factor", "4", "--window-size", "20,0"]
YARN += ["--rope-original-max-position-embeddings", "64"]
MLP = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp"]
STOP = ["--exit-interval", "5"]

LAYOUTS = {
    "tp_sequence": [*SEQUENCE, "--recompute-granularity", "selective"],
    "tp_sequence_full": [*SEQUENCE, *FULL, "uniform"],
    "tp_mlp": [*SEQUENCE, *MLP],
    "pp": PIPELINE,
    "pp_virtual": [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2"],
    "cp_sharded": [*CONTEXT, *SHARDED],
    "dp_overlap": [*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather"],
}
# By name: the run without transformer-engine that it has to equal, and the flags of both.
OTHERS = {
    "padded_heads": ("odd_heads", ODD, ["--tensor-model-parallel-size", "2"]),
    "scaled_rotary": ("scaled_rotary_local", SCALED, CONTEXT),
    "windowed": ("windowed_local", YARN, CONTEXT),
}
MOVES = ("to_transformer_engine", "from_transformer_engine")


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Returns a folder with the runs of both implementations."""
    folder = tiny_run.folder / "transformer_engine"
    folder.mkdir()
    base = ["--config", tiny_run.config]
    moved = {name: [*base, "--save", folder / name, "--load", folder / name] for name in MOVES}
    new = extend_tokenizer(
        load_tokenizer(tiny_run.tokenizer_model),
        [chr(0x6000 + 13 * k) for k in range(60)],
        folder / "extended",
    )
    from_huggingface = [*base, "--load-hf", folder / "huggingface", "--train-iters", "3"]
    grown = [*from_huggingface, "--tokenizer-model", new.model_path, "--embedding-init", "normal"]
    jobs.run_layouts(
        1,
        [
            [*base, "--save", folder / "single"],
            [*moved["to_transformer_engine"], *STOP],
            *([*base, *same, "--save", folder / name] for name, same, _ in OTHERS.values()),
        ],
        folder,
    )
    export_checkpoint(folder / "single", folder / "huggingface")
    jobs.run_with_stand_in(
        2,
        [
            *([*base, *flags, "--save", folder / name] for name, flags in LAYOUTS.items()),
            *(
                [*base, *same, *flags, "--pad-attention-heads", "--save", folder / name]
                for name, (_, same, flags) in OTHERS.items()
            ),
            [*moved["to_transformer_engine"], *SEQUENCE],
            [*moved["from_transformer_engine"], *CONTEXT, *SHARDED, *STOP],
            [*from_huggingface, *SEQUENCE, "--save", folder / "loaded"],
            [*grown, *PIPELINE, "--save", folder / "grown"],
        ],
        folder,
    )
    jobs.run_layouts(
        1,
        [
            [*moved["from_transformer_engine"], *SHARDED],
            [*from_huggingface, "--save", folder / "loaded_local"],
            [*grown, "--save", folder / "grown_local"],
        ],
        folder,
    )
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "local"),
    [
        *((name, "single") for name in (*LAYOUTS, *MOVES)),
        *((name, local) for name, (local, _, _) in OTHERS.items()),
        ("loaded", "loaded_local"),
        ("grown", "grown_local"),
    ],
)
def test_losses_and_gradients_equal_those_of_local_layers(
    runs: Path, name: str, local: str
) -> None:
    expected, expected_validation = jobs.read_metrics(runs / local)
    found, found_validation = jobs.read_metrics(runs / name)
    assert len(found) == len(expected) >= 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch_digest"] == theirs["batch_digest"]
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for ours, theirs in zip(found_validation, expected_validation, strict=True):
        for source, values in theirs["validation"].items():
            loss = ours["validation"][source]["loss"]
            assert loss == pytest.approx(values["loss"], abs=TOLERANCE)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp_sequence", "pp_virtual", "cp_sharded"])
def test_checkpoints_hold_the_same_tensors(runs: Path, name: str) -> None:
    ours, theirs = (DistributedReader(runs / run / "iter_0000010") for run in (name, "single"))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in ours.tensors
    for tensor in theirs.tensors:
        if tensor.startswith("optimizer.state.exp_avg."):  # the mean of the gradients
            expected = theirs.read_whole(tensor)
            difference = (ours.read_whole(tensor) - expected).abs().max()
            assert difference <= 1e-4 * expected.abs().max(), tensor


@pytest.mark.distributed
def test_an_export_is_the_same_model(runs: Path, tmp_path: Path) -> None:
    checkpoint = runs / "tp_sequence"
    export_checkpoint(checkpoint, tmp_path / "huggingface")
    output = jobs.run(
        [sys.executable, TOOL, "verify", "--checkpoint", checkpoint]
        + ["--hf", tmp_path / "huggingface"]
    )
    assert output.splitlines()[-1] == "same model"
