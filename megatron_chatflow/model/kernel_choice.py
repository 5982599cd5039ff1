"""Chooses the implementations of attention, norm, RoPE, SwiGLU and loss for a run.

On a GPU the implementations are measured at the run's sizes, unless the run is deterministic or
requests certain ones; on CPUs there is nothing to choose. The fastest implementation whose result
agrees with the fp32 reference is taken, the same on every rank. Measured is the GPU's time: the
time of a launch on the host is hidden behind the GPU's work in all but the smallest models.
"""

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_chatflow.config import TrainConfig
from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels import cpu as cpu_kernels
from megatron_chatflow.kernels.attention import Facts, choose, gather_facts, obstacle, preference
from megatron_chatflow.kernels.cross_entropy import supports_softmax
from megatron_chatflow.kernels.cuda import load_kernels
from megatron_chatflow.kernels.external import can_import
from megatron_chatflow.kernels.rms_norm import NORMS, supports_rms_norm
from megatron_chatflow.kernels.rope import supports_rope_width
from megatron_chatflow.kernels.swiglu import ACTIVATIONS, supports_swiglu
from megatron_chatflow.model.attention import PackedCausalAttention, describe_backend
from megatron_chatflow.model.loss import VocabularyShard, chunk_loss
from megatron_chatflow.model.packed import pack_tokens
from megatron_chatflow.model.rotary import Rotary, apply_rotary, rotary_table, table_dtype
from megatron_chatflow.runtime.device import call_seconds

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


# Tokens on which implementations are timed, and on which they are compared with fp32; what fills a
# GPU's caches several times over says as much as more.
_TIMED_TOKENS = 16384
_COMPARED_TOKENS = 1024
_TIMED_LOSS_TOKENS = 2048
# Libraries whose kernels reckon places in 32 bits.
_NARROW = ("liger", "transformer_engine")
_SHORTEST_DOCUMENT = 64
_EPSILON = 1e-5
_SEED = 1234
_FUSED = ("ours", "liger", "transformer_engine", "torch")
_MODULES = {
    ("liger", "norm"): "liger_kernel.ops.rms_norm",
    ("liger", "RoPE"): "liger_kernel.ops.rope",
    ("liger", "SwiGLU"): "liger_kernel.ops.swiglu",
    ("transformer_engine", "norm"): "transformer_engine.pytorch",
    ("transformer_engine", "RoPE"): "transformer_engine.pytorch.attention.rope",
    ("transformer_engine", "SwiGLU"): "transformer_engine.pytorch.ops",
}


@dataclass(frozen=True)
class StepSizes:
    """What one rank computes on for a micro-batch.

    Attributes:
        num_tokens: Of a micro-batch on this rank.
        norm_tokens: Those of them that a norm gets; fewer under sequence parallelism.
        hidden_size: Of the model.
        ffn_width: Columns of SwiGLU's result on this rank.
        num_heads: Query heads on this rank.
        num_groups: Key heads on this rank.
        head_dim: Size of a head.
        vocab_rows: Rows of the output layer on this rank.
        dtype: Of activations.
        device: Where they lie.
    """

    num_tokens: int
    norm_tokens: int
    hidden_size: int
    ffn_width: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_rows: int
    dtype: torch.dtype
    device: torch.device

    def on(self, num_tokens: int) -> "StepSizes":
        """The same with no more than so many tokens."""
        return replace(
            self,
            num_tokens=min(self.num_tokens, num_tokens),
            norm_tokens=min(self.norm_tokens, num_tokens),
        )

    @property
    def most_elements(self) -> int:
        """Of the largest activation that norm, RoPE and SwiGLU meet."""
        widths = (self.hidden_size, 2 * self.ffn_width, self.num_heads * self.head_dim)
        return self.num_tokens * max(widths)


