"""The training loop and its step.

`train` runs iterations until the last one, the exit interval or a stop signal: get a batch, run
forward and backward, judge the step, update, record, validate, save. `train_step` is one step. What
a run can do besides (heartbeats, profiling, choice questions, garbage collection, the log) lies in
`megatron_chatflow.training.callbacks`; `megatron_chatflow.training.build` assembles a `Run`.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.profiler import record_function

from megatron_chatflow.blend.adaptive import AdaptiveBlend
from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.controllers import WeightControl
from megatron_chatflow.blend.quota import GRID
from megatron_chatflow.checkpoint.store import CheckpointSaver, RunState, load_checkpoint
from megatron_chatflow.config import RunConfig, RunLength
from megatron_chatflow.data.loader import GlobalBatch, Loader
from megatron_chatflow.errors import LocalError, UserError
from megatron_chatflow.evaluation.validation import SourceLoss, Validator, reduce_source_sums
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.runtime.device import peak_memory
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks, run_on_all_ranks
from megatron_chatflow.runtime.signals import StopRequest
from megatron_chatflow.training.callbacks import Callback, ExitStatus
from megatron_chatflow.training.guard import Guard, Verdict
from megatron_chatflow.training.norms import Norms
from megatron_chatflow.training.optimizer import Optimization
from megatron_chatflow.training.report import IntervalLog, IterationRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    iteration: int  # number of completed steps
    consumed_samples: int
    counts: npt.NDArray[np.int64]  # int64[num_sources], number of samples drawn from each source

    def after(self, batch: GlobalBatch) -> "TrainState":
        """Returns the state once ``batch`` is consumed."""
        return TrainState(self.iteration + 1, batch.end, self.counts + batch.num_drawn)


@dataclass(frozen=True)
class Run:
    """Everything that the training loop uses."""

    config: RunConfig  # resolved configuration
    length: RunLength  # first and last iteration, and the unit of the learning-rate schedule
    ranks: Ranks  # this process's place in every parallel group
    blend: Blend | AdaptiveBlend  # decides which source each sample comes from
    control: WeightControl | None  # decides the blend's weights; None if they are known
    loader: Loader  # yields this rank's micro-batches
    forward_step: ForwardStep  # runs one micro-batch
    optimization: Optimization  # model chunks, optimizer and learning rate
    guard: Guard  # judges every step before its update
    # By the suffix of their sources' names: "" for held-out samples, and " (test)" for the test
    # split, which only the last validation evaluates. Splits without samples are absent.
    validators: Mapping[str, Validator]
    log: IntervalLog  # collects iterations and reports them to the callbacks
    callbacks: Sequence[Callback]  # optional behaviour, in the order in which hooks are called
    stop_request: StopRequest  # signals and the time limit
    saver: CheckpointSaver | None  # writes checkpoints; None without ``--save``
    checkpoint_state: RunState  # the parts of a checkpoint's `RunState` that do not change
    # The checkpoint that the run resumed from, for rollbacks; None if there is none or it cannot be
    # loaded again as it is.
    resumed_from: Path | None


@dataclass(frozen=True)
class StepResult:
    """Result of one step."""

    # float64[num_sources, 3] on the CPU: summed loss, loss tokens and bytes of each source over the
    # global batch; the same on every rank.
    source_sums: torch.Tensor
    grad_norm: float  # norm of the whole gradient before clipping
    learning_rate: float  # learning rate of the update
    weight_decay: float  # weight decay of the update
    verdict: Verdict  # whether the update was made; the same on every rank
    norms: Norms | None = None  # norms of the weights and gradients, if they are due
    # Number of the stage of training, which a rollback may leave; None for a run without stages.
    stage: int | None = None

    @property
    def loss(self) -> float | None:
        """Mean loss of the global batch's loss tokens, in nats; None without loss tokens."""
        loss_sum, num_tokens, _ = self.source_sums.sum(dim=0).tolist()
        return loss_sum / num_tokens if num_tokens else None


