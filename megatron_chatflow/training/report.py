"""Collects iterations and reports them, one by one and as means over each log interval.

Losses are means over loss tokens; shares and speed cover the whole interval.

`IntervalLog.add` waits neither for a device nor for another rank, so an iteration that is not
logged costs nothing. The hash of each global batch needs all ranks; it is exchanged for all pending
iterations at once, before a log, a validation or a save.

A log precedes every save. A resumed run therefore starts with an empty interval and logs the same
means as a run that was never interrupted, and ``metrics.jsonl`` always reaches the last checkpoint.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.data.loader import combine_digests
from megatron_chatflow.runtime.ranks import Ranks, data_parallel_group
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.callbacks.straggler import StragglerDetector, StragglerReport
from megatron_chatflow.training.norms import Norms

NUM_RECENT_ITERATIONS = 100


@dataclass(frozen=True)
class Downtime:
    """Cost of restarts."""

    num_restarts: int = 0  # number of resumes, for whatever reason
    seconds: float = 0.0  # wall time between the last iteration that counts and each resume
    num_failures: int = 0  # number of resumes after the run was killed or failed
    failure_seconds: float = 0.0  # wall time lost to failures


@dataclass(frozen=True)
class RunFacts:
    """Constants of a run that reports need."""

    num_iterations: int  # iterations of the whole run
    num_samples: int  # samples of the whole run
    seq_length: int  # tokens per sample
    world_size: int  # number of processes in the job
    flops_per_token: float  # model FLOPs per token, forward and backward, if everything is trained
    causal_share: float  # share of these FLOPs that remains if causal attention counts half
    peak_flops: float | None  # peak FLOP/s of one process's device; None if it is not known
    sources: Sequence[str]  # source names in the order of the sums
    samples_per_epoch: Sequence[int]  # samples in one epoch of each source
    downtime: Downtime = Downtime()  # cost of restarts
    # the same as `flops_per_token` in each stage of training; empty for a run without stages
    stage_flops: Sequence[float] = ()

    def flops_share(self, records: Sequence["IterationRecord"]) -> float:
        """Returns the FLOPs of iterations over those that they had if everything was trained."""
        given = [
            record.num_samples * self.stage_flops[record.stage]
            if self.stage_flops and record.stage is not None
            else record.num_samples * self.flops_per_token
            for record in records
        ]
        return sum(given) / (sum(one.num_samples for one in records) * self.flops_per_token)


@dataclass(frozen=True)
class IterationRecord:
    """One iteration, kept until the next log."""

    iteration: int  # number of the iteration, from 1
    consumed_samples: int  # samples consumed, including this iteration's
    num_samples: int
    # float64[num_sources, 3] on the CPU: summed loss, loss tokens and bytes of each source
    source_sums: torch.Tensor
    weights: npt.NDArray[np.int64]  # int64[num_sources], planned weights that sum to 2^32
    # int64[num_sources], samples drawn from each source in this iteration
    num_drawn: npt.NDArray[np.int64]
    # int64[num_sources], samples drawn from each source since the run began
    counts: npt.NDArray[np.int64]
    learning_rate: float  # learning rate of the update
    weight_decay: float  # weight decay of the update
    grad_norm: float  # gradient norm before clipping
    is_updated: bool  # whether the update was made
    time: float  # Unix time at the end of the iteration, in seconds
    seconds: float  # wall time of the iteration
    data_seconds: float  # part of it that the reporting rank waited for its batch
    memory_bytes: int  # peak memory of the reporting process so far
    num_skipped: int  # bad steps, whose updates were skipped, since the run began
    skipped_no_loss_tokens: int  # steps without loss tokens, whose updates were skipped as well
    num_rollbacks: int  # rollbacks to a checkpoint since the run began
    # weights in the objective by source; None if all are equal throughout the run
    objective_weights: Sequence[float] | None = None
    stage: int | None = None  # number of the stage of training; None for a run without stages
    norms: Norms | None = None  # norms of weights and gradients, if they are logged


@dataclass(frozen=True)
class SourceReport:
    """One source in the reported iterations."""

    loss: float | None  # mean loss of its loss tokens in nats; None without loss tokens
    weight: float  # planned share; over several iterations the mean weighted by samples
    realised: float  # share of the samples
    tokens: int  # tokens drawn from the source since the run began
    loss_tokens: int  # number of loss tokens that `loss` is the mean of
    epochs: float  # epochs of the source since the run began
    # mean weight in the objective; None if all sources count alike throughout the run
    objective_weight: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the object for ``metrics.jsonl``."""
        row = {**vars(self), "loss": finite(self.loss)}
        if self.objective_weight is None:
            del row["objective_weight"]
        return row


