"""What is reported of one iteration, or of all iterations since the last log.

The loop keeps an `IterationRecord` of every iteration. `summarize` turns one record into the row of
``metrics.jsonl`` and the records of an interval into what the log, TensorBoard and Weights & Biases
show: losses are means over loss tokens, shares and speed are sums over the whole interval.

What restarts have cost, as one value that every report carries; `restarts` keeps the records.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.straggler import StragglerReport


@dataclass(frozen=True)
class Downtime:
    """What restarts have cost.

    Attributes:
        num_restarts: How often the run was resumed, for whatever reason.
        seconds: Wall time between the last iteration that counts and each resume.
        num_failures: Those after the run was killed or failed, rather than stopped on request.
        failure_seconds: The wall time of these.
    """

    num_restarts: int = 0
    seconds: float = 0.0
    num_failures: int = 0
    failure_seconds: float = 0.0


@dataclass(frozen=True)
class RunFacts:
    """What reports need to know of a run and what does not change while it goes on.

    Attributes:
        num_iterations: Iterations of the whole run.
        seq_length: Tokens of a sample.
        world_size: Processes of the job.
        flops_per_token: Model FLOPs of a token, forward and backward.
        causal_share: Of these, the part that remains if causal attention counts half.
        peak_flops: FLOP/s of one process's device; None where it is not known.
        sources: Names in the order of the sums.
        samples_per_epoch: Samples of one pass over each source.
        downtime: What restarts have cost.
    """

    num_iterations: int
    seq_length: int
    world_size: int
    flops_per_token: float
    causal_share: float
    peak_flops: float | None
    sources: Sequence[str]
    samples_per_epoch: Sequence[int]
    downtime: Downtime = Downtime()


@dataclass(frozen=True)
class IterationRecord:
    """What is kept of one iteration until the next log.

    Attributes:
        iteration: Its number, from 1.
        consumed_samples: Samples consumed, this iteration's included.
        num_samples: Samples of this iteration.
        source_sums: float64[num_sources, 3] on the CPU: summed loss, loss tokens and bytes of each
            source.
        weights: int64[num_sources], planned weights, summing to 2^32.
        num_drawn: int64[num_sources], samples drawn from each source in this iteration.
        counts: int64[num_sources], samples drawn from each source since the run began.
        learning_rate: Rate of its update.
        grad_norm: Gradient norm before clipping.
        is_updated: Whether its update was made.
        time: Unix time of its end, in seconds.
        seconds: Its wall time.
        data_seconds: Part of it that the reporting rank waited for its batch.
        memory_bytes: The most that the reporting process has held so far.
        num_skipped: Bad steps, whose updates were left out, since the run began.
        skipped_no_loss_tokens: Steps without loss tokens, whose updates were left out as well.
        num_rollbacks: Returns to a checkpoint's weights since the run began.
    """

    iteration: int
    consumed_samples: int
    num_samples: int
    source_sums: torch.Tensor
    weights: npt.NDArray[np.int64]
    num_drawn: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    learning_rate: float
    grad_norm: float
    is_updated: bool
    time: float
    seconds: float
    data_seconds: float
    memory_bytes: int
    num_skipped: int
    skipped_no_loss_tokens: int
    num_rollbacks: int


@dataclass(frozen=True)
class SourceReport:
    """One source in the reported iterations.

    Attributes:
        loss: Mean loss of its loss tokens in nats; None if it had none.
        weight: Its share as planned; over several iterations the mean by samples.
        realised: Its share of the samples.
        tokens: Tokens drawn from it since the run began.
        loss_tokens: Loss tokens that `loss` is the mean of.
        epochs: Passes over it since the run began.
    """

    loss: float | None
    weight: float
    realised: float
    tokens: int
    loss_tokens: int
    epochs: float


@dataclass(frozen=True)
class IterationReport:
    """One iteration, or all iterations since the last log.

    Losses and the gradient norm leave out iterations whose update was left out, unless there are no
    others. Shares, tokens and speed count every iteration.

    Attributes:
        iteration: Iterations of the run so far; the last one reported.
        interval: How many iterations this reports.
        num_iterations: Iterations of the whole run.
        consumed_samples: Samples consumed up to the last one.
        consumed_tokens: The same in tokens.
        global_batch_size: Samples of the last one.
        lm_loss: Mean loss of the loss tokens in nats; None if there were none.
        learning_rate: Rate of the last update.
        grad_norm: Mean of the gradient norms before clipping.
        time: Unix time of the end of the last one, in seconds.
        seconds: Wall time of an iteration, the mean.
        data_seconds: Part of it that the reporting rank waited for its batch.
        tokens_per_second: Of the whole job.
        tokens_per_second_per_gpu: Of one process.
        tflops_per_gpu: Model FLOP/s of each process (PaLM count) in 1e12.
        mfu: That over the device's peak; None where the peak is not known.
        mfu_causal: The same where causal attention counts half.
        memory_bytes: The most that the reporting process has held, of its device's memory.
        batch_digest: Hash of the last global batch's tokens and masks in sample order; None where a
            failure ended the run before the ranks could exchange it.
        num_skipped: Bad steps, whose updates were left out, since the run began.
        skipped_no_loss_tokens: Steps without loss tokens, whose updates were left out as well.
        num_rollbacks: Returns to a checkpoint's weights since the run began.
        downtime: What restarts have cost.
        sources: By name.
        stragglers: The ranks compared, where that is asked for.
        seconds_left: Wall time until the run's last iteration; None where it is not estimated.
    """

    iteration: int
    interval: int
    num_iterations: int
    consumed_samples: int
    consumed_tokens: int
    global_batch_size: int
    lm_loss: float | None
    learning_rate: float
    grad_norm: float
    time: float
    seconds: float
    data_seconds: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float | None
    mfu_causal: float | None
    memory_bytes: int
    batch_digest: str | None
    num_skipped: int
    skipped_no_loss_tokens: int
    num_rollbacks: int
    downtime: Downtime
    sources: Mapping[str, SourceReport]
    stragglers: StragglerReport | None = None
    seconds_left: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object of ``metrics.jsonl``."""
        compared = {} if self.stragglers is None else {"stragglers": self.stragglers.to_dict()}
        return {
            "iteration": self.iteration,
            "interval": self.interval,
            "consumed_samples": self.consumed_samples,
            "consumed_tokens": self.consumed_tokens,
            "lm_loss": finite(self.lm_loss),
            "learning_rate": self.learning_rate,
            "grad_norm": finite(self.grad_norm),
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "tflops_per_gpu": self.tflops_per_gpu,
            "mfu": self.mfu,
            "mfu_causal": self.mfu_causal,
            "memory_bytes": self.memory_bytes,
            "time": self.time,
            "seconds": self.seconds,
            "data_seconds": self.data_seconds,
            "num_restarts": self.downtime.num_restarts,
            "seconds_lost": self.downtime.seconds,
            "num_skipped": self.num_skipped,
            "skipped_no_loss_tokens": self.skipped_no_loss_tokens,
            "num_rollbacks": self.num_rollbacks,
            "batch_digest": self.batch_digest,
            "sources": {
                name: {**vars(source), "loss": finite(source.loss)}
                for name, source in self.sources.items()
            },
            **compared,
        }

    def scalars(self) -> dict[str, float]:
        """What is plotted, under the names that Megatron uses where it has them."""
        values: dict[str, float | None] = {
            "lm loss": self.lm_loss,
            "learning-rate": self.learning_rate,
            "grad-norm": self.grad_norm,
            "iteration-time": self.seconds,
            "data-wait": self.data_seconds,
            "tokens-per-second": self.tokens_per_second,
            "tokens-per-second-per-gpu": self.tokens_per_second_per_gpu,
            "throughput": self.tflops_per_gpu,
            "mfu": self.mfu,
            "mfu-causal": self.mfu_causal,
            "memory-bytes": self.memory_bytes,
            "consumed-samples": self.consumed_samples,
            "consumed-tokens": self.consumed_tokens,
            "restarts": self.downtime.num_restarts,
            "seconds-lost": self.downtime.seconds,
            "skipped-updates": self.num_skipped,
            "skipped-no-loss-tokens": self.skipped_no_loss_tokens,
            "rollbacks": self.num_rollbacks,
        }
        for name, source in self.sources.items():
            values |= {f"{field}/{name}": value for field, value in vars(source).items()}
        for name, part in self.stragglers.parts.items() if self.stragglers else ():
            values |= {f"straggler/{name}/min": part.min, f"straggler/{name}/max": part.max}
        return {name: value for name, value in values.items() if value is not None}


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no form for it."""
    return value if value is not None and math.isfinite(value) else None


def summarize(
    records: Sequence[IterationRecord],
    facts: RunFacts,
    *,
    batch_digest: str | None,
    stragglers: StragglerReport | None = None,
    seconds_left: float | None = None,
) -> IterationReport:
    """Reports one iteration, or several that follow one another.

    Args:
        records: At least one, in order.
        facts: Of the run.
        batch_digest: Of the last one's global batch.
        stragglers: The ranks compared over these iterations.
        seconds_left: Estimated wall time until the run's last iteration.
    """
    last = records[-1]
    measured = [record for record in records if record.is_updated] or records
    sums = torch.stack([record.source_sums for record in measured]).sum(dim=0)
    num_samples = sum(record.num_samples for record in records)
    seconds = sum(record.seconds for record in records)
    tokens_per_second = num_samples * facts.seq_length / seconds
    flops_per_process = facts.flops_per_token * tokens_per_second / facts.world_size
    mfu = flops_per_process / facts.peak_flops if facts.peak_flops else None
    return IterationReport(
        iteration=last.iteration,
        interval=len(records),
        num_iterations=facts.num_iterations,
        consumed_samples=last.consumed_samples,
        consumed_tokens=last.consumed_samples * facts.seq_length,
        global_batch_size=last.num_samples,
        lm_loss=_mean_loss(sums.sum(dim=0).tolist()),
        learning_rate=last.learning_rate,
        grad_norm=sum(record.grad_norm for record in measured) / len(measured),
        time=last.time,
        seconds=seconds / len(records),
        data_seconds=sum(record.data_seconds for record in records) / len(records),
        tokens_per_second=tokens_per_second,
        tokens_per_second_per_gpu=tokens_per_second / facts.world_size,
        tflops_per_gpu=flops_per_process / 1e12,
        mfu=mfu,
        mfu_causal=None if mfu is None else mfu * facts.causal_share,
        memory_bytes=last.memory_bytes,
        num_skipped=last.num_skipped,
        skipped_no_loss_tokens=last.skipped_no_loss_tokens,
        num_rollbacks=last.num_rollbacks,
        downtime=facts.downtime,
        batch_digest=batch_digest,
        stragglers=stragglers,
        seconds_left=seconds_left,
        sources=_source_reports(records, sums.tolist(), facts),
    )


def _source_reports(
    records: Sequence[IterationRecord], sums: Sequence[Sequence[float]], facts: RunFacts
) -> dict[str, SourceReport]:
    counts = records[-1].counts.tolist()
    num_drawn = np.sum([record.num_drawn for record in records], axis=0).tolist()
    total = sum(record.num_samples for record in records)
    # In whole numbers of 2^-32, so that constant weights keep every digit.
    weights = [
        sum(int(record.weights[s]) * record.num_samples for record in records) / (total << 32)
        for s in range(len(facts.sources))
    ]
    return {
        name: SourceReport(
            loss=_mean_loss(sums[s]),
            weight=weights[s],
            realised=num_drawn[s] / total,
            tokens=counts[s] * facts.seq_length,
            loss_tokens=int(sums[s][1]),
            epochs=counts[s] / facts.samples_per_epoch[s] if facts.samples_per_epoch[s] else 0.0,
        )
        for s, name in enumerate(facts.sources)
    }


def _mean_loss(row: Sequence[float]) -> float | None:
    """Mean loss of a row of summed loss, loss tokens and bytes; None without loss tokens."""
    loss_sum, num_tokens, _ = row
    return loss_sum / num_tokens if num_tokens else None


def validation_dict(iteration: int, losses: Mapping[str, SourceLoss]) -> dict[str, Any]:
    """The object that ``metrics.jsonl`` holds for a validation."""
    return {
        "iteration": iteration,
        "validation": {
            name: {"loss": finite(loss.loss), "bits_per_byte": finite(loss.bits_per_byte)}
            for name, loss in losses.items()
        },
    }


def validation_scalars(losses: Mapping[str, SourceLoss]) -> dict[str, float]:
    """What is plotted of a validation."""
    return {
        f"{kind}/{name}": value
        for name, loss in losses.items()
        for kind, value in (
            ("validation loss", loss.loss),
            ("validation bits per byte", loss.bits_per_byte),
        )
    }


def choice_scalars(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What is plotted of choice questions."""
    return {
        f"{kind}/{name}": result[key]
        for name, result in results.items()
        for kind, key in (
            ("choice accuracy", "accuracy"),
            ("choice accuracy per byte", "accuracy_per_byte"),
        )
        if result.get(key) is not None
    }
