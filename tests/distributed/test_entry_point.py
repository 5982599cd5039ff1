"""Tests the entry point from the user's side: exit statuses, one-line errors, a full disk."""

import json
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jobs
import pytest
from fork_server import run_forked
from tiny_run import TinyRun


def _failing(command: Sequence[str], max_file_bytes: int | None = None) -> str:
    """Runs a command that must exit with status 2, and returns its only error line.

    With a limit, the system refuses to let a file grow past it, as on a full disk.
    """
    if max_file_bytes is None:
        result = run_forked(command[1:])
    else:
        limits = (max_file_bytes, max_file_bytes)
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


@pytest.mark.distributed
def test_missing_configuration(tmp_path: Path) -> None:
    line = _failing(jobs.pretrain("--config", tmp_path / "nowhere.yaml"))
    assert "nowhere.yaml" in line


@pytest.mark.distributed
def test_missing_data(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    text = tiny_run.config.read_text(encoding="utf-8")
    config.write_text(text.replace("first_text_document", "nowhere_text_document"))
    assert "data.sources.first.paths[0]" in _failing(jobs.pretrain("--config", config))


@pytest.mark.distributed
def test_two_ranks_say_it_once(tiny_run: TinyRun) -> None:
    command = [*jobs.forking_torchrun(2), "-m", "megatron_chatflow.pretrain"]
    command += ["--config", tiny_run.config]
    output = jobs.run([*map(str, command), "--seq-length", "128", "--vocab-size", "599"], expect=1)
    assert output.count("error: model.vocab_size") == 1


@pytest.mark.distributed
def test_a_disk_that_fills_leaves_the_previous_checkpoint(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = jobs.pretrain("--config", tiny_run.config, "--save", folder, "--load", folder)
    jobs.run([*command, "--exit-interval", "5"])
    before = sorted(path.name for path in folder.rglob("*"))

    line = _failing([*command, "--exit-interval", "8"], max_file_bytes=1 << 20)
    assert "checkpoint.save" in line and "could not be written" in line
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    left = {name for name in (path.name for path in folder.rglob("*")) if "tfevents" not in name}
    assert left == {name for name in before if "tfevents" not in name} | {"restarts.jsonl"}

    jobs.run(command)
    iterations, _ = jobs.read_metrics(folder)
    assert [entry["iteration"] for entry in iterations] == list(range(1, 11))
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "10\n"


@pytest.mark.distributed
def test_a_failed_save_on_the_way_does_not_end_the_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    blocker = folder / ".iter_0000004.saving"
    folder.mkdir()
    blocker.write_text("a file where the save wants its folder")
    output = jobs.run(
        jobs.pretrain("--config", tiny_run.config, "--save", folder, "--save-interval", "4")
    )
    assert (folder / "iter_0000008").is_dir()
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "10\n"
    assert f"saving {folder / 'iter_0000004'} failed: " in output
    assert not (folder / "iter_0000004").exists()


@pytest.mark.distributed
def test_a_run_leaves_what_it_promises(tiny_run: TinyRun, tmp_path: Path) -> None:
    command = jobs.pretrain("--config", tiny_run.config, "--save", tmp_path, "--train-iters", "3")
    output = jobs.run(command, fresh=True)
    assert "* data.sources.first: 1 of 1 datasets has no .json" in output
    assert (tmp_path / "config.yaml").is_file()
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "iter_0000003" / "config.yaml").is_file()
    iterations, validations = jobs.read_metrics(tmp_path)
    assert len(iterations) == 3
    assert [entry["iteration"] for entry in validations] == [0, 3]
    entry = iterations[-1]
    assert entry["consumed_samples"] == 24
    assert entry["consumed_tokens"] == 24 * 64
    for name in ("lm_loss", "learning_rate", "grad_norm", "tokens_per_second", "tflops_per_gpu"):
        assert isinstance(entry[name], float)
    assert sum(source["weight"] for source in entry["sources"].values()) == pytest.approx(1)
    assert sum(source["realised"] for source in entry["sources"].values()) == pytest.approx(1)
    state = json.loads((tmp_path / "iter_0000003" / "state.json").read_text())
    assert state["consumed_samples"] == 24
