"""The training loop: batch, step, report, validate, save, until the run's last iteration.

Collects iterations and reports them: each by itself, and means over each log interval.

`IntervalLog.add` waits neither for a device nor for another rank, so an iteration that is not
logged costs nothing. What needs other ranks, the hash of each global batch, is exchanged for all
iterations at once, before a log, a validation or a save.

A log precedes every save. So a resumed run begins with an empty interval and logs the same means as
one that was never interrupted, and ``metrics.jsonl`` always reaches up to the last checkpoint.

One training step: gradients of a global batch, the update, and the sums that the log reports.

In: this rank's micro-batches. Out: `StepResult`. The loss is summed over the global batch's loss
tokens and divided by their number, so it does not depend on how the batch was cut.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.checkpoint.store import CheckpointSaver, RunState, load_checkpoint
from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.data.loader import GlobalBatch, Loader, combine_digests
from megatron_chatflow.data.source import Source
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.choice import ChoiceValidator
from megatron_chatflow.evaluation.validation import SourceLoss, Validator, reduce_source_sums
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime import ranks as megatron
from megatron_chatflow.runtime.device import peak_memory
from megatron_chatflow.runtime.host_memory import FreedMemory, GarbageCollection
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks
from megatron_chatflow.runtime.signals import StopRequest
from megatron_chatflow.runtime.watchdog import Watchdog
from megatron_chatflow.train.callbacks import Hook
from megatron_chatflow.train.guard import Guard, Verdict
from megatron_chatflow.train.optimizer import Optimization
from megatron_chatflow.train.profiler import Mark, ProfilerWindow, no_mark
from megatron_chatflow.train.report import IterationRecord, RunFacts, summarize
from megatron_chatflow.train.restarts import Status, write_status
from megatron_chatflow.train.straggler import StragglerReport, Stragglers

RECENT_ITERATIONS = 100


class IntervalLog:
    """Iterations until they are reported, and the hooks that they are reported to.

    Attributes:
        hooks: Watchers; none but on the reporting rank.
    """

    def __init__(
        self, hooks: Sequence[Hook], facts: RunFacts, ranks: Ranks, stragglers: Stragglers | None
    ) -> None:
        """Starts with an empty interval.

        Args:
            hooks: Watchers; none but on the reporting rank.
            facts: What reports need to know of the run.
            ranks: This process's place.
            stragglers: Compares the ranks at each log; None where that is not asked for.
        """
        self.hooks = hooks
        self._facts = facts
        self._ranks = ranks
        self._stragglers = stragglers
        self._remaining = RemainingTime()
        self._records: list[IterationRecord] = []
        self._num_steps = 0
        self._data_seconds = 0.0
        # Of the iterations that the hooks have not seen: this rank's rows of sample and digest.
        self._digests: list[torch.Tensor] = []
        self._last_hash: str | None = None

    def add(
        self, digests: torch.Tensor, data_seconds: float, record: IterationRecord | None
    ) -> None:
        """Adds an iteration.

        Args:
            digests: int64[num_local_samples, 3], global sample number and digest of this rank's.
            data_seconds: This rank's wait for its batch.
            record: What is reported of it; None on ranks without hooks.
        """
        self._digests.append(digests)
        self._num_steps += 1
        self._data_seconds += data_seconds
        if record is not None:
            self._records.append(record)
            self._remaining.add(record.seconds, time.perf_counter())

    def write_iterations(self, stragglers: StragglerReport | None = None) -> None:
        """Hands the iterations since the last call to the hooks; every rank calls it.

        Args:
            stragglers: The ranks compared, reported with the last iteration.
        """
        if self._digests:
            hashes = batch_digests(self._digests, self._ranks)
            self._hand_on(hashes, stragglers)

    def log(self) -> None:
        """Reports the iterations since the last log and begins anew; every rank calls it."""
        if self._num_steps == 0:
            return
        stragglers = None
        if self._stragglers is not None:
            mean_wait = self._data_seconds / self._num_steps
            stragglers = self._stragglers.report(self._num_steps, mean_wait)
        self.write_iterations(stragglers)
        self._show(stragglers)

    def log_alone(self) -> None:
        """Reports what is pending when a failure ends the run, without other ranks or hashes."""
        if self._num_steps:
            self._hand_on([None] * len(self._digests), None)
            self._show(None)

    def _hand_on(self, hashes: Sequence[str | None], stragglers: StragglerReport | None) -> None:
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
        for hook in self.hooks:
            hook.on_iterations(reports)

    def _show(self, stragglers: StragglerReport | None) -> None:
        if self._records:
            remaining = self._facts.num_iterations - self._records[-1].iteration
            report = summarize(
                self._records,
                self._facts,
                batch_digest=self._last_hash,
                stragglers=stragglers,
                seconds_left=self._remaining.estimate(remaining, time.perf_counter()),
            )
            for hook in self.hooks:
                hook.on_log(report)
        self._records = []
        self._num_steps = 0
        self._data_seconds = 0.0


class RemainingTime:
    """Estimates how long the rest of a run takes.

    The time of an iteration is the mean of the last `RECENT_ITERATIONS`. Validations and saves
    between iterations count by their share of the time since this process began to train.
    """

    def __init__(self) -> None:
        """Starts without any iteration."""
        self._begin = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_ITERATIONS)
        self._seconds = 0.0
        self._num_iterations = 0

    def add(self, seconds: float, now: float) -> None:
        """Adds an iteration that took ``seconds`` and ended at ``now``, by any clock."""
        if self._num_iterations == 0:
            self._begin = now - seconds
        elif self._num_iterations == 1:
            # The first iteration allocates and compiles; it counts only while it is the only one.
            self._recent.clear()
        self._num_iterations += 1
        self._seconds += seconds
        self._recent.append(seconds)

    def estimate(self, num_iterations: int, now: float) -> float:
        """Seconds that ``num_iterations`` more will take; at least one iteration was added."""
        between = max(now - self._begin - self._seconds, 0.0) / self._num_iterations
        return num_iterations * (sum(self._recent) / len(self._recent) + between)


def batch_digests(digests: Sequence[torch.Tensor], ranks: Ranks) -> list[str]:
    """Hashes whole global batches in sample order, with one exchange for all of them.

    Args:
        digests: For each iteration int64[num_local_samples, 3]: this rank's global sample numbers
            and digests. The data-parallel ranks hold equally many samples of each.
        ranks: This process's place.
    """
    local = torch.cat(list(digests)).to(ranks.device)
    parts = [torch.empty_like(local) for _ in range(ranks.data_parallel_size)]
    torch.distributed.all_gather(parts, local, group=megatron.data_parallel_group())
    sizes = [len(rows) for rows in digests]
    batches = zip(*(torch.split(part.cpu(), sizes) for part in parts), strict=True)
    return [_combine(torch.cat(batch)) for batch in batches]


def _combine(rows: torch.Tensor) -> str:
    return combine_digests(rows[rows[:, 0].argsort()][:, 1:])


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        source_sums: float64[num_sources, 3] on the CPU: summed loss, loss tokens and bytes of each
            source over the global batch; the same on every rank.
        grad_norm: Norm of the whole gradient before clipping.
        learning_rate: The rate that the update used.
        verdict: Whether the update was made; the same on every rank.
    """

    source_sums: torch.Tensor
    grad_norm: float
    learning_rate: float
    verdict: Verdict

    @property
    def loss(self) -> float | None:
        """Mean loss of the global batch's loss tokens, in nats; None if it had none."""
        loss_sum, num_tokens, _ = self.source_sums.sum(dim=0).tolist()
        return loss_sum / num_tokens if num_tokens else None


