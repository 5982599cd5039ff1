"""Detects slow ranks by their time in forward and backward passes and waiting for data.

The timers that megatron-core's schedules call measure both passes on every rank; each log compares
the ranks. Times between the passes, in which ranks wait for each other, are not counted. The ranks
of a tensor-parallel group synchronize inside the passes, so they share the time of their slowest.
On CUDA with NVML bindings, megatron-core's own detector also reads temperature, power, utilization
and clock.
"""

import importlib.util
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.training.callbacks import Callback

TIMES = ("forward_seconds", "backward_seconds", "data_seconds")
READINGS = ("gpu_temperature", "gpu_power", "gpu_utilization", "gpu_clock")

logger = logging.getLogger(__name__)


class _Timer:
    """Sums the time between `start` and `stop`, measured by CUDA events on a GPU."""

    def __init__(self, is_cuda: bool, is_counted: bool) -> None:
        self._is_cuda = is_cuda
        self._is_counted = is_counted
        self._seconds = 0.0
        self._begin = 0.0
        self._events: list[tuple[Any, Any]] = []

    def start(self, barrier: bool = False) -> None:
        """Starts the timer; ``barrier`` is part of megatron-core's interface and ignored."""
        if not self._is_counted:
            return
        if self._is_cuda:
            event: Any = torch.cuda.Event  # typed in some of torch's releases alone
            pair = (event(enable_timing=True), event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)
        else:
            self._begin = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        """Stops the timer."""
        if not self._is_counted:
            return
        if self._is_cuda:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._begin

    def read_and_reset(self) -> float:
        """Returns the seconds since the last call."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class ComputeTimers:
    """The object that megatron-core calls as ``config.timers``; it times the two passes only.

    ``is_on`` is whether time is measured now, which excludes validation.
    """

    def __init__(self, is_cuda: bool) -> None:
        self._nothing = _Timer(is_cuda, is_counted=False)
        self._timers = {
            "forward-compute": _Timer(is_cuda, is_counted=True),
            "backward-compute": _Timer(is_cuda, is_counted=True),
        }
        self.is_on = False

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """Returns the timer of a part."""
        return self._timers.get(name, self._nothing) if self.is_on else self._nothing

    def read_and_reset(self) -> tuple[float, float]:
        """Returns the seconds of forward and backward passes since the last call."""
        forward, backward = self._timers["forward-compute"], self._timers["backward-compute"]
        return forward.read_and_reset(), backward.read_and_reset()


@dataclass(frozen=True)
class PartReport:
    """One quantity over all ranks: times in seconds per iteration, readings in NVML's units."""

    min: float
    min_rank: int
    median: float
    max: float
    max_rank: int


@dataclass(frozen=True)
class SlowRank:
    """A slow rank."""

    rank: int
    host: str  # its node
    ratio: float  # its time in both passes over the median of the ranks in its pipeline stage


@dataclass(frozen=True)
class StragglerReport:
    """Comparison of the ranks: each quantity, and the slowest ranks, slowest first."""

    parts: dict[str, PartReport]
    slowest: tuple[SlowRank, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns the object for ``metrics.jsonl``."""
        return {
            **{name: vars(part) for name, part in self.parts.items()},
            "slowest": [vars(rank) for rank in self.slowest],
        }


class StragglerDetector(Callback):
    """Times this rank's steps and compares all ranks at each log.

    The model's configuration needs its ``timers``.
    """

    def __init__(self, ranks: Ranks, num_listed: int) -> None:
        """Gathers every rank's node and pipeline stage; every rank calls it."""
        self.timers = ComputeTimers(ranks.is_cuda)
        self._device = ranks.device
        self._num_listed = num_listed
        place = (os.uname().nodename, ranks.pipeline_parallel_rank)
        places: list[Any] = [None] * ranks.process.world_size
        torch.distributed.all_gather_object(places, place)
        self._places: list[tuple[str, int]] = places
        self._detector = _core_detector(ranks)

    def before_step(self, iteration: int) -> None:
        """Starts measuring."""
        self.timers.is_on = True

    def after_step(self, iteration: int) -> None:
        """Stops measuring."""
        self.timers.is_on = False

    def report(self, num_iterations: int, data_seconds: float) -> StragglerReport:
        """Compares the ranks over ``num_iterations``; every rank calls it.

        ``data_seconds`` is this rank's mean wait for a batch.
        """
        forward, backward = (seconds / num_iterations for seconds in self.timers.read_and_reset())
        figures = [forward, backward, data_seconds, *self._readings()]
        own = torch.tensor(figures, dtype=torch.float64, device=self._device)
        rows = [torch.empty_like(own) for _ in self._places]
        torch.distributed.all_gather(rows, own)
        return compare(torch.stack(rows).tolist(), self._places, self._num_listed)

    def _readings(self) -> list[float]:
        """Reads this rank's GPU sensors; NaN where that fails."""
        if self._detector is None:
            return []
        try:
            return [float(value) for value in self._detector.elapsed()[2:]]
        except Exception as error:
            logger.warning("megatron-core's straggler detector failed: %s", error)
            return [math.nan] * len(READINGS)


def compare(
    rows: Sequence[Sequence[float]], places: Sequence[tuple[str, int]], num_listed: int
) -> StragglerReport:
    """Compares the ranks and lists the ``num_listed`` slowest ones.

    Args:
        rows: `TIMES` of every rank, followed by `READINGS` if there are any.
        places: Node and pipeline stage of every rank.
        num_listed: Number of slowest ranks to list.
    """
    parts = {}
    for name, column in zip((*TIMES, *READINGS), zip(*rows, strict=True), strict=False):
        if not all(map(math.isfinite, column)):
            continue
        low, high = min(column), max(column)
        middle = median(column)
        parts[name] = PartReport(low, column.index(low), middle, high, column.index(high))
    computing = [row[0] + row[1] for row in rows]
    ratios = []
    for rank, (host, stage) in enumerate(places):
        peers = [time for time, place in zip(computing, places, strict=True) if place[1] == stage]
        ratios.append(SlowRank(rank, host, computing[rank] / (median(peers) or 1.0)))
    slowest = sorted(ratios, key=lambda one: (-one.ratio, one.rank))[:num_listed]
    return StragglerReport(parts, tuple(slowest))


def _core_detector(ranks: Ranks) -> Any | None:
    """Returns megatron-core's configured `StragglerDetector`; None if any rank cannot run it.

    Its control port, through which anybody could switch it off, is not opened.
    """
    has_nvml = importlib.util.find_spec("pynvml") is not None
    able = torch.tensor(int(ranks.is_cuda and has_nvml), device=ranks.device)
    torch.distributed.all_reduce(able, op=torch.distributed.ReduceOp.MIN)
    if not able.item():
        why = "pynvml is not installed on every node" if ranks.is_cuda else "it needs CUDA"
        logger.info("stragglers: megatron-core's detector is not used (%s)", why)
        return None
    from megatron.core.utils import StragglerDetector

    detector = StragglerDetector()
    detector._controller = lambda: None
    detector.configure(ranks.process.world_size, ranks.process.rank, enabled=True)
    return detector