@dataclass(frozen=True)
class IterationReport:
    """One iteration, or all iterations since the last log.

    Losses and the gradient norm exclude iterations whose update was skipped, unless there are no
    others. Shares, tokens and speed include every iteration.
    """

    iteration: int  # the last reported iteration
    interval: int  # number of reported iterations
    num_iterations: int  # iterations of the whole run
    consumed_samples: int  # samples consumed up to the last iteration
    consumed_tokens: int  # the same in tokens
    global_batch_size: int  # samples in the last iteration
    lm_loss: float | None  # mean loss of the loss tokens in nats; None without loss tokens
    learning_rate: float  # learning rate of the last update
    weight_decay: float  # weight decay of the last update
    grad_norm: float  # mean gradient norm before clipping
    time: float  # Unix time at the end of the last iteration, in seconds
    seconds: float  # mean wall time per iteration
    data_seconds: float  # mean time that the reporting rank waited for its batch
    tokens_per_second: float  # throughput of the whole job
    tokens_per_second_per_gpu: float  # throughput of one process
    tflops_per_gpu: float  # model FLOP/s of one process (PaLM count) in 1e12
    mfu: float | None  # model FLOP/s over the device's peak; None if the peak is not known
    mfu_causal: float | None  # the same with causal attention counted half
    memory_bytes: int  # peak memory of the reporting process on its device
    # Hash of the last global batch's tokens and masks in sample order; None if a failure ended the
    # run before the ranks could exchange it.
    batch_digest: str | None
    num_skipped: int  # bad steps, whose updates were skipped, since the run began
    skipped_no_loss_tokens: int  # steps without loss tokens, whose updates were skipped as well
    num_rollbacks: int  # rollbacks to a checkpoint since the run began
    downtime: Downtime  # cost of restarts
    sources: Mapping[str, SourceReport]
    stage: int | None = None  # number of the stage of training; None for a run without stages
    stragglers: StragglerReport | None = None  # comparison of the ranks if it is enabled
    # L2 norm of the weights after the last update; None unless it is logged
    params_norm: float | None = None
    # L2 norms of the weights and of the gradients before clipping, of each layer in the last
    # iteration; None unless they are logged
    layer_norms: Mapping[str, tuple[float, float]] | None = None
    # estimated wall time until the last iteration; None without an estimate
    seconds_left: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the object for ``metrics.jsonl``."""
        left_out = ("num_iterations", "downtime", "seconds_left")
        row = {name: value for name, value in vars(self).items() if name not in left_out}
        row["lm_loss"], row["grad_norm"] = finite(self.lm_loss), finite(self.grad_norm)
        row["num_restarts"] = self.downtime.num_restarts
        row["seconds_lost"] = self.downtime.seconds
        row["sources"] = {name: source.to_dict() for name, source in self.sources.items()}
        row["layer_norms"] = self.layer_norms and {
            name: {"params": finite(params), "grads": finite(grads)}
            for name, (params, grads) in self.layer_norms.items()
        }
        for name in ("stage", "params_norm", "layer_norms"):
            if row[name] is None:
                del row[name]
        stragglers = row.pop("stragglers")
        return row if stragglers is None else {**row, "stragglers": stragglers.to_dict()}

    def scalars(self) -> dict[str, float]:
        """Returns the scalars to plot, under Megatron's names where it has them."""
        values: dict[str, float | None] = {
            "lm loss": self.lm_loss,
            "learning-rate": self.learning_rate,
            "batch-size": self.global_batch_size,
            "weight-decay": self.weight_decay,
            "grad-norm": self.grad_norm,
            "params-norm": self.params_norm,
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
            "stage": self.stage,
        }
        for name, source in self.sources.items():
            values |= {f"{field}/{name}": value for field, value in vars(source).items()}
        for name, (params, grads) in (self.layer_norms or {}).items():
            values |= {f"params-norm/{name}": params, f"grad-norm/{name}": grads}
        for name, part in self.stragglers.parts.items() if self.stragglers else ():
            values |= {f"straggler/{name}/min": part.min, f"straggler/{name}/max": part.max}
        return {name: value for name, value in values.items() if value is not None}


def finite(value: float | None) -> float | None:
    """Returns the value, or None if JSON cannot represent it."""
    return value if value is not None and math.isfinite(value) else None


