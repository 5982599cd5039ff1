"""Tests background saves on real ranks: failures leave the run and its checkpoints unchanged."""

from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun

WORKER = Path(__file__).with_name("saver_worker.py")


@pytest.mark.distributed
@pytest.mark.parametrize("flag", ["--async-save", "--no-async-save"])
def test_a_save_that_fails_on_one_rank_fails_on_all(
    tiny_run: TinyRun, tmp_path: Path, flag: str
) -> None:
    flags = ["--config", tiny_run.config, "--save", tmp_path / "run", "--save-retain", 2, flag]
    flags += ["--tensor-model-parallel-size", 2, "--exit-interval", 2, "--no-tensorboard"]
    output = jobs.run_ranks(2, WORKER, "failures", *flags)
    assert "Traceback" not in output


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_damaged_checkpoints_are_errors(
    tiny_run: TinyRun, tmp_path: Path, num_processes: int
) -> None:
    flags = ["--config", tiny_run.config, "--save", tmp_path / "run", "--exit-interval", 2]
    flags += ["--use-distributed-optimizer", "--no-tensorboard"]
    output = jobs.run_ranks(num_processes, WORKER, "damage", *flags, timeout=900)
    assert "kinds of damage" in output
    print(output.splitlines()[-1])


@pytest.mark.distributed
def test_damage_is_found_before_loading(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = jobs.pretrain("--config", tiny_run.config, "--save", run, "--load", run)
    jobs.run([*command, "--exit-interval", "2"])
    path = run / "iter_0000002" / "__0_0.distcp"
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    for flags in (["--ckpt-verify"], ["--ckpt-verify", "--dry-run"]):
        output = jobs.run([*command, *flags], expect=2)
        assert "__0_0.distcp has changed since it was saved" in output
        assert "Traceback" not in output
    path.write_bytes(good)
    jobs.run([*command, "--ckpt-verify"])
