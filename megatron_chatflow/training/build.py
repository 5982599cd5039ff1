"""Builds a `Run` from its configuration and resumes it from a checkpoint."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.checkpoint.remote import CheckpointUploader
from megatron_chatflow.checkpoint.store import (
    CheckpointSaver,
    load_checkpoint,
    load_weights,
    verify_checkpoint,
)
from megatron_chatflow.config import RunConfig
from megatron_chatflow.config.shape import causal_share, flops_per_token
from megatron_chatflow.convert.grown_reader import GrownReader
from megatron_chatflow.convert.load_huggingface import load_huggingface
from megatron_chatflow.data.loader import Loader
from megatron_chatflow.data.source import Source
from megatron_chatflow.evaluation.choice import ChoiceSettings, ChoiceValidator
from megatron_chatflow.evaluation.scoring import PackedRows
from megatron_chatflow.evaluation.validation import Validator
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.model.llama import Llama, build_llama
from megatron_chatflow.model.objective import Objective
from megatron_chatflow.runtime.device import has_fast_bf16, peak_flops
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks, run_on_all_ranks
from megatron_chatflow.runtime.signals import StopRequest
from megatron_chatflow.runtime.table import format_table
from megatron_chatflow.runtime.watchdog import Watchdog
from megatron_chatflow.training.callbacks import Callback
from megatron_chatflow.training.callbacks.choice import ChoiceEval
from megatron_chatflow.training.callbacks.cuda_graphs import CudaGraphs
from megatron_chatflow.training.callbacks.probes import ProbeEval
from megatron_chatflow.training.callbacks.process import FreedMemory, GarbageCollection, Heartbeat
from megatron_chatflow.training.callbacks.profiler import ProfilerWindow
from megatron_chatflow.training.callbacks.straggler import StragglerDetector
from megatron_chatflow.training.guard import Guard
from megatron_chatflow.training.inputs import (
    RunInputs,
    carried_files,
    check_same_inputs_on_all_ranks,
    open_inputs_from,
    verify_data,
)
from megatron_chatflow.training.loop import Run, TrainState
from megatron_chatflow.training.optimizer import Optimization, build_optimization
from megatron_chatflow.training.report import IntervalLog, RunFacts
from megatron_chatflow.training.run_folder import open_run_folder
from megatron_chatflow.training.start import resolve_initial_checkpoint

logger = logging.getLogger(__name__)


def build_run(config: RunConfig, ranks: Ranks, stack: ExitStack) -> tuple[Run, TrainState]:
    """Builds every part of a run; every rank calls it. ``stack`` closes what must be closed.

    Raises:
        UserError: Data, tokenizer, model and checkpoint do not fit together.
    """
    inputs = _open_inputs(config, ranks)
    with device_mode(ranks.device):
        llama = build_llama(
            config.model,
            config.parallel,
            config.train,
            ranks,
            vocab_size=inputs.vocab_size,
            sequence_length=config.data.seq_length,
        )
    objective = _build_objective(inputs, ranks)
    optimization = build_optimization(config, llama, ranks, inputs.length, objective, inputs.stages)
    if inputs.checkpoint is not None:
        if config.checkpoint.ckpt_verify and not inputs.is_huggingface:
            verify_checkpoint(inputs.checkpoint, ranks)
            logger.info("verified: every file of %s matches its recorded hash", inputs.checkpoint)
        _load_checkpoint(config, inputs, llama, optimization, ranks)
    state = TrainState(0, 0, np.zeros(len(inputs.blend.schedule.sources), dtype=np.int64))
    if inputs.resumed is not None:
        iteration, consumed_samples = inputs.resumed.iteration, inputs.resumed.consumed_samples
        state = TrainState(iteration, consumed_samples, inputs.blend.counts(consumed_samples))
    optimization.set_progress(state.iteration, state.consumed_samples)
    if optimization.stages is not None and inputs.resumed is not None:
        optimization.stages.restore(inputs.resumed.stages, inputs.checkpoint)

    watchdog = Watchdog(
        timeout_seconds=60 * config.hang_timeout_minutes,
        rank=ranks.process.rank,
        world_size=ranks.process.world_size,
        folder=config.checkpoint.save,
    )
    stack.callback(watchdog.close)
    if config.train.bf16 and not has_fast_bf16(ranks.device):
        logger.warning(
            "train.bf16: this CPU has no AVX-512, so PyTorch's bf16 matrix products are up to "
            "50 times slower than fp32; use --no-bf16"
        )
    peak, peak_source = peak_flops(ranks.device, llama.dtype)
    _log_implementations(llama, optimization, peak_source)
    reporters, downtime = run_on_all_ranks(
        lambda: open_run_folder(config, ranks, inputs.length, inputs.blend.edit, stack)
    )
    stragglers = None
    if config.logging.log_straggler:
        stragglers = StragglerDetector(ranks, config.logging.straggler_minmax_count)
        llama.config.timers = stragglers.timers

    loader = Loader(
        inputs.sources,
        inputs.blend,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=ranks.data_parallel_rank,
        data_parallel_size=ranks.data_parallel_size,
        num_prefetch=config.data.num_prefetch,
        retry_seconds=config.faults.data_retry_seconds,
    )
    stack.callback(loader.close)
    if inputs.control is not None:
        logger.info("controller: %s", inputs.control)
    choices = _build_choice_validator(config, inputs)
    what = "saving and exiting after this iteration"
    if config.checkpoint.save is None:
        what = "exiting after this iteration without saving, because --save is not set"
    notice = f"interrupted: {what}; press Ctrl-C again to exit immediately"
    stop_request = StopRequest(
        config.train.exit_duration_in_mins, notice=notice if ranks.process.rank == 0 else None
    )
    stack.callback(stop_request.close)
    saver = _build_saver(config, inputs, ranks, state, watchdog, stack)

    # The loop calls the hooks in this order, which `training.callbacks` documents.
    behaviour: list[Callback | None] = [
        Heartbeat(watchdog),
        None if config.train.cuda_graph_impl == "none" else CudaGraphs(config, optimization, ranks),
        ProfilerWindow(config, ranks),
        stragglers,
        None if choices is None else ChoiceEval(choices, config.train.choice_interval),
        _build_probe_eval(config, inputs) if inputs.probes else None,
        GarbageCollection(config.train.manual_gc_interval),
        None if ranks.is_cuda else FreedMemory(),
    ]
    callbacks = [callback for callback in behaviour if callback is not None]
    for callback in callbacks:
        stack.callback(callback.close)
    callbacks += reporters

    flops = flops_per_token(config.model, inputs.vocab_size, config.data.seq_length)
    num_stages = len(inputs.stages.stages)
    facts = RunFacts(
        num_iterations=inputs.length.last_iteration,
        num_samples=inputs.length.num_samples,
        seq_length=config.data.seq_length,
        world_size=ranks.process.world_size,
        flops_per_token=float(flops),
        causal_share=causal_share(config.model, inputs.vocab_size, config.data.seq_length),
        peak_flops=peak,
        sources=[source.name for source in inputs.sources],
        samples_per_epoch=[source.num_samples for source in inputs.sources],
        downtime=downtime,
        stage_flops=[inputs.stages.flops_per_token(k, flops) for k in range(num_stages)],
    )
    validators = {
        "": _build_validator(config, inputs.validation_sources),
        " (test)": _build_validator(config, inputs.test_sources),
    }
    # A rollback can load only a checkpoint of this very run, with its optimizer.
    is_restorable = inputs.resumed is not None and not inputs.grown and config.checkpoint.load_optim
    run = Run(
        config=config,
        length=inputs.length,
        ranks=ranks,
        blend=inputs.blend,
        control=inputs.control,
        loader=loader,
        forward_step=ForwardStep.build(
            llama,
            ranks,
            num_bytes_per_id=inputs.tokenizer.num_bytes_per_id,
            num_sources=len(inputs.sources),
            objective=objective,
            on_micro_batch=watchdog.heartbeat,
        ),
        optimization=optimization,
        guard=Guard(config, facts.sources, inputs.resumed.guard if inputs.resumed else {}),
        validators={name: one for name, one in validators.items() if one is not None},
        log=IntervalLog(callbacks, facts, ranks, stragglers),
        callbacks=callbacks,
        stop_request=stop_request,
        saver=saver,
        checkpoint_state=inputs.state,
        resumed_from=inputs.checkpoint if is_restorable else None,
    )
    return run, state


def _open_inputs(config: RunConfig, ranks: Ranks) -> RunInputs:
    """Opens the inputs and checks that they are the same on every rank."""
    checkpoint = resolve_initial_checkpoint(config, ranks)
    inputs = run_on_all_ranks(lambda: open_inputs_from(checkpoint, config))
    check_same_inputs_on_all_ranks(inputs)
    if config.data.data_verify:
        # Every node checks the files that it sees itself, which may be local copies.
        part, num_parts = ranks.process.local_rank, ranks.process.local_world_size
        run_on_all_ranks(lambda: verify_data(config, inputs, part=part, num_parts=num_parts))
        logger.info("verified: every dataset that has a .json file matches it")
    if inputs.changes:
        logger.info(
            "settings that differ from %s:\n%s", inputs.checkpoint, format_table(inputs.changes)
        )
    if inputs.blend.edit is not None:
        logger.info("%s", inputs.blend.edit)
    if config.train.stages:
        logger.info("stages of training:\n%s", format_table(inputs.stages.table(inputs.length)))
    if inputs.findings:
        rule = "*" * 100
        lines = [rule, *(f"* {finding}" for finding in inputs.findings), rule]
        logger.warning("%d findings:\n%s", len(inputs.findings), "\n".join(lines))
    return inputs


def _load_checkpoint(
    config: RunConfig, inputs: RunInputs, llama: Llama, optimization: Optimization, ranks: Ranks
) -> None:
    checkpoint = inputs.checkpoint
    assert checkpoint is not None, "checked by the caller"
    weights_only = inputs.resumed is None or not config.checkpoint.load_optim
    chunks, optimizer = optimization.chunks, optimization.optimizer
    reader, has_average = None, False
    if inputs.grown is not None and not inputs.is_huggingface:
        reader = GrownReader(checkpoint, inputs.grown, llama.padded_vocab_size)
    if inputs.is_huggingface:
        load_huggingface(checkpoint, chunks, ranks, inputs.grown, optimizer)
    elif weights_only:
        load_weights(checkpoint, chunks, ranks, reader, optimizer)
    else:
        has_average = load_checkpoint(
            checkpoint, chunks, optimizer, ranks, reader, optimization.average_states()
        )
    _start_average(config, optimization, has_average, is_resumed=inputs.resumed is not None)
    what = "weights" if weights_only else "weights and optimizer state"
    logger.info("loaded %s from %s", what, checkpoint)
    if inputs.resumed and config.train.fp8_format and config.train.fp8_recipe == "delayed":
        logger.warning(
            "the delayed recipe of FP8 starts with empty maxima, which checkpoints do not hold: "
            "the first losses differ from those of an uninterrupted run"
        )
    if inputs.resumed is not None and weights_only:
        logger.warning(
            "the optimizer starts with fresh state at iteration %d (--no-load-optim); remove "
            "the flag before the next restart, or the state is reset again",
            inputs.resumed.iteration + 1,
        )


def _start_average(
    config: RunConfig, optimization: Optimization, has_average: bool, *, is_resumed: bool
) -> None:
    """Starts the average of the weights at the loaded ones unless it was loaded as well."""
    if optimization.average is not None and not has_average:
        optimization.average.restart()
        if is_resumed:
            logger.info("optimizer.ema_decay: the average starts at the weights of the checkpoint")
    if optimization.average is None and has_average:
        logger.warning(
            "the checkpoint holds a moving average of the weights, which this run does not "
            "continue; set optimizer.ema_decay to continue it"
        )


def _build_objective(inputs: RunInputs, ranks: Ranks) -> Objective | None:
    """Returns the weights of sources in the objective; None if all are equal."""
    weights = inputs.objective
    if weights.are_equal:
        return None
    first = weights.at(inputs.length.consumed_samples)
    shown = ", ".join(f"{name} {w:g}" for name, w in zip(weights.sources, first, strict=True))
    change = "" if weights.are_constant else "; they change along the schedule"
    logger.info("weights of sources in the objective: %s%s", shown, change)
    return Objective(weights, ranks.device)


def _build_validator(config: RunConfig, sources: list[Source]) -> Validator | None:
    if not any(source.num_samples for source in sources):
        return None
    return Validator(
        sources=sources,
        max_samples=config.train.eval_iters * config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
    )


def _build_saver(
    config: RunConfig,
    inputs: RunInputs,
    ranks: Ranks,
    state: TrainState,
    watchdog: Watchdog,
    stack: ExitStack,
) -> CheckpointSaver | None:
    if config.checkpoint.save is None:
        return None
    carried = run_on_all_ranks(lambda: carried_files(config, inputs) if ranks.is_reporter else None)
    uploader = None
    if config.checkpoint.save_remote is not None and ranks.is_reporter:
        uploader = CheckpointUploader(
            Path(config.checkpoint.save),
            config.checkpoint.save_remote,
            retain=config.checkpoint.save_retain,
            keep_every=config.checkpoint.save_keep_every,
        )
    saver = CheckpointSaver(
        Path(config.checkpoint.save),
        config,
        ranks,
        durable_iteration=state.iteration or None,
        carried=carried,
        on_progress=watchdog.heartbeat,
        uploader=uploader,
    )
    stack.callback(saver.close)
    return saver


def _build_choice_validator(config: RunConfig, inputs: RunInputs) -> ChoiceValidator | None:
    train = config.train
    if train.choice_questions is None:
        return None
    return ChoiceValidator.build(
        Path(train.choice_questions).name.split(".")[0],
        inputs.questions,
        ChoiceSettings(train.choice_scoring, train.choice_num_fewshot, train.choice_language),
        tokenizer=inputs.tokenizer,
        begins_with_bos=inputs.state.tokenizer["add_bos_token"],
        seq_length=config.data.seq_length,
        micro_batch_size=train.micro_batch_size,
    )


def _build_probe_eval(config: RunConfig, inputs: RunInputs) -> ProbeEval:
    packed = [
        PackedRows.build(
            probe.rows,
            seq_length=config.data.seq_length,
            micro_batch_size=config.train.micro_batch_size,
            fill_id=inputs.tokenizer.eos_id,
        )
        for probe in inputs.probes
    ]
    return ProbeEval(inputs.probes, packed, config.train.probe_interval)


def _log_implementations(llama: Llama, optimization: Optimization, peak_source: str) -> None:
    """Logs which implementation each part of the run uses."""
    implementations: dict[str, Any] = {
        **llama.implementations,
        "optimizer": optimization.description,
        "peak": peak_source,
    }
    for part, implementation in implementations.items():
        logger.info("%s: %s", part, implementation)
    logger.info(
        "%s parameters in this process; vocabulary of %d tokens padded to %d rows",
        f"{llama.num_local_parameters():,}",
        llama.vocab_size,
        llama.padded_vocab_size,
    )