def train(run: Run, state: TrainState) -> TrainState:
    """Trains until the last iteration, the exit interval or a stop signal, and saves at the end.

    Raises:
        UserError: The last checkpoint could not be written, or a bad step ends the run.
    """
    try:
        state, status = _run_iterations(run, state)
        run.log.log()
        ensure_saved(run, state)
    except BaseException:
        run.log.log_without_other_ranks()
        for callback in run.callbacks:
            callback.on_exit("failed")
        raise
    for callback in run.callbacks:
        callback.on_exit(status)
    return state


def _run_iterations(run: Run, state: TrainState) -> tuple[TrainState, ExitStatus]:
    """Runs the loop; the caller logs the iterations since the last log and saves."""
    train, callbacks = run.config.train, run.callbacks
    log_interval, save_interval = run.config.logging.log_interval, None
    if run.saver is not None:
        save_interval = run.config.checkpoint.save_interval
    first_iteration, last_iteration = state.iteration + 1, run.length.last_iteration
    batches = run.loader.batches(state.consumed_samples, run.length.batch_sizes.at)

    if state.iteration == 0:
        if run.control is not None:
            for number in range(run.control.blend.num_decided):
                report_decision(run, state, run.control.record(number))
        validate(run, state)
        for callback in callbacks:
            callback.on_evaluate(run, state)

    while state.iteration < last_iteration:
        iteration = state.iteration + 1

        # Get this rank's micro-batches.
        for callback in callbacks:
            callback.before_iteration(iteration)
        begin = time.perf_counter()
        with record_function("loading"):
            batch = next(batches)
        data_seconds = time.perf_counter() - begin

        # Forward, backward, verdict and update.
        for callback in callbacks:
            callback.before_step(iteration)
        if run.optimization.norms is not None:
            run.optimization.norms.is_due = is_due(iteration, log_interval, last_iteration)
        result = train_step(batch, run.optimization, run.forward_step, run.ranks, run.guard)
        for callback in callbacks:
            callback.after_step(iteration)
        state = state.after(batch)
        if run.control is not None and result.verdict.is_good:
            run.control.observe(result.source_sums.numpy())
        if record_step_verdict(run, result, batch, state):
            roll_back(run, state)

        # Record and log. A log precedes every save, so that a resumed run logs the same means.
        record_iteration(run, state, batch, result, time.perf_counter() - begin, data_seconds)
        is_save_due = is_due(iteration, save_interval)
        if is_save_due or is_due(iteration, log_interval, last_iteration):
            run.log.log()

        # Validate and evaluate.
        is_test_due = " (test)" in run.validators and iteration == last_iteration
        if is_test_due or is_due(iteration, train.eval_interval, last_iteration):
            validate(run, state)
        for callback in callbacks:
            callback.on_evaluate(run, state)

        # Decide the weights of the next horizon, which a checkpoint has to contain.
        if run.control is not None and run.control.is_due(state.consumed_samples):
            decide_weights(run, run.control, state)

        # Save. The buffers of the first save are allocated after the first step.
        if run.saver is not None and iteration == first_iteration:
            optimization = run.optimization
            run.saver.prepare(
                optimization.chunks, optimization.optimizer, optimization.average_states()
            )
        if is_save_due:
            save(run, state)

        # Exit.
        for callback in callbacks:
            callback.after_iteration(iteration)
        status: ExitStatus | None = None
        if run.stop_request.is_set(run.ranks.device):
            logger.info("stop requested: exiting after iteration %d", iteration)
            status = "stop_requested"
        if is_due(iteration, train.exit_interval):
            status = "exit_interval"
        if status is not None and iteration < last_iteration:
            return state, status
    return state, "finished"