def step_operations(sizes: StepSizes) -> list[Operation]:
    """``norm``, ``RoPE``, ``SwiGLU`` and ``loss passes``."""
    timed, compared = sizes.on(_TIMED_TOKENS), sizes.on(_COMPARED_TOKENS)
    return [
        _installed(replace(make(timed), smaller=_installed(make(compared), sizes)), sizes)
        for make in (_norm, _rope, _swiglu, _loss)
    ]


def _installed(operation: Operation, sizes: StepSizes) -> Operation:
    """An operation without the implementations that a run of these sizes cannot take."""
    reasons = {name: _missing(sizes, operation.name, name) for name in operation.names}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    present = {n: f for n, f in operation.implementations.items() if n not in absent}
    return replace(operation, implementations=present, absent=absent)


def _missing(sizes: StepSizes, operation: str, name: str) -> str | None:
    """Why a run cannot take an implementation."""
    if name == "torch":
        return None
    if name == "ours":
        return ours_obstacle(sizes, operation)
    if sizes.device.type != "cuda":
        return "there is no GPU"
    if name == "megatron":
        is_needed = ours_obstacle(sizes, operation) is not None
        return None if is_needed else "not compiled, where csrc/kernels has a kernel"
    if sizes.most_elements >= 2**31 and name in _NARROW:
        return "its kernels reckon places in 32 bits"
    module = _MODULES[name, operation]
    return None if can_import(module) else f"{module} cannot be imported"


def ours_obstacle(sizes: StepSizes, operation: str) -> str | None:
    """Why the kernels of ``csrc/kernels`` cannot do an operation; None if they can."""
    library, reason = load_kernels()
    if sizes.device.type == "cuda" and library is None:
        return reason
    takes = {
        "norm": supports_rms_norm(sizes.hidden_size, sizes.dtype),
        "RoPE": supports_rope_width(sizes.head_dim, sizes.dtype),
        "SwiGLU": supports_swiglu(sizes.ffn_width, sizes.dtype),
        "loss passes": supports_softmax(sizes.vocab_rows, sizes.dtype),
    }
    return None if takes[operation] else f"csrc/kernels has none for these sizes in {sizes.dtype}"


def _random(sizes: StepSizes, *shapes: tuple[int, ...]) -> Iterator[torch.Tensor]:
    generator = torch.Generator(sizes.device).manual_seed(_SEED)
    for shape in shapes:
        values = torch.randn(shape, generator=generator, device=sizes.device)
        yield values.to(sizes.dtype).requires_grad_()


def _norm(sizes: StepSizes) -> Operation:
    num_tokens, hidden_size = sizes.norm_tokens, sizes.hidden_size

    def inputs() -> tuple[torch.Tensor, ...]:
        x, weight = _random(sizes, (num_tokens, hidden_size), (hidden_size,))
        return x, nn.Parameter(weight.detach())

    def by(name: str) -> Function:
        normalise = None

        def call(x: torch.Tensor, weight: nn.Parameter) -> torch.Tensor:
            nonlocal normalise
            normalise = normalise or NORMS[name](_EPSILON)
            return normalise(x, weight)

        return call

    # Forward reads x and writes y; backward reads x and its gradient and writes one.
    num_bytes = 5 * sizes.dtype.itemsize * num_tokens * hidden_size
    implementations = {name: by(name) for name in _FUSED}
    return Operation("norm", _FUSED, implementations, inputs, num_bytes=num_bytes)


