"""A dry run: what a run would need is opened and checked, and what it would do is printed.

In: a resolved configuration and a number of processes. Out: text. Needs no GPU and no other rank.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from megatron_chatflow.checkpoint.manifest import damage, refuse_damage
from megatron_chatflow.config import RunConfig, validate_for_world
from megatron_chatflow.config.memory import estimate_memory, saving_copy_bytes
from megatron_chatflow.config.model_shape import (
    flops_per_token,
    num_parameters,
    padded_vocab_size,
)
from megatron_chatflow.data.plan import plan, to_table
from megatron_chatflow.evaluation.report_table import Row, format_table
from megatron_chatflow.train.inputs import RunInputs, open_inputs


def dry_run(config: RunConfig, world_size: int | None = None) -> str:
    """Checks a run and describes it.

    Args:
        config: The run.
        world_size: Processes that it would have; as few as its layout needs if None.

    Returns:
        The description, to be printed.

    Raises:
        UserError: What would stop the run.
    """
    num_processes = world_size or config.model_parallel_size
    validate_for_world(config, num_processes)
    inputs = open_inputs(config)
    hashed = None if inputs.is_huggingface else inputs.checkpoint
    if config.checkpoint.ckpt_verify and hashed is not None:
        refuse_damage(hashed, damage(hashed))
    return "\n\n".join(
        (
            _describe_findings(inputs.findings),
            "resolved configuration:\n" + config.to_yaml().rstrip(),
            _describe_data(config, inputs),
            _describe_work(config, inputs, num_processes),
        )
    )


def _describe_findings(findings: Sequence[str]) -> str:
    if not findings:
        return "no findings"
    return "\n".join(["findings:", *(f"  - {finding}" for finding in findings)])


def _describe_data(config: RunConfig, inputs: RunInputs) -> str:
    rows = plan(
        inputs.blend,
        inputs.length.num_samples,
        {source.name: source.num_samples for source in inputs.sources},
    )
    sources: list[Row] = [
        {
            "source": source.name,
            "tokens": source.num_tokens,
            "samples an epoch": source.num_samples,
        }
        for source in inputs.sources
    ]
    length = inputs.length
    begin = "starts fresh"
    if inputs.resumed is not None:
        begin = (
            f"goes on from {inputs.checkpoint}, iteration {length.iteration:,} of "
            f"{length.last_iteration:,}, sample {length.consumed_samples:,} of "
            f"{length.num_samples:,}"
        )
    elif inputs.checkpoint is not None:
        begin = f"starts from the weights of {inputs.checkpoint}"
    return (
        f"{length.remaining_iterations():,} iterations of {length.global_batch_size:,} samples of "
        f"{config.data.seq_length:,} tokens; {begin}\n\n{format_table(sources)}\n\n"
        f"blend, planned and realised:\n{format_table(to_table(rows))}"
    )


def _describe_work(config: RunConfig, inputs: RunInputs, num_processes: int) -> str:
    flops = flops_per_token(config.model, inputs.vocab_size, config.data.seq_length)
    samples = inputs.length.remaining_iterations() * inputs.length.global_batch_size
    tokens = samples * config.data.seq_length
    rows = padded_vocab_size(config.model, config.parallel, inputs.vocab_size)
    memory = [_describe_memory(config, inputs.vocab_size, num_processes, on_cpu=False)]
    if not torch.cuda.is_available():
        memory.append(_describe_memory(config, inputs.vocab_size, num_processes, on_cpu=True))
    return (
        f"{num_parameters(config.model, inputs.vocab_size):,} parameters, {inputs.vocab_size:,} "
        f"pieces padded to {rows:,} rows\n"
        f"{num_processes} processes: {config.model_parallel_size} hold one copy of the model, "
        f"{num_processes // config.model_parallel_size} copies\n"
        + "".join(memory)
        + f"{flops / 1e9:.3f} GFLOP a token, {flops * tokens / num_processes:.3e} FLOP a process"
    )


def _describe_memory(
    config: RunConfig, vocab_size: int, num_processes: int, *, on_cpu: bool
) -> str:
    memory = estimate_memory(config, vocab_size, num_processes, on_cpu=on_cpu)
    listing = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in asdict(memory).items())
    where = "on CPUs" if on_cpu else "on GPUs"
    text = f"memory of the fullest process {where}: {memory.total / 2**30:.2f} GiB ({listing})\n"
    copy = saving_copy_bytes(config, vocab_size, num_processes)
    if copy and not on_cpu:
        text += f"and of the host, a process's copy for its checkpoints: {copy / 2**30:.2f} GiB\n"
    return text