def train_step(
    batch: GlobalBatch,
    optimization: Optimization,
    forward_step: ForwardStep,
    ranks: Ranks,
    guard: Guard,
) -> StepResult:
    """Runs one step, whose update is skipped if the guard rejects it; every rank calls it.

    The loss is summed over the global batch's loss tokens and divided by their number, so it does
    not depend on how the batch was split.

    Megatron-LM counts a step without an update as an iteration but does not advance its learning
    rate. Here the learning rate advances with every step, so that it is the same after a resume.
    """
    if forward_step.objective is not None:
        forward_step.objective.begin_step(batch.begin)
    optimization.begin_iteration(batch.begin)
    for chunk in optimization.chunks:
        chunk.zero_grad_buffer()
    optimization.optimizer.zero_grad()
    with record_function("forward and backward"), device_mode(ranks.device):
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
    learning_rate, weight_decay = optimization.learning_rate(), optimization.weight_decay()
    with record_function("optimizer"), device_mode(ranks.device):
        optimization.mask_gradients()
        verdict, grad_norm = optimization.update.step(lambda norm: guard.judge(rows, norm))
        if optimization.average is not None and verdict.is_good:
            optimization.average.update()
        norms = None if optimization.norms is None else optimization.norms.measure()
    optimization.advance(batch.end - batch.begin)
    stage = None if optimization.stages is None else optimization.stages.stage
    return StepResult(sums, grad_norm, learning_rate, weight_decay, verdict, norms, stage)


def record_step_verdict(
    run: Run, result: StepResult, batch: GlobalBatch, state: TrainState
) -> bool:
    """Counts the step's verdict; returns whether the weights must be rolled back.

    Raises `UserError` on every rank if the verdict ends the run.
    """
    try:
        return run.guard.record(result.verdict, result.loss, batch.begin, batch.end)
    except UserError:
        # A save in progress is of a healthy iteration, so let it finish.
        if run.saver is not None:
            run.saver.finish()
            run.saver.finish_uploads()
            report_uploads(run, state)
        raise


def roll_back(run: Run, state: TrainState) -> None:
    """Loads weights and optimizer of the last checkpoint; the data continues from ``state``.

    The weights therefore never see the samples since that checkpoint, which led to the bad step.
    """
    checkpoint = run.resumed_from
    if run.saver is not None:
        run.saver.finish()
        checkpoint = run.saver.newest or checkpoint
    if checkpoint is None:
        raise UserError(
            f"iteration {state.iteration}: --on-nan rollback found no checkpoint of this run; "
            "set --save and --save-interval, or use --on-nan skip"
        )
    optimization = run.optimization
    has_average = load_checkpoint(
        checkpoint,
        optimization.chunks,
        optimization.optimizer,
        run.ranks,
        average=optimization.average_states(),
    )
    if optimization.average is not None and not has_average:
        optimization.average.restart()
    optimization.set_progress(state.iteration, state.consumed_samples)
    if optimization.stages is not None:
        optimization.stages.restore(RunState.read(checkpoint).stages, checkpoint)
    logger.warning(
        "rolled back to the weights of %s; the data continues from sample %d",
        checkpoint,
        state.consumed_samples,
    )


def record_iteration(
    run: Run,
    state: TrainState,
    batch: GlobalBatch,
    result: StepResult,
    seconds: float,
    data_seconds: float,
) -> None:
    """Adds an iteration to the log; only the reporting rank keeps its record."""
    record = None
    objective = run.forward_step.objective
    if run.ranks.is_reporter:
        record = IterationRecord(
            iteration=state.iteration,
            consumed_samples=state.consumed_samples,
            num_samples=batch.end - batch.begin,
            source_sums=result.source_sums,
            weights=run.blend.weights(batch.begin),
            num_drawn=batch.num_drawn,
            counts=state.counts,
            learning_rate=result.learning_rate,
            weight_decay=result.weight_decay,
            grad_norm=result.grad_norm,
            norms=result.norms,
            is_updated=result.verdict.is_good,
            stage=result.stage,
            time=time.time(),
            seconds=seconds,
            data_seconds=data_seconds,
            memory_bytes=peak_memory(run.ranks.device),
            num_skipped=run.guard.num_skipped,
            skipped_no_loss_tokens=run.guard.skipped_no_loss_tokens,
            num_rollbacks=run.guard.num_rollbacks,
            objective_weights=None if objective is None else objective.weights,
        )
    digests = torch.cat((batch.sample_positions.unsqueeze(-1), batch.sample_digests), dim=-1)
    run.log.add(digests, data_seconds, record)