def _rope(sizes: StepSizes) -> Operation:
    positions = torch.arange(sizes.num_tokens, device=sizes.device)
    rotary = Rotary(sizes.head_dim, 10000.0)
    table = rotary_table(positions, rotary, table_dtype(sizes.dtype, sizes.device))
    exact = rotary_table(positions, rotary, torch.float32)

    def inputs() -> tuple[torch.Tensor, ...]:
        # As attention gets them: parts of what one product wrote.
        num_heads = sizes.num_heads // sizes.num_groups
        shape = (sizes.num_tokens, sizes.num_groups, num_heads + 2, sizes.head_dim)
        (mixed,) = _random(sizes, shape)
        query, key = mixed.detach()[:, :, :num_heads], mixed.detach()[:, :, num_heads]
        query = query.reshape(sizes.num_tokens, -1, sizes.head_dim)
        return query.requires_grad_(), key.requires_grad_()

    def by(name: str) -> Function:
        return lambda query, key: apply_rotary(
            query, key, exact if query.dtype == torch.float32 else table, name
        )

    num_heads = sizes.num_heads + sizes.num_groups
    num_bytes = 4 * sizes.dtype.itemsize * sizes.num_tokens * num_heads * sizes.head_dim
    implementations = {name: by(name) for name in _FUSED}
    return Operation("RoPE", _FUSED, implementations, inputs, num_bytes=num_bytes)


def _swiglu(sizes: StepSizes) -> Operation:
    def inputs() -> tuple[torch.Tensor, ...]:
        return tuple(_random(sizes, (sizes.num_tokens, 2 * sizes.ffn_width)))

    def by(name: str) -> Function:
        activate = None

        def call(rows: torch.Tensor) -> torch.Tensor:
            nonlocal activate
            activate = activate or ACTIVATIONS[name]()
            return activate(rows)

        return call

    names = (*_FUSED[:-1], "megatron", "torch")
    num_bytes = 8 * sizes.dtype.itemsize * sizes.num_tokens * sizes.ffn_width
    implementations = {name: by(name) for name in names}
    return Operation("SwiGLU", names, implementations, inputs, num_bytes=num_bytes)


