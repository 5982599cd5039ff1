"""Describes a simulation, as text and as JSON."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

from megatron_chatflow.config import RunConfig
from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.config.shape import flops_per_token, num_model_chunks
from megatron_chatflow.runtime.table import Row, format_table
from megatron_chatflow.simulate.device import GPUS
from megatron_chatflow.simulate.inputs import SimulatedInputs
from megatron_chatflow.simulate.layout_search import describe_step
from megatron_chatflow.simulate.observer import GroupMessages, LineCount, Observation

KINDS = ("weights", "gradients", "optimizer", "activations", "temporary")
_GIB = 2**30
_NUM_SHOWN = 8
_NUM_RANGES = 4
_READABLE = {"aten::_local_scalar_dense": "a value is read"}
# Messages of these phases are repeated for every micro-batch. Those over data-parallel groups are
# not: they reduce gradients and gather parameters once a step, while micro-batches are computed.
_REPEATED = ("schedule", "forward", "backward")


@dataclass(frozen=True)
class Simulation:
    """A finished simulation.

    Attributes:
        config: The user's configuration.
        gpu: Name of the GPU.
        world_size: Number of ranks of the job.
        inputs: What was executed.
        observations: What every simulated rank did.
        ranks: The ranks that each of them stands for.
    """

    config: RunConfig
    gpu: str
    world_size: int
    inputs: SimulatedInputs
    observations: Sequence[Observation]
    ranks: Sequence[tuple[int, ...]]

    @property
    def factor(self) -> float:
        """Micro-batches of a step over those that were executed."""
        return self.inputs.num_micro_batches / self.inputs.num_executed


def merge_equal(
    rows: Sequence[tuple[Observation, tuple[int, ...]]],
) -> list[tuple[Observation, tuple[int, ...]]]:
    """Merges ranks of a stage that did the same.

    The launches of the update are not compared: they depend on where the rank's shard of the
    optimizer begins.

    Args:
        rows: What was observed, and the ranks that it stands for.
    """
    merged: dict[str, tuple[Observation, tuple[int, ...]]] = {}
    for observation, ranks in rows:
        launches = {**observation.launches, "update": 0}
        place = {"stage": observation.place["pipeline"]}
        key = json.dumps(asdict(replace(observation, launches=launches, place=place)))
        first, others = merged.get(key, (observation, ()))
        merged[key] = first, tuple(sorted((*others, *ranks)))
    return list(merged.values())


def step_flops(simulation: Simulation, observation: Observation) -> dict[str, float]:
    """Returns the floating-point operations of a whole step on a rank, by operator."""
    total: Counter[str] = Counter()
    for phase, operators in observation.flops.items():
        for operator, flops in operators.items():
            total[operator] += round(flops * (simulation.factor if phase in _REPEATED else 1))
    return dict(total)


def step_messages(simulation: Simulation, observation: Observation) -> list[GroupMessages]:
    """Returns the collectives of a whole step on a rank, by phase, group and kind."""
    messages = []
    for one in observation.messages:
        is_repeated = one.phase in _REPEATED and not one.group.startswith("data")
        factor = simulation.factor if is_repeated else 1
        messages.append(
            GroupMessages(
                *(one.phase, one.group, one.collective, round(one.num_calls * factor)),
                *(round(one.num_bytes * factor), one.wire_bytes * factor),
            )
        )
    return messages


def step_launches(simulation: Simulation, observation: Observation) -> int:
    """Returns the kernel launches of a whole step on a rank."""
    return round(
        sum(
            count * (simulation.factor if phase in _REPEATED else 1)
            for phase, count in observation.launches.items()
        )
    )


def layer_launches(simulation: Simulation) -> tuple[float, float]:
    """Returns the kernels that a layer launches in its forward and its backward pass.

    It is the largest number of any simulated rank.
    """
    forward, backward = (
        max(one.layer_launches.get(name, 0.0) for one in simulation.observations)
        for name in ("forward", "backward")
    )
    return forward, backward


def to_json(simulation: Simulation) -> dict[str, Any]:
    """Returns the report for ``--output``."""
    config, inputs = simulation.config, simulation.inputs
    estimate = estimate_memory(config, inputs.vocab_size, simulation.world_size)
    return {
        "gpu": {"key": simulation.gpu, **asdict(GPUS[simulation.gpu])},
        "world_size": simulation.world_size,
        "layout": {
            "tensor": config.parallel.tensor_model_parallel_size,
            "pipeline": config.parallel.pipeline_model_parallel_size,
            "chunks": num_model_chunks(config.model, config.parallel),
            "context": config.parallel.context_parallel_size,
            "data": simulation.world_size // config.model_parallel_size,
        },
        "versions": {
            name: metadata.version(name) for name in ("torch", "megatron-core", "megatron-chatflow")
        },
        "vocab_size": inputs.vocab_size,
        "notes": list(inputs.notes),
        "micro_batches": {
            "per_step": inputs.num_micro_batches,
            "executed": inputs.num_executed,
        },
        "estimate": {**asdict(estimate), "total": estimate.total},
        "ranks": [
            _rank_to_json(simulation, one, ranks)
            for one, ranks in zip(simulation.observations, simulation.ranks, strict=True)
        ],
    }


def _rank_to_json(
    simulation: Simulation, observation: Observation, ranks: tuple[int, ...]
) -> dict[str, Any]:
    flops = step_flops(simulation, observation)
    return {
        "place": observation.place,
        "implementations": observation.implementations,
        "stands_for": list(ranks),
        "memory": {
            "peak_bytes": observation.peak_bytes,
            "peak_phase": observation.peak_phase,
            "start_peak_bytes": observation.start_peak_bytes,
            **{kind: observation.memory.get(kind, 0) for kind in KINDS},
            "holders": [asdict(one) for one in observation.holders],
        },
        "flops_per_step": {"total": sum(flops.values()), "by_operator": flops},
        "messages_per_step": [asdict(one) for one in step_messages(simulation, observation)],
        "launches": {
            "per_step": step_launches(simulation, observation),
            "per_layer": observation.layer_launches,
        },
        "synchronizations_per_step": [asdict(one) for one in observation.synchronizations],
        "synchronizations_elsewhere": [asdict(one) for one in observation.other_synchronizations],
        "cpu_tensors": [asdict(one) for one in observation.cpu_tensors],
    }


def describe(simulation: Simulation) -> str:
    """Returns the report for the terminal."""
    inputs = simulation.inputs
    model = GPUS[simulation.gpu]
    parts = [
        f"simulated on {model.name} ({model.memory_bytes / _GIB:.1f} GiB), "
        f"{simulation.world_size} ranks; no values were computed\n"
        + "\n".join(f"  - {note}" for note in inputs.notes),
        "memory in GiB at the peak of a step\n" + format_table(_memory_rows(simulation)),
    ]
    fullest = max(simulation.observations, key=lambda one: one.peak_bytes)
    parts.append(
        f"lines that hold most on rank {fullest.place['rank']}\n" + format_table(_holders(fullest))
    )
    parts.append(_fit(simulation, fullest))
    parts.append("implementations\n" + format_table(_implementation_rows(simulation)))
    parts.append("work of a step on a GPU\n" + format_table(_work_rows(simulation)))
    step = describe_step(
        simulation.config,
        inputs.vocab_size,
        simulation.world_size,
        simulation.gpu,
        layer_launches(simulation),
    )
    if step:
        parts.append(step)
    parts.append(
        "messages of a step, in GiB that a rank sends in a ring\n"
        + (format_table(_message_rows(simulation)) or "none")
    )
    parts.append(_waiting(simulation))
    cpu_tensors = format_table(_merged(simulation, "cpu_tensors"))
    parts.append(
        f"CPU tensors reach operators on the GPU\n{cpu_tensors}"
        if cpu_tensors
        else "no CPU tensor reaches an operator on the GPU"
    )
    return "\n\n".join(parts)


def _fit(simulation: Simulation, fullest: Observation) -> str:
    """Returns whether the run fits, and how near the estimate was."""
    memory, rank = GPUS[simulation.gpu].memory_bytes, fullest.place["rank"]
    free = memory - fullest.peak_bytes
    needs = f"{fullest.peak_bytes / _GIB:.2f} of {memory / _GIB:.2f} GiB"
    fit = (
        f"rank {rank} needs the most, {needs}: {free / _GIB:.2f} GiB remain for the CUDA context, "
        "NCCL and fragmentation"
        if free >= 0
        else f"rank {rank} DOES NOT FIT: it needs {needs}"
    )
    vocab_size = simulation.inputs.vocab_size
    estimate = estimate_memory(simulation.config, vocab_size, simulation.world_size).total
    difference = estimate / fullest.peak_bytes - 1
    return (
        f"{fit}\nthe estimate of the dry run without --simulate is {estimate / _GIB:.2f} GiB, "
        f"{abs(difference):.1%} {'above' if difference >= 0 else 'below'} the simulated peak"
    )


def format_ranges(numbers: Sequence[int]) -> str:
    """Formats ascending numbers as ``0-3, 8``, or the first ranges of many and their count."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in ranges[:_NUM_RANGES]]
    more = f", ... ({len(numbers)})" if len(ranges) > _NUM_RANGES else ""
    return ", ".join(shown) + more


