"""Describes a simulation, as text and as JSON."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
    """

    config: RunConfig
    gpu: str
    world_size: int
    inputs: SimulatedInputs
    observations: Sequence[Observation]

    @property
    def factor(self) -> float:
        """Micro-batches of a step over those that were executed."""
        return self.inputs.num_micro_batches / self.inputs.num_executed


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
        "ranks": [_rank_to_json(simulation, one) for one in simulation.observations],
    }


def _rank_to_json(simulation: Simulation, observation: Observation) -> dict[str, Any]:
    flops = step_flops(simulation, observation)
    return {
        "place": observation.place,
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
    parts.append("work of a step\n" + format_table(_work_rows(simulation)))
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
        "messages of a step, in GiB sent by a rank of a ring\n"
        + (format_table(_message_rows(simulation)) or "none")
    )
    for title, lines in (
        ("the host waits, in a step", _merged(simulation, "synchronizations")),
        ("CPU tensors that reach operators on the GPU", _merged(simulation, "cpu_tensors")),
    ):
        parts.append(f"{title}: " + ("nowhere" if not lines else f"\n{format_table(lines)}"))
    estimate = estimate_memory(simulation.config, inputs.vocab_size, simulation.world_size)
    difference = estimate.total / fullest.peak_bytes - 1
    parts.append(
        f"the estimate of the dry run without --simulate is {estimate.total / _GIB:.2f} GiB, "
        f"{abs(difference):.1%} {'above' if difference >= 0 else 'below'} the simulated peak"
    )
    if fullest.peak_bytes > model.memory_bytes:
        parts.append(
            f"rank {fullest.place['rank']} DOES NOT FIT: it needs "
            f"{fullest.peak_bytes / _GIB:.2f} of {model.memory_bytes / _GIB:.2f} GiB"
        )
    return "\n\n".join(parts)


def _label(observation: Observation) -> Row:
    place = observation.place
    return {"rank": place["rank"], "stage": place["pipeline"]}


def _memory_rows(simulation: Simulation) -> list[Row]:
    return [
        {
            **_label(one),
            "peak": f"{one.peak_bytes / _GIB:.2f}",
            **{kind: f"{one.memory.get(kind, 0) / _GIB:.2f}" for kind in KINDS},
            "in": one.peak_phase,
        }
        for one in simulation.observations
    ]


def _holders(observation: Observation) -> list[Row]:
    return [
        {"GiB": f"{one.num_bytes / _GIB:.2f}", "kind": one.kind, "line": one.line}
        for one in observation.holders[:_NUM_SHOWN]
    ]


def _work_rows(simulation: Simulation) -> list[Row]:
    config = simulation.config
    tokens = config.train.global_batch_size * config.data.seq_length
    model_flops = flops_per_token(
        config.model, simulation.inputs.vocab_size, config.data.seq_length
    )
    share = model_flops * tokens / simulation.world_size
    rows: list[Row] = []
    for one in simulation.observations:
        flops = sum(step_flops(simulation, one).values())
        rows.append(
            {
                **_label(one),
                "TFLOP": f"{flops / 1e12:,.1f}",
                "of the mean share": f"{flops / share:.2f}",
                "launches": step_launches(simulation, one),
                "a layer, forward": f"{one.layer_launches.get('forward', 0):.0f}",
                "a layer, backward": f"{one.layer_launches.get('backward', 0):.0f}",
            }
        )
    return rows


def _message_rows(simulation: Simulation) -> list[Row]:
    rows: list[Row] = []
    for one in simulation.observations:
        total: dict[tuple[str, str], tuple[int, float]] = {}
        for message in step_messages(simulation, one):
            key = message.group, message.collective
            calls, sent = total.get(key, (0, 0.0))
            total[key] = calls + message.num_calls, sent + message.wire_bytes
        for (group, collective), (calls, sent) in sorted(total.items(), key=lambda i: -i[1][1]):
            if sent:
                rows.append(
                    {
                        **_label(one),
                        "group": group,
                        "collective": collective,
                        "calls": calls,
                        "sent": f"{sent / _GIB:.3f}",
                    }
                )
    return rows


def _merged(simulation: Simulation, field: str) -> list[Row]:
    """Returns places of all ranks, each once."""
    found: dict[tuple[str, str, str], int] = {}
    for line in _all_lines(simulation, field):
        key = line.phase, line.what, " < ".join(line.lines[:2])
        found[key] = max(found.get(key, 0), line.count)
    return [
        {"count": count, "phase": phase, "what": what, "line": line}
        for (phase, what, line), count in found.items()
    ]


def _all_lines(simulation: Simulation, field: str) -> Iterator[LineCount]:
    for one in simulation.observations:
        yield from getattr(one, field)
