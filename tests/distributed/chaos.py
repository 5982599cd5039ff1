"""Kills a run many times and checks that its result equals that of an undisturbed run.

``python tests/distributed/chaos.py FOLDER --kills 30 [--seed 0] [--processes 2]``

Prints a line per kill and a summary table. Exits with status 0 only if ``batch_digest``, loss and
gradient norm of every iteration and every tensor of the last checkpoint equal those of an
undisturbed run.

The faults occur at random moments:

- ``rank``: SIGKILL to a worker. The torchrun agent restarts all workers.
- ``job``: SIGKILL to the agent. Its workers die with it, and the job is launched again.
- ``save``: SIGKILL to a worker or to the agent while a checkpoint is being written.
- ``full``: limits the file size (RLIMIT_FSIZE) until a save has failed, as on a full disk.
- ``term``: SIGTERM to the agent, as a scheduler sends it. The job is launched again.
"""

import argparse
import collections
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import jobs
import psutil
import torch
from tiny_run import make_tiny_run
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

KINDS = ("rank", "job", "save", "full", "term")
_PATIENCE = 300.0  # Seconds within which a healthy job makes progress, on the slowest machine.


@dataclass
class Record:
    """Counts of what happened to the run."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    num_launches: int = 0
    num_failed_saves: int = 0


class Job:
    """The run under torchrun: its processes and its progress."""

    def __init__(self, command: list[str], folder: Path, log: Path, record: Record) -> None:
        self._command = command
        self._folder = folder
        self._log = log
        self._record = record
        self.agent: psutil.Popen | None = None

    def launch(self) -> None:
        """Launches the job."""
        self._record.num_launches += 1
        # Log through a pipe: the file size limit of `full` would apply to a log file as well.
        self.agent = psutil.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=jobs.environment(),
        )
        threading.Thread(target=self._copy, args=(self.agent.stdout,), daemon=True).start()

    def _copy(self, output: IO[bytes]) -> None:
        """Appends the job's output to the log until all of its processes have ended."""
        with open(self._log, "ab", buffering=0) as log:
            while data := output.read1(1 << 16):  # type: ignore[attr-defined]
                log.write(data)

    def is_alive(self) -> bool:
        """Returns whether the agent is alive."""
        return self.agent is not None and self.agent.poll() is None

    def workers(self) -> list[psutil.Process]:
        """Returns the training processes."""
        try:
            children = self.agent.children() if self.agent is not None else []
            return [child for child in children if "pretrain" in " ".join(child.cmdline())]
        except psutil.Error:
            return []

    def iteration(self) -> int:
        """Returns the last iteration that was logged."""
        try:
            lines = (self._folder / "metrics.jsonl").read_bytes().splitlines()
            return max((json.loads(line)["iteration"] for line in lines[-3:]), default=0)
        except (OSError, ValueError):
            return 0

    def num_failed_saves(self) -> int:
        """Returns the number of failed saves in the log."""
        return sum(b"saving " in line and b" failed: " in line for line in self._log.open("rb"))

    def is_saving(self) -> bool:
        """Returns whether a checkpoint is being written."""
        return any(self._folder.glob(".iter_*"))

    def wait_for(self, iteration: int) -> None:
        """Waits until the run reaches an iteration or ends, and relaunches it if it ended early."""
        deadline = time.monotonic() + _PATIENCE
        while self.iteration() < iteration:
            if not self.is_alive():
                return
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"no progress beyond iteration {self.iteration()}: see {self._log}"
                )
            time.sleep(0.02)


def strike(kind: str, job: Job, rng: random.Random) -> None:
    """Applies one of `KINDS` to a job that is training."""
    workers = job.workers()
    if kind == "save":
        deadline = time.monotonic() + 30
        while not job.is_saving() and job.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        kind = rng.choice(["rank", "job"])
    if kind == "full":
        limit(workers, 100)
        # Keep the limit until a save has failed or the run is over.
        deadline = time.monotonic() + 60
        before = job.num_failed_saves()
        while job.num_failed_saves() == before and time.monotonic() < deadline:
            time.sleep(0.02)
        limit(workers, resource.RLIM_INFINITY)
        return
    assert job.agent is not None
    victim = rng.choice(workers) if kind == "rank" and workers else job.agent
    try:
        victim.send_signal(signal.SIGTERM if kind == "term" else signal.SIGKILL)
        if victim is job.agent:
            job.agent.wait(_PATIENCE)
            psutil.wait_procs(workers, timeout=_PATIENCE)
    except psutil.NoSuchProcess:
        pass


