"""Tokens per second of a training step, beside peers measured in the same run.

Prints a row for our step and, with ``--peers``, for transformers and for plain megatron-core (its
local layer spec) with the same shape and tokens, each in a process of its own. Their rounds
alternate with ours, so that drift of the machine's speed affects both; medians are reported. On
CPUs a peer is measured twice: with freed memory kept, as in our runs, and with default settings.
``--tensor-parallel N`` also measures our step over N processes of this machine. Unless
``--mock-data`` is given, our step is also measured on data read by the loader, with the time it
waits for batches. ``--ema`` also measures it with ``--ema-decay``. Under torchrun only our step is
measured, tensor-parallel over all processes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from benchmarks.corpora import BenchmarkVocabulary, write_corpus
from benchmarks.peer_process import PeerProcess
from benchmarks.shapes import OURS, SHAPES, SUBJECT_SEED, Shape
from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.config import DataConfig, KnotConfig, ScheduleConfig, SourceConfig
from megatron_chatflow.config.shape import flops_per_token
from megatron_chatflow.data.loader import Loader
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.device import peak_flops
from megatron_chatflow.runtime.launch import finalize, initialize
from megatron_chatflow.runtime.ranks import ProcessRank, Ranks
from megatron_chatflow.runtime.table import Row

ON_DATA = "ours, on data"
AVERAGED = "ours, with --ema-decay"
_SOURCE = "mock"  # the name that the guard of `training_steps.Ours` knows
_NUM_TOKENS = 20_000_000  # tokens of a made-up dataset: 40 MB
DEFAULT_MALLOC_SUFFIX = ", as it comes"


class Subject(Protocol):
    """A model that can be trained step by step."""

    def step(self) -> float:
        """Runs one training step on the benchmark's tokens and returns the loss."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument(
        "--preset", choices=list(SHAPES), default="58m", help="model shape; default: %(default)s"
    )
    parser.add_argument("--num-layers", type=int, help="override the preset")
    parser.add_argument("--seq-length", type=int, help="override the preset")
    parser.add_argument("--micro-batch-size", type=int, help="override the preset")
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="recompute activations from the input of each layer in our step",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="also measure our step with N processes, on CPUs",
    )
    parser.add_argument(
        "--num-rounds", type=int, default=7, help="rounds per subject; default: %(default)s"
    )
    parser.add_argument(
        "--num-steps", type=int, default=1, help="steps per round; default: %(default)s"
    )
    parser.add_argument(
        "--mock-data", action="store_true", help="measure only with tokens in memory"
    )
    parser.add_argument("--data", type=Path, help="prefix of a dataset (default: a random one)")
    parser.add_argument(
        "--sequence-parallel", action="store_true", help="use sequence parallelism (under torchrun)"
    )
    parser.add_argument(
        "--ema", action="store_true", help="also measure our step with an average of the weights"
    )
    parser.add_argument("--profile", action="store_true", help="also profile our step")


def shape_of(arguments: argparse.Namespace) -> Shape:
    """Returns the preset with the changes of the command line.

    Raises:
        UserError: A size is below 1.
    """
    changes = {
        name: value
        for name in ("num_layers", "seq_length", "micro_batch_size")
        if (value := getattr(arguments, name)) is not None
    }
    for name, value in changes.items():
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, not {value}")
    preset = SHAPES[arguments.preset]
    return replace(preset, **changes, recompute=preset.recompute or arguments.recompute)


