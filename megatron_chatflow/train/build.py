"""Puts a run together from its configuration, and takes it up where a checkpoint left it.

In: a resolved configuration and this process's ranks. Out: a `Run` and its `TrainState`.
"""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.checkpoint.store import (
    CheckpointSaver,
    RunState,
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
from megatron_chatflow.evaluation.validation import Validator
from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.model.llama import Llama, build_llama
from megatron_chatflow.runtime.device import peak_flops
from megatron_chatflow.runtime.host_memory import FreedMemory, GarbageCollection
from megatron_chatflow.runtime.launch import device_mode
from megatron_chatflow.runtime.ranks import Ranks, run_on_all_ranks
from megatron_chatflow.runtime.signals import StopRequest
from megatron_chatflow.runtime.table import format_table
from megatron_chatflow.runtime.watchdog import Watchdog
from megatron_chatflow.train.guard import Guard
from megatron_chatflow.train.inputs import (
    RunInputs,
    carried_files,
    check_same_inputs_on_all_ranks,
    open_inputs_from,
    verify_data,
)
from megatron_chatflow.train.loop import IntervalLog, Run, TrainState
from megatron_chatflow.train.optimizer import Optimization, build_optimization
from megatron_chatflow.train.profiler import ProfilerWindow
from megatron_chatflow.train.record import open_record
from megatron_chatflow.train.report import RunFacts
from megatron_chatflow.train.start import resolve_initial_checkpoint
from megatron_chatflow.train.straggler import Stragglers

logger = logging.getLogger(__name__)


def build_run(config: RunConfig, ranks: Ranks, stack: ExitStack) -> tuple[Run, TrainState]:
    """Builds every part; ``stack`` closes what has to be closed.

    Raises:
        UserError: Data, tokenizer, model and checkpoint do not fit together.
    """
    inputs = _inputs(config, ranks)
    llama = _model(config, ranks, inputs.vocab_size)
    optimization = build_optimization(config, llama, ranks, inputs.length)
    if inputs.checkpoint is not None:
        if config.checkpoint.ckpt_verify and not inputs.is_huggingface:
            verify_checkpoint(inputs.checkpoint, ranks)
            logger.info("every file of %s is what was saved", inputs.checkpoint)
        _load(config, inputs, llama, optimization, ranks)
    progress = _progress(inputs.blend, inputs.resumed)
    optimization.set_progress(progress.iteration, progress.consumed_samples)

    watchdog = _watchdog(config, ranks)
    stack.callback(watchdog.close)
    peak, peak_source = peak_flops(ranks.device, llama.dtype)
    _log_choices(config, llama, optimization, ranks, peak_source)
    edit = inputs.blend.edit
    hooks, downtime = run_on_all_ranks(
        lambda: open_record(config, ranks, inputs.length, edit, stack)
    )
    stragglers = _stragglers(config, ranks, llama)
    facts = RunFacts(
        num_iterations=inputs.length.last_iteration,
        seq_length=config.data.seq_length,
        world_size=ranks.process.world_size,
        flops_per_token=float(
            flops_per_token(config.model, inputs.vocab_size, config.data.seq_length)
        ),
        causal_share=causal_share(config.model, inputs.vocab_size, config.data.seq_length),
        peak_flops=peak,
        sources=[source.name for source in inputs.sources],
        samples_per_epoch=[source.num_samples for source in inputs.sources],
        downtime=downtime,
    )
    run = Run(
        config=config,
        length=inputs.length,
        ranks=ranks,
        sources=inputs.sources,
        blend=inputs.blend,
        loader=_loader(config, inputs, ranks, stack),
        forward_step=ForwardStep.build(
            llama,
            ranks,
            num_bytes_per_id=inputs.tokenizer.num_bytes_per_id,
            num_sources=len(inputs.sources),
            on_micro_batch=watchdog.heartbeat,
        ),
        optimization=optimization,
        validator=_validator(config, inputs.validation_sources),
        test_validator=_validator(config, inputs.test_sources),
        choices=_choices(config, inputs),
        state=inputs.state,
        log=IntervalLog(hooks, facts, ranks, stragglers),
        stop_request=StopRequest(
            config.train.exit_duration_in_mins, notice=_interrupt_notice(config, ranks)
        ),
        guard=_guard(config, inputs),
        watchdog=watchdog,
        collection=GarbageCollection(config.train.manual_gc_interval),
        freed_memory=None if ranks.is_cuda else FreedMemory(),
        profiler=ProfilerWindow(config, ranks),
        stragglers=stragglers,
        saver=_saver(config, inputs, ranks, progress, watchdog, stack),
        resumed_from=_restorable_checkpoint(config, inputs),
    )
    stack.callback(run.stop_request.close)
    stack.callback(run.collection.close)
    stack.callback(run.profiler.close)
    return run, progress


def _inputs(config: RunConfig, ranks: Ranks) -> RunInputs:
    """What the run reads, the same on every rank."""
    beginning = resolve_initial_checkpoint(config, ranks)
    inputs = run_on_all_ranks(lambda: open_inputs_from(beginning, config))
    check_same_inputs_on_all_ranks(inputs)
    if config.data.data_verify:
        # Every node compares the files that it sees itself: they may be copies of its own.
        part, num_parts = ranks.process.local_rank, ranks.process.local_world_size
        run_on_all_ranks(lambda: verify_data(config, inputs, part=part, num_parts=num_parts))
        logger.info("every dataset that has a .json is what was made")
    if inputs.changes:
        logger.info(
            "settings that differ from those of %s:\n%s",
            inputs.checkpoint,
            format_table(inputs.changes),
        )
    if inputs.findings:
        rule = "*" * 100
        lines = [rule, *(f"* {finding}" for finding in inputs.findings), rule]
        logger.warning("%d findings:\n%s", len(inputs.findings), "\n".join(lines))
    return inputs


def _interrupt_notice(config: RunConfig, ranks: Ranks) -> str | None:
    """What one rank says at the first Ctrl-C."""
    if ranks.process.rank != 0:
        return None
    what = "leaving after this iteration (no --save: nothing is saved)"
    if config.checkpoint.save is not None:
        what = "saving and leaving after this iteration"
    return f"interrupted: {what}; Ctrl-C again ends the run at once"


def _stragglers(config: RunConfig, ranks: Ranks, llama: Llama) -> Stragglers | None:
    if not config.logging.log_straggler:
        return None
    stragglers = Stragglers(ranks, config.logging.straggler_minmax_count)
    llama.config.timers = stragglers.timers
    return stragglers


def _guard(config: RunConfig, inputs: RunInputs) -> Guard:
    names = [source.name for source in inputs.sources]
    return Guard(config, names, inputs.resumed.guard if inputs.resumed else {})


def _watchdog(config: RunConfig, ranks: Ranks) -> Watchdog:
    return Watchdog(
        timeout_seconds=60 * config.hang_timeout_minutes,
        rank=ranks.process.rank,
        world_size=ranks.process.world_size,
        folder=config.checkpoint.save,
    )


def _model(config: RunConfig, ranks: Ranks, vocab_size: int) -> Llama:
    with device_mode(ranks.device):
        return build_llama(
            config.model,
            config.parallel,
            config.train,
            ranks,
            vocab_size=vocab_size,
            sequence_length=config.data.seq_length,
        )


def _load(
    config: RunConfig, inputs: RunInputs, llama: Llama, optimization: Optimization, ranks: Ranks
) -> None:
    checkpoint = inputs.checkpoint
    assert checkpoint is not None, "the caller has looked"
    weights_only = inputs.resumed is None or not config.checkpoint.load_optim
    chunks, optimizer = optimization.chunks, optimization.optimizer
    reader = None
    if inputs.grown is not None and not inputs.is_huggingface:
        reader = GrownReader(checkpoint, inputs.grown, llama.padded_vocab_size)
    if inputs.is_huggingface:
        load_huggingface(checkpoint, chunks, ranks, inputs.grown, optimizer)
    elif weights_only:
        load_weights(checkpoint, chunks, ranks, reader, optimizer)
    else:
        load_checkpoint(checkpoint, chunks, optimizer, ranks, reader)
    what = "weights" if weights_only else "weights and optimizer state"
    logger.info("loaded %s from %s", what, checkpoint)
    if inputs.resumed is not None and weights_only:
        logger.warning(
            "the optimizer begins afresh at iteration %d (--no-load-optim); leave the flag out of "
            "later restarts, which would reset it again",
            inputs.resumed.iteration + 1,
        )


def _restorable_checkpoint(config: RunConfig, inputs: RunInputs) -> Path | None:
    """The checkpoint of this run that can be loaded again as it is, for a rollback."""
    is_whole = inputs.resumed is not None and not inputs.grown and config.checkpoint.load_optim
    return inputs.checkpoint if is_whole else None


def _progress(blend: Blend, resumed: RunState | None) -> TrainState:
    if resumed is None:
        return TrainState(0, 0, np.zeros(len(blend.schedule.sources), dtype=np.int64))
    return TrainState(
        resumed.iteration, resumed.consumed_samples, blend.counts(resumed.consumed_samples)
    )


def _loader(config: RunConfig, inputs: RunInputs, ranks: Ranks, stack: ExitStack) -> Loader:
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
    return loader


def _validator(config: RunConfig, sources: list[Source]) -> Validator | None:
    if not any(source.num_samples for source in sources):
        return None
    return Validator(
        sources=sources,
        max_samples=config.train.eval_iters * config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        seq_length=config.data.seq_length,
    )


def _saver(
    config: RunConfig,
    inputs: RunInputs,
    ranks: Ranks,
    progress: TrainState,
    watchdog: Watchdog,
    stack: ExitStack,
) -> CheckpointSaver | None:
    if config.checkpoint.save is None:
        return None
    carried = run_on_all_ranks(lambda: carried_files(config, inputs) if ranks.is_reporter else None)
    resumed = progress.iteration if progress.iteration else None
    saver = CheckpointSaver(
        Path(config.checkpoint.save),
        config,
        ranks,
        durable_iteration=resumed,
        carried=carried,
        on_progress=watchdog.heartbeat,
    )
    stack.callback(saver.close)
    return saver


def _choices(config: RunConfig, inputs: RunInputs) -> ChoiceValidator | None:
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


def _log_choices(
    config: RunConfig, llama: Llama, optimization: Optimization, ranks: Ranks, peak_source: str
) -> None:
    """Says once which implementation each part of the run uses."""
    choices: dict[str, Any] = {
        **llama.kernels.descriptions,
        "tensor-parallel collectives": llama.collectives,
        "optimizer": optimization.description,
        "peak": peak_source,
    }
    for part, choice in choices.items():
        logger.info("%s: %s", part, choice)
    logger.info(
        "%s parameters in this process, %d pieces padded to %d rows",
        f"{llama.num_local_parameters():,}",
        llama.vocab_size,
        llama.padded_vocab_size,
    )