def limit(workers: list[psutil.Process], num_bytes: int) -> None:
    """Sets the maximum file size of running workers, in bytes."""
    for worker in workers:
        try:
            resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
        except ProcessLookupError:
            pass


def disturb(job: Job, num_kills: int, num_iterations: int, rng: random.Random) -> Record:
    """Trains to the end while injecting ``num_kills`` faults."""
    record = job._record
    kinds = [KINDS[k % len(KINDS)] for k in range(num_kills)]
    rng.shuffle(kinds)
    step = max(1, (num_iterations - 10) // num_kills)
    job.launch()
    for number, kind in enumerate(kinds, 1):
        target = min(job.iteration() + rng.randint(1, step), num_iterations - 2)
        job.wait_for(target)
        if not job.is_alive():
            job.launch()
            job.wait_for(target)
        time.sleep(rng.random() * 0.1)
        at = job.iteration()
        strike(kind, job, rng)
        record.kills[kind] += 1
        print(f"{number:3d}/{num_kills}  {kind:5s} at iteration {at}", flush=True)
        if not job.is_alive():
            job.launch()
    while job.iteration() < num_iterations or job.is_alive():
        job.wait_for(num_iterations)
        if job.is_alive():
            job.agent.wait(_PATIENCE)  # type: ignore[union-attr]
        elif job.iteration() < num_iterations:
            job.launch()
    return record


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor of a checkpoint."""
    reader = FileSystemReader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    load_shards(state, storage_reader=reader, no_dist=True)
    return state


def differences(found: Path, expected: Path, num_iterations: int) -> list[str]:
    """Returns the differences between two runs. The list is empty if they are equal."""
    ours, theirs = (jobs.read_metrics(folder)[0] for folder in (found, expected))
    problems = []
    numbers = [entry["iteration"] for entry in ours]
    if numbers != list(range(1, num_iterations + 1)):
        problems.append("an iteration is missing from the metrics, or stands there twice")
    for mine, other in zip(ours, theirs, strict=False):
        for key in ("batch_digest", "lm_loss", "grad_norm", "learning_rate"):
            if mine[key] != other[key]:
                problems.append(f"iteration {other['iteration']}: {key} differs")
    name = f"iter_{num_iterations:07d}"
    mine_last, other_last = tensors(found / name), tensors(expected / name)
    problems += [
        f"{name}: {key} differs"
        for key, value in other_last.items()
        if key not in mine_last or not torch.equal(mine_last[key], value)
    ]
    return problems


def main() -> int:
    """Runs the command line. Returns 0 if the runs do not differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    num_iterations = 12 * options.kills + 20
    tiny = make_tiny_run(options.folder)
    flags = ["--config", tiny.config, "--train-iters", num_iterations, "--save-interval", 4]
    flags += ["--save-retain", 2, "--eval-interval", "none", "--use-distributed-optimizer"]
    launcher = [*jobs.torchrun(options.processes), "--max-restarts=1000"]
    launcher += ["-m", "megatron_chatflow.pretrain"]
    whole, disturbed = options.folder / "undisturbed", options.folder / "disturbed"
    for folder in (whole, disturbed):
        shutil.rmtree(folder, ignore_errors=True)
    log = options.folder / "disturbed.log"
    log.write_bytes(b"")
    begin = time.perf_counter()
    jobs.run([*launcher, *map(str, flags), "--save", str(whole)])
    whole_seconds = time.perf_counter() - begin

    command = [*launcher, *map(str, flags), "--save", str(disturbed), "--load", str(disturbed)]
    job = Job(command, disturbed, log, Record())
    begin = time.perf_counter()
    record = disturb(job, options.kills, num_iterations, random.Random(options.seed))
    seconds = time.perf_counter() - begin
    text = log.read_text(errors="replace")
    record.num_failed_saves = job.num_failed_saves()
    num_trained = text.count("| consumed samples:")
    print(f"kills: {sum(record.kills.values())} {dict(record.kills)}")
    print(f"launches by hand {record.num_launches}, saves that failed {record.num_failed_saves}")
    print(
        f"iterations {num_iterations}, trained {num_trained}: {num_trained - num_iterations} again"
    )
    print(f"undisturbed {whole_seconds:.0f} s, disturbed {seconds:.0f} s")
    problems = differences(disturbed, whole, num_iterations)
    print("\n".join(problems[:20]) or "every batch, loss, gradient norm and final tensor is equal")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