def run(arguments: argparse.Namespace) -> list[Row]:
    """Runs the benchmark, see the module docstring."""
    shape = shape_of(arguments)
    num_processes = ProcessRank.from_environment().world_size
    if arguments.peers and num_processes > 1:
        raise UserError("--peers: the peers run in one process; run without torchrun")
    if arguments.tensor_parallel is not None:
        _check_tensor_parallel(arguments.tensor_parallel, shape, num_processes)
    ranks = initialize(tensor_model_parallel_size=num_processes)
    with ExitStack() as stack:
        stack.callback(finalize)
        from benchmarks import training_steps as subjects

        tokens = shape.tokens(torch.Generator().manual_seed(SUBJECT_SEED))
        ours = subjects.Ours(shape, tokens, ranks, sequence_parallel=arguments.sequence_parallel)
        if arguments.peers:
            rows = _beside_peers(ours, list(subjects.PEERS), shape, arguments, ranks)
        else:
            seconds = measure({OURS: ours}, arguments.num_rounds, arguments.num_steps, ranks)
            rows = _rows(seconds, shape, ranks)
        if arguments.tensor_parallel is not None:
            rows += _beside_tensor_parallel(ours, shape, arguments, ranks)
        if arguments.ema:
            averaged = subjects.Averaged(ours)
            seconds = measure(
                {OURS: ours, AVERAGED: averaged}, arguments.num_rounds, arguments.num_steps, ranks
            )
            rows.append(_rows(seconds, shape, ranks)[1])
        if not arguments.mock_data:
            rows.append(_on_data(ours, shape, arguments, ranks))
        if arguments.profile:
            from benchmarks.step_profile import profile_rows

            rows += profile_rows(ours.step, shape, ranks)
    if ranks.process.rank:
        raise SystemExit(0)  # the first process reports
    return rows


def _check_tensor_parallel(size: int, shape: Shape, num_processes: int) -> None:
    if num_processes > 1:
        raise UserError("--tensor-parallel: starts its own processes; run without torchrun")
    if torch.cuda.is_available():
        raise UserError(
            "--tensor-parallel: only works on CPUs; on GPUs, run the benchmark with torchrun"
        )
    heads = shape.num_query_groups
    if size < 2 or heads % size:
        raise UserError(f"--tensor-parallel: {size} must be at least 2 and divide {heads} heads")


def _on_data(ours: Any, shape: Shape, arguments: argparse.Namespace, ranks: Ranks) -> Row:
    """Measures our step on data from files. Its rounds alternate with those on mock data."""
    with (
        tempfile.TemporaryDirectory() as folder,
        OnData(ours, shape, arguments.data, Path(folder)) as on_data,
    ):
        seconds = measure(
            {OURS: ours, ON_DATA: on_data}, arguments.num_rounds, arguments.num_steps, ranks
        )
        wait = on_data.median_wait()
    return {
        **_rows(seconds, shape, ranks)[1],
        "loader_wait_ms": 1000 * wait,
        "loader_stall": wait / statistics.median(seconds[ON_DATA]),
    }


