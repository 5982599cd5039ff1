"""The training loop: batch, step, report, validate, save, until the run's last iteration.

In: everything that a run is made of, in a `Run`. Out: the last `Progress`. It reads straight down;
what it calls lies in files of its own.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_chatflow.checkpoint.saver import CheckpointSaver
from megatron_chatflow.checkpoint.store import RunState, load_checkpoint
from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.data.blend import Blend
from megatron_chatflow.data.loader import GlobalBatch, Loader
from megatron_chatflow.data.source import Source
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.choice_training import ChoiceValidator
from megatron_chatflow.evaluation.validation import SourceLoss, Validator
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime.collection import GarbageCollection
from megatron_chatflow.runtime.freed_memory import FreedMemory
from megatron_chatflow.runtime.peak import peak_memory
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.runtime.signals import StopRequest
from megatron_chatflow.runtime.watchdog import Watchdog
from megatron_chatflow.train.guard import Guard
from megatron_chatflow.train.interval import IntervalLog
from megatron_chatflow.train.optimizer import Optimization
from megatron_chatflow.train.profiler import ProfilerWindow
from megatron_chatflow.train.report import IterationRecord
from megatron_chatflow.train.restarts import Status, write_status
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
        test_validator: The samples of `data.split`'s test, for the run's end; None without any.
        choices: Choice questions; None where there are none.
        log: What is reported of iterations, and to whom.
        state: The parts of `RunState` that do not change.
        stop_request: Signals.
        guard: Judges every step.
        watchdog: Ends a process that hangs.
        collection: When Python collects garbage.
        freed_memory: Watches what the process keeps of freed memory; None on GPUs.
        profiler: Profiles a window of iterations.
        stragglers: Compares the ranks; None where that is not asked for.
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
    log: IntervalLog
    stop_request: StopRequest
    guard: Guard
    watchdog: Watchdog
    collection: GarbageCollection
    freed_memory: FreedMemory | None
    profiler: ProfilerWindow
    stragglers: Stragglers | None = None
    test_validator: Validator | None = None
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
    try:
        progress = _train(run, progress)
        run.log.log()
        _ensure_saved(run, progress)
    except BaseException:
        run.log.log_alone()
        _write_status(run, "failed")
        raise
    _write_status(run, _status(run, progress))
    return progress


def _status(run: Run, progress: Progress) -> Status:
    """Why the loop ended."""
    if progress.iteration >= run.length.last_iteration:
        return "finished"
    is_exit = _is_due(progress.iteration, run.config.train.exit_interval)
    return "exit_interval" if is_exit else "stop_requested"


def _write_status(run: Run, status: Status) -> None:
    if run.ranks.is_reporter and run.config.checkpoint.save is not None:
        write_status(Path(run.config.checkpoint.save), status)


def _train(run: Run, progress: Progress) -> Progress:
    """The loop of `train`; iterations since the last log are left to the caller."""
    config = run.config
    last_iteration = run.length.last_iteration
    first_iteration = progress.iteration + 1
    batches = run.loader.batches(progress.consumed_samples, config.train.global_batch_size)
    if progress.iteration == 0:
        _validate(run, progress)
        _put_questions(run, progress)
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
        _record(run, progress, batch, result, time.perf_counter() - begin, data_seconds)
        is_save_due = run.saver is not None and _is_due(
            progress.iteration, config.checkpoint.save_interval
        )
        if is_save_due or _is_due(progress.iteration, config.logging.log_interval, last_iteration):
            run.log.log()
        if _is_due(progress.iteration, config.train.eval_interval, last_iteration):
            _validate(run, progress)
        if _is_due(progress.iteration, config.train.choice_interval, last_iteration):
            _put_questions(run, progress)
        if run.saver is not None and progress.iteration == first_iteration:
            run.saver.prepare(run.optimization.chunks, run.optimization.optimizer)
        if is_save_due:
            _save(run, progress)
        run.collection.after(progress.iteration)
        if run.freed_memory is not None:
            run.freed_memory.after_step()
        if _should_stop(run, progress):
            break
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


def _record(
    run: Run,
    progress: Progress,
    batch: GlobalBatch,
    result: StepResult,
    seconds: float,
    data_seconds: float,
) -> None:
    """Adds an iteration to the log."""
    record = None
    if run.log.hooks:
        record = IterationRecord(
            iteration=progress.iteration,
            consumed_samples=progress.consumed_samples,
            num_samples=batch.end - batch.begin,
            source_sums=result.source_sums,
            weights=run.blend.schedule.weights(batch.begin),
            num_drawn=batch.num_drawn,
            counts=progress.counts,
            learning_rate=result.learning_rate,
            grad_norm=result.grad_norm,
            is_updated=result.verdict.is_good,
            time=time.time(),
            seconds=seconds,
            data_seconds=data_seconds,
            memory_bytes=peak_memory(run.ranks.device),
            num_skipped=run.guard.num_skipped,
            skipped_no_loss_tokens=run.guard.skipped_no_loss_tokens,
            num_rollbacks=run.guard.num_rollbacks,
        )
    digests = torch.cat((batch.sample_positions.unsqueeze(-1), batch.sample_digests), dim=-1)
    run.log.add(digests, data_seconds, record)


def _validate(run: Run, progress: Progress) -> None:
    is_end = progress.iteration == run.length.last_iteration
    validators = {"": run.validator, " (test)": run.test_validator if is_end else None}
    losses: dict[str, SourceLoss] = {}
    for suffix, validator in validators.items():
        if validator is None:
            continue
        run.watchdog.beat(progress.iteration, f"validation{suffix}")
        run.log.write_iterations()
        run.optimization.gather_parameters()
        found = validator.run(run.forward_step, run.optimization.chunks, run.ranks)
        losses |= {f"{name}{suffix}": loss for name, loss in found.items()}
    if not losses:
        return
    for hook in run.log.hooks:
        hook.on_validation(progress.iteration, losses)


def _put_questions(run: Run, progress: Progress) -> None:
    if run.choices is None:
        return
    run.watchdog.beat(progress.iteration, "choice questions")
    run.log.write_iterations()
    run.optimization.gather_parameters()
    result = run.choices.run(run.forward_step, run.optimization.chunks, run.ranks)
    for hook in run.log.hooks:
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