def _labels(simulation: Simulation) -> list[Row]:
    """Returns the ranks that each observation stands for, and their place."""
    has_context = simulation.config.parallel.context_parallel_size > 1
    return [
        {
            ("rank" if all(len(r) == 1 for r in simulation.ranks) else "ranks"): format_ranges(
                ranks
            ),
            "stage": one.place["pipeline"],
            **({"context": one.place["context"]} if has_context else {}),
        }
        for one, ranks in zip(simulation.observations, simulation.ranks, strict=True)
    ]


def _memory_rows(simulation: Simulation) -> list[Row]:
    return [
        {
            **label,
            "peak": f"{one.peak_bytes / _GIB:.2f}",
            **{kind: f"{one.memory.get(kind, 0) / _GIB:.2f}" for kind in KINDS},
            "reached in": one.peak_phase,
        }
        for label, one in zip(_labels(simulation), simulation.observations, strict=True)
    ]


def _holders(observation: Observation) -> list[Row]:
    return [
        {"GiB": f"{one.num_bytes / _GIB:.2f}", "kind": one.kind, "line": one.line}
        for one in observation.holders[:_NUM_SHOWN]
    ]


def _implementation_rows(simulation: Simulation) -> list[Row]:
    """Returns what computes each part, once for all ranks that say the same."""
    found: dict[tuple[str, str], None] = {}
    for one in simulation.observations:
        found |= dict.fromkeys(one.implementations.items())
    return [{"part": part, "implementation": text} for part, text in found]


