"""Time per draw of the blend: the first batch, sequential draws, and random access.

Prints one row per schedule: milliseconds from a schedule to its first global batch and to one at a
random place in a new blend (the worst of several places), nanoseconds per sample in sequence
(median and best of the rounds), bytes held, and the largest distance of any count from its quota
over the first samples, in samples, rounded down.

megatron-core's blending index supports only constant weights and draws the whole run before its
first sample. Runs too long for that are extrapolated from a shorter one; the column ``basis`` says
so.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.engine import make_engine
from megatron_chatflow.blend.quota import GRID
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.runtime import load_extension
from megatron_chatflow.runtime.table import Row

extension = load_extension("blend")

OURS, PEER = "megatron_chatflow", "megatron-core"
RAMPS = ("constant", "linear", "cosine")

_NUM_KNOTS = 6
_NUM_PLACES = 20
_NUM_ROUNDS = 5
_ROUND_SAMPLES = 1 << 17
_LEAF = 1 << 16
_ERROR_SAMPLES = 100_000
_PEER_SAMPLES = 1_000_000
_SCALES = (10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12)
_SCALE_SOURCES = (4, 16, 64, 256, 512)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument(
        "--num-samples", type=int, default=10**9, help="samples of the run; default: %(default)s"
    )
    parser.add_argument("--num-sources", type=int, nargs="+", default=[4, 64, 512])
    parser.add_argument("--samples-per-iteration", type=int, default=512)
    parser.add_argument(
        "--scaling", action="store_true", help="also measure runs of 1e6 to 1e12 samples"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    """Runs the benchmark, see the module docstring."""
    cases = [
        (arguments.num_samples, num_sources, ramp)
        for num_sources in arguments.num_sources
        for ramp in RAMPS
    ]
    if arguments.scaling:
        cases += [(scale, number, "linear") for scale in _SCALES for number in _SCALE_SOURCES]
    return list(_rows(cases, arguments.samples_per_iteration, with_peer=arguments.peers))


def _rows(
    cases: list[tuple[int, int, str]], samples_per_iteration: int, *, with_peer: bool
) -> Iterator[Row]:
    peer = _peer_builder() if with_peer else None
    rates: dict[int, dict[str, float]] = {}
    shown: set[tuple[int, int]] = set()
    for num_samples, num_sources, ramp in cases:
        schedule = random_schedule(num_samples, num_sources, ramp, samples_per_iteration)
        yield {
            "num_samples": num_samples,
            "num_sources": num_sources,
            "ramp": ramp,
            "by": OURS if extension is not None else f"{OURS} (reference)",
            "basis": "measured",
            **measure(schedule, num_samples),
        }
        if peer is None or (num_samples, num_sources) in shown:
            continue
        shown.add((num_samples, num_sources))
        if num_sources not in rates:
            rates[num_sources] = _measure_peer(peer, num_sources)
        yield _peer_row(num_samples, num_sources, rates[num_sources])


def random_schedule(
    num_samples: int, num_sources: int, ramp: str, samples_per_iteration: int
) -> Schedule:
    """Makes a schedule of random weights, a quarter of them 0: one knot, or five ramps.

    Args:
        num_samples: Number of samples over which the knots are spread.
        num_sources: Number of sources.
        ramp: ``constant`` (one knot), ``linear`` or ``cosine``.
        samples_per_iteration: Samples that share one evaluation of the weights.
    """
    rng = np.random.default_rng(num_sources)
    names = [f"source_{k}" for k in range(num_sources)]
    knots: list[dict[str, Any]] = []
    for knot in range(1 if ramp == "constant" else _NUM_KNOTS):
        weights = rng.random(num_sources) * (rng.random(num_sources) > 0.25)
        weights[rng.integers(num_sources)] = 1.0
        knots.append(
            {
                "at": num_samples * knot // _NUM_KNOTS,
                "weights": dict(zip(names, weights.tolist(), strict=True)),
                "ramp": "step" if ramp == "constant" else ramp,
            }
        )
    return Schedule.from_dict({"knots": knots}, names, samples_per_iteration)


def measure(schedule: Schedule, num_samples: int) -> dict[str, float | int | None]:
    """Measures our blend.

    Args:
        schedule: Schedule of the run.
        num_samples: Number of samples of the run.
    """
    batch = schedule.samples_per_iteration
    rng = random.Random(1)
    places = [rng.randrange(max(1, num_samples - batch)) for _ in range(_NUM_PLACES)]

    def start(at: int) -> None:
        Blend(schedule).take(at, at + batch)

    return {
        "first_batch_ms": 1e3 * _seconds(partial(start, 0)),
        # The better of two tries, so that other activity of the machine does not count as the worst
        # case.
        "cold_ms": 1e3 * max(min(_seconds(partial(start, at)) for _ in range(2)) for at in places),
        **_measure_consecutive_batches(schedule, num_samples),
        "held_bytes": _held_bytes(schedule, num_samples),
        "worst_error": _rounded_down(worst_error(schedule, num_samples)),
    }


def _rounded_down(error: float) -> float:
    """Rounds down to four digits, so that the reported error never exceeds the observed one."""
    return math.floor(1e4 * error) / 1e4


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _measure_consecutive_batches(schedule: Schedule, num_samples: int) -> dict[str, float]:
    """Measures nanoseconds per sample of consecutive global batches."""
    batch = schedule.samples_per_iteration
    blend = Blend(schedule)
    size = min(_ROUND_SAMPLES, num_samples // 2)
    rounds = []
    for number in range(_NUM_ROUNDS):
        # Rounds begin at a leaf. Samples drawn earlier belong to the previous leaf, so every sample
        # of a round is drawn within the round.
        begin = (num_samples - size) * number // _NUM_ROUNDS // _LEAF * _LEAF
        blend.take(max(begin - 1, 0), begin)

        def draw(begin: int = begin) -> None:
            for at in range(begin, begin + size, batch):
                blend.take(at, min(at + batch, begin + size))

        rounds.append(1e9 * _seconds(draw) / size)
    return {
        "ns_per_sample": statistics.median(rounds),
        "best_ns_per_sample": min(rounds),
    }


def _held_bytes(schedule: Schedule, num_samples: int) -> int | None:
    """Returns the engine's memory in bytes in the middle of the run; None for the reference."""
    zeros = [0] * len(schedule.sources)
    engine: Any = make_engine(schedule.table(), 0, zeros, zeros)
    engine.take(num_samples // 2, num_samples // 2 + 1)
    return int(engine.num_bytes()) if extension is not None else None


def worst_error(schedule: Schedule, num_samples: int) -> float:
    """Returns the largest distance of a count from its quota over the first samples, in samples.

    Args:
        schedule: Schedule of the run.
        num_samples: Number of samples of the run.
    """
    num_samples = min(num_samples, _ERROR_SAMPLES)
    batch = schedule.samples_per_iteration
    source, _ = Blend(schedule).take(0, num_samples)
    worst = 0
    lag = np.zeros(len(schedule.sources), np.int64)
    for begin in range(0, num_samples, batch):
        drawn = source[begin : begin + batch]
        passed = np.arange(1, len(drawn) + 1)[:, None] * schedule.weights(begin)[None, :]
        counts = np.cumsum(drawn[:, None] == np.arange(len(lag))[None, :], axis=0)
        lags = lag[None, :] + passed - counts * GRID
        worst = max(worst, int(np.abs(lags).max()))
        lag = lags[-1]
    return worst / GRID


Builder = Callable[..., None]


def _peer_builder() -> Builder | None:
    """Returns megatron-core's compiled function; None if it is not available."""
    try:
        from megatron.core.datasets.helpers_cpp import build_blending_indices
    except ImportError:
        return None
    builder: Builder = build_blending_indices
    return builder


def _measure_peer(build: Builder, num_sources: int) -> dict[str, float]:
    """Measures the peer with the weights of the first knot."""
    weights = random_schedule(1, num_sources, "constant", 1).weights(0) / GRID
    source = np.zeros(_PEER_SAMPLES, np.int16)
    index = np.zeros(_PEER_SAMPLES, np.int64)
    rounds = [
        _seconds(lambda: build(source, index, weights, num_sources, _PEER_SAMPLES, False))
        for _ in range(3)
    ]
    return {
        "ns_per_sample": 1e9 * statistics.median(rounds) / _PEER_SAMPLES,
        "best_ns_per_sample": 1e9 * min(rounds) / _PEER_SAMPLES,
        "worst_error": _rounded_down(_float_error(source[:_ERROR_SAMPLES], weights)),
    }


def _float_error(source: npt.NDArray[np.int16], weights: npt.NDArray[np.float64]) -> float:
    worst = 0.0
    for k, weight in enumerate(weights):
        counts = np.cumsum(source == k)
        worst = max(worst, float(np.abs(counts - weight * np.arange(1, len(source) + 1)).max()))
    return worst


def _peer_row(num_samples: int, num_sources: int, rates: dict[str, float]) -> Row:
    """Returns the peer's costs: it draws the whole run first, at 2 + 8 bytes per sample."""
    start = 1e-6 * rates["ns_per_sample"] * num_samples
    return {
        "num_samples": num_samples,
        "num_sources": num_sources,
        "ramp": "constant",
        "by": PEER,
        "basis": "measured" if num_samples == _PEER_SAMPLES else "projected from 1e6",
        "first_batch_ms": start,
        "cold_ms": start,
        "ns_per_sample": rates["ns_per_sample"],
        "best_ns_per_sample": rates["best_ns_per_sample"],
        "held_bytes": 10 * num_samples,
        "worst_error": rates["worst_error"],
    }