def train_step(
    batch: GlobalBatch,
    optimization: Optimization,
    forward_step: ForwardStep,
    ranks: Ranks,
    guard: Guard,
    mark: Mark = no_mark,
) -> StepResult:
    """Takes one step, or leaves its update out where the guard says so; every rank calls it.

    Megatron-LM counts a step without an update as an iteration but keeps its learning rate where it
    was. Here the learning rate goes on with the samples, whatever became of the update, so that it
    is the same after a resume.

    Args:
        batch: This rank's micro-batches of the global batch.
        optimization: Chunks, optimizer and learning rate; all change.
        forward_step: How a micro-batch runs.
        ranks: This process's place.
        guard: Judges the step before its update.
        mark: Names the step's parts for a profile.
    """
    for chunk in optimization.chunks:
        chunk.zero_grad_buffer()
    optimization.optimizer.zero_grad()
    with mark("forward and backward"), device_mode(ranks.device):
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            # Every model chunk runs every micro-batch.
            data_iterator=[iter(batch.micro_batches) for _ in optimization.chunks],
            model=optimization.chunks,
            num_microbatches=len(batch.micro_batches),
            # A micro-batch is one row of packed tokens.
            seq_length=batch.micro_batches[0].tokens.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
    if ranks.is_last_stage:
        sums = torch.stack(results).sum(dim=0)
    else:
        sums = torch.zeros(forward_step.num_sources, 3, dtype=torch.float64, device=ranks.device)
    sums = reduce_source_sums(sums, ranks).cpu()
    rows = sums.tolist()
    learning_rate = optimization.learning_rate()
    with mark("optimizer"), device_mode(ranks.device):
        verdict, grad_norm = optimization.update.step(lambda norm: guard.judge(rows, norm))
    optimization.advance(batch.end - batch.begin)
    return StepResult(sums, grad_norm, learning_rate, verdict)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """How far a run is.

    Attributes:
        iteration: Steps taken.
        consumed_samples: Samples consumed.
        counts: int64[num_sources], samples drawn from each source.
    """

    iteration: int
    consumed_samples: int
    counts: npt.NDArray[np.int64]

    def after(self, batch: GlobalBatch) -> "TrainState":
        """The progress once ``batch`` is consumed."""
        return TrainState(self.iteration + 1, batch.end, self.counts + batch.num_drawn)


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


