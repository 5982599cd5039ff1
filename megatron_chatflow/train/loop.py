"""The training loop: batch, step, report, validate, save, until the run's last iteration.

In: everything that a run is made of, in a `Run`. Out: the last `Progress`. It reads straight down;
what it calls lies in files of its own.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.checkpoint.saver import CheckpointSaver
from megatron_chatflow.checkpoint.store import RunState, load_checkpoint
from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.data.blend import Blend
from megatron_chatflow.data.digest import combine_digests
from megatron_chatflow.data.loader import GlobalBatch, Loader
from megatron_chatflow.data.source import Source
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.choice_training import ChoiceValidator
from megatron_chatflow.evaluation.validation import Validator
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime import megatron
from megatron_chatflow.runtime.collection import GarbageCollection
from megatron_chatflow.runtime.freed_memory import FreedMemory
from megatron_chatflow.runtime.peak import peak_memory
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.runtime.signals import StopRequest
from megatron_chatflow.runtime.watchdog import Watchdog
from megatron_chatflow.train.downtime import Downtime
from megatron_chatflow.train.guard import Guard
from megatron_chatflow.train.hooks import Hook
from megatron_chatflow.train.interval import Interval
from megatron_chatflow.train.optimizer import Optimization
from megatron_chatflow.train.profiler import ProfilerWindow
from megatron_chatflow.train.report import IterationReport, source_reports
from megatron_chatflow.train.step import StepResult, train_step
from megatron_chatflow.train.straggler import Stragglers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        iteration: Steps taken.
        consumed_samples: Samples consumed.
        counts: int64[num_sources], samples drawn from each source.
    """

    iteration: int
    consumed_samples: int
    counts: npt.NDArray[np.int64]

    def after(self, batch: GlobalBatch) -> "Progress":
        """The progress once ``batch`` is consumed."""
        return Progress(self.iteration + 1, batch.end, self.counts + batch.num_drawn)


@dataclass(frozen=True)
class Run:
    """All that a run is made of.

    Attributes:
        config: Resolved configuration.
        length: Where the run ends.
        ranks: This process's place.
        sources: Training sources in the schedule's order.
        blend: Which sample comes when.
        loader: This rank's micro-batches.
        forward_step: How a micro-batch runs.
        optimization: Model chunks, optimizer, learning rate.
        validator: Held-out samples; None where there are none.
        choices: Choice questions; None where there are none.
        hooks: Watchers; none but on the reporting rank.
        state: The parts of `RunState` that do not change.
        flops_per_token: Model FLOPs of a token, forward and backward.
        causal_share: Of these FLOPs, where attention counts as the causal half that it is.
        peak_flops: Of one process; None where it is not known.
        stop_request: Signals.
        guard: Judges every step.
        watchdog: Ends a process that hangs.
        collection: When Python collects garbage.
        freed_memory: Watches what the process keeps of freed memory; None on GPUs.
        profiler: Profiles a window of iterations.
        stragglers: Compares the ranks; None where that is not asked for.
        downtime: What restarts have cost.
        saver: Writes checkpoints; None where none are asked for.
        resumed_from: The checkpoint that it went on from; None if it cannot be loaded as it is.
    """

    config: RunConfig
    length: RunLength
    ranks: Ranks
    sources: Sequence[Source]
    blend: Blend
    loader: Loader
    forward_step: ForwardStep
    optimization: Optimization
    validator: Validator | None
    choices: ChoiceValidator | None
    state: RunState
    flops_per_token: float
    causal_share: float
    peak_flops: float | None
    stop_request: StopRequest
    guard: Guard
    watchdog: Watchdog
    collection: GarbageCollection
    freed_memory: FreedMemory | None
    profiler: ProfilerWindow
    stragglers: Stragglers | None = None
    downtime: Downtime = field(default=Downtime())
    hooks: Sequence[Hook] = field(default=())
    saver: CheckpointSaver | None = None
    resumed_from: Path | None = None


