"""Tests that a lost node of an elastic job rejoins it.

The two nodes are network namespaces joined by a pair of virtual interfaces, independent of name
resolution and of the machine's networks. Without root they belong to a user namespace. The test is
skipped with a reason if the system permits neither.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
import psutil
import pytest
from tiny_run import TinyRun

pytestmark = pytest.mark.slow

TRAIN_SCRIPT = Path(__file__).parents[2] / "examples" / "llama2_7b" / "train.sh"
LIMIT_SECONDS = 240


@dataclass(frozen=True)
class Host:
    """A network namespace.

    Attributes:
        address: Its IPv4 address.
        interface: The network interface that has the address.
        enter: Command prefix that runs a command in the namespace.
    """

    address: str
    interface: str
    enter: list[str]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Creates two hosts that reach only each other."""
    for command in ("unshare", "nsenter", "ip"):
        if shutil.which(command) is None:
            pytest.skip(f"no {command} command")
    is_root = os.geteuid() == 0
    user = [] if is_root else ["--user", "--preserve-credentials"]
    hold = ["unshare", "--net", *([] if is_root else ["--user", "--map-root-user"])]
    with contextlib.ExitStack() as stack:
        first = _hold(stack, hold)
        enter_first = ["nsenter", "--target", str(first), *user, "--net"]
        second = _hold(stack, [*enter_first, "unshare", "--net"])
        enter_second = ["nsenter", "--target", str(second), *user, "--net"]
        # TEST-NET-1, which is not routed anywhere.
        both = [Host("192.0.2.1", "node1", enter_first), Host("192.0.2.2", "node2", enter_second)]
        pair = ["ip", "link", "add", "node1", "type", "veth", "peer", "name", "node2"]
        _set_up([*enter_first, *pair, "netns", str(second)])
        for host in both:
            _set_up([*host.enter, "ip", "addr", "add", f"{host.address}/24", "dev", host.interface])
            for interface in ("lo", host.interface):
                _set_up([*host.enter, "ip", "link", "set", interface, "up"])
        yield both


def _hold(stack: contextlib.ExitStack, command: list[str]) -> int:
    """Creates a namespace that lasts as long as the process with the returned id."""
    holder = stack.enter_context(
        subprocess.Popen(
            [*command, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(holder.kill)
    assert holder.stdout is not None and holder.stderr is not None
    if holder.stdout.readline() != "ready\n":
        pytest.skip(f"this user may not make network namespaces: {holder.stderr.read().strip()}")
    return holder.pid


def _set_up(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces cannot be joined: {done.stderr.strip()}")


def _start(
    stack: contextlib.ExitStack, hosts: list[Host], number: int, flags: list[object], log: Path
) -> psutil.Popen:
    """Starts the agent of a node with the script for users, without host names."""
    host = hosts[number]
    environment = {
        **jobs.environment(),
        "NNODES": "1:2",
        "GPUS_PER_NODE": "1",
        "GRACE_SECONDS": "20",
        "LAUNCHER": f"{sys.executable} -m torch.distributed.run",
        "RDZV_ENDPOINT": f"{hosts[0].address}:29500",
        "PET_RDZV_CONF": f"is_host={int(number == 0)},keep_alive_interval=1,last_call_timeout=3",
        "PET_LOCAL_ADDR": host.address,
        "GLOO_SOCKET_IFNAME": host.interface,
    }
    output = stack.enter_context(open(log, "wb"))
    command: list[Any] = [*host.enter, "bash", TRAIN_SCRIPT, *flags]
    agent = psutil.Popen(
        [str(part) for part in command],
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    stack.callback(_end, agent)
    return agent


def _end(agent: psutil.Popen) -> None:
    """Kills an agent and its workers, as the loss of a node would."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [agent, *agent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    agent.wait()


def _num_processes(entry: dict[str, Any]) -> int:
    return round(entry["tokens_per_second"] / entry["tokens_per_second_per_gpu"])


@pytest.mark.distributed
def test_a_node_that_comes_back_is_taken_in(
    tiny_run: TinyRun, tmp_path: Path, hosts: list[Host]
) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    flags: list[object] = [tiny_run.config, "--train-iters", 1_000_000, "--eval-interval", "none"]
    flags += ["--save-interval", 5, "--save-retain", 2, "--no-tensorboard"]
    elastic = [*flags, "--save", folder, "--load", folder]

    def metrics() -> list[dict[str, Any]]:
        is_there = (folder / "metrics.jsonl").exists()
        return jobs.read_metrics(folder)[0] if is_there else []

    def wait(what: str, condition: Callable[[], bool], *agents: psutil.Popen) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
            assert all(agent.poll() is None for agent in agents), f"no {what}: {logs}"
            assert time.monotonic() < deadline, f"no {what}: {logs}"
            time.sleep(0.05)

    with contextlib.ExitStack() as stack:
        first = _start(stack, hosts, 0, elastic, tmp_path / "first.log")
        second = _start(stack, hosts, 1, elastic, tmp_path / "second.log")
        wait("beginning", lambda: len(metrics()) >= 8, first, second)
        assert _num_processes(metrics()[-1]) == 2
        _end(second)
        lost_at = len(metrics())
        wait("run of one node", lambda: _num_processes(metrics()[-1]) == 1, first)
        back = _start(stack, hosts, 1, elastic, tmp_path / "back.log")
        wait("run of two nodes", lambda: _num_processes(metrics()[-1]) == 2, first, back)
        joined_at = len(metrics())
        wait("progress", lambda: len(metrics()) >= joined_at + 5, first, back)
    found = metrics()
    assert joined_at > 5 and lost_at >= 8 and found[-1]["num_restarts"] >= 2
    single = ["--config", *flags, "--save", whole, "--exit-interval", len(found)]
    jobs.run(jobs.pretrain(*single))
    expected = jobs.read_metrics(whole)[0]
    assert [e["batch_digest"] for e in found] == [e["batch_digest"] for e in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=1e-4)
