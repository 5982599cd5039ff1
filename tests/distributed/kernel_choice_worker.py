"""Makes ranks choose among implementations that are slow, wrong or missing on one of them.

``torchrun --nproc-per-node 2 kernel_choice_worker.py FOLDER``. Each rank writes ``FOLDER/rank_R``
with one line per operation that states its choice.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_chatflow.model.kernel_choice import Function, Operation, choose_fastest

NAMES = ("a", "b", "torch")


def _inputs() -> tuple[torch.Tensor, ...]:
    return (torch.arange(5.0).requires_grad_(),)


def _times(factor: int) -> Function:
    return lambda x: factor * x


def _operations(rank: int) -> list[tuple[Operation, dict[str, float]]]:
    """Returns the operations and the times that this rank measures."""
    every = {name: _times(2) for name in NAMES}
    wrong_on_1 = {**every, "a": _times(2 + rank)}
    only_on_1 = {**every} if rank else {name: every[name] for name in ("b", "torch")}
    absent = {} if rank else {"a": "is not here"}
    slow_somewhere = {"a": 2.0 - rank, "b": 1.0 + rank, "torch": 1.5}
    times = {"a": 1.0, "b": 2.0, "torch": 3.0}
    return [
        (Operation("0", NAMES, every, _inputs), slow_somewhere),
        (Operation("1", NAMES, wrong_on_1, _inputs), times),
        (Operation("2", NAMES, only_on_1, _inputs, absent=absent), times),
    ]


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    operations = _operations(rank)
    shown = {operation.name: times for operation, times in operations}

    def read(operation: Operation, function: Function, device: torch.device) -> float:
        (name,) = (n for n, f in operation.implementations.items() if f is function)
        return shown[operation.name][name]

    choices = choose_fastest([operation for operation, _ in operations], torch.device("cpu"), read)
    lines = "".join(f"{choice.name}: {choice.description}\n" for choice in choices)
    (Path(sys.argv[1]) / f"rank_{rank}").write_text(lines, encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