def train(run: Run, progress: Progress) -> Progress:
    """Trains until the last iteration, the exit interval, or a signal; saves at the end.

    Args:
        run: What to train.
        progress: Where it stands.

    Returns:
        Where it stands at the end.

    Raises:
        UserError: The last checkpoint could not be written, or a bad step ends the run.
    """
    config = run.config
    last_iteration = run.length.last_iteration
    first_iteration = progress.iteration + 1
    batches = run.loader.batches(progress.consumed_samples, config.train.global_batch_size)
    if progress.iteration == 0:
        _validate(run, progress)
        _put_questions(run, progress)
    interval = Interval()
    while progress.iteration < last_iteration:
        run.watchdog.beat(progress.iteration + 1, "loading")
        run.profiler.before(progress.iteration)
        begin = time.perf_counter()
        with run.profiler.mark("loading"):
            batch = next(batches)
        data_seconds = time.perf_counter() - begin
        run.watchdog.beat(progress.iteration + 1, "training")
        result = _step(run, batch)
        progress = progress.after(batch)
        if _is_to_roll_back(run, result, batch):
            _roll_back(run, progress)
        interval.add(time.perf_counter() - begin, data_seconds)
        if _is_due(progress.iteration, config.logging.log_interval, last_iteration):
            _report(run, progress, batch, result, interval)
        if _is_due(progress.iteration, config.train.eval_interval, last_iteration):
            _validate(run, progress)
        if _is_due(progress.iteration, config.train.choice_interval, last_iteration):
            _put_questions(run, progress)
        if run.saver is not None and progress.iteration == first_iteration:
            run.saver.prepare(run.optimization.chunks, run.optimization.optimizer)
        if _is_due(progress.iteration, config.checkpoint.save_interval):
            _save(run, progress)
        run.collection.after(progress.iteration)
        if run.freed_memory is not None:
            run.freed_memory.after_step()
        if _should_stop(run, progress):
            break
    _ensure_saved(run, progress)
    return progress


def _step(run: Run, batch: GlobalBatch) -> StepResult:
    """One step, timed where ranks are compared."""
    mark = run.profiler.mark
    if run.stragglers is None:
        return train_step(batch, run.optimization, run.forward_step, run.ranks, run.guard, mark)
    run.stragglers.timers.is_on = True
    result = train_step(batch, run.optimization, run.forward_step, run.ranks, run.guard, mark)
    run.stragglers.timers.is_on = False
    return result


def _is_to_roll_back(run: Run, result: StepResult, batch: GlobalBatch) -> bool:
    try:
        return run.guard.record(result.verdict, result.loss, batch.begin, batch.end)
    except UserError:
        # Every rank stops here: a save under way is of a healthy iteration, and is worth its time.
        if run.saver is not None:
            run.saver.finish()
        raise


def _roll_back(run: Run, progress: Progress) -> None:
    """Takes weights and optimizer of the last checkpoint; the data goes on where it is.

    What led to the bad step, the samples since that checkpoint, is thereby left out of the weights.
    """
    checkpoint = run.resumed_from
    if run.saver is not None:
        run.saver.finish()
        checkpoint = run.saver.newest or checkpoint
    if checkpoint is None:
        raise UserError(
            f"iteration {progress.iteration}: --on-nan rollback finds no checkpoint of this run; "
            "give --save and --save-interval, or use --on-nan skip"
        )
    optimization = run.optimization
    load_checkpoint(checkpoint, optimization.chunks, optimization.optimizer, run.ranks)
    optimization.set_progress(progress.iteration, progress.consumed_samples)
    logger.warning(
        "rolled back to the weights of %s; the data goes on from sample %d",
        checkpoint,
        progress.consumed_samples,
    )


def _is_due(iteration: int, interval: int | None, last_iteration: int | None = None) -> bool:
    return interval is not None and (iteration % interval == 0 or iteration == last_iteration)


def _should_stop(run: Run, progress: Progress) -> bool:
    if run.stop_request.is_made(run.ranks.device):
        logger.info("asked to stop: leaving after iteration %d", progress.iteration)
        return True
    return _is_due(progress.iteration, run.config.train.exit_interval)


