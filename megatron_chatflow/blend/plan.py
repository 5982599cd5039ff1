"""The plan of a run: planned and realised mixture, epochs per source, and limits on them.

`plan` returns a `PlanRow` for each source in each phase. A phase is the part of the run between two
knots. `to_table` and `to_csv` format the rows. `mixture_curve` returns the same data for a plot.
`check_epochs` raises an error if a run repeats a source more often than its ``max_epochs`` allows.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megatron_chatflow.blend.adaptive import AdaptiveBlend
from megatron_chatflow.blend.blend import MAX_SAMPLES, Blend
from megatron_chatflow.blend.objective import ObjectiveWeights
from megatron_chatflow.blend.quota import GRID
from megatron_chatflow.config.learning_rate import learning_rates
from megatron_chatflow.config.run_length import RunLength
from megatron_chatflow.config.sections import OptimizerConfig
from megatron_chatflow.errors import UserError

_MIN_SAMPLES_PER_BIN = 100
MANY_EPOCHS = 4.0
"""Up to about four epochs, repeated text is worth nearly as much as new text (Muennighoff et al.,
"Scaling Data-Constrained Language Models", NeurIPS 2023)."""
_MAX_RATES = 1 << 20
NUM_PARTS = 10
"""Number of rows of `learning_rate_table`."""
_POINTS_PER_PHASE = 1 + 64
"""A cosine ramp consists of 64 chords."""


@dataclass(frozen=True)
class PlanRow:
    """One source in one phase."""

    phase: int  # number of the phase, from 1
    begin: int  # first sample of the phase
    end: int  # first sample after the phase
    source: str
    planned: float  # sum of the source's weights over the phase, in samples
    realised: int  # samples drawn from the source in the phase
    planned_share: float  # ``planned`` as a share of the phase
    realised_share: float  # ``realised`` as a share of the phase
    # realised share of the tokens that weights count; that of the samples if they count samples
    counted_share: float
    # epochs of the source that were drawn from the begin of the run to the end of the phase; None
    # if the size of an epoch is unknown
    epochs: float | None


def plan(
    blend: Blend, num_samples: int, samples_per_epoch: Mapping[str, int] | None = None
) -> list[PlanRow]:
    """Computes the planned and the realised mixture of every phase and source, in this order.

    ``samples_per_epoch`` has the sizes of sources. The epochs of missing sources are None.
    """
    sizes = samples_per_epoch or {}
    edges = [0, *blend.knots_before(num_samples), num_samples]
    counts = [blend.counts(edge) for edge in edges]
    quotas = [blend.quotas(edge) for edge in edges]
    rows = []
    tokens = blend.schedule.tokens
    means = [1.0 if tokens is None else tokens.mean(name) for name in blend.schedule.sources]
    for phase, (begin, end) in enumerate(zip(edges, edges[1:], strict=False), 1):
        counted = [
            int(after - before) * mean
            for before, after, mean in zip(counts[phase - 1], counts[phase], means, strict=True)
        ]
        for k, name in enumerate(blend.schedule.sources):
            planned = (quotas[phase][k] - quotas[phase - 1][k]) / GRID
            realised = int(counts[phase][k] - counts[phase - 1][k])
            size = sizes.get(name)
            rows.append(
                PlanRow(
                    phase=phase,
                    begin=begin,
                    end=end,
                    source=name,
                    planned=planned,
                    realised=realised,
                    planned_share=planned / (end - begin),
                    realised_share=realised / (end - begin),
                    counted_share=counted[k] / (math.fsum(counted) or 1.0),
                    epochs=int(counts[phase][k]) / size if size else None,
                )
            )
    return rows


def check_epochs(
    blend: Blend,
    length: RunLength,
    samples_per_epoch: Mapping[str, int],
    max_epochs: Mapping[str, float],
) -> None:
    """Checks that a run does not repeat a source more often than allowed.

    Args:
        blend: The blend.
        length: The length of the run.
        samples_per_epoch: Samples per epoch by source.
        max_epochs: Maximum number of epochs by source. Missing sources have no limit.

    Raises:
        UserError: A source exceeds its limit. The message names the first such source and the
            iteration, counted from 1.
    """
    num_samples = length.num_samples
    found = []
    for name, limit in max_epochs.items():
        allowed = int(min(limit * samples_per_epoch[name], MAX_SAMPLES))
        sample = blend.first_draw(blend.sources.index(name), allowed)
        if sample is not None and sample < num_samples:
            found.append((sample, name))
    if not found:
        return
    sample, name = min(found)
    size = samples_per_epoch[name]
    k = blend.sources.index(name)
    # Round up, so that the number in the message is sufficient as a new limit.
    needed = math.ceil(1000 * int(blend.counts(num_samples)[k]) / size) / 1000 if size else math.inf
    shown = _decimal(max_epochs[name])
    raise UserError(
        f"data.sources.{name}.max_epochs: {shown} epochs of {size} samples are exceeded "
        f"{'at' if sample >= length.consumed_samples else 'before'} iteration "
        f"{length.iteration_of(sample)} (sample {sample}): "
        f"lower its weight in data.schedule, or raise max_epochs to the {_decimal(needed)} that "
        "the whole run needs"
    )


def epoch_findings(
    blend: Blend,
    num_samples: int,
    samples_per_epoch: Mapping[str, int],
    max_epochs: Mapping[str, float],
) -> list[str]:
    """Reports, in one line each, the sources that a run repeats more than `MANY_EPOCHS` times.

    Sources of unknown or no size are skipped, as are those in ``max_epochs``, because the user
    chose a limit that `check_epochs` enforces.
    """
    findings = []
    for name, count in zip(blend.schedule.sources, blend.counts(num_samples).tolist(), strict=True):
        size = samples_per_epoch.get(name)
        if not size or name in max_epochs or count <= MANY_EPOCHS * size:
            continue
        findings.append(
            f"data.sources.{name}: {count / size:,.1f} epochs in this run ({count:,} samples from "
            f"{size:,}): lower its weight in data.schedule, add data, or set max_epochs to accept "
            "the repetition"
        )
    return findings


def _decimal(value: float) -> str:
    """Formats a float as the shortest decimal that is parsed to it, without an exponent."""
    return np.format_float_positional(value, trim="-")


def to_csv(rows: Sequence[PlanRow]) -> str:
    """Formats rows as CSV with a header; unknown epochs are empty."""
    text = io.StringIO()
    names = [field.name for field in fields(PlanRow)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def to_table(rows: Sequence[PlanRow], blend: Blend) -> list[dict[str, str | int | float | None]]:
    """Formats the rows of `plan` for a text table, with phases in the unit of the schedule."""
    unit, seq_length = blend.schedule.unit, blend.schedule.seq_length or 1
    counts = blend.schedule.count
    label = counts.replace("_", " ")
    return [
        {
            f"phase ({unit})": f"{blend.position(row.begin):,} to {blend.position(row.end):,}",
            "source": row.source,
            "planned": f"{row.planned_share:.4%}",
            "realised": f"{row.realised_share:.4%}",
            **({} if counts == "samples" else {f"of {label}": f"{row.counted_share:.4%}"}),
            "samples": row.realised,
            **({"tokens": row.realised * seq_length} if unit == "tokens" else {}),
            "epochs so far": row.epochs,
        }
        for row in rows
    ]


def objective_table(
    objective: ObjectiveWeights, blend: Blend, num_samples: int
) -> list[dict[str, str | int | float | None]]:
    """Lists the weights of all sources in the objective at the begin and end of every phase.

    Positions are in the unit of the schedule.
    """
    edges = sorted({0, *objective.samples_before(num_samples), num_samples - 1})
    return [
        {
            f"at ({blend.schedule.unit})": f"{blend.position(sample):,}",
            **{n: f"{w:g}" for n, w in zip(objective.sources, objective.at(sample), strict=True)},
        }
        for sample in edges
    ]


def decision_table(
    blend: AdaptiveBlend, num_rows: int | None = None
) -> list[dict[str, str | int | float | None]]:
    """Lists the weights that were decided, by horizons with the same weights.

    ``num_rows`` limits the table to the last rows.
    """
    rows: list[tuple[int, int, list[int]]] = []
    for number, weights in enumerate(blend.decisions()):
        begin, end = number * blend.horizon, (number + 1) * blend.horizon
        if rows and rows[-1][2] == weights:
            begin = rows.pop()[0]
        rows.append((begin, end, weights))
    return [
        {
            "samples": f"{begin:,} to {end:,}",
            **{n: f"{w / GRID:.4%}" for n, w in zip(blend.sources, weights, strict=True)},
        }
        for begin, end, weights in rows[-num_rows if num_rows else 0 :]
    ]


def learning_rate_table(
    blend: Blend, optimizer: OptimizerConfig, length: RunLength
) -> list[dict[str, str | int | float | None]]:
    """Divides the rest of a run where its summed learning rate reaches each tenth of its total.

    An iteration moves the weights about as far as its learning rate says. Each row therefore stands
    for the same amount of learning, and shows the tokens of each source in it: what a schedule of
    the data and one of the learning rate do together.

    Args:
        blend: The blend.
        optimizer: Settings of the optimizer.
        length: The length of the run, whose remaining iterations are divided.

    Returns:
        One row per tenth with the iterations (the last included), the mean learning rate, and the
        tokens and share of each source. Empty for a run of less than ten iterations, and if
        all rates are 0.
    """
    num_iterations = length.remaining_iterations()
    if num_iterations < NUM_PARTS:
        return []
    first, sizes = length.consumed_samples, length.batch_sizes
    # In a longer run, the rate of some iterations stands for those that follow.
    stride = -(-num_iterations // _MAX_RATES)
    iterations = np.arange(0, num_iterations, stride, dtype=np.int64)
    # The scheduler has counted an iteration's own samples only after its update.
    places = sizes.samples_after(first, iterations)
    if not length.counts_samples:
        places = length.iteration + iterations
    rates = learning_rates(optimizer, length, places - length.lr_start)
    reached = np.cumsum(rates)
    if not reached[-1]:
        return []
    goals = reached[-1] * np.arange(1, NUM_PARTS) / NUM_PARTS
    inner = np.minimum((np.searchsorted(reached, goals) + 1) * stride, num_iterations)
    edges = [0, *inner.tolist(), num_iterations]
    counts = [blend.counts(length.samples_after(edge)) for edge in edges]
    seq_length = blend.schedule.seq_length or 1
    rows: list[dict[str, str | int | float | None]] = []
    for part, (begin, end) in enumerate(pairwise(edges)):
        drawn = counts[part + 1] - counts[part]
        in_part = rates[begin // stride : -(-end // stride)]
        total = max(int(drawn.sum()), 1)
        rows.append(
            {
                "learning rate": f"{part * 10} to {part * 10 + 10} %",
                "iterations": f"{length.iteration + begin + 1:,} to {length.iteration + end:,}",
                "mean": f"{in_part.mean():.3g}" if end > begin else "",
                **{
                    f"{name} tokens": f"{int(number) * seq_length:,} ({number / total:.1%})"
                    for name, number in zip(blend.schedule.sources, drawn, strict=True)
                },
            }
        )
    return rows


@dataclass(frozen=True)
class MixtureCurve:
    """The mixture over the run, in equal bins."""

    edges: npt.NDArray[np.int64]  # int64[num_bins + 1], samples
    planned: npt.NDArray[np.float64]  # float64[num_bins, num_sources], mean weight in each bin
    # float64[num_bins, num_sources], share of the draws in each bin
    realised: npt.NDArray[np.float64]
    # int64[num_points], ascending samples. A sample at which weights jump occurs twice.
    points: npt.NDArray[np.int64]
    # float64[num_points, num_sources], the planned weight at each point. It is linear between
    # points.
    shares: npt.NDArray[np.float64]
    # int64[num_points, num_sources], draws of each source before each point
    drawn: npt.NDArray[np.int64]


def mixture_curve(blend: Blend, num_samples: int, num_bins: int = 200) -> MixtureCurve:
    """Computes the planned and the realised mixture over a run of at least one sample for a plot.

    The number of equal bins is reduced if a bin would have fewer than 100 samples.
    """
    num_bins = max(1, min(num_bins, num_samples // _MIN_SAMPLES_PER_BIN))
    edges = np.array([num_samples * part // num_bins for part in range(num_bins + 1)], np.int64)
    counts = np.array([blend.counts(int(edge)) for edge in edges])
    quotas = [blend.quotas(int(edge)) for edge in edges]
    sizes = np.diff(edges)[:, None]
    # Quotas overflow int64 in a long run; their differences fit into float64.
    due = [
        [(after - before) / GRID for before, after in zip(*pair, strict=True)]
        for pair in zip(quotas, quotas[1:], strict=False)
    ]
    points, shares = _planned_line(blend, num_samples)
    realised = np.diff(counts, axis=0) / sizes
    drawn = np.array([blend.counts(sample) for sample in points.tolist()])
    return MixtureCurve(edges, np.array(due) / sizes, realised, points, shares, drawn)


def _planned_line(
    blend: Blend, num_samples: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Returns the planned weights as a polyline through every knot and every jump."""
    knots = sorted({*blend.knots_before(num_samples), *blend.edits_before(num_samples)})
    points: list[int] = []
    shares = []
    for begin, end in pairwise([0, *knots, num_samples]):
        inner = np.linspace(begin, end, _POINTS_PER_PHASE, dtype=np.int64)[:-1].tolist()
        inner = list(dict.fromkeys(inner))
        points += [*inner, end]
        # The weights of the last sample before `end` are the limit at `end`.
        shares += [blend.planned_shares(sample) for sample in [*inner, end - 1]]
    return np.array(points, np.int64), np.array(shares)
