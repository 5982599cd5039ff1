"""Chooses the parallel layout of a run by its predicted speed.

`search_layouts` varies the tensor-, pipeline- and context-parallel sizes, the interleaving, the
micro-batch size and recomputation. The global batch and everything else of the run stay as they
are. A layout counts if the configuration with it is valid, and if its estimated memory leaves a
tenth of the GPU to the allocator, the CUDA context and the libraries.

Predictions that differ by less than `TIE` are not a reason to prefer a layout. Among these, the
simplest one comes first, and then the one that needs the least memory.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_chatflow.config import ParallelConfig, RunConfig, load_config, validate_for_world
from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.config.shape import flops_per_token, num_model_chunks
from megatron_chatflow.config.stages import ALL_ROWS, select
from megatron_chatflow.convert.shape import LlamaShape
from megatron_chatflow.convert.weight_map import placements
from megatron_chatflow.errors import UserError
from megatron_chatflow.simulate.step_time import (
    LAYER_LAUNCHES,
    GpuSpec,
    Stack,
    StepLayout,
    StepTime,
    TransformerShape,
    find_gpu,
    predict_step,
)
from megatron_chatflow.tokenizer import load_tokenizer

TIE = 0.08
"""Layouts count as equally fast if their predicted times differ by less than this share."""
MEMORY_SHARE = 0.9
"""Share of a GPU's memory that the estimate may use."""
MOST_STAGES = 32
MOST_TENSOR_RANKS = 8
SHORTEST_SHARD = 2048
"""Context parallelism leaves each rank at least this many tokens of a sample."""
MICRO_BATCH_SIZES = (1, 2, 4, 8)

NUM_WARMUP, NUM_MEASURED = 5, 100
PLAUSIBLE_SPEEDS = (0.1, 1.5)
"""Measured speeds relative to the prediction; others were measured on another device."""
ASSUMED_VOCAB_SIZE = 32_000
DEFAULT_GPU = "h100"

UNTUNED_BAND = (0.70, 1.05)
"""Speed relative to the prediction that stacks reach which nobody has tuned on the cluster."""
CALIBRATED_BAND = (0.85, 1.15)
"""The same after the prediction was scaled by one measurement on the cluster."""


