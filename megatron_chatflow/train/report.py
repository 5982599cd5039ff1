"""What is reported of an iteration, as one value.

In: a step's sums, the batch's draws, the clock. Out: `IterationReport`, from which each hook writes
its own form, and the object that ``metrics.jsonl`` holds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_chatflow.evaluation.validation import SourceLoss
from megatron_chatflow.train.downtime import Downtime
from megatron_chatflow.train.straggler import StragglerReport


@dataclass(frozen=True)
class SourceReport:
    """One source in one iteration.

    Attributes:
        loss: Mean loss of its loss tokens in nats; None if it had none.
        weight: Its share as planned.
        realised: Its share of the iteration's samples.
        tokens: Tokens drawn from it since the run began.
        loss_tokens: Loss tokens of this iteration.
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
    """One logged iteration.

    Attributes:
        iteration: Steps taken, this one included.
        num_iterations: Steps of the whole run.
        consumed_samples: Samples consumed, this iteration's included.
        consumed_tokens: The same in tokens.
        global_batch_size: Samples of this iteration.
        lm_loss: Mean loss of its loss tokens in nats; None if it had none.
        learning_rate: Rate of its update.
        grad_norm: Gradient norm before clipping.
        time: Unix time of the report, in seconds.
        seconds: Wall time of an iteration, the mean since the last report.
        data_seconds: Part of it that the reporting rank waited for its batch.
        tokens_per_second: Of the whole job.
        tokens_per_second_per_gpu: Of one process.
        tflops_per_gpu: Model FLOP/s of each process (PaLM count) in 1e12.
        mfu: That over the device's peak; None where the peak is not known.
        mfu_causal: The same where causal attention counts half.
        memory_bytes: The most that the reporting process has held, of its device's memory.
        batch_digest: Hash of the global batch's tokens and masks in sample order.
        num_skipped: Bad steps, whose updates were left out, since the run began.
        skipped_no_loss_tokens: Steps without loss tokens, whose updates were left out as well.
        num_rollbacks: Returns to a checkpoint's weights since the run began.
        downtime: What restarts have cost.
        sources: By name.
        stragglers: The ranks compared, where that is asked for.
    """

    iteration: int
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
    batch_digest: str
    num_skipped: int
    skipped_no_loss_tokens: int
    num_rollbacks: int
    downtime: Downtime
    sources: Mapping[str, SourceReport]
    stragglers: StragglerReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object of ``metrics.jsonl``."""
        compared = {} if self.stragglers is None else {"stragglers": self.stragglers.to_dict()}
        return {
            "iteration": self.iteration,
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


def source_reports(
    names: Sequence[str],
    *,
    sums: Sequence[Sequence[float]],
    weights: Sequence[int],
    num_drawn: Sequence[int],
    counts: Sequence[int],
    samples_per_epoch: Sequence[int],
    seq_length: int,
) -> dict[str, SourceReport]:
    """Puts together what is known of each source.

    Args:
        names: Sources in their order.
        sums: Loss, loss tokens and bytes of each in this iteration.
        weights: Planned weights, summing to 2^32.
        num_drawn: Samples drawn from each in this iteration.
        counts: Samples drawn from each since the run began.
        samples_per_epoch: Samples of one pass over each.
        seq_length: Tokens of a sample.
    """
    total = sum(num_drawn)
    return {
        name: SourceReport(
            loss=sums[s][0] / sums[s][1] if sums[s][1] else None,
            weight=weights[s] / 2**32,
            realised=num_drawn[s] / total,
            tokens=counts[s] * seq_length,
            loss_tokens=int(sums[s][1]),
            epochs=counts[s] / samples_per_epoch[s] if samples_per_epoch[s] else 0.0,
        )
        for s, name in enumerate(names)
    }


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