def train(run: Run, progress: TrainState) -> TrainState:
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


def _status(run: Run, progress: TrainState) -> Status:
    """Why the loop ended."""
    if progress.iteration >= run.length.last_iteration:
        return "finished"
    is_exit = _is_due(progress.iteration, run.config.train.exit_interval)
    return "exit_interval" if is_exit else "stop_requested"


def _write_status(run: Run, status: Status) -> None:
    if run.ranks.is_reporter and run.config.checkpoint.save is not None:
        write_status(Path(run.config.checkpoint.save), status)


def _train(run: Run, progress: TrainState) -> TrainState:
    """The loop of `train`; iterations since the last log are left to the caller."""
    config = run.config
    last_iteration = run.length.last_iteration
    first_iteration = progress.iteration + 1
    batches = run.loader.batches(progress.consumed_samples, config.train.global_batch_size)
    if progress.iteration == 0:
        _validate(run, progress)
        _run_choice_eval(run, progress)
    while progress.iteration < last_iteration:
        run.watchdog.enter_phase(progress.iteration + 1, "loading")
        run.profiler.before(progress.iteration)
        begin = time.perf_counter()
        with run.profiler.mark("loading"):
            batch = next(batches)
        data_seconds = time.perf_counter() - begin
        run.watchdog.enter_phase(progress.iteration + 1, "training")
        result = _step(run, batch)
        progress = progress.after(batch)
        if _record_step_verdict(run, result, batch):
            _roll_back(run, progress)
        _record(run, progress, batch, result, time.perf_counter() - begin, data_seconds)
        is_save_due = run.saver is not None and _is_due(
            progress.iteration, config.checkpoint.save_interval
        )
        if is_save_due or _is_due(progress.iteration, config.logging.log_interval, last_iteration):
            run.log.log()
        is_test_due = run.test_validator is not None and progress.iteration == last_iteration
        if is_test_due or _is_due(progress.iteration, config.train.eval_interval, last_iteration):
            _validate(run, progress)
        if _is_due(progress.iteration, config.train.choice_interval, last_iteration):
            _run_choice_eval(run, progress)
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


def _record_step_verdict(run: Run, result: StepResult, batch: GlobalBatch) -> bool:
    try:
        return run.guard.record(result.verdict, result.loss, batch.begin, batch.end)
    except UserError:
        # Every rank stops here: a save under way is of a healthy iteration, and is worth its time.
        if run.saver is not None:
            run.saver.finish()
        raise


def _roll_back(run: Run, progress: TrainState) -> None:
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


def _should_stop(run: Run, progress: TrainState) -> bool:
    if run.stop_request.is_set(run.ranks.device):
        logger.info("asked to stop: leaving after iteration %d", progress.iteration)
        return True
    return _is_due(progress.iteration, run.config.train.exit_interval)


def _record(
    run: Run,
    progress: TrainState,
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


def _validate(run: Run, progress: TrainState) -> None:
    is_end = progress.iteration == run.length.last_iteration
    validators = {"": run.validator, " (test)": run.test_validator if is_end else None}
    losses: dict[str, SourceLoss] = {}
    for suffix, validator in validators.items():
        if validator is None:
            continue
        run.watchdog.enter_phase(progress.iteration, f"validation{suffix}")
        run.log.write_iterations()
        run.optimization.gather_parameters()
        found = validator.run(run.forward_step, run.optimization.chunks, run.ranks)
        losses |= {f"{name}{suffix}": loss for name, loss in found.items()}
    if not losses:
        return
    for hook in run.log.hooks:
        hook.on_validation(progress.iteration, losses)


def _run_choice_eval(run: Run, progress: TrainState) -> None:
    if run.choices is None:
        return
    run.watchdog.enter_phase(progress.iteration, "choice questions")
    run.log.write_iterations()
    run.optimization.gather_parameters()
    result = run.choices.run(run.forward_step, run.optimization.chunks, run.ranks)
    for hook in run.log.hooks:
        hook.on_choice(progress.iteration, {run.choices.name: result})


def _save(run: Run, progress: TrainState) -> None:
    if run.saver is None:
        return
    run.watchdog.enter_phase(progress.iteration, "saving")
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


def _ensure_saved(run: Run, progress: TrainState) -> None:
    """Returns once the progress is on the disk; one more attempt if the last save failed.

    Raises:
        UserError: That failed too.
    """
    run.watchdog.enter_phase(progress.iteration, "saving")
    if run.saver is None or run.saver.finish() == progress.iteration:
        return
    _save(run, progress)
    if run.saver.finish() != progress.iteration:
        raise UserError(
            f"checkpoint.save: {run.config.checkpoint.save}: the last checkpoint could not be "
            "written; free space and resume from the one before"
        )