def _work_rows(simulation: Simulation) -> list[Row]:
    config = simulation.config
    tokens = config.train.global_batch_size * config.data.seq_length
    model_flops = flops_per_token(
        config.model, simulation.inputs.vocab_size, config.data.seq_length
    )
    share = model_flops * tokens / simulation.world_size
    rows: list[Row] = []
    for label, one in zip(_labels(simulation), simulation.observations, strict=True):
        flops = sum(step_flops(simulation, one).values())
        rows.append(
            {
                **label,
                "TFLOP": f"{flops / 1e12:,.1f}",
                "of an equal share of the model's": f"{flops / share:.2f}",
                "kernel launches": step_launches(simulation, one),
                "of a layer, forward": f"{one.layer_launches.get('forward', 0):.0f}",
                "backward": f"{one.layer_launches.get('backward', 0):.0f}",
            }
        )
    return rows


def _message_rows(simulation: Simulation) -> list[Row]:
    """Returns what ranks send; those that send the same share a row."""
    senders: dict[tuple[str, str, int, str], list[int]] = {}
    for one, ranks in zip(simulation.observations, simulation.ranks, strict=True):
        total: dict[tuple[str, str], tuple[int, float]] = {}
        for message in step_messages(simulation, one):
            key = message.group, message.collective
            calls, sent = total.get(key, (0, 0.0))
            total[key] = (calls + message.num_calls, sent + message.wire_bytes)
        for (group, collective), (calls, sent) in total.items():
            if sent:
                row = (group, collective, calls, f"{sent / _GIB:.3f}")
                senders.setdefault(row, []).extend(ranks)
    num_ranks = sum(map(len, simulation.ranks))
    return [
        {
            "group": group,
            "collective": collective,
            "calls": calls,
            "sent": sent,
            "ranks": "all" if len(ranks) == num_ranks else format_ranges(sorted(ranks)),
        }
        for (group, collective, calls, sent), ranks in sorted(
            senders.items(), key=lambda item: (item[0][:2], -float(item[0][3]))
        )
    ]


def _waiting(simulation: Simulation) -> str:
    rows = _merged(simulation, "synchronizations")
    if not rows:
        return "the host never waits for the GPU in a step"
    passes = [row for row in rows if row["phase"] in ("forward", "backward")]
    verdict = (
        "ALSO IN FORWARD OR BACKWARD PASSES, where the GPU then runs idle"
        if passes
        else "never in a forward or backward pass"
    )
    return f"the host waits for the GPU in a step, {verdict}\n{format_table(rows)}"


def _merged(simulation: Simulation, field: str) -> list[Row]:
    """Returns places of all ranks, each once."""
    found: dict[tuple[str, str, str], int] = {}
    for one in simulation.observations:
        lines: Sequence[LineCount] = getattr(one, field)
        for line in lines:
            what = _READABLE.get(line.what, line.what)
            key = line.phase, what, " < ".join(line.lines[:2])
            found[key] = max(found.get(key, 0), line.count)
    return [
        {"count": count, "phase": phase, "what": what, "line": line}
        for (phase, what, line), count in found.items()
    ]