@dataclass(frozen=True)
class PlannedLayout:
    """A layout of a run with its predicted speed.

    Attributes:
        config: The run with this layout.
        num_gpus: Number of GPUs.
        memory: Estimated memory in bytes of the rank that needs the most.
        step: Predicted time of a step, before calibration.
        seconds: Predicted time of a step, after calibration.
        mfu: Model FLOP/s over the GPU's bf16 peak, as training reports it.
    """

    config: RunConfig
    num_gpus: int
    memory: int
    step: StepTime
    seconds: float
    mfu: float

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens per second of the whole run."""
        tokens = self.config.train.global_batch_size * self.config.data.seq_length
        return tokens / self.seconds

    @property
    def num_dimensions(self) -> int:
        """Number of techniques that the layout needs besides data parallelism."""
        parallel = self.config.parallel
        return sum(
            [
                parallel.tensor_model_parallel_size > 1,
                parallel.pipeline_model_parallel_size > 1,
                num_model_chunks(self.config.model, parallel) > 1,
                parallel.context_parallel_size > 1,
                self.config.train.recompute_granularity is not None,
            ]
        )

    @property
    def name(self) -> str:
        """The layout in short, such as ``TP4 PP4 VP5 DP16 MBS1 selective``."""
        parallel, train = self.config.parallel, self.config.train
        sizes = {
            "TP": parallel.tensor_model_parallel_size,
            "PP": parallel.pipeline_model_parallel_size,
            "VP": num_model_chunks(self.config.model, parallel),
            "CP": parallel.context_parallel_size,
        }
        parts = [f"{key}{size}" for key, size in sizes.items() if size > 1]
        parts += [f"DP{self.num_gpus // self.config.model_parallel_size}"]
        parts += [f"MBS{train.micro_batch_size}"]
        if train.recompute_granularity is not None:
            parts += [train.recompute_granularity]
        return " ".join(parts)


def plan_layout(
    config: RunConfig,
    num_gpus: int,
    gpu: GpuSpec,
    vocab_size: int,
    *,
    network: float | None = None,
    speed: float = 1.0,
    stack: Stack | None = None,
    layer_launches: tuple[float, float] = LAYER_LAUNCHES,
) -> PlannedLayout:
    """Predicts the speed of a run with the layout that it has.

    Args:
        config: The configuration of the run, valid for ``num_gpus``.
        num_gpus: Number of GPUs.
        gpu: The GPU.
        vocab_size: Size of the tokenizer's vocabulary before padding.
        network: Network bandwidth per GPU in bytes per second; None for the GPU's usual one.
        speed: Measured speed over predicted speed, from `calibrate`.
        stack: The training software; this project with the run's attention kernel if None.
        layer_launches: Kernels that a layer launches in its forward and its backward pass.

    Raises:
        UserError: The GPU does not have the precision of the run.
    """
    shape = TransformerShape.of(config, vocab_size)
    layout = replace(StepLayout.of(config, num_gpus, network), layer_launches=layer_launches)
    if stack is not None:
        layout = replace(layout, stack=stack)
    is_missing = {
        "bf16": False,
        "fp8": not gpu.fp8,
        "blockwise": not gpu.fp8,
        "mxfp8": gpu.family != "blackwell",
    }
    if is_missing[layout.stack.precision]:
        raise UserError(
            f"train: a GPU of the {gpu.family} generation does not compute in "
            f"{layout.stack.precision}; choose another --gpu, or remove train.fp8_format and "
            "train.fp4_format"
        )
    step = predict_step(shape, layout, gpu)
    seconds = step.seconds / speed
    flops = flops_per_token(config.model, vocab_size, config.data.seq_length)
    tokens = config.train.global_batch_size * config.data.seq_length
    return PlannedLayout(
        config=config,
        num_gpus=num_gpus,
        memory=estimate_memory(config, vocab_size, num_gpus).total,
        step=step,
        seconds=seconds,
        mfu=flops * tokens / seconds / num_gpus / gpu.bf16,
    )


def search_layouts(
    config: RunConfig,
    num_gpus: int,
    gpu: GpuSpec,
    vocab_size: int,
    *,
    network: float | None = None,
    speed: float = 1.0,
    stack: Stack | None = None,
) -> list[PlannedLayout]:
    """Returns the layouts that fit in memory, the recommended one first.

    The layouts that tie with the fastest come first, in the order of their number of techniques
    and their memory. The others follow in the order of their predicted speed.

    Args:
        config: The configuration of the run. Its own layout does not matter.
        num_gpus: Number of GPUs.
        gpu: The GPU.
        vocab_size: Size of the tokenizer's vocabulary before padding.
        network: Network bandwidth per GPU in bytes per second; None for the GPU's usual one.
        speed: Measured speed over predicted speed, from `calibrate`.
        stack: The training software; this project with the run's attention kernel if None.
    """
    limit = MEMORY_SHARE * gpu.memory
    found = [
        plan_layout(layout, num_gpus, gpu, vocab_size, network=network, speed=speed, stack=stack)
        for layout in valid_layouts(config, num_gpus)
        if estimate_memory(layout, vocab_size, num_gpus).total <= limit
    ]
    found.sort(key=lambda layout: layout.seconds)
    num_tied = sum(layout.seconds < found[0].seconds * (1 + TIE) for layout in found)
    tied = sorted(found[:num_tied], key=lambda each: (each.num_dimensions, each.memory))
    return tied + found[num_tied:]


def valid_layouts(config: RunConfig, num_gpus: int) -> Iterator[RunConfig]:
    """Yields the run with every layout to consider for which its configuration is valid.

    Data-parallel ranks shard the optimizer's state, and both exchanges overlap with compute,
    unless FP8 weights rule that out.
    """
    # Other modules than the default are only valid with selective recomputation.
    modules: tuple[Any, Any] = ("core_attn",), config.train.recompute_modules
    for parallel in _parallel_configs(config, num_gpus):
        for micro_batch_size in MICRO_BATCH_SIZES:
            for granularity in (None, "selective", "full"):
                is_full = granularity == "full"
                try:
                    layout = replace(
                        config,
                        parallel=parallel,
                        train=replace(
                            config.train,
                            micro_batch_size=micro_batch_size,
                            recompute_granularity=granularity,
                            recompute_method="uniform" if is_full else None,
                            recompute_num_layers=1 if is_full else None,
                            recompute_modules=modules[granularity == "selective"],
                        ),
                    )
                    validate_for_world(layout, num_gpus)
                except (UserError, ValidationError):  # pydantic wraps those of the whole run
                    continue
                yield layout


def _parallel_configs(config: RunConfig, num_gpus: int) -> Iterator[ParallelConfig]:
    """Yields the parallel sections to try. Not all of them are valid."""
    num_layers = config.model.num_layers
    longest = max(1, config.data.seq_length // SHORTEST_SHARD)
    for stages in _divisors(num_layers, MOST_STAGES):
        for tensor in range(1, MOST_TENSOR_RANKS + 1):
            for context in (1, 2, 4, 8):
                if num_gpus % (stages * tensor * context) or context > longest:
                    continue
                in_stage = num_layers // stages
                for layers in _divisors(in_stage, in_stage) if stages > 1 else (in_stage,):
                    yield replace(
                        config.parallel,
                        tensor_model_parallel_size=tensor,
                        pipeline_model_parallel_size=stages,
                        context_parallel_size=context,
                        num_layers_per_virtual_pipeline_stage=layers if layers < in_stage else None,
                        num_virtual_stages_per_pipeline_rank=None,
                        sequence_parallel=tensor > 1,
                        use_distributed_optimizer=True,
                        overlap_grad_reduce=True,
                        overlap_param_gather=not config.train.reuse_grad_buf_for_mxfp8_param_ag,
                        tp_comm_overlap=config.parallel.tp_comm_overlap and tensor > 1,
                    )


def _divisors(number: int, largest: int) -> list[int]:
    return [each for each in range(1, min(number, largest) + 1) if number % each == 0]


def calibrate(
    metrics: Path, gpu: GpuSpec, network: float | None = None
) -> tuple[float, PlannedLayout]:
    """Compares the speed of a run with its prediction.

    The measured time of a step is the median over the last `NUM_MEASURED` iterations, without the
    first `NUM_WARMUP` of the file, and without stages of training that leave out weight gradients.

    Args:
        metrics: The run's ``metrics.jsonl``. The run's ``config.yaml`` lies beside it.
        gpu: The GPU that it was measured on.
        network: Network bandwidth per GPU in bytes per second; None for the GPU's usual one.

    Returns:
        Measured speed over predicted speed, and the prediction.

    Raises:
        UserError: If the files cannot be read, or the speed cannot be that of these GPUs.
    """
    config = load_config(metrics.parent / "config.yaml")
    tokens = config.train.global_batch_size * config.data.seq_length
    vocab_size = vocab_size_of(config)[0]
    is_partial = _partial_stages(config, vocab_size)
    steps: list[tuple[float, int]] = []
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{metrics}: cannot be read: {error}") from None
    for line in lines:
        try:
            entry = json.loads(line)
            seconds, total = float(entry["seconds"]), float(entry["tokens_per_second"])
            num_gpus = round(total / float(entry["tokens_per_second_per_gpu"]))
            if "stage" in entry and is_partial[int(entry["stage"])]:
                continue
        except (ValueError, LookupError, TypeError, ZeroDivisionError, RecursionError):
            continue  # a validation, or an incomplete line
        if abs(seconds * total / tokens - 1) < 1e-3:  # not with an earlier batch size
            steps.append((seconds, num_gpus))
    if len(steps) <= NUM_WARMUP:
        raise UserError(
            f"{metrics}: has {len(steps)} iterations with the batch size of config.yaml"
            f"{' that train every tensor' if any(is_partial) else ''}; calibration needs more than "
            f"{NUM_WARMUP}"
        )
    num_gpus = steps[-1][1]
    measured = [seconds for seconds, number in steps[NUM_WARMUP:] if number == num_gpus]
    validate_for_world(config, num_gpus)
    planned = plan_layout(config, num_gpus, gpu, vocab_size, network=network)
    speed = planned.seconds / statistics.median(measured[-NUM_MEASURED:])
    low, high = PLAUSIBLE_SPEEDS
    if not low < speed < high:
        raise UserError(
            f"{metrics}: its steps take {planned.seconds / speed:.3g} s, {1 / speed:.3g} times the "
            f"prediction {planned.seconds:.3g} s; name the GPU that it was measured on"
        )
    return speed, planned


def _partial_stages(config: RunConfig, vocab_size: int) -> list[bool]:
    """Returns for each stage of training whether nothing of some tensor is trained in it."""
    shape = LlamaShape.of(config.model, vocab_size)
    tensors = [rule.megatron.format(layer=layer) for rule, layer in placements(shape)]
    is_tied = not shape.untie_embeddings_and_output_weights

    def is_trained(tensor: str, selectors: Sequence[str]) -> bool:
        found = (select(one, tensor, is_tied=is_tied, new_rows=ALL_ROWS) for one in selectors)
        return any(rows is not None for rows in found)

    return [
        not all(is_trained(tensor, stage.trainable) for tensor in tensors)
        for stage in config.train.stages
    ]


def vocab_size_of(config: RunConfig) -> tuple[int, str | None]:
    """Returns the vocabulary size of a run before padding, and a note if it is assumed.

    It is that of the model section or of the tokenizer. If the tokenizer cannot be read, it is
    that of LLaMA-2.
    """
    if config.model.vocab_size is not None:
        return config.model.vocab_size, None
    settings = config.tokenizer
    try:
        tokenizer = load_tokenizer(settings.tokenizer_model, settings.tokenizer_type)
    except UserError as error:
        return ASSUMED_VOCAB_SIZE, f"assuming a vocabulary of {ASSUMED_VOCAB_SIZE:,}: {error}"
    return tokenizer.vocab_size, None


def offloading_of(config: RunConfig) -> str | None:
    """Returns the setting that copies to host memory in every step, which is not predicted."""
    if config.optimizer.optimizer_cpu_offload:
        return "optimizer.optimizer_cpu_offload"
    if config.train.fine_grained_activation_offloading:
        return "train.fine_grained_activation_offloading"
    return None


def describe_step(
    config: RunConfig,
    vocab_size: int,
    num_gpus: int,
    gpu_name: str = DEFAULT_GPU,
    layer_launches: tuple[float, float] = LAYER_LAUNCHES,
) -> str:
    """Describes the predicted step of a run, for a dry run.

    Args:
        config: The configuration of the run, valid for ``num_gpus``.
        vocab_size: Size of the tokenizer's vocabulary before padding.
        num_gpus: Number of GPUs.
        gpu_name: Name of the GPU.
        layer_launches: Kernels that a layer launches in its forward and its backward pass.

    Returns:
        One line, or an empty text for a run in fp32 or with offloading, whose speed cannot be
        predicted.
    """
    if not config.train.bf16 or offloading_of(config) is not None:
        return ""
    planned = plan_layout(
        config, num_gpus, find_gpu(gpu_name), vocab_size, layer_launches=layer_launches
    )
    loss, share = planned.step.largest_loss
    speed = planned.tokens_per_second / num_gpus
    low, high = UNTUNED_BAND
    return (
        f"predicted for {num_gpus} x {gpu_name}, not measured: {planned.seconds:.3g} s per step, "
        f"{speed:,.0f} tokens/s per GPU ({low * speed:,.0f} to {high * speed:,.0f}), MFU "
        f"{100 * planned.mfu:.1f} %; largest loss: {loss}, {100 * share:.1f} % of the step"
    )