def _report(
    run: Run,
    progress: Progress,
    batch: GlobalBatch,
    result: StepResult,
    interval: Interval,
) -> None:
    digest = _batch_digest(batch, run.ranks)
    num_steps = interval.num_steps
    seconds, data_seconds = interval.take()
    stragglers = None
    if run.stragglers is not None:
        stragglers = run.stragglers.report(num_steps, data_seconds)
    if not run.hooks:
        return
    seq_length = run.config.data.seq_length
    num_samples = batch.end - batch.begin
    tokens_per_second = num_samples * seq_length / seconds
    flops_per_process = run.flops_per_token * tokens_per_second / run.ranks.process.world_size
    report = IterationReport(
        iteration=progress.iteration,
        num_iterations=run.length.last_iteration,
        consumed_samples=progress.consumed_samples,
        consumed_tokens=progress.consumed_samples * seq_length,
        global_batch_size=num_samples,
        lm_loss=result.loss,
        learning_rate=result.learning_rate,
        grad_norm=result.grad_norm,
        time=time.time(),
        seconds=seconds,
        data_seconds=data_seconds,
        tokens_per_second=tokens_per_second,
        tokens_per_second_per_gpu=tokens_per_second / run.ranks.process.world_size,
        tflops_per_gpu=flops_per_process / 1e12,
        mfu=flops_per_process / run.peak_flops if run.peak_flops else None,
        mfu_causal=(
            flops_per_process * run.causal_share / run.peak_flops if run.peak_flops else None
        ),
        memory_bytes=peak_memory(run.ranks.device),
        num_skipped=run.guard.num_skipped,
        skipped_no_loss_tokens=run.guard.skipped_no_loss_tokens,
        num_rollbacks=run.guard.num_rollbacks,
        downtime=run.downtime,
        batch_digest=digest,
        stragglers=stragglers,
        sources=source_reports(
            [source.name for source in run.sources],
            sums=result.source_sums.tolist(),
            weights=run.blend.schedule.weights(batch.begin).tolist(),
            num_drawn=batch.num_drawn.tolist(),
            counts=progress.counts.tolist(),
            samples_per_epoch=[source.num_samples for source in run.sources],
            seq_length=seq_length,
        ),
    )
    for hook in run.hooks:
        hook.on_iteration(report)


def _batch_digest(batch: GlobalBatch, ranks: Ranks) -> str:
    """Hash of the whole global batch in sample order; every rank of a replica has its part."""
    local = torch.cat((batch.sample_positions.unsqueeze(-1), batch.sample_digests), dim=-1).to(
        ranks.device
    )
    parts = [torch.empty_like(local) for _ in range(ranks.data_parallel_size)]
    torch.distributed.all_gather(parts, local, group=megatron.data_parallel_group())
    rows = torch.cat(parts).cpu()
    return combine_digests(rows[rows[:, 0].argsort()][:, 1:])


def _validate(run: Run, progress: Progress) -> None:
    if run.validator is None or run.config.train.eval_interval is None:
        return
    run.watchdog.beat(progress.iteration, "validation")
    run.optimization.gather_parameters()
    losses = run.validator.run(run.forward_step, run.optimization.chunks, run.ranks)
    for hook in run.hooks:
        hook.on_validation(progress.iteration, losses)


def _put_questions(run: Run, progress: Progress) -> None:
    if run.choices is None:
        return
    run.watchdog.beat(progress.iteration, "choice questions")
    run.optimization.gather_parameters()
    result = run.choices.run(run.forward_step, run.optimization.chunks, run.ranks)
    for hook in run.hooks:
        hook.on_choice(progress.iteration, {run.choices.name: result})


def _save(run: Run, progress: Progress) -> None:
    if run.saver is None:
        return
    run.watchdog.beat(progress.iteration, "saving")
    run.optimization.gather_parameters()
    state: dict[str, Any] = run.blend.state_at(progress.consumed_samples)
    run.saver.save(
        replace(
            run.state,
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_samples * run.config.data.seq_length,
            blend=state,
            guard=run.guard.state(),
        ),
        run.optimization.chunks,
        run.optimization.optimizer,
    )


def _ensure_saved(run: Run, progress: Progress) -> None:
    """Returns once the progress is on the disk; one more attempt if the last save failed.

    Raises:
        UserError: That failed too.
    """
    run.watchdog.beat(progress.iteration, "saving")
    if run.saver is None or run.saver.finish() == progress.iteration:
        return
    _save(run, progress)
    if run.saver.finish() != progress.iteration:
        raise UserError(
            f"checkpoint.save: {run.config.checkpoint.save}: the last checkpoint could not be "
            "written; free space and resume from the one before"
        )