class OnData(AbstractContextManager["OnData"]):
    """Our training step on batches from files.

    Attributes:
        waits: Seconds that each step waited for its batch.
    """

    def __init__(self, ours: Any, shape: Shape, prefix: Path | None, folder: Path) -> None:
        """Opens the dataset, or writes a random one to ``folder``.

        Raises:
            UserError: The dataset cannot be read, or has ids outside of the shape's vocabulary.
        """
        if prefix is None:
            prefix = folder / "corpus"
            write_corpus(prefix, max(_NUM_TOKENS, 64 * shape.num_tokens), shape.vocab_size)
        config = DataConfig(
            seq_length=shape.seq_length,
            sources={_SOURCE: SourceConfig(paths=(prefix,))},
            schedule=ScheduleConfig(knots=(KnotConfig(at=0, weights={_SOURCE: 1.0}),)),
        )
        vocabulary = BenchmarkVocabulary(vocab_size=shape.vocab_size)
        sources = build_sources(config, seed=1, tokenizer=vocabulary)
        schedule = Schedule.from_dict(
            {"knots": [{"at": 0, "weights": {_SOURCE: 1.0}}]},
            sources=[_SOURCE],
            samples_per_iteration=shape.micro_batch_size,
            seq_length=shape.seq_length,
        )
        self.waits: list[float] = []
        self._ours, self._vocab_size = ours, shape.vocab_size
        self._loader = Loader(
            sources,
            Blend(schedule),
            seq_length=shape.seq_length,
            micro_batch_size=shape.micro_batch_size,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        self._batches = self._loader.batches(0, shape.micro_batch_size)

    def step(self) -> float:
        """Runs one training step and returns the loss."""
        begin = time.perf_counter()
        batch = next(self._batches)
        self.waits.append(time.perf_counter() - begin)
        highest = int(max(micro_batch.tokens.max() for micro_batch in batch.micro_batches))
        if highest >= self._vocab_size:
            raise UserError(
                f"--data: token id {highest} is outside the vocabulary of {self._vocab_size} "
                "tokens of the model shape"
            )
        return float(self._ours.step(batch))

    def median_wait(self) -> float:
        """Returns the median wait in seconds, without the first batch, which is not prefetched."""
        return statistics.median(self.waits[1:])

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Stops the loader's threads."""
        self._loader.close()


def _beside_peers(
    ours: Subject, names: Sequence[str], shape: Shape, arguments: argparse.Namespace, ranks: Ranks
) -> list[Row]:
    """Measures each peer in turn. Its rounds alternate with ours."""
    variants = [(name, True) for name in names]
    if not ranks.is_cuda:
        variants += [(name, False) for name in names]
    rows: list[Row] = []
    our_seconds: list[float] = []
    for name, keep_freed_memory in variants:
        subject = name if keep_freed_memory else name + DEFAULT_MALLOC_SUFFIX
        with closing(PeerProcess(name, shape, keep_freed_memory=keep_freed_memory)) as peer:
            seconds = measure(
                {OURS: ours, subject: peer}, arguments.num_rounds, arguments.num_steps, ranks
            )
        our_seconds += seconds[OURS]
        rows.append(_rows(seconds, shape, ranks)[1])
    return _rows({OURS: our_seconds}, shape, ranks) + rows


def _beside_tensor_parallel(
    ours: Subject, shape: Shape, arguments: argparse.Namespace, ranks: Ranks
) -> list[Row]:
    """Measures our step over several processes, with and without sequence parallelism."""
    num_processes = arguments.tensor_parallel
    rows: list[Row] = []
    for name, switches in (
        (f"ours, {num_processes} processes", {}),
        (f"ours, {num_processes} processes, sequence-parallel", {"sequence_parallel": True}),
    ):
        with closing(PeerProcess(OURS, shape, num_processes=num_processes, **switches)) as cut:
            seconds = measure(
                {OURS: ours, name: cut}, arguments.num_rounds, arguments.num_steps, ranks
            )
        rows.append(_rows(seconds, shape, ranks)[1])
    return rows


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the figures by subject, in the form that external checks read."""
    return {
        str(row["subject"]): {"tokens_per_second": row["tokens_per_second"]}
        for row in rows
        if "subject" in row
    }


def measure(
    subjects: dict[str, Subject], num_rounds: int, num_steps: int, ranks: Ranks
) -> dict[str, list[float]]:
    """Returns seconds per step for each subject and round, without the first round of each."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(num_rounds + 1):
        for name, subject in subjects.items():
            elapsed = _time(subject.step, num_steps, ranks)
            if number:
                seconds[name].append(elapsed / num_steps)
    return seconds


def _time(step: Callable[[], float], num_steps: int, ranks: Ranks) -> float:
    if ranks.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(num_steps):
        step()
    if ranks.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _rows(seconds: dict[str, list[float]], shape: Shape, ranks: Ranks) -> list[Row]:
    flops = flops_per_token(shape.model_config(), shape.vocab_size, shape.seq_length)
    peak, _ = peak_flops(ranks.device, torch.bfloat16)
    rows: list[Row] = []
    for name, values in seconds.items():
        rate = shape.num_tokens / statistics.median(values)
        ratios = [other / own for own, other in zip(seconds[OURS], values, strict=True)]
        rows.append(
            {
                "subject": name,
                "tokens_per_second": rate,
                "best_tokens_per_second": shape.num_tokens / min(values),
                "tflops": rate * flops / 1e12,
                "mfu": rate * flops / peak if peak else None,
                "ours_is_faster_by": statistics.median(ratios),
            }
        )
    return rows