def summarize(
    records: Sequence[IterationRecord],
    facts: RunFacts,
    *,
    batch_digest: str | None,
    stragglers: StragglerReport | None = None,
    seconds_left: float | None = None,
) -> IterationReport:
    """Reports one iteration, or several consecutive ones.

    Args:
        records: At least one record, in order.
        facts: Constants of the run.
        batch_digest: Hash of the last record's global batch.
        stragglers: Comparison of the ranks over these iterations.
        seconds_left: Estimated wall time until the run's last iteration.
    """
    last = records[-1]
    measured = [record for record in records if record.is_updated] or records
    sums = torch.stack([record.source_sums for record in measured]).sum(dim=0)
    num_samples = sum(record.num_samples for record in records)
    seconds = sum(record.seconds for record in records)
    tokens_per_second = num_samples * facts.seq_length / seconds
    share = facts.flops_share(records)
    flops_per_process = share * facts.flops_per_token * tokens_per_second / facts.world_size
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
        weight_decay=last.weight_decay,
        grad_norm=sum(record.grad_norm for record in measured) / len(measured),
        time=last.time,
        seconds=seconds / len(records),
        data_seconds=sum(record.data_seconds for record in records) / len(records),
        tokens_per_second=tokens_per_second,
        tokens_per_second_per_gpu=tokens_per_second / facts.world_size,
        tflops_per_gpu=flops_per_process / 1e12,
        mfu=mfu,
        # No stage leaves out any of attention, half of which causal attention does not need.
        mfu_causal=None if mfu is None else mfu * (1 - (1 - facts.causal_share) / share),
        memory_bytes=last.memory_bytes,
        num_skipped=last.num_skipped,
        skipped_no_loss_tokens=last.skipped_no_loss_tokens,
        num_rollbacks=last.num_rollbacks,
        downtime=facts.downtime,
        batch_digest=batch_digest,
        stage=last.stage,
        stragglers=stragglers,
        seconds_left=seconds_left,
        params_norm=last.norms.params if last.norms else None,
        layer_norms=last.norms.layers if last.norms else None,
        sources=_source_reports(records, sums.tolist(), facts),
    )


def _source_reports(
    records: Sequence[IterationRecord], sums: Sequence[Sequence[float]], facts: RunFacts
) -> dict[str, SourceReport]:
    counts = records[-1].counts.tolist()
    num_drawn = np.sum([record.num_drawn for record in records], axis=0).tolist()
    total = sum(record.num_samples for record in records)
    # Integers in units of 2^-32, so that constant weights keep every digit.
    weights = [
        sum(int(record.weights[s]) * record.num_samples for record in records) / (total << 32)
        for s in range(len(facts.sources))
    ]
    objective: list[float | None] = [None] * len(facts.sources)
    given = [record.objective_weights for record in records if record.objective_weights is not None]
    if given:
        num_samples = [record.num_samples for record in records]
        objective = np.average(given, axis=0, weights=num_samples).tolist()
    return {
        name: SourceReport(
            loss=_mean_loss(sums[s]),
            weight=weights[s],
            realised=num_drawn[s] / total,
            tokens=counts[s] * facts.seq_length,
            loss_tokens=int(sums[s][1]),
            epochs=counts[s] / facts.samples_per_epoch[s] if facts.samples_per_epoch[s] else 0.0,
            objective_weight=objective[s],
        )
        for s, name in enumerate(facts.sources)
    }


def _mean_loss(row: Sequence[float]) -> float | None:
    """Returns the mean loss of a row of `IterationRecord.source_sums`; None without loss tokens."""
    loss_sum, num_tokens, _ = row
    return loss_sum / num_tokens if num_tokens else None


