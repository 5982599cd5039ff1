"""Tests that a stop and resume at any iteration change no loss, digest or weight by a bit.

In another layout the order of the data is the same and losses agree up to rounding.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import psutil
import pytest
import torch
from fork_server import launcher_environment
from tiny_run import TinyRun
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

TRAIN_SCRIPT = Path(__file__).parents[2] / "examples" / "llama2_7b" / "train.sh"
LAYOUTS = {
    "dp2_distributed_optimizer": ["--use-distributed-optimizer"],
    "tp2_bf16": ["--tensor-model-parallel-size", "2", "--bf16"],
    "pp2_bf16": ["--pipeline-model-parallel-size", "2", "--bf16"],
}


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor of a checkpoint, including optimizer state."""
    reader = FileSystemReader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    load_shards(state, storage_reader=reader, no_dist=True)
    return state


def _assert_same_record(found: Path, expected: Path) -> None:
    timed = {
        "seconds",
        "data_seconds",
        "tokens_per_second",
        "tokens_per_second_per_gpu",
        "tflops_per_gpu",
        "mfu",
        "mfu_causal",
    }
    timed |= {"time", "memory_bytes", "num_restarts", "seconds_lost"}
    for ours, theirs in zip(jobs.read_metrics(found), jobs.read_metrics(expected), strict=True):
        assert [{k: v for k, v in entry.items() if k not in timed} for entry in ours] == [
            {k: v for k, v in entry.items() if k not in timed} for entry in theirs
        ]


