"""Dry run: opens and checks what a run needs, and describes what the run would do.

It needs neither a GPU nor other ranks. Findings come first, then a summary; ``--verbose`` adds the
resolved configuration and a long plan.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from megatron_chatflow.blend.adaptive import AdaptiveBlend
from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.plan import decision_table, learning_rate_table, plan, to_table
from megatron_chatflow.checkpoint.files import find_damage, raise_if_damaged
from megatron_chatflow.config import RunConfig, RunLength, validate_for_world
from megatron_chatflow.config.memory import (
    estimate_memory,
    offloaded_activation_bytes,
    offloaded_bytes,
    saving_copy_bytes,
)
from megatron_chatflow.config.shape import flops_per_token, num_parameters, padded_vocab_size
from megatron_chatflow.data.packing import Packing
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.scoring import PackedRows
from megatron_chatflow.runtime.table import Row, format_table
from megatron_chatflow.training.inputs import RunInputs, open_inputs, verify_data

_MAX_PLAN_ROWS = 24
"""A longer plan is shown only with ``--verbose``."""


DescribeStep = Callable[[RunConfig, int, int], str]
"""Describes the predicted step of a run, given its vocabulary size and number of processes."""


def dry_run(
    config: RunConfig,
    world_size: int | None = None,
    *,
    verbose: bool = False,
    describe_step: DescribeStep | None = None,
) -> str:
    """Checks a run and describes it.

    Args:
        config: Configuration of the run.
        world_size: Number of processes; None for the minimum of the layout.
        verbose: Add the resolved configuration, and the plan even if it is long.
        describe_step: Predicts the step on GPUs. None to leave the prediction out.

    Raises:
        UserError: What would stop the run; the message lists all errors that were found.
    """
    num_processes = world_size or config.model_parallel_size
    errors: list[UserError] = []
    inputs = None
    with _collected_warnings() as warnings:
        try:
            validate_for_world(config, num_processes)
        except UserError as error:
            errors.append(error)
        try:
            inputs = open_inputs(config)
            hashed = None if inputs.is_huggingface else inputs.checkpoint
            if config.checkpoint.ckpt_verify and hashed is not None:
                raise_if_damaged(hashed, find_damage(hashed))
            if config.data.data_verify:
                verify_data(config, inputs)
        except UserError as error:
            errors.append(error)
        if errors or inputs is None:
            for record in warnings:
                logging.getLogger().handle(record)
            if len(errors) == 1:
                raise errors[0]
            listing = "; ".join(f"({number}) {error}" for number, error in enumerate(errors, 1))
            raise UserError(f"{len(errors)} errors: {listing}")
    findings = dict.fromkeys([*inputs.findings, *(record.getMessage() for record in warnings)])
    if findings:
        parts = ["\n".join(["no errors; findings:", *(f"  - {finding}" for finding in findings)])]
    else:
        parts = ["no errors, no findings"]
    if inputs.changes:
        changes = format_table(inputs.changes)
        parts.append(f"settings that differ from the checkpoint:\n{changes}")
    parts += [
        _describe_data(config, inputs, verbose=verbose),
        _describe_work(config, inputs, num_processes),
    ]
    if describe_step is not None:
        step = describe_step(config, inputs.vocab_size, num_processes)
        parts[-1] += f"\n{step}" if step else ""
    if verbose:
        parts.append("resolved configuration:\n" + config.to_yaml().rstrip())
    else:
        parts.append("use --verbose to also print the resolved configuration")
    return "\n\n".join(parts)


@contextmanager
def _collected_warnings() -> Iterator[list[logging.LogRecord]]:
    """Collects the package's warnings so that they are printed with the findings."""
    package = logging.getLogger("megatron_chatflow")
    records: list[logging.LogRecord] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                records.append(record)
            else:
                logging.getLogger().handle(record)

    collector = Collector()
    propagates = package.propagate
    package.addHandler(collector)
    package.propagate = False
    try:
        yield records
    finally:
        package.removeHandler(collector)
        package.propagate = propagates


def _describe_data(config: RunConfig, inputs: RunInputs, *, verbose: bool) -> str:
    count = config.data.schedule.count
    sources: list[Row] = [
        {
            "source": source.name,
            "tokens": source.num_tokens,
            "samples per epoch": source.num_samples,
            **(
                {}
                if count == "samples"
                else {f"{count.replace('_', ' ')} per epoch": source.counted_tokens}
            ),
            **_describe_objective(inputs, number),
            **_describe_packing(source.packing),
        }
        for number, source in enumerate(inputs.sources)
    ]
    length = inputs.length
    begin = "starts fresh"
    if inputs.resumed is not None:
        begin = (
            f"resumes {inputs.checkpoint} at iteration {length.iteration:,} of "
            f"{length.last_iteration:,}, sample {length.consumed_samples:,} of "
            f"{length.num_samples:,}"
        )
    elif inputs.checkpoint is not None:
        begin = f"starts from the weights of {inputs.checkpoint}"
    edit = "" if inputs.blend.edit is None else f"{inputs.blend.edit}\n"
    return (
        f"{length.remaining_iterations():,} iterations of {_describe_sizes(length)} samples of "
        f"{config.data.seq_length:,} tokens; {begin}\n{edit}\n{format_table(sources)}\n\n"
        f"{_describe_blend(config, inputs, verbose=verbose)}"
        f"{_describe_stages(config, inputs)}"
        f"{_describe_probes(config, inputs)}"
    )


