"""Tests a run that uses the parts of the recipe together: stages, WSD, a ramp, an average, faults.

The run rolls back across the boundary of a stage and is then stopped and resumed. Rolling back
leaves out the updates since the checkpoint, so it must equal, bit for bit, an uninterrupted run
that skips exactly these updates.
"""

import json
from pathlib import Path

import jobs
import pytest
import torch
import yaml
from tiny_run import TinyRun

from megatron_chatflow.checkpoint.files import iteration_folder
from megatron_chatflow.convert.distributed import DistributedReader

FAULTY = Path(__file__).with_name("faulty_worker.py")
# The batch grows from 4 to 16 samples: iterations end at these samples.
ENDS = [4, 8, 16, 28, 44, 60, 76, 92]
STAGES = [
    {"at": 0, "trainable": ["rows.300-", "layers.1"]},
    {"at": 16, "trainable": ["all"], "lr_multipliers": {"embeddings": 0.5}},
    {"at": 60, "trainable": ["layers.0-2", "output"]},
]
FLAGS = (
    *("--use-distributed-optimizer", "--ema-decay", "0.75"),
    *("--train-samples", "92", "--global-batch-size", "16", "--rampup-batch-size", "4", "4", "24"),
    *("--lr-decay-style", "WSD", "--lr-wsd-decay-samples", "40", "--lr-warmup-samples", "8"),
    *("--save-interval", "3", "--eval-interval", "2"),
)


def train(folder: Path, name: str, fault: dict[str, list[int]], *flags: str) -> str:
    places = ["--config", folder / "run.yaml", "--save", folder / name, "--load", folder / name]
    return jobs.run_ranks(2, FAULTY, json.dumps(fault), *places, *FLAGS, *flags, timeout=600)


@pytest.mark.distributed
def test_a_rollback_across_a_stage_leaves_out_its_updates_only(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    values = yaml.safe_load(tiny_run.config.read_text(encoding="utf-8"))
    values["optimizer"] = {"lr": 3e-3, "min_lr": 3e-4, "weight_decay": 0.1}
    values["train"] |= {"stages": STAGES, "train_iters": None, "micro_batch_size": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    train(tmp_path, "skipped", {"nan_at": [16, 28]}, "--on-nan", "skip")
    # Iteration 4, the first of stage 1, is good; iteration 5 returns to iteration 3, of stage 0.
    rollback = ("--on-nan", "rollback")
    output = train(tmp_path, "rolled", {"nan_at": [28]}, *rollback, "--exit-interval", "5")
    assert "rolled back to the weights of" in output and "iter_0000003" in output
    train(tmp_path, "rolled", {}, *rollback)

    runs = {name: jobs.read_metrics(tmp_path / name) for name in ("skipped", "rolled")}
    (expected, validated), (found, validated_again) = runs.values()
    assert [step["consumed_samples"] for step in found] == ENDS
    assert [step["stage"] for step in found] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [step["num_rollbacks"] for step in found] == [0] * 4 + [1] * 4
    for key in ("batch_digest", "learning_rate", "weight_decay", "global_batch_size"):
        assert [step[key] for step in found] == [step[key] for step in expected], key
    for key in ("lm_loss", "grad_norm"):
        ours, theirs = ([step[key] for step in steps] for steps in (found, expected))
        assert ours[:3] == theirs[:3] and ours[5:] == theirs[5:], key
    assert validated[-1]["validation"] == validated_again[-1]["validation"]
    assert "first (ema)" in validated[-1]["validation"]
    stored = [
        DistributedReader(iteration_folder(tmp_path / name, 8)) for name in ("skipped", "rolled")
    ]
    assert set(stored[0].tensors) == set(stored[1].tensors)
    for tensor in stored[0].tensors:
        one, other = (reader.read_whole(tensor) for reader in stored)
        assert torch.equal(one, other), tensor
    states = [
        json.loads((iteration_folder(tmp_path / name, 8) / "state.json").read_text())["stages"]
        for name in ("skipped", "rolled")
    ]
    # Stage 1 began after the same three updates, although it began twice.
    assert states[0] == states[1] and states[0]["started"] == [[0, 0], [1, 3], [2, 4]]
