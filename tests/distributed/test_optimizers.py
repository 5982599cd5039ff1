"""Tests that the plain and the distributed optimizer read each other's checkpoints in any layout.

A checkpoint that is loaded in another layout or by the other optimizer, and saved again without a
step, holds the same numbers bit for bit. Losses of a run that changes its optimizer agree with
those of a run that does not, up to rounding (see `test_layouts`).
"""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch
from test_resume import _tensors
from tiny_run import TinyRun

WORKER = Path(__file__).with_name("saver_worker.py")
TOLERANCE = 2e-5

SHARDED = ["--use-distributed-optimizer"]
TENSOR = ["--tensor-model-parallel-size", "2"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
VIRTUAL = [*PIPELINE, "--num-virtual-stages-per-pipeline-rank", "2"]
CONTEXT = ["--context-parallel-size", "2"]

# A chain in which each run loads the checkpoint of the previous one. Each entry holds the number of
# processes, a name and flags.
CHAIN = (
    (2, {"plain": [], "tensor_sharded": [*TENSOR, *SHARDED], "pipeline": PIPELINE}),
    (4, {"tensor_data_sharded": [*TENSOR, *SHARDED], "context_sharded": [*CONTEXT, *SHARDED]}),
    (1, {"single_sharded": SHARDED}),
    (2, {"virtual_sharded": [*VIRTUAL, *SHARDED], "sharded": SHARDED}),
)
NAMES = [name for _, links in CHAIN for name in links]
PRECISIONS = {"fp32": [], "bf16": ["--bf16"]}


def _resave(num_processes: int, commands: list[list[object]], folder: Path) -> None:
    path = folder / f"resave_{num_processes}.json"
    path.write_text(json.dumps([list(map(str, command)) for command in commands]))
    jobs.run_ranks(num_processes, WORKER, "resave", path, timeout=900)


@pytest.fixture(scope="module")
def saved(tiny_run: TinyRun) -> Path:
    """Saves a checkpoint per precision and runs the chain.

    The checkpoints are those of the distributed optimizer on two ranks.
    """
    folder = tiny_run.folder / "optimizers"
    folder.mkdir()
    base = ["--config", tiny_run.config]
    begin = [
        [*base, *SHARDED, *flags, "--save", folder / name, "--exit-interval", 4]
        for name, flags in PRECISIONS.items()
    ]
    moves = []
    for name, (first, then) in {"to_sharded": ([], SHARDED), "to_plain": (SHARDED, [])}.items():
        run = [*base, "--save", folder / name, "--load", folder / name]
        moves += [[*run, *first, "--exit-interval", 4], [*run, *then]]
    jobs.run_layouts(2, [*begin, [*base, "--save", folder / "whole"], *moves], folder)
    last = dict.fromkeys(PRECISIONS, "")
    for num_processes, links in CHAIN:
        commands = []
        for name, flags in links.items():
            for precision, precision_flags in PRECISIONS.items():
                load, save = folder / (precision + last[precision]), folder / f"{precision}_{name}"
                last[precision] = f"_{name}"
                commands.append([*base, *flags, *precision_flags, "--load", load, "--save", save])
        _resave(num_processes, commands, folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_and_saved_again_is_the_same(saved: Path, name: str, precision: str) -> None:
    expected = _tensors(saved / precision / "iter_0000004")
    found = _tensors(saved / f"{precision}_{name}" / "iter_0000004")
    assert found.keys() == expected.keys()
    for what in ("exp_avg", "exp_avg_sq", *(["fp32_param"] if precision == "bf16" else [])):
        assert any(key.startswith(f"optimizer.state.{what}.") for key in found)
    for key, tensor in expected.items():
        # Vocabularies are padded for the number of tensor-parallel ranks.
        num_rows = min(len(tensor), len(found[key]))
        assert torch.equal(found[key][:num_rows], tensor[:num_rows]), key
        assert not found[key][num_rows:].any()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["to_sharded", "to_plain"])
def test_a_run_that_changes_its_optimizer_goes_on_alike(saved: Path, name: str) -> None:
    expected, _ = jobs.read_metrics(saved / "whole")
    found, _ = jobs.read_metrics(saved / name)
    assert [e["batch_digest"] for e in found] == [e["batch_digest"] for e in expected]
    assert len(found) == 10
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=TOLERANCE)


@pytest.mark.distributed
def test_master_weights_under_their_earlier_name_are_found(
    saved: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """Earlier versions called the distributed optimizer's master weights ``param``."""
    old = tmp_path / "old"
    (saved / "bf16").rename(old)
    try:
        path = old / "iter_0000004" / ".metadata"
        index, text = pickle.loads(path.read_bytes()), "optimizer.state.fp32_param."
        new = "optimizer.state.param."
        index.state_dict_metadata = {
            name.replace(text, new): entry for name, entry in index.state_dict_metadata.items()
        }
        index.storage_data = {
            replace(key, fqn=key.fqn.replace(text, new)): place
            for key, place in index.storage_data.items()
        }
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(index))
        for name in (
            "hashes.json",
            "tensor_index.json",
        ):  # Earlier versions wrote no such file.
            (old / "iter_0000004" / name).unlink()
        flags = ["--config", tiny_run.config, "--bf16", "--load", old, "--save", tmp_path / "new"]
        _resave(1, [flags], tmp_path)
        path.write_bytes(before)
    finally:
        old.rename(saved / "bf16")
    expected = _tensors(saved / "bf16" / "iter_0000004")
    found = _tensors(tmp_path / "new" / "iter_0000004")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
