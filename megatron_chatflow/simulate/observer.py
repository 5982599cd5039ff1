"""Watches the training loop of a simulated rank and divides what is recorded into phases.

`Observer.install` wraps functions of `training.loop`, the forward step, the reduction of gradients
and megatron-core's layer; each wrapper calls the original unchanged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_chatflow.model.forward import ForwardStep
from megatron_chatflow.simulate.process_group import name_groups
from megatron_chatflow.simulate.recorder import Ledger, Peak, Recorder
from megatron_chatflow.training import build, loop, optimizer


@dataclass(frozen=True)
class LineCount:
    """How often something happened at a place.

    Attributes:
        phase: The phase of the run.
        what: The operator or function.
        lines: Lines of code, innermost first.
        count: How often.
    """

    phase: str
    what: str
    lines: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class GroupMessages:
    """Collectives of one kind over one group in a phase; see `recorder.Message`."""

    phase: str
    group: str
    collective: str
    num_calls: int
    num_bytes: int
    wire_bytes: float


@dataclass(frozen=True)
class HeldMemory:
    """Memory that one line holds at the peak."""

    kind: str
    line: str
    num_bytes: int


@dataclass(frozen=True)
class Observation:
    """What one rank did in its last complete step, and around it.

    Attributes:
        place: The rank's place in the parallel groups.
        implementations: What computes each part of the run, as its log says.
        peak_bytes: Memory at the step's peak.
        peak_phase: The phase in which it was reached.
        memory: Bytes at the peak by kind.
        holders: The lines that hold most at the peak, in descending order.
        start_peak_bytes: Peak before the first step, validation included.
        flops: Of a step as executed, by phase and operator.
        launches: Kernel launches of a step as executed, by phase.
        layer_launches: Kernel launches of one layer, in ``forward`` and ``backward``.
        messages: Collectives of a step as executed.
        synchronizations: Where the host waited, in a step and after it.
        other_synchronizations: Where the host waited at the start and in validation.
        cpu_tensors: CPU tensors that reached an operator on the GPU, anywhere.
        num_steps: Number of steps that were executed.
    """

    place: dict[str, int]
    implementations: dict[str, str]
    peak_bytes: int
    peak_phase: str
    memory: dict[str, int]
    holders: list[HeldMemory]
    start_peak_bytes: int
    flops: dict[str, dict[str, int]]
    launches: dict[str, int]
    layer_launches: dict[str, float]
    messages: list[GroupMessages]
    synchronizations: list[LineCount]
    other_synchronizations: list[LineCount]
    cpu_tensors: list[LineCount]
    num_steps: int


NUM_HOLDERS = 40


@dataclass
class _Step:
    ledger: Ledger
    peak: Peak
    after: Ledger = field(default_factory=Ledger)


class Observer:
    """Observes one simulated rank.

    Args:
        recorder: Where operators are recorded.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._place: dict[str, int] = {}
        self._implementations: dict[str, str] = {}
        self._start = Ledger()
        self._start_peak = 0
        self._steps: list[_Step] = []
        self._num_calls = 0
        self._layer_launches: dict[str, list[int]] = {"forward": [], "backward": []}

    def install(self) -> None:
        """Wraps the functions, in this process and for good."""
        wrappers: list[tuple[Any, str, Callable[[Any], Any]]] = [
            (build, "build_llama", self._watch_build),
            (loop, "validate", partial(self._in_phase, "validation")),
            (loop, "train_step", self._watch_step),
            (loop, "get_forward_backward_func", self._watch_schedule),
            (ForwardStep, "__call__", self._watch_forward),
            (TransformerLayer, "forward", self._watch_layer),
            (optimizer, "finalize_model_grads", partial(self._in_phase, "gradients")),
        ]
        for owner, name, wrap in wrappers:
            setattr(owner, name, wrap(getattr(owner, name)))

    # Wrappers.

    def _in_phase(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before, self._recorder.phase = self._recorder.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                self._recorder.phase = before

        return call

    def _watch_build(self, build_llama: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(build_llama)
        def call(model: Any, parallel: Any, train: Any, ranks: Any, **kwargs: Any) -> Any:
            name_groups()
            self._place = {
                "rank": ranks.process.rank,
                "tensor": ranks.tensor_parallel_rank,
                "pipeline": ranks.pipeline_parallel_rank,
                "context": ranks.context_parallel_rank,
                "data": ranks.data_parallel_rank,
            }
            llama = build_llama(model, parallel, train, ranks, **kwargs)
            self._implementations = dict(llama.implementations)
            return llama

        return call

    def _watch_schedule(self, get_schedule: Callable[..., Any]) -> Callable[..., Any]:
        def get(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            return self._in_phase("schedule", get_schedule(*args, **kwargs))

        return get

    def _watch_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        recorder = self._recorder

        @wraps(train_step)
        def call(batch: Any, optimization: Any, *args: Any, **kwargs: Any) -> Any:
            self._close_step()
            self._implementations["optimizer"] = optimization.description
            recorder.phase = "update"
            recorder.begin_step()
            result = train_step(batch, optimization, *args, **kwargs)
            peak = recorder.end_step(held_blocks(recorder, optimization))
            recorder.phase = "after"
            self._steps.append(_Step(recorder.take(), peak))
            return result

        return call

    def _close_step(self) -> None:
        ledger = self._recorder.take()
        if self._steps:
            self._steps[-1].after = ledger
        else:
            self._start, self._start_peak = ledger, self._recorder.peak_bytes

    def _watch_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def call(step: Any, *args: Any, **kwargs: Any) -> Any:
            if self._recorder.phase != "schedule":  # a validation
                return forward(step, *args, **kwargs)
            number = self._num_calls
            self._num_calls += 1
            with self._forward_pass(number):
                output, loss_function = forward(step, *args, **kwargs)

            def watched_loss(hidden: torch.Tensor) -> Any:
                with self._forward_pass(number):
                    return loss_function(hidden)

            return output, watched_loss

        return call

    def _forward_pass(self, number: int) -> "_ForwardPass":
        return _ForwardPass(self._recorder, number)

    def _watch_layer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        recorder = self._recorder

        @wraps(forward)
        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            begin = recorder.num_launches
            result = forward(layer, *args, **kwargs)
            if recorder.phase != "forward":
                return result
            self._layer_launches["forward"].append(recorder.num_launches - begin)
            output = result[0] if isinstance(result, tuple) else result
            if output.requires_grad and hidden is not None and hidden.requires_grad:
                self._watch_backward(output, hidden)
            return result

        return call

    def _watch_backward(self, output: torch.Tensor, hidden: torch.Tensor) -> None:
        """Counts the launches between the gradient of a layer's output and that of its input."""
        begins: list[int] = []

        def begin(_gradient: torch.Tensor) -> None:
            begins.append(self._recorder.num_launches)

        def end(_gradient: torch.Tensor) -> None:
            if begins:
                count = self._recorder.num_launches - begins.pop()
                self._layer_launches["backward"].append(count)

        hooks: list[tuple[Any, Callable[[torch.Tensor], None]]] = [(output, begin), (hidden, end)]
        for tensor, hook in hooks:
            tensor.register_hook(hook)

    # Result.

    def finish(self) -> Observation:
        """Returns what was observed; at least one step must be complete."""
        self._close_step()
        last, before = self._steps[-1], self._steps[max(len(self._steps) - 2, 0)]
        ledgers = [self._start, *(one for step in self._steps for one in (step.ledger, step.after))]
        flops: dict[str, dict[str, int]] = {}
        for (phase, operator), count in last.ledger.flops.items():
            flops.setdefault(phase, {})[operator] = count
        return Observation(
            place=self._place,
            implementations=self._implementations,
            peak_bytes=last.peak.num_bytes,
            peak_phase=last.peak.phase,
            memory=dict(last.peak.bytes_by_kind),
            holders=[
                HeldMemory(kind, line, num_bytes)
                for (kind, line), num_bytes in last.peak.bytes_by_line.most_common(NUM_HOLDERS)
            ],
            start_peak_bytes=self._start_peak,
            flops=flops,
            launches=dict(last.ledger.launches),
            layer_launches={
                name: sum(counts) / len(counts)
                for name, counts in self._layer_launches.items()
                if counts
            },
            messages=[
                GroupMessages(*key, m.num_calls, m.num_bytes, m.wire_bytes)
                for key, m in last.ledger.messages.items()
            ],
            # What follows the last step is the end of the run.
            synchronizations=[*_lines(last.ledger), *_lines(before.after)],
            other_synchronizations=_lines(self._start),
            cpu_tensors=[
                LineCount(*key, count)
                for ledger in ledgers
                for key, count in ledger.cpu_tensors.items()
            ],
            num_steps=len(self._steps),
        )


class _ForwardPass:
    """The forward pass of a micro-batch, or its loss."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder = recorder
        self._number = number

    def __enter__(self) -> None:
        self._recorder.begin_forward(self._number)

    def __exit__(self, *_: object) -> None:
        self._recorder.end_forward()


def _lines(ledger: Ledger) -> list[LineCount]:
    return [LineCount(*key, count) for key, count in ledger.synchronizations.items()]


def held_blocks(recorder: Recorder, optimization: Any) -> dict[str, set[int]]:
    """Returns the identities of the blocks of weights, gradients and optimizer state."""
    weights: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for chunk in optimization.chunks:
        for module in chunk.modules():
            # transformer-engine's copies of weights in FP8.
            for copy in getattr(module, "_fp8_workspaces", {}).values():
                weights += _parts(copy)
        for parameter in chunk.parameters():
            weights += _parts(parameter.data)
            gradients += [
                gradient
                for gradient in (getattr(parameter, "main_grad", None), parameter.grad)
                if gradient is not None
            ]
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            gradients.append(buffer.grad_data)
            # With mxfp8, updated weights are gathered in the buffer of the gradients.
            if buffer.param_data is not None and not _share_memory(
                buffer.param_data, buffer.grad_data
            ):
                weights.append(buffer.param_data)
    return {
        "weights": recorder.blocks_of(weights),
        "gradients": recorder.blocks_of(gradients),
        "optimizer": recorder.blocks_of(_state(optimization.optimizer)),
    }


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensors that a tensor consists of."""
    whole: Any = tensor
    if not hasattr(whole, "__tensor_flatten__"):
        return [tensor]
    return [getattr(whole, name) for name in whole.__tensor_flatten__()[0]]


def _state(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of the optimizers that megatron-core's optimizer consists of."""
    for part in getattr(optimizer, "chained_optimizers", (optimizer,)):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))
        for group in inner.param_groups:
            yield from (parameter.data for parameter in group["params"])
