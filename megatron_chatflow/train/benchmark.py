"""Tokens a second of a training step, where its time goes, and peers beside it in the same run.

In: a shape. Out: a row for ours and, with ``--peers``, for transformers and for plain megatron-core
(its local layer spec) on the same shape and the same tokens. Rounds of the subjects alternate, so
that a machine whose speed drifts drifts for all of them; medians are reported. On CPUs the peers
are measured twice: with freed memory kept as our runs keep it, and as they come. Under torchrun,
ours alone, tensor-parallel over its processes.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import Any, Protocol

import torch

from megatron_chatflow.config.model_shape import flops_per_token
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.report_table import Row
from megatron_chatflow.runtime.launch import finalize, initialize, return_freed_memory
from megatron_chatflow.runtime.peak import peak_flops
from megatron_chatflow.runtime.ranks import ProcessRank, Ranks
from megatron_chatflow.train.benchmark_peer import PeerProcess
from megatron_chatflow.train.benchmark_shape import SHAPES, SUBJECT_SEED, Shape

OURS = "ours"
AS_IT_COMES = ", as it comes"


class Subject(Protocol):
    """Something that takes training steps."""

    def step(self) -> float:
        """Takes one step on the benchmark's tokens; returns the loss."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be chosen."""
    parser.add_argument("--preset", choices=list(SHAPES), default="58m", help="shape to train")
    parser.add_argument("--num-layers", type=int, help="instead of the preset's")
    parser.add_argument("--seq-length", type=int, help="instead of the preset's")
    parser.add_argument("--micro-batch-size", type=int, help="instead of the preset's")
    parser.add_argument("--num-rounds", type=int, default=7, help="measured rounds of each subject")
    parser.add_argument("--num-steps", type=int, default=1, help="steps of a round")
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes")


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The preset with what the command line changes.

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
            raise UserError(f"--{name.replace('_', '-')}: {value} is below 1")
    return Shape(**{**vars(SHAPES[arguments.preset]), **changes})


def run(arguments: argparse.Namespace) -> list[Row]:
    """Measures; see the module."""
    shape = shape_of(arguments)
    num_processes = ProcessRank.from_environment().world_size
    if arguments.peers and num_processes > 1:
        raise UserError("--peers: the peers run in one process; start without torchrun")
    ranks = initialize(tensor_model_parallel_size=num_processes)
    with ExitStack() as stack:
        stack.callback(finalize)
        from megatron_chatflow.train import benchmark_subjects as subjects

        tokens = shape.tokens(torch.Generator().manual_seed(SUBJECT_SEED))
        ours: dict[str, Subject] = {OURS: subjects.Ours(shape, tokens, ranks)}
        peers: dict[str, Subject] = {}
        if arguments.peers:
            peers = {name: peer(shape, tokens, ranks) for name, peer in subjects.PEERS.items()}
        seconds = measure(ours | peers, arguments.num_rounds, arguments.num_steps, ranks)
        rows = _rows(seconds, shape, ranks)
        if arguments.peers and not ranks.is_cuda:
            peers.clear()
            # What they held is needed by the next ones, in processes of their own.
            gc.collect()
            return_freed_memory()
            for name in subjects.PEERS:
                rows.append(_as_it_comes(name, ours, shape, arguments, ranks))
        if arguments.profile:
            from megatron_chatflow.train.benchmark_profile import profile_rows

            rows += profile_rows(ours[OURS].step, shape, ranks)
    if ranks.process.rank:
        raise SystemExit(0)  # the first process reports
    return rows


def _as_it_comes(
    name: str,
    ours: dict[str, Subject],
    shape: Shape,
    arguments: argparse.Namespace,
    ranks: Ranks,
) -> Row:
    """A peer's row from a process of its own, beside ours in the same rounds."""
    with closing(PeerProcess(name, shape)) as peer:
        subjects = {**ours, name + AS_IT_COMES: peer}
        seconds = measure(subjects, arguments.num_rounds, arguments.num_steps, ranks)
    return _rows(seconds, shape, ranks)[1]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures by subject, as checks outside the project read them."""
    return {
        str(row["subject"]): {"tokens_per_second": row["tokens_per_second"]}
        for row in rows
        if "subject" in row
    }


def measure(
    subjects: dict[str, Subject], num_rounds: int, num_steps: int, ranks: Ranks
) -> dict[str, list[float]]:
    """Seconds of a step, per subject and round; the first round of each is not counted."""
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