def _assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = _tensors(found), _tensors(expected)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for name in ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Trains two runs per layout: an undisturbed one, and one resumed after 4 iterations."""
    folder = tiny_run.folder / "resume"
    folder.mkdir()
    commands = []
    for name, flags in LAYOUTS.items():
        base = ["--config", tiny_run.config, *flags]
        commands.append([*base, "--save", folder / f"{name}_whole"])
        stopped = [*base, "--save", folder / f"{name}_parts", "--load", folder / f"{name}_parts"]
        commands.append([*stopped, "--exit-interval", 4])
        commands.append(stopped)
    # A run that stopped on two data-parallel ranks continues in one process.
    moved = ["--config", tiny_run.config, "--save", folder / "moved", "--load", folder / "moved"]
    jobs.run_layouts(2, [*commands, [*moved, "--exit-interval", 4]], folder)
    jobs.run_layouts(1, [moved], folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact(runs: Path, layout: str) -> None:
    _assert_same_record(runs / f"{layout}_parts", runs / f"{layout}_whole")
    _assert_same_weights(
        runs / f"{layout}_parts" / "iter_0000010", runs / f"{layout}_whole" / "iter_0000010"
    )


@pytest.mark.distributed
def test_resume_on_another_number_of_ranks_keeps_the_order(runs: Path) -> None:
    expected, _ = jobs.read_metrics(runs / "dp2_distributed_optimizer_whole")
    found, _ = jobs.read_metrics(runs / "moved")
    assert [e["batch_digest"] for e in found] == [e["batch_digest"] for e in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=2e-5)


@pytest.mark.distributed
def test_a_resume_with_a_fresh_optimizer(tiny_run: TinyRun, tmp_path: Path) -> None:
    base = ["--config", tiny_run.config, "--train-iters", 8]
    parts = [*base, "--save", tmp_path / "parts", "--load", tmp_path / "parts"]
    fresh = [*base, "--save", tmp_path / "fresh", "--load", tmp_path / "fresh"]
    bf16 = [*base, "--bf16", "--save", tmp_path / "bf16", "--load", tmp_path / "bf16"]
    commands = [
        [*base, "--save", tmp_path / "whole"],
        [*fresh, "--exit-interval", 4],
        [*fresh, "--no-load-optim"],
        [*bf16, "--exit-interval", 4],
        [*bf16, "--exit-interval", 5, "--no-load-optim", "--lr", "1e-30"],
        [*parts, "--exit-interval", 4],
        [*parts, "--no-load-optim", "--exit-interval", 5],
        parts,
    ]
    jobs.run_layouts(1, commands, tmp_path)
    whole, found = (jobs.read_metrics(tmp_path / name)[0] for name in ("whole", "fresh"))
    for name in ("iteration", "batch_digest", "learning_rate"):
        assert [entry[name] for entry in found] == [entry[name] for entry in whole]
    losses = [
        (ours["lm_loss"], theirs["lm_loss"]) for ours, theirs in zip(found, whole, strict=True)
    ]
    # Iteration 5 has the same weights. Its update is the first with different moments.
    assert all(ours == theirs for ours, theirs in losses[:5])
    assert all(ours != theirs for ours, theirs in losses[5:])
    # Master weights count as weights, so they keep their full precision.
    before, after = (_tensors(tmp_path / "bf16" / f"iter_000000{i}") for i in (4, 5))
    masters = [name for name in before if ".fp32_param." in name]
    assert masters and all(torch.equal(before[name], after[name]) for name in masters)
    # The moments are saved and resumed like those of any run.
    _assert_same_weights(tmp_path / "parts" / "iter_0000008", tmp_path / "fresh" / "iter_0000008")


@pytest.mark.distributed
def test_a_new_seed_keeps_the_order_of_the_epoch(tiny_run: TinyRun, tmp_path: Path) -> None:
    base = ["--config", tiny_run.config]
    folder = tmp_path / "run"
    run = [*base, "--save", folder, "--load", folder]
    commands = [
        [*base, "--save", tmp_path / "whole"],
        [*run, "--exit-interval", 4],
        [*run, "--exit-interval", 7, "--seed", 7, "--new-data-seed"],
        [*run, "--seed", 7],  # the seed that the checkpoint now records
    ]
    jobs.run_layouts(1, commands, tmp_path)
    _assert_same_record(folder, tmp_path / "whole")
    state = json.loads((folder / "iter_0000010" / "state.json").read_text())
    assert state["data_seeds"] == {name: [[0, 1234], [1, 7]] for name in ("first", "second")}
    output = jobs.run(jobs.pretrain(*run, "--seed", 8), expect=2)
    assert "train.seed: 8 here and 7 in" in output
    output = jobs.run(jobs.pretrain(*run, "--seed", 7, "--lr", "1e-3", "--eval-iters", 2))
    assert re.search(r"optimizer\.lr +0\.003 +0\.001", output)
    assert re.search(r"train\.eval_iters +1 +2 +validation reads up to 16 samples", output)
    assert output.count("settings that differ") == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_goes_on_from_its_last_checkpoint(tiny_run: TinyRun, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--config", tiny_run.config, "--save-interval", 3, "--train-iters", 40]
    jobs.run(jobs.pretrain(*flags, "--save", whole))
    command = jobs.pretrain(*flags, "--save", killed, "--load", killed)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    latest = killed / "latest_checkpointed_iteration.txt"
    deadline = time.monotonic() + 120
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = int(latest.read_text())
    jobs.run(command)
    assert stopped_at < 40, "the run was over before it could be killed"
    _assert_same_record(killed, whole)
    _assert_same_weights(killed / "iter_0000040", whole / "iter_0000040")


def _heed_ctrl_c() -> None:
    """Restores the Ctrl-C handling that a shell disables for a test suite in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launched", "name"),
    [
        ("alone", "SIGTERM"),
        ("fork", "SIGUSR1"),
        ("fork", "SIGINT"),
        ("train.sh", "SIGTERM"),
        # More than ten seconds each.
        pytest.param("train.sh", "SIGUSR1", marks=pytest.mark.slow),
        pytest.param("train.sh", "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves(
    tiny_run: TinyRun, tmp_path: Path, name: str, launched: str
) -> None:
    folder = tmp_path / "run"
    flags = ["--train-iters", 100000, "--save", folder]
    command = jobs.pretrain("--config", tiny_run.config, *flags)
    if launched == "fork":
        command = [*jobs.FORKED, *command[1:]]
    elif launched == "train.sh":
        command = [str(part) for part in (TRAIN_SCRIPT, tiny_run.config, *flags)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    job = {"PATH": path, "GPUS_PER_NODE": "2", "RDZV_ENDPOINT": "localhost:0"}
    process = subprocess.Popen(
        command,
        env={**jobs.environment(), **launcher_environment(), **job},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_heed_ctrl_c,
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.Signals[name])
    status = process.wait(timeout=120)
    # The launcher reports the signal by its own exit status.
    assert (status == 0) == (launched != "train.sh")
    iterations, _ = jobs.read_metrics(folder)
    assert int((folder / "latest_checkpointed_iteration.txt").read_text()) == len(iterations)


_WAITS_TO_BE_STOPPED = """
import sys, time, torch
from megatron_chatflow.runtime.signals import StopRequest
request = StopRequest(notice="asked")
print("ready", flush=True)
while not request.is_set(torch.device("cpu")):
    time.sleep(0.01)
print("stopping", flush=True)
time.sleep(60)
"""


@pytest.mark.distributed
def test_a_second_ctrl_c_ends_at_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITS_TO_BE_STOPPED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_ctrl_c,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)  # A launcher forwards the Ctrl-C.
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors == "\nasked\n"


@pytest.mark.distributed
def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """A shell starts background jobs with SIGINT ignored."""
    script = "import signal\nfrom megatron_chatflow.runtime.signals import StopRequest\n"
    script += "StopRequest()\nassert signal.getsignal(signal.SIGINT) == signal.SIG_IGN"
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_workers_die_with_their_launcher(tiny_run: TinyRun, tmp_path: Path) -> None:
    command = [*jobs.torchrun(2), "-m", "megatron_chatflow.pretrain", "--config", tiny_run.config]
    flags = ["--train-iters", 100000, "--save", tmp_path / "run"]
    agent = psutil.Popen(
        [str(part) for part in (*command, *flags)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    workers = agent.children(recursive=True)
    assert len(workers) >= 2
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
