"""Runs a subject of the training benchmark in processes of its own.

On CPUs a peer runs either with the C library's default allocator settings or, like our runs, with
freed memory kept by the C library. The two differ by up to a factor of two, so the benchmark shows
both. Several processes form one tensor-parallel job, as torchrun would start it.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import OURS, SUBJECT_SEED, Shape
from megatron_chatflow.errors import UserError, run_main
from megatron_chatflow.runtime.ranks import ProcessRank

_READY = "ready"
_SECONDS_TO_END = 60.0


class PeerProcess:
    """A subject in its own processes, which runs a step on request."""

    def __init__(
        self,
        name: str,
        shape: Shape,
        *,
        keep_freed_memory: bool = True,
        num_processes: int = 1,
        **switches: bool,
    ) -> None:
        """Starts the processes and waits until each has built its model.

        Args:
            name: Name of a peer, or `OURS`.
            shape: Shape of the model and batch.
            keep_freed_memory: Whether the C library keeps freed memory, as in our runs on CPUs.
            num_processes: Tensor-parallel size of our step.
            switches: Keys of the section ``parallel`` for our step.
        """
        order = {"name": name, "keep_freed_memory": keep_freed_memory, "switches": switches}
        command = [sys.executable, "-m", __name__, json.dumps({**order, "shape": vars(shape)})]
        path = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).resolve().parents[1])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
        # A file, because a pipe would fill up if nobody reads it.
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**environment, **variables},
            )
            for variables in _ranks(num_processes)
        ]
        self._answers()

    def step(self) -> float:
        """Runs one step in the processes and returns the loss.

        Raises:
            UserError: A process ended. The others are stopped as well.
        """
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("step\n")
                process.stdin.flush()
        return float(self._answers()[0])

    def close(self) -> None:
        """Stops the processes."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()

    def _answers(self) -> list[str]:
        answers = [_answer_of(process) for process in self._processes]
        if all(answer is not None for answer in answers):
            return [str(answer) for answer in answers]
        for process in self._processes:
            process.kill()
        self._log.seek(0)
        said = self._log.read().strip().splitlines() or [
            "no output; check that there is enough memory"
        ]
        self.close()
        raise UserError(f"a benchmark process exited: {said[-1]}")


def _ranks(num_processes: int) -> list[dict[str, str]]:
    """Returns the environment variables that torchrun would set in each process."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(num_processes)
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    # Together they have as many threads as the single process that they are compared with.
    job["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // num_processes))
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def _answer_of(process: "subprocess.Popen[str]") -> str | None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_READY):
            return line.removeprefix(_READY).strip()
    return None


def _answer(text: object) -> None:
    sys.stdout.write(f"{_READY} {text}\n")
    sys.stdout.flush()


def main() -> None:
    """Builds the subject named by the first argument and runs a step per line of standard input."""
    from megatron_chatflow.runtime.launch import finalize, initialize

    order: dict[str, Any] = json.loads(sys.argv[1])
    shape = Shape(**order["shape"])
    ranks = initialize(
        tensor_model_parallel_size=ProcessRank.from_environment().world_size,
        keep_freed_memory=order["keep_freed_memory"],
    )
    from benchmarks.training_steps import PEERS, Ours

    tokens = shape.tokens(torch.Generator().manual_seed(SUBJECT_SEED))
    subject: Any
    if order["name"] == OURS:
        subject = Ours(shape, tokens, ranks, **order["switches"])
    else:
        subject = PEERS[order["name"]](shape, tokens, ranks)
    _answer("")
    for _ in sys.stdin:
        _answer(subject.step())
    finalize()


if __name__ == "__main__":
    run_main(main)
