"""A peer of the training benchmark in a process of its own, where nothing of ours disturbs it.

In: a peer's name and a shape. Out: `PeerProcess`, whose ``step()`` is one step there. On CPUs it
has what its users have, or, as our runs do, has the C library keep freed memory; the two differ by
up to a factor of two, so the benchmark shows both.
"""

import json
import subprocess
import sys
from typing import Any

import torch

from megatron_chatflow.errors import UserError, run_main
from megatron_chatflow.train.benchmark_shape import SUBJECT_SEED, Shape

_READY = "ready"


class PeerProcess:
    """A peer that waits in its own process until it is told to take a step."""

    def __init__(self, name: str, shape: Shape, *, keep_freed_memory: bool) -> None:
        """Starts the process and waits until it has built its model."""
        order = {"name": name, "keep_freed_memory": keep_freed_memory, **vars(shape)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def step(self) -> float:
        """Takes one step there; returns the loss."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_READY):
                return line.removeprefix(_READY).strip()
        raise UserError("--peers: a peer's own process ended; is there enough memory?")


def _answer(text: object) -> None:
    sys.stdout.write(f"{_READY} {text}\n")
    sys.stdout.flush()


def main() -> None:
    """Builds the subject that the first argument names, and steps once for each line that comes."""
    from megatron_chatflow.runtime.launch import finalize, initialize

    sizes: dict[str, Any] = json.loads(sys.argv[1])
    name, keep_freed_memory = sizes.pop("name"), sizes.pop("keep_freed_memory")
    shape = Shape(**sizes)
    ranks = initialize(keep_freed_memory=keep_freed_memory)
    from megatron_chatflow.train.benchmark_subjects import PEERS

    subject = PEERS[name](shape, shape.tokens(torch.Generator().manual_seed(SUBJECT_SEED)), ranks)
    _answer("")
    for _ in sys.stdin:
        _answer(subject.step())
    finalize()


if __name__ == "__main__":
    run_main(main)
