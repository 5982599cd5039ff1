"""Tests bad steps and hung ranks in real runs: skipping, rollback, counts and reports."""

import json
import sys
from pathlib import Path

import jobs
import pytest
import torch
from tiny_run import TinyRun
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

FAULTY = Path(__file__).with_name("faulty_worker.py")


def _faulty(fault: object, *arguments: object) -> list[str]:
    return [sys.executable, str(FAULTY), json.dumps(fault), *map(str, arguments)]


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    load_shards(state, storage_reader=reader, no_dist=True)
    return state


def are_equal(folder: Path, first: int, second: int) -> bool:
    ours, theirs = (_tensors(folder / f"iter_{k:07d}") for k in (first, second))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.distributed
def test_bad_steps_are_skipped_and_counted_across_a_resume(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    fault = {"nan": [3, 4], "spike": {"17": 100}}
    flags = ["--config", tiny_run.config, "--train-iters", 18, "--save-interval", 1]
    flags += ["--on-nan", "skip", "--loss-spike-factor", 3]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    jobs.run(_faulty(fault, *flags, "--save", whole))
    resumed = _faulty(fault, *flags, "--save", parts, "--load", parts)
    jobs.run([*resumed, "--exit-interval", 15])
    output = jobs.run(resumed)
    assert "above 3 times the recent median" in output

    expected, _ = jobs.read_metrics(whole)
    found, _ = jobs.read_metrics(parts)
    losses = [entry["lm_loss"] for entry in expected]
    assert [k for k, loss in enumerate(losses, 1) if loss is None] == [3, 4]
    assert [entry["num_skipped"] for entry in expected] == [0, 0, 1] + [2] * 13 + [3, 3]
    assert [entry["lm_loss"] for entry in found] == losses
    assert [entry["num_skipped"] for entry in found][-1] == 3
    assert [entry["num_restarts"] for entry in found] == [0] * 15 + [1] * 3
    assert found[-1]["seconds_lost"] > 0
    (restart,) = map(json.loads, (parts / "restarts.jsonl").read_text().splitlines())
    assert (restart["attempt"], restart["iteration"], restart["reached"]) == (2, 15, 15)
    assert restart["seconds_lost"] == found[-1]["seconds_lost"]
    assert restart["cause"] == "exit_interval"
    assert json.loads((parts / "status.json").read_text())["status"] == "finished"
    assert not (whole / "restarts.jsonl").exists()
    assert are_equal(whole, 2, 4)
    assert not are_equal(whole, 4, 5)
    assert are_equal(whole, 16, 17)

    jobs.run(jobs.pretrain(*flags, "--save", tmp_path / "healthy"))
    healthy, _ = jobs.read_metrics(tmp_path / "healthy")
    digests = [[entry["batch_digest"] for entry in run] for run in (healthy, expected, found)]
    assert digests[0] == digests[1] == digests[2], "bad steps change no data"


@pytest.mark.distributed
def test_rollback_takes_the_weights_of_the_last_checkpoint(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    flags = ["--config", tiny_run.config, "--train-iters", 9, "--on-nan", "rollback"]
    folder = tmp_path / "run"
    output = jobs.run(_faulty({"nan": [6]}, *flags, "--save", folder, "--save-interval", 3))
    assert "rolled back to the weights of" in output and "iter_0000003" in output
    entries, _ = jobs.read_metrics(folder)
    assert [entry["num_rollbacks"] for entry in entries] == [0] * 5 + [1] * 4
    assert are_equal(folder, 3, 6)
    assert not are_equal(folder, 6, 9)
    output = jobs.run(_faulty({"nan": [2]}, *flags, "--save", tmp_path / "none"), expect=2)
    assert "rollback found no checkpoint of this run" in output.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.distributed
def test_rollback_takes_no_other_runs_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    flags = ["--config", tiny_run.config, "--train-iters", 4, "--on-nan", "rollback"]
    jobs.run(jobs.pretrain(*flags, "--save", old, "--save-interval", 2))
    left = (old / "metrics.jsonl").read_bytes()
    for begin in ([], ["--pretrained-checkpoint", old], ["--load", old, "--finetune"]):
        fresh = jobs.pretrain(*flags, *begin, "--save", old, "--seed", 7)
        output = jobs.run(fresh, expect=2)
        assert "contains checkpoints of another run" in output and f"--load {old}" in output
        assert "checkpoints of another run" in jobs.run([*fresh, "--dry-run"], expect=2)
    assert (old / "metrics.jsonl").read_bytes() == left

    # The checkpoint that a run resumed from belongs to it, wherever it is stored.
    resumed = [*flags, "--load", old / "iter_0000002", "--save", new]
    output = jobs.run(_faulty({"nan": [3]}, *resumed))
    assert f"rolled back to the weights of {old / 'iter_0000002'}" in output


@pytest.mark.distributed
def test_a_stop_lets_the_save_under_way_finish(tiny_run: TinyRun, tmp_path: Path) -> None:
    fault = json.dumps({"nan": [4], "slow_save": {"rank": 1, "seconds": 3}})
    flags = ["--config", tiny_run.config, "--save", tmp_path, "--save-interval", 3]
    output = jobs.run([*jobs.forking_torchrun(2), FAULTY, fault, *flags], expect=1)
    assert output.count("error: samples 24 to 32: the loss is not finite") == 1
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    assert (tmp_path / "iter_0000003" / "state.json").is_file()


@pytest.mark.distributed
def test_stop_is_the_default_and_one_line(tiny_run: TinyRun, tmp_path: Path) -> None:
    flags = ["--config", tiny_run.config, "--save", tmp_path / "run"]
    output = jobs.run(_faulty({"nan": [2]}, *flags), expect=2)
    assert output.splitlines()[-1].startswith("error: samples 8 to 16: the loss is not finite")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.distributed
def test_a_hung_rank_is_named_and_the_job_restarts_by_itself(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*jobs.forking_torchrun(2, "--max-restarts=1"), FAULTY]
    command += [json.dumps({"hang": {"rank": 1, "iteration": 6}}), "--config", tiny_run.config]
    command += ["--save", folder, "--load", folder, "--save-interval", 2]
    output = jobs.run([*command, "--hang-timeout-minutes", 0.25, "--data-retry-seconds", 5])
    assert "at a different point: rank 1 (iteration 6, training, in __main__.faulty_step)" in output
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "10"
    entries, _ = jobs.read_metrics(folder)
    assert [entry["iteration"] for entry in entries] == list(range(1, 11))
    assert entries[-1]["num_restarts"] == 1
    assert "failures 1 (" in output
    (restart,) = map(json.loads, (folder / "restarts.jsonl").read_text().splitlines())
    assert restart["cause"] == "failed"
