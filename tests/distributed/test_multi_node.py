"""Tests two torchrun agents with a c10d rendezvous, each at its own loopback address."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jobs
import psutil
import pytest
from fork_server import launcher_environment
from tiny_run import TinyRun

pytestmark = pytest.mark.slow


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _agents(nodes: str, flags: list[object], folder: Path) -> list[psutil.Popen]:
    port = _free_port()
    agents = []
    for number in (1, 2):
        command: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--no-python"]
        command += [f"--nnodes={nodes}", "--nproc-per-node=1", "--max-restarts=3"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test"]
        command += ["--rdzv-conf=keep_alive_interval=1,last_call_timeout=3"]
        command += [f"--local-addr=127.0.0.{number}", *jobs.FORKED]
        command += ["-m", "megatron_chatflow.pretrain", *flags]
        log = open(folder / f"agent_{number}.log", "wb")
        agents.append(
            psutil.Popen(
                [str(part) for part in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**jobs.environment(), **launcher_environment()},
            )
        )
        # The first agent hosts the store of the rendezvous.
        time.sleep(1.0)
    return agents


def _wait_for_iteration(folder: Path, iteration: int, agents: list[psutil.Popen]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and any(agent.poll() is None for agent in agents):
        if (folder / "metrics.jsonl").exists() and len(jobs.read_metrics(folder)[0]) >= iteration:
            return
        time.sleep(0.05)
    raise AssertionError("the run did not get on")


@pytest.mark.distributed
def test_two_nodes_give_the_losses_of_one_process(tiny_run: TinyRun, tmp_path: Path) -> None:
    flags: list[object] = ["--config", tiny_run.config, "--use-distributed-optimizer"]
    one, two = tmp_path / "one", tmp_path / "two"
    agents = _agents("2", [*flags, "--save", two], tmp_path)
    statuses = [agent.wait(timeout=300) for agent in agents]
    logs = "".join((tmp_path / f"agent_{k}.log").read_text()[-3000:] for k in (1, 2))
    assert statuses == [0, 0], logs
    jobs.run(jobs.pretrain(*flags, "--save", one))
    expected, found = jobs.read_metrics(one)[0], jobs.read_metrics(two)[0]
    assert [e["batch_digest"] for e in found] == [e["batch_digest"] for e in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=2e-5)


@pytest.mark.distributed
def test_a_lost_node_leaves_the_run_to_the_other(tiny_run: TinyRun, tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    flags: list[object] = ["--config", tiny_run.config, "--train-iters", 60]
    flags += ["--save-interval", 5, "--eval-interval", "none"]
    elastic = [*flags, "--save", folder, "--load", folder]
    first, second = _agents("1:2", elastic, tmp_path)
    _wait_for_iteration(folder, 8, [first, second])
    second.send_signal(signal.SIGKILL)
    second.wait()
    status = first.wait(timeout=300)
    assert status == 0, (tmp_path / "agent_1.log").read_text()[-5000:]
    jobs.run(jobs.pretrain(*flags, "--save", whole))
    expected, found = jobs.read_metrics(whole)[0], jobs.read_metrics(folder)[0]
    assert [e["batch_digest"] for e in found] == [e["batch_digest"] for e in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=1e-4)
    assert found[-1]["num_restarts"] >= 1
