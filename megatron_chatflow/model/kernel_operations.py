"""The operations of a step that have several implementations, at a run's own sizes.

In: the sizes of one micro-batch on one rank. Out: norm, RoPE, SwiGLU, loss passes and attention,
each with every implementation that this machine has, and the reason for those that it has not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from megatron_chatflow.model.attention import PackedCausalAttention
from megatron_chatflow.model.attention_backends import Facts, obstacle, preference
from megatron_chatflow.model.foreign_kernels import can_import
from megatron_chatflow.model.kernel_choice import Function, Operation
from megatron_chatflow.model.loss import VocabularySlice, chunk_loss
from megatron_chatflow.model.norm import NORMS
from megatron_chatflow.model.packed import pack_tokens
from megatron_chatflow.model.rotary import Rotary, apply_rotary, rotary_table, table_dtype
from megatron_chatflow.model.swiglu import ACTIVATIONS
from megatron_chatflow.native.cuda_kernels import load_kernels
from megatron_chatflow.native.rms_norm import takes_rms_norm
from megatron_chatflow.native.rope import takes_rope_width
from megatron_chatflow.native.softmax import takes_softmax
from megatron_chatflow.native.swiglu import takes_swiglu

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
        "norm": takes_rms_norm(sizes.hidden_size, sizes.dtype),
        "RoPE": takes_rope_width(sizes.head_dim, sizes.dtype),
        "SwiGLU": takes_swiglu(sizes.ffn_width, sizes.dtype),
        "loss passes": takes_softmax(sizes.vocab_rows, sizes.dtype),
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
    num_pieces = sizes.vocab_rows - sizes.vocab_rows // 16
    rows = VocabularySlice(sizes.vocab_rows // 16, sizes.vocab_rows, num_pieces, None)

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