def _loss(sizes: StepSizes) -> Operation:
    num_tokens = min(sizes.num_tokens, _TIMED_LOSS_TOKENS)
    # Some columns are padding, and some labels lie before or behind this slice.
    num_valid_tokens = sizes.vocab_rows - sizes.vocab_rows // 16
    rows = VocabularyShard(sizes.vocab_rows // 16, sizes.vocab_rows, num_valid_tokens, None)

    def inputs() -> tuple[torch.Tensor, ...]:
        (logits,) = _random(sizes, (num_tokens, sizes.vocab_rows))
        labels = torch.arange(num_tokens, device=sizes.device) * 17 % (2 * sizes.vocab_rows)
        return logits.detach(), labels

    def by(name: str) -> Function:
        def call(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            chunk = chunk_loss(logits, labels, rows, name)
            return chunk.losses, chunk.differences, chunk.scale, labels

        return call

    def finish(
        losses: torch.Tensor, differences: torch.Tensor, scale: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Labels' entries are of another size than all others: each is compared by itself."""
        gradient = differences * scale.unsqueeze(-1).to(differences.dtype)
        place = (labels - rows.start).clamp(0, rows.num_rows - 1).unsqueeze(-1)
        return losses, gradient.gather(-1, place), gradient.scatter(-1, place, 0.0)

    names = ("ours", "torch")
    num_bytes = 3 * sizes.dtype.itemsize * num_tokens * sizes.vocab_rows
    return Operation(
        "loss passes",
        names,
        {name: by(name) for name in names},
        inputs,
        finish=finish,
        num_bytes=num_bytes,
    )


@dataclass(frozen=True)
class _AttentionSettings:
    """What `PackedCausalAttention` reads of megatron-core's configuration."""

    deterministic_mode: bool = False


def document_ends(num_tokens: int, sequence_length: int) -> list[int]:
    """Where documents end in a micro-batch, the 0 before the first included.

    Every second sequence is one document; the others, the first among them, hold documents of
    unequal length, as packed instructions are.

    >>> document_ends(512, 256)
    [0, 128, 192, 256, 512]
    """
    ends = [0]
    for begin in range(0, num_tokens, sequence_length):
        end = min(begin + sequence_length, num_tokens)
        is_packed = begin // sequence_length % 2 == 0
        while is_packed and end - ends[-1] >= 2 * _SHORTEST_DOCUMENT:
            ends.append(ends[-1] + (end - ends[-1]) // 2)
        ends.append(end)
    return ends


def attention_operation(
    sizes: StepSizes, facts: Facts, sequence_length: int, rotation: str
) -> Operation:
    """Causal attention of packed documents, rotary embedding included.

    Args:
        sizes: Of one micro-batch on one rank.
        facts: By which back ends are there or not.
        sequence_length: Tokens of a sample.
        rotation: Which implementation of `apply_rotary`.
    """
    names = preference(facts.capability)
    absent = {name: why for name in names if (why := obstacle(name, facts)) is not None}
    present = [name for name in names if name not in absent]
    timed, compared = (
        _attention(sizes.on(num_tokens), names, present, sequence_length, rotation)
        for num_tokens in (_TIMED_TOKENS, _COMPARED_TOKENS)
    )
    return replace(timed, absent=absent, smaller=compared)


def _attention(
    sizes: StepSizes,
    names: tuple[str, ...],
    present: Sequence[str],
    sequence_length: int,
    rotation: str,
) -> Operation:
    ends = document_ends(sizes.num_tokens, min(sequence_length, sizes.num_tokens))
    rotary = Rotary(sizes.head_dim, 10000.0)
    packed = {
        dtype: pack_tokens(
            torch.tensor(ends, dtype=torch.int32), rotary=rotary, dtype=dtype, device=sizes.device
        )
        for dtype in (sizes.dtype, torch.float32)
    }

    def inputs() -> tuple[torch.Tensor, ...]:
        heads = (sizes.num_heads, sizes.num_groups, sizes.num_groups)
        return tuple(_random(sizes, *((sizes.num_tokens, n, sizes.head_dim) for n in heads)))

    def by(backend: str) -> Function:
        module, exact = (
            PackedCausalAttention(
                _AttentionSettings(), 1, None, "self", backend=backend, rotation=name
            )
            for name in (rotation, "torch")
        )

        def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            attend = exact if query.dtype == torch.float32 else module
            context: torch.Tensor = attend(
                query, key, value, None, packed_seq_params=packed[query.dtype]
            )
            return context

        return call

    implementations = {name: by(name) for name in present}
    return Operation("attention", names, implementations, inputs, reference="sdpa")


logger = logging.getLogger(__name__)

_COMPOSED = {
    "norm": "torch's rms_norm",
    "RoPE": "composed in torch, angles once a micro-batch",
    "SwiGLU": "composed in torch",
    "loss passes": "composed in torch, chunked and vocabulary-parallel",
}


@dataclass(frozen=True)
class Kernels:
    """Names of implementations.

    Attributes:
        attention: One of `attention_backends.BACKENDS`.
        norm: One of `norm.NORMS`.
        rope: An ``implementation`` of `apply_rotary`.
        swiglu: One of `swiglu.ACTIVATIONS`.
        loss: An ``implementation`` of `chunk_loss`.
        descriptions: Which each is and why, by operation, for the log.
    """

    attention: str
    norm: str
    rope: str
    swiglu: str
    loss: str
    descriptions: Mapping[str, str]


def choose_kernels(
    sizes: StepSizes, train: TrainConfig, *, sequence_length: int, context_parallel_size: int
) -> Kernels:
    """Chooses for a run; on GPUs all ranks call it together.

    Args:
        sizes: Of one micro-batch on one rank.
        train: What is asked for.
        sequence_length: Tokens of a sample.
        context_parallel_size: Ranks that share one.

    Raises:
        UserError: What is asked for cannot be used.
    """
    facts = gather_facts(
        sizes.device, sizes.dtype, sizes.head_dim, deterministic=train.deterministic_mode
    )
    # Validate the arguments before benchmarking.
    backend, reason = choose(facts, train.attention_backend)
    attention = Choice(backend, describe_backend(reason, sizes.device, sizes.dtype))
    if sizes.device.type != "cuda":
        return _kernels(attention, {name: _on_a_cpu(sizes, name) for name in _COMPOSED})
    _refuse_what_is_not_built(train)
    begin = time.perf_counter()
    if train.fused_kernels == "measured" and not train.deterministic_mode:
        operations = step_operations(sizes)
        choices = choose_fastest(operations, sizes.device)
        fused = {o.name: choice for o, choice in zip(operations, choices, strict=True)}
    else:
        fused = {name: _as_asked(sizes, train, name) for name in _COMPOSED}
    # Ranks that share a sample attend to more keys than they have queries, which is not measured.
    is_free = train.attention_backend == "auto" and not train.deterministic_mode
    # In fp32 there is torch's alone, which may need memory for the scores of all pairs of tokens.
    if is_free and context_parallel_size == 1 and sizes.dtype != torch.float32:
        operation = attention_operation(sizes, facts, sequence_length, fused["RoPE"].name)
        (attention,) = choose_fastest([operation], sizes.device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(sizes.device)
    logger.info("kernels chosen in %.1f s", time.perf_counter() - begin)
    return _kernels(attention, fused)


def _kernels(attention: Choice, fused: Mapping[str, Choice]) -> Kernels:
    norm, rope = fused["norm"], fused["RoPE"]
    swiglu, loss = fused["SwiGLU"], fused["loss passes"]
    descriptions = {
        "attention": attention.description,
        "norm": norm.description,
        "rotary embedding": rope.description,
        "SwiGLU": swiglu.description,
        "cross-entropy": loss.description,
    }
    return Kernels(attention.name, norm.name, rope.name, swiglu.name, loss.name, descriptions)


def transformer_engine_kernels(sizes: StepSizes) -> Kernels:
    """Returns what transformer-engine's layers use; only the loss is not theirs."""
    problem = "no GPU" if sizes.device.type != "cuda" else ours_obstacle(sizes, "loss passes")
    loss = Choice("ours", f"ours, {load_kernels()[1]}")
    if problem is not None:
        loss = Choice("torch", f"{_COMPOSED['loss passes']}: {problem}")
    theirs = "transformer_engine"
    descriptions = {
        "attention": "transformer-engine's DotProductAttention",
        "norm": "transformer-engine's, fused with the linear layer behind it",
        "rotary embedding": "transformer-engine's, angles once a micro-batch",
        "SwiGLU": "megatron-core's",
        "cross-entropy": loss.description,
    }
    return Kernels(theirs, theirs, theirs, "megatron", loss.name, descriptions)


def _on_a_cpu(sizes: StepSizes, operation: str) -> Choice:
    """Its own kernels, which the composition takes in bf16."""
    composed = _COMPOSED[operation]
    if operation == "loss passes":
        return Choice("torch", composed)
    fused = cpu_kernels.description() if sizes.dtype == torch.bfloat16 else None
    return Choice("torch", fused or f"{composed}: no GPU")


def _refuse_what_is_not_built(train: TrainConfig) -> None:
    library, reason = load_kernels()
    if train.fused_kernels == "ours" and library is None:
        raise UserError(
            f"train.fused_kernels: ours cannot be used: {reason}; build them, or leave the choice "
            "to measured"
        )


def _as_asked(sizes: StepSizes, train: TrainConfig, operation: str) -> Choice:
    """Without a measurement, which may come out otherwise after a restart."""
    composed = _COMPOSED[operation]
    if train.fused_kernels == "torch":
        return Choice("torch", f"{composed}: --fused-kernels torch")
    obstacle = ours_obstacle(sizes, operation)
    if obstacle is not None:
        return Choice("torch", f"{composed}: {obstacle}")
    why = "--fused-kernels ours" if train.fused_kernels == "ours" else "--deterministic-mode"
    return Choice("ours", f"ours, {load_kernels()[1]}: {why}")
