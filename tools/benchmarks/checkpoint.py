"""Time that training is blocked by a save, and time until the checkpoint is durable.

Prints a row for our saver, a row for the disk alone (direct writes of as many bytes), and with
``--peers`` rows for torch's ``dcp.save`` and ``dcp.async_save`` and for megatron-core's
asynchronous ``dist_checkpointing.save`` of the same tensors. The model is a real one with its
optimizer. The rounds of the subjects alternate, and medians are reported. Every subject's bytes are
flushed to the disk before its clock stops. Under torchrun the processes are data-parallel, each
saves its shard, and the slowest process counts.

In one process, training steps are also timed while an asynchronous save is in progress. The time
that training loses by a save is the time that it is blocked, and what those steps take longer than
steps without a save.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.shapes import Shape
from megatron_chatflow.checkpoint.direct_file import CHUNK_BYTES, DirectFile
from megatron_chatflow.checkpoint.store import CheckpointSaver, RunState, shards_to_save
from megatron_chatflow.checkpoint.writer import page_aligned
from megatron_chatflow.errors import UserError
from megatron_chatflow.files import scratch_folder, sync_tree
from megatron_chatflow.runtime.launch import finalize, initialize
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.runtime.table import Row

OURS, DISK, SAVE, ASYNC_SAVE = "ours", "disk_alone", "dcp_save", "dcp_async_save"
MEGATRON = "megatron_core_async_save"
_STEP_ROUNDS = 3

Timing = tuple[float, float]
"""Seconds that training waited, and seconds until the checkpoint was durable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument(
        "--num-layers",
        type=int,
        default=6,
        help="layers of width 1024; 6 are 2 GB; default: %(default)s",
    )
    parser.add_argument(
        "--use-distributed-optimizer",
        action="store_true",
        help="under torchrun: shard the optimizer state",
    )
    parser.add_argument(
        "--num-rounds", type=int, default=5, help="saves per subject; default: %(default)s"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(),
        help="folder on the disk to measure; the checkpoints are deleted afterwards",
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Runs the benchmark, see the module docstring."""
    for name in ("num_layers", "num_rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1")
    if not arguments.folder.is_dir():
        raise UserError(f"--folder: {arguments.folder} is not a folder")
    ranks = initialize()
    with ExitStack() as stack:
        stack.callback(finalize)
        # The training step imports megatron-core, which on CPUs has to come after `initialize`.
        from benchmarks.training_steps import Ours

        root = _shared_folder(arguments.folder, ranks, stack)
        shape = Shape(arguments.num_layers, 1024, 2816, 16, 16, 128, 1)
        tokens = torch.randint(0, shape.vocab_size, (1, shape.seq_length + 1))
        sharded = arguments.use_distributed_optimizer
        model = Ours(shape, tokens, ranks, use_distributed_optimizer=sharded)
        model.step()
        saver = CheckpointSaver(root / "ours", model.config, ranks, durable_iteration=None)
        stack.callback(saver.close)
        rows = _measure(arguments, model, saver, root, ranks)
    if ranks.process.rank:
        raise SystemExit(0)  # the first process reports
    return rows


def _shared_folder(folder: Path, ranks: Ranks, stack: ExitStack) -> Path:
    """Creates a folder shared by all processes; the first process removes it."""
    name: list[Any] = [None]
    if ranks.process.rank == 0:
        name = [str(stack.enter_context(scratch_folder("benchmark_", folder)))]
    torch.distributed.broadcast_object_list(name, src=0)
    return Path(name[0])


def _slowest(timing: Timing, ranks: Ranks) -> Timing:
    """Returns the maximum over all processes."""
    seconds = torch.tensor(timing, dtype=torch.float64, device=ranks.device)
    torch.distributed.all_reduce(seconds, op=torch.distributed.ReduceOp.MAX)
    return float(seconds[0]), float(seconds[1])


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the figures by subject, in the form that external checks read."""
    return {
        str(row["subject"]): {
            "blocked_seconds_per_gb": row["blocked_seconds_per_gb"],
            "durable_gb_per_second": row["durable_gb_per_second"],
        }
        for row in rows
    }


def _measure(
    arguments: argparse.Namespace, model: Any, saver: CheckpointSaver, root: Path, ranks: Ranks
) -> list[Row]:
    chunks, optimizer = model.optimization.chunks, model.optimization.optimizer
    shards, _, _ = shards_to_save(chunks, optimizer, ranks)
    tensors = {f"{shard.name}.{shard.offsets}": shard.values.detach() for shard in shards}
    my_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    sizes: list[Any] = [None] * ranks.process.world_size
    torch.distributed.all_gather_object(sizes, my_bytes)
    num_bytes = sum(sizes)
    saver.prepare(chunks, optimizer)
    subjects: dict[str, Callable[[int], Timing]] = {
        OURS: lambda number: _time_ours(saver, number, chunks, optimizer),
        DISK: _disk_alone(root / f"disk{ranks.process.rank}", my_bytes),
    }
    if arguments.peers:
        subjects[SAVE] = lambda number: _time_save(tensors, root / f"save{number}")
        subjects[ASYNC_SAVE] = lambda number: _time_async_save(tensors, root / f"async{number}")
        megatron = MegatronAsyncSave(tensors, root, ranks)
        subjects[MEGATRON] = megatron.time
    timings: dict[str, list[Timing]] = {name: [] for name in subjects}
    for number in range(arguments.num_rounds + 1):
        for name, subject in subjects.items():
            torch.distributed.barrier()
            timing = _slowest(subject(number + 1), ranks)
            # The first round of each subject touches memory and disk for the first time.
            if number:
                timings[name].append(timing)
            if ranks.process.rank == 0:
                _empty(root)
    # Not measured with several processes: their steps wait for each other, and each process is busy
    # at other times.
    during_save: dict[str, tuple[float, float]] = {}
    if ranks.process.world_size == 1:
        saves: dict[str, AsyncSave] = {OURS: OurSave(saver, chunks, optimizer)}
        if arguments.peers:
            saves |= {ASYNC_SAVE: DcpAsyncSave(tensors, root), MEGATRON: megatron}
        for name, save in saves.items():
            during_save[name] = _steps_during_save(model, save)
            _empty(root)
    return [
        _row(name, values, timings, num_bytes, during_save.get(name))
        for name, values in timings.items()
    ]


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _state(iteration: int) -> RunState:
    empty: dict[str, Any] = {}
    return RunState(iteration, 0, 0, empty, empty, empty, empty, empty)


class AsyncSave(Protocol):
    """A save that goes on while training steps run."""

    def start(self, number: int) -> object:
        """Starts a save; training is blocked meanwhile."""

    def is_busy(self) -> bool:
        """Returns whether the save is in progress."""

    def finish(self) -> object:
        """Waits for the save."""


class OurSave:
    """Saves with our saver."""

    def __init__(self, saver: CheckpointSaver, chunks: list[Any], optimizer: Any) -> None:
        self._saver, self._chunks, self._optimizer = saver, chunks, optimizer

    def start(self, number: int) -> None:
        """Starts a save."""
        self._saver.save(_state(number), self._chunks, self._optimizer)

    def is_busy(self) -> bool:
        """Returns whether the files are still being written."""
        return self._saver.is_busy

    def finish(self) -> None:
        """Waits for the save."""
        self._saver.finish()


class DcpAsyncSave:
    """Saves with `torch.distributed.checkpoint.async_save`."""

    def __init__(self, tensors: dict[str, torch.Tensor], root: Path) -> None:
        self._tensors, self._root = tensors, root
        self._future: Any = None

    def start(self, number: int) -> None:
        """Starts a save."""
        folder = self._root / f"async{number}"
        self._future = async_save(dict(self._tensors), checkpoint_id=folder)

    def is_busy(self) -> bool:
        """Returns whether the files are still being written."""
        return not self._future.done()

    def finish(self) -> None:
        """Waits for the save."""
        self._future.result()


def _time_ours(saver: CheckpointSaver, number: int, chunks: list[Any], optimizer: Any) -> Timing:
    begin = time.perf_counter()
    saver.save(_state(number), chunks, optimizer)
    blocked = time.perf_counter() - begin
    if saver.finish() != number:
        raise UserError("the checkpoint could not be written; see the log")
    return blocked, time.perf_counter() - begin


def _disk_alone(path: Path, num_bytes: int) -> Callable[[int], Timing]:
    """Returns a subject that writes a buffer with O_DIRECT and flushes it."""
    memory, tensor = page_aligned(CHUNK_BYTES)
    tensor.random_()
    data = memoryview(memory)[:CHUNK_BYTES]

    def write(number: int) -> Timing:
        begin = time.perf_counter()
        with closing(DirectFile(path.with_name(f"{path.name}_{number}"), num_bytes)) as file:
            chunks = [file.submit(k, data) for k in range(0, num_bytes, CHUNK_BYTES)]
            for chunk in chunks:
                chunk.result()
            file.finish()
        seconds = time.perf_counter() - begin
        return seconds, seconds

    return write


def _time_save(tensors: dict[str, torch.Tensor], folder: Path) -> Timing:
    begin = time.perf_counter()
    save(dict(tensors), checkpoint_id=folder)
    sync_tree(folder)
    seconds = time.perf_counter() - begin
    return seconds, seconds


def _time_async_save(tensors: dict[str, torch.Tensor], folder: Path) -> Timing:
    begin = time.perf_counter()
    future: Any = async_save(dict(tensors), checkpoint_id=folder)
    blocked = time.perf_counter() - begin
    future.result()
    sync_tree(folder)
    return blocked, time.perf_counter() - begin


class MegatronAsyncSave:
    """Saves as Megatron-LM does with ``--async-save``.

    Args:
        tensors: The tensors by name.
        root: The folder of the checkpoints.
        ranks: This process's ranks.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], root: Path, ranks: Ranks) -> None:
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self._tensors = {f"rank{ranks.process.rank}.{key}": value for key, value in tensors.items()}
        self._root = root
        self._queue = AsyncCallsQueue()

    def start(self, number: int) -> Path:
        """Starts a save and returns its folder."""
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        folder = self._root / f"megatron{number}"
        folder.mkdir(exist_ok=True)
        sharded = {
            name: ShardedTensor.from_rank_offsets(name, tensor)
            for name, tensor in self._tensors.items()
        }
        request = dist_checkpointing.save(sharded, str(folder), async_sharded_save=True)
        self._queue.schedule_async_request(request)
        return folder

    def is_busy(self) -> bool:
        """Publishes the save if all files are written, and returns whether they are not."""
        self._queue.maybe_finalize_async_calls(blocking=False)
        return bool(self._queue.get_num_unfinalized_calls())

    def finish(self) -> None:
        """Waits for the save."""
        self._queue.maybe_finalize_async_calls(blocking=True)

    def time(self, number: int) -> Timing:
        """Returns the seconds until training goes on, and until the checkpoint is durable."""
        begin = time.perf_counter()
        folder = self.start(number)
        blocked = time.perf_counter() - begin
        self.finish()
        sync_tree(folder)
        return blocked, time.perf_counter() - begin


def _steps_during_save(model: Any, save: AsyncSave) -> tuple[float, float]:
    """Returns the slowdown of a step during a save, and the seconds that training loses by one."""

    def step() -> float:
        begin = time.perf_counter()
        model.step()
        return time.perf_counter() - begin

    slowdowns, losses = [], []
    for number in range(_STEP_ROUNDS):
        alone = statistics.median(step() for _ in range(5))
        begin = time.perf_counter()
        save.start(1000 + number)
        blocked = time.perf_counter() - begin
        during = []
        while save.is_busy():
            during.append(step())
        save.finish()
        slowdowns.append(statistics.fmean(during) / alone if during else 1.0)
        losses.append(blocked + sum(during) - len(during) * alone)
    return statistics.median(slowdowns), statistics.median(losses)


def _row(
    name: str,
    values: list[Timing],
    timings: dict[str, list[Timing]],
    num_bytes: int,
    during_save: tuple[float, float] | None,
) -> Row:
    durable = statistics.median(seconds for _, seconds in values)
    ratios = [theirs / ours for (_, ours), (_, theirs) in zip(timings[OURS], values, strict=True)]
    return {
        "subject": name,
        "gigabytes": num_bytes / 1e9,
        "blocked_seconds_per_gb": statistics.median(blocked for blocked, _ in values)
        / (num_bytes / 1e9),
        "durable_seconds": durable,
        "durable_gb_per_second": num_bytes / 1e9 / durable,
        "ours_is_durable_sooner_by": statistics.median(ratios),
        "step_slowdown_during_save": None if during_save is None else during_save[0],
        "training_seconds_lost": None if during_save is None else during_save[1],
    }