def validate(run: Run, state: TrainState) -> None:
    """Computes each source's validation loss; every rank calls it."""
    losses: dict[str, SourceLoss] = {}
    for suffix, validator in run.validators.items():
        if suffix and state.iteration != run.length.last_iteration:
            continue
        prepare_evaluation(run, state, f"validation{suffix}")
        found = validator.run(run.forward_step, run.optimization.chunks, run.ranks)
        if run.control is not None and not suffix:
            run.control.observe_validation({name: one.loss for name, one in found.items()})
        losses |= {f"{name}{suffix}": loss for name, loss in found.items()}
        # The average starts at the first weights.
        if run.optimization.average is not None and state.iteration:
            with run.optimization.averaged_weights():
                found = validator.run(run.forward_step, run.optimization.chunks, run.ranks)
            losses |= {f"{name}{suffix} (ema)": loss for name, loss in found.items()}
    if losses:
        for callback in run.callbacks:
            callback.on_validation(state.iteration, losses)


def decide_weights(run: Run, control: WeightControl, state: TrainState) -> None:
    """Decides the weights of the next horizon; every rank calls it and adopts those of rank 0."""
    decision = [run_on_all_ranks(control.propose)]
    torch.distributed.broadcast_object_list(decision, src=0)
    record = control.adopt(*decision[0])
    shares = ", ".join(f"{name} {w / GRID:.4f}" for name, w in record["weights"].items())
    logger.info("weights of samples %d to %d: %s", record["begin"], record["end"], shares)
    report_decision(run, state, record)


def report_decision(run: Run, state: TrainState, record: Mapping[str, Any]) -> None:
    """Reports the weights of a horizon to the callbacks."""
    for callback in run.callbacks:
        callback.on_decision(state.iteration, record)


def prepare_evaluation(run: Run, state: TrainState, name: str) -> None:
    """Reports pending iterations and gathers the parameters; every rank calls it."""
    for callback in run.callbacks:
        callback.before_validation(state.iteration, name)
    run.log.write_iterations()
    run.optimization.gather_parameters()


def save(run: Run, state: TrainState) -> None:
    """Starts a checkpoint of ``state``, which the saver writes in the background."""
    if run.saver is None:
        return
    report_uploads(run, state)
    for callback in run.callbacks:
        callback.on_save(state.iteration)
    run.optimization.gather_parameters()
    run.saver.save(
        replace(
            run.checkpoint_state,
            iteration=state.iteration,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_samples * run.config.data.seq_length,
            blend=blend_state(run, state),
            guard=run.guard.state(),
            stages=run.optimization.stages.state() if run.optimization.stages else {},
        ),
        run.optimization.chunks,
        run.optimization.optimizer,
        run.optimization.average_states(),
    )


def report_uploads(run: Run, state: TrainState) -> None:
    """Reports the uploads that ended since the last call; only the reporting rank has any."""
    for result in [] if run.saver is None else run.saver.take_upload_results():
        for callback in run.callbacks:
            callback.on_upload(state.iteration, result.to_dict())


def blend_state(run: Run, state: TrainState) -> dict[str, Any]:
    """Returns the state of the blend, and of its controller if it has one, as JSON."""
    blend = run.blend.state_at(state.consumed_samples)
    controller = run.config.data.schedule.controller
    if controller is None:
        return blend
    found = {"name": controller.name} if run.control is None else run.control.state()
    return {**blend, "controller": found}


def ensure_saved(run: Run, state: TrainState) -> None:
    """Waits until ``state`` is on disk and uploaded; saves once more if the last save failed."""
    for callback in run.callbacks:
        callback.on_save(state.iteration)
    if run.saver is None:
        return
    if run.saver.finish() != state.iteration:
        save(run, state)
        if run.saver.finish() != state.iteration:
            raise UserError(
                f"checkpoint.save: {run.config.checkpoint.save}: the last checkpoint could not be "
                "written; free disk space and resume from the previous checkpoint"
            )
    problem = run.saver.finish_uploads()
    report_uploads(run, state)
    if problem is not None:
        raise LocalError(
            f"checkpoint.save_remote: {run.config.checkpoint.save_remote}: the last checkpoint "
            f"could not be uploaded: {problem} (it is intact in {run.config.checkpoint.save}; the "
            "same command uploads it)"
        )


def is_due(iteration: int, interval: int | None, last_iteration: int | None = None) -> bool:
    """Returns whether an action with this interval is due; it is never due without an interval."""
    return interval is not None and (iteration % interval == 0 or iteration == last_iteration)