def _describe_sizes(length: RunLength) -> str:
    """Returns the samples per iteration, or the range over which they grow."""
    sizes = length.batch_sizes
    begins = [length.samples_after(n) for n in (0, max(length.remaining_iterations() - 1, 0))]
    first, last = map(sizes.at, begins)
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _describe_blend(config: RunConfig, inputs: RunInputs, *, verbose: bool) -> str:
    if isinstance(inputs.blend, AdaptiveBlend):
        what = "replays recorded decisions" if inputs.control is None else str(inputs.control)
        decided = format_table(decision_table(inputs.blend, None if verbose else _MAX_PLAN_ROWS))
        return f"blend: {what}\ndecided weights:\n{decided}"
    sizes = {source.name: source.num_samples for source in inputs.sources}
    rows = plan(inputs.blend, inputs.length.num_samples, sizes)
    shown = format_table(to_table(rows, inputs.blend))
    if len(rows) > _MAX_PLAN_ROWS and not verbose:
        shown = (
            f"{len(rows)} rows are not shown; use --verbose or tools/plan_blend.py to print them"
        )
    tenths = _describe_learning_rate(inputs.blend, config, inputs)
    return f"blend, planned and realised:\n{shown}{tenths}"


def _describe_learning_rate(blend: Blend, config: RunConfig, inputs: RunInputs) -> str:
    rows = learning_rate_table(blend, config.optimizer, inputs.length)
    if not rows:
        return ""
    return f"\n\nsources by tenths of the summed learning rate:\n{format_table(rows)}"


def _describe_stages(config: RunConfig, inputs: RunInputs) -> str:
    if not config.train.stages:
        return ""
    return f"\n\nstages of training:\n{format_table(inputs.stages.table(inputs.length))}"


def _describe_probes(config: RunConfig, inputs: RunInputs) -> str:
    """Lists the probes with their share of the training's compute: three passes per token."""
    if not inputs.probes:
        return ""
    interval = config.train.probe_interval or 1
    data = config.data
    trained = 3 * interval * config.train.global_batch_size * data.seq_length
    size = data.seq_length * config.train.micro_batch_size
    rows: list[Row] = []
    for probe in inputs.probes:
        num_read = PackedRows.num_batches(probe.rows, size) * size
        rows.append(
            {
                "probe": probe.label,
                "sequences": len(probe.rows),
                "tokens": num_read,
                "share of compute": f"{100 * num_read / trained:.2g}%",
            }
        )
    return f"\n\nprobes, every {interval:,} iterations:\n{format_table(rows)}"


def _describe_objective(inputs: RunInputs, number: int) -> Row:
    """Returns a source's weight in the objective, or those at its first and last iteration."""
    if inputs.objective.are_equal:
        return {}
    length = inputs.length
    last = length.samples_after(max(length.remaining_iterations() - 1, 0))
    samples = [length.consumed_samples, last]
    ends = [f"{inputs.objective.at(sample)[number]:g}" for sample in samples]
    return {"objective weight": ends[0] if inputs.objective.are_constant else " to ".join(ends)}


def _describe_packing(packing: Packing | None) -> Row:
    if packing is None:
        return {}
    return {
        "packed documents": len(packing.documents),
        "of these truncated": packing.num_truncated,
        "skipped, no loss tokens": packing.num_without_loss,
    }


def _describe_work(config: RunConfig, inputs: RunInputs, num_processes: int) -> str:
    flops = flops_per_token(config.model, inputs.vocab_size, config.data.seq_length)
    length, work = inputs.length, []
    for index, ends in enumerate(inputs.stages.iterations(length)):
        first, last = (length.samples_after(end - length.iteration) for end in ends)
        if first < last:
            each = inputs.stages.flops_per_token(index, flops)
            work.append((each, each * (last - first) * config.data.seq_length))
    per_token = [one for one, _ in work] or [flops]
    bounds = dict.fromkeys((min(per_token), max(per_token)))
    shown = " to ".join(f"{bound / 1e9:.3f}" for bound in bounds)
    total = sum(whole for _, whole in work)
    rows = padded_vocab_size(config.model, config.parallel, inputs.vocab_size)
    memory = [_describe_memory(config, inputs.vocab_size, num_processes, on_cpu=False)]
    if not torch.cuda.is_available():
        memory.append(_describe_memory(config, inputs.vocab_size, num_processes, on_cpu=True))
    return (
        f"{num_parameters(config.model, inputs.vocab_size):,} parameters, {inputs.vocab_size:,} "
        f"tokens in the vocabulary, padded to {rows:,} rows\n{num_processes} processes: "
        f"{config.model_parallel_size} per copy of the model, "
        f"{num_processes // config.model_parallel_size} copies\n"
        + "".join(memory)
        + (f"{shown} GFLOP per token, {total / num_processes:.3e} FLOP per process")
    )


def _describe_memory(
    config: RunConfig, vocab_size: int, num_processes: int, *, on_cpu: bool
) -> str:
    memory = estimate_memory(config, vocab_size, num_processes, on_cpu=on_cpu)
    listing = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in asdict(memory).items())
    where = "on CPUs" if on_cpu else "on GPUs"
    text = f"memory of the largest process {where}: {memory.total / 2**30:.2f} GiB ({listing})\n"
    copy = saving_copy_bytes(config, vocab_size, num_processes)
    if copy and not on_cpu:
        text += f"host memory per process for the checkpoint copy: {copy / 2**30:.2f} GiB\n"
    offloaded = offloaded_bytes(config, vocab_size, num_processes)
    if offloaded and not on_cpu:
        text += f"host memory per process for offloaded state: {offloaded / 2**30:.2f} GiB\n"
    activations = offloaded_activation_bytes(config, num_processes)
    if activations and not on_cpu:
        text += (
            f"host memory per process for offloaded activations: {activations / 2**30:.2f} GiB\n"
        )
    return text
