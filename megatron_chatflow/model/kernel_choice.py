"""The fastest of several implementations of an operation, measured on the device that will run it.

In: operations, each with implementations of one function. Out: for each operation the name of the
fastest that computes the right thing, the same on every rank, and the figures for the log. Which
library's kernel is the fastest differs from GPU to GPU, from width to width and from release to
release; a measurement at the start of a run says more than a list that was right elsewhere. It is
the GPU's time: what the host needs for a launch is hidden behind the GPU's work in all but the
smallest models.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_chatflow.runtime.timing import call_seconds

Function = Callable[..., Any]
"""Of an operation's inputs; returns a tensor or a tuple of tensors."""

# Greatest error against fp32, as a share of the greatest value: a few roundings of the dtype.
_TOLERANCE = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8, torch.float32: 2.0**-12}
# What a faster one has to gain, so that a restart seldom takes another of two near-equals.
_MARGIN = 1.03


def _as_they_are(*outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return outputs


@dataclass(frozen=True)
class Operation:
    """What is computed in a run, and how it could be.

    Attributes:
        name: For the log.
        names: All implementations that there are anywhere, the same on all ranks; of two that are
            about as fast the earlier is taken.
        implementations: Those that are here, by name.
        make_inputs: Returns the same values in new memory at every call, since some implementations
            overwrite what they are given. Gradients are taken by those that require them.
        reference: The implementation that is right in fp32.
        absent: Why others are not here, by name.
        finish: Makes of outputs what implementations have to agree on.
        smaller: The same with inputs that fp32 has memory for, where they are compared.
        num_bytes: What forward and backward have to move, for the benchmark; 0 if that says little.
    """

    name: str
    names: tuple[str, ...]
    implementations: Mapping[str, Function]
    make_inputs: Callable[[], tuple[torch.Tensor, ...]]
    reference: str = "torch"
    absent: Mapping[str, str] = field(default_factory=dict)
    finish: Function = _as_they_are
    smaller: "Operation | None" = None
    num_bytes: int = 0


@dataclass(frozen=True)
class Choice:
    """Which implementation a run takes.

    Attributes:
        name: Of the implementation.
        description: Its name, its time and those of the others, for the log.
    """

    name: str
    description: str


Clock = Callable[[Operation, Function, torch.device], float]
"""Seconds of one forward and backward pass of an implementation."""


def median_seconds(
    operation: Operation, function: Function, device: torch.device, num_calls: int = 10
) -> float:
    """Seconds of a forward and a backward pass, the median of several.

    Args:
        operation: Gives the inputs.
        function: The implementation.
        device: Where they lie.
        num_calls: Measured calls.
    """
    inputs = operation.make_inputs()
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = [torch.ones_like(output) for output in _tuple(function(*inputs))] if wanted else []

    def call() -> None:
        outputs = _tuple(function(*inputs))
        if wanted:
            torch.autograd.grad(outputs, wanted, gradients)

    return statistics.median(call_seconds(call, device, num_calls))


def choose_fastest(
    operations: Sequence[Operation], device: torch.device, clock: Clock = median_seconds
) -> list[Choice]:
    """Measures every implementation; all ranks call it, and all get the same answer.

    An implementation counts by its slowest rank. One that fails on a rank, or whose result there is
    not the reference's, is left out.

    Args:
        operations: What to choose for, the same on all ranks but for what is installed there.
        device: Where it runs.
        clock: What measures.

    Returns:
        One choice for each operation.

    Raises:
        RuntimeError: No implementation of an operation works on all ranks.
    """
    measured = [_measure(operation, device, clock) for operation in operations]
    width = max(len(operation.names) for operation in operations)
    table = torch.full((len(operations), width), math.inf, dtype=torch.float64)
    for row, operation, (seconds, _) in zip(table, operations, measured, strict=True):
        for column, name in enumerate(operation.names):
            row[column] = seconds.get(name, math.inf)
    if dist.is_initialized():
        table = table.to(device)
        dist.all_reduce(table, op=dist.ReduceOp.MAX)
        table = table.cpu()
    return [
        _choice(operation, dict(zip(operation.names, row.tolist(), strict=False)), faults)
        for operation, row, (_, faults) in zip(operations, table, measured, strict=True)
    ]


def _measure(
    operation: Operation, device: torch.device, clock: Clock
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of those that are right, and why the others are not measured."""
    seconds, faults = {}, dict(operation.absent)
    compared = operation.smaller or operation
    try:
        exact = _exact_results(compared)
    except Exception as error:
        # Only the reference is left to be tried: there is nothing to compare others with.
        _drain(device)
        why = f"no fp32 result to compare with: {_first_line(error)}"
        faults.update({n: why for n in operation.implementations if n != operation.reference})
    for name in (name for name in operation.names if name not in faults):
        function = operation.implementations[name]
        try:
            if name != operation.reference:
                _compare(compared, compared.implementations[name], exact)
            seconds[name] = clock(operation, function, device)
        except Exception as error:
            # A library may raise anything where it meets a GPU that it was not made for.
            _drain(device)
            faults[name] = f"left out: {_first_line(error)}"
    return seconds, faults


def _drain(device: torch.device) -> None:
    """Has a failed launch reported here, and not by the next that asks."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)


def _tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _results(
    function: Function, inputs: tuple[torch.Tensor, ...], finish: Function
) -> tuple[torch.Tensor, ...]:
    """Outputs, and the gradients of a weighted sum of them by the inputs that require one."""
    outputs = _tuple(finish(*_tuple(function(*inputs))))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not wanted:
        return outputs
    weights = [_weights(output) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, wanted, weights))


def _weights(output: torch.Tensor) -> torch.Tensor:
    """Numbers of both signs that differ from neighbour to neighbour."""
    places = torch.arange(output.numel(), device=output.device) % 65537
    return torch.cos(places.float()).view(output.shape).to(output.dtype)


def _exact_results(operation: Operation) -> tuple[torch.Tensor, ...]:
    """What the reference computes in fp32."""
    inputs = tuple(
        tensor.detach().float().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor
        for tensor in operation.make_inputs()
    )
    return _results(operation.implementations[operation.reference], inputs, operation.finish)


def _compare(operation: Operation, function: Function, exact: tuple[torch.Tensor, ...]) -> None:
    """Raises if the implementation's outputs or gradients are not the exact ones."""
    found = _results(function, operation.make_inputs(), operation.finish)
    if len(found) != len(exact):
        raise ArithmeticError(f"{len(found)} results, where there are {len(exact)}")
    for result, error in zip(found, _errors(found, exact), strict=True):
        if not error <= _TOLERANCE[result.dtype]:
            raise ArithmeticError(f"it is {error:.2g} from fp32's result, relative to the greatest")


def _errors(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> Iterator[float]:
    for result, wanted in zip(found, exact, strict=True):
        if result.shape != wanted.shape:
            raise ArithmeticError(f"a result of {tuple(result.shape)}, not {tuple(wanted.shape)}")
        greatest = wanted.abs().amax().clamp_(min=torch.finfo(torch.float32).tiny)
        yield float((result.detach().float() - wanted.detach()).abs().amax() / greatest.detach())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _choice(
    operation: Operation, seconds: Mapping[str, float], faults: Mapping[str, str]
) -> Choice:
    """The first in order that no other beats by the margin."""
    ranking = sorted((s, name) for name, s in seconds.items() if math.isfinite(s))
    unusable = [
        f"{name}: {faults.get(name, 'not usable on another rank')}"
        for name, s in seconds.items()
        if not math.isfinite(s)
    ]
    if not ranking:
        raise RuntimeError(f"{operation.name}: no implementation works: {'; '.join(unusable)}")
    chosen = next(name for name, s in seconds.items() if s <= _MARGIN * ranking[0][0])
    figures = ", ".join(f"{name} {1e6 * s:,.0f} us" for s, name in ranking)
    description = f"{chosen}; forward and backward here: {figures}"
    return Choice(chosen, "; ".join((description, *unusable)))