class IntervalLog:
    """Collects iterations until they are reported to the callbacks."""

    def __init__(
        self,
        callbacks: Sequence[Callback],
        facts: RunFacts,
        ranks: Ranks,
        stragglers: StragglerDetector | None,
    ) -> None:
        self._callbacks = callbacks
        self._facts = facts
        self._ranks = ranks
        self._stragglers = stragglers
        self._remaining = RemainingTime()
        self._records: list[IterationRecord] = []
        self._num_steps = 0
        self._data_seconds = 0.0
        # This rank's sample positions and digests of the iterations not yet reported.
        self._digests: list[torch.Tensor] = []
        self._last_hash: str | None = None

    def add(
        self, digests: torch.Tensor, data_seconds: float, record: IterationRecord | None
    ) -> None:
        """Adds an iteration.

        Args:
            digests: int64[num_local_samples, 3], global sample numbers and digests of this rank.
            data_seconds: This rank's wait for its batch.
            record: Record of the iteration; None except on the reporting rank.
        """
        self._digests.append(digests)
        self._num_steps += 1
        self._data_seconds += data_seconds
        if record is not None:
            self._records.append(record)
            self._remaining.add(record.seconds, time.perf_counter())

    def write_iterations(self, stragglers: StragglerReport | None = None) -> None:
        """Reports the iterations since the last call one by one; every rank calls it."""
        if self._digests:
            hashes = batch_digests(self._digests, self._ranks)
            self._report_iterations(hashes, stragglers)

    def log(self) -> None:
        """Reports the iterations since the last log and starts an interval; every rank calls it."""
        if self._num_steps == 0:
            return
        stragglers = None
        if self._stragglers is not None:
            mean_wait = self._data_seconds / self._num_steps
            stragglers = self._stragglers.report(self._num_steps, mean_wait)
        self.write_iterations(stragglers)
        self._report_interval(stragglers)

    def log_without_other_ranks(self) -> None:
        """Reports pending iterations, without hashes, when a failure ends the run."""
        if self._num_steps:
            self._report_iterations([None] * len(self._digests), None)
            self._report_interval(None)

    def _report_iterations(
        self, hashes: Sequence[str | None], stragglers: StragglerReport | None
    ) -> None:
        self._digests.clear()
        if not hashes or not self._records:
            return
        self._last_hash = hashes[-1]
        records = self._records[-len(hashes) :]
        reports = [
            summarize(
                [record],
                self._facts,
                batch_digest=digest,
                stragglers=stragglers if record is records[-1] else None,
            )
            for record, digest in zip(records, hashes, strict=True)
        ]
        for callback in self._callbacks:
            callback.on_iterations(reports)

    def _report_interval(self, stragglers: StragglerReport | None) -> None:
        if self._records:
            last = self._records[-1]
            # In iterations of the last one's size, which earlier ones under a ramp have not.
            remaining = (self._facts.num_samples - last.consumed_samples) / last.num_samples
            report = summarize(
                self._records,
                self._facts,
                batch_digest=self._last_hash,
                stragglers=stragglers,
                seconds_left=self._remaining.estimate(remaining, time.perf_counter()),
            )
            for callback in self._callbacks:
                callback.on_log(report)
        self._records = []
        self._num_steps = 0
        self._data_seconds = 0.0


class RemainingTime:
    """Estimates the time until the end of a run.

    The time of an iteration is the mean of the last `NUM_RECENT_ITERATIONS`. Validations and saves
    between iterations count by their share of the time since this process began to train.
    """

    def __init__(self) -> None:
        self._begin = 0.0
        self._recent: deque[float] = deque(maxlen=NUM_RECENT_ITERATIONS)
        self._seconds = 0.0
        self._num_iterations = 0

    def add(self, seconds: float, now: float) -> None:
        """Adds an iteration that took ``seconds`` and ended at ``now``, by any clock."""
        if self._num_iterations == 0:
            self._begin = now - seconds
        elif self._num_iterations == 1:
            # The first iteration allocates and compiles, so it counts only while it is alone.
            self._recent.clear()
        self._num_iterations += 1
        self._seconds += seconds
        self._recent.append(seconds)

    def estimate(self, num_iterations: float, now: float) -> float:
        """Estimates the seconds of ``num_iterations`` more; at least one must have been added."""
        between = max(now - self._begin - self._seconds, 0.0) / self._num_iterations
        return num_iterations * (sum(self._recent) / len(self._recent) + between)


def batch_digests(digests: Sequence[torch.Tensor], ranks: Ranks) -> list[str]:
    """Hashes whole global batches in sample order, with one exchange for all of them.

    ``digests`` holds int64[num_local_samples, 3] for each iteration: this rank's global sample
    numbers and digests. All data-parallel ranks hold the same number of samples of an iteration.
    """
    local = torch.cat(list(digests)).to(ranks.device)
    gathered = [torch.empty_like(local) for _ in range(ranks.data_parallel_size)]
    torch.distributed.all_gather(gathered, local, group=data_parallel_group())
    sizes = [len(rows) for rows in digests]
    batches = zip(*(torch.split(rows.cpu(), sizes) for rows in gathered), strict=True)
    hashes = []
    for batch in batches:
        rows = torch.cat(batch)
        hashes.append(combine_digests(rows[rows[:, 0].argsort()][:, 1:]))
    return hashes
