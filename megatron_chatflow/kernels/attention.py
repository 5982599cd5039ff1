"""Which attention kernels a run uses, and the one call into each library that has them.

In: what is installed, the GPU, dtype and head size. Out: a name and the reason; and for each name a
function on packed tokens. Queries of segment i see keys of segment i, causally, the last query the
last key; segments are given by cumulative lengths (``cu_seqlens``), query heads are a multiple of
key heads. A library is imported when nothing else speaks against it, and not before.

Causal attention in bf16 on the CPU, composed of the library's matrix products and our softmax.

In: queries, keys and values of a packed micro-batch before rotation. Out: what attention sees. Not
an attention kernel: oneDNN's batched products make blocks of scores, of which those above the
diagonal are never formed, and `cpu_kernels` turns each block into probabilities while it lies in
the cache. PyTorch's own flash kernel takes twice as long where processors have no AMX. The
probabilities are kept for the backward pass, `length / 2` numbers a query and head, and so
documents longer than `MAX_LENGTH` are left to PyTorch.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
from packaging.version import Version

from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels import cpu as cpu_kernels

# Longest document; the probabilities of its last query and head are 4 kB.
MAX_LENGTH = 2048
# Queries of a block: fewer leave the products thin, more form many scores above the diagonal.
QUERY_CHUNK = 256
# Scores of a block, 8 MB: more leave the cache between two products, fewer cost more calls.
BLOCK_SCORES = 1 << 22

Runs = tuple[tuple[int, int, int], ...]
Angles = tuple[torch.Tensor, torch.Tensor]


def is_composed(query: torch.Tensor, longest: int) -> bool:
    """Whether a micro-batch whose longest document has ``longest`` tokens is computed here."""
    return cpu_kernels.is_available(query) and longest <= MAX_LENGTH


@dataclass(frozen=True)
class _Block:
    """Some queries of some documents of a run, and the keys up to the last of them."""

    documents: slice
    queries: slice

    def query_heads(self, heads: torch.Tensor, num_groups: int) -> torch.Tensor:
        """``[documents * groups, heads of a group * queries, head_dim]`` of all the run's heads."""
        part = heads[self.documents, :, self.queries]
        return part.reshape(part.shape[0] * num_groups, -1, part.shape[-1])

    def key_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """``[documents * groups, keys, head_dim]``."""
        # Dense before anybody transposes it: a copy of the transposed would be twenty times slower.
        return heads[self.documents, :, : self.queries.stop].flatten(0, 1).contiguous()


def _blocks(num_documents: int, num_heads: int, length: int) -> Iterator[_Block]:
    """Blocks of a run; of each document the last queries first, which see every key."""
    chunk = min(QUERY_CHUNK, length)
    together = max(1, BLOCK_SCORES // (num_heads * chunk * length))
    for first in range(0, num_documents, together):
        documents = slice(first, min(first + together, num_documents))
        for end in range(length, 0, -chunk):
            yield _Block(documents, slice(max(0, end - chunk), end))


def _largest_block(num_documents: int, num_heads: int, length: int) -> int:
    """Scores of a run's largest block, its first."""
    first = next(_blocks(num_documents, num_heads, length))
    documents = range(num_documents)[first.documents]
    return len(documents) * num_heads * len(range(length)[first.queries]) * length


def _move(tokens: torch.Tensor, run: tuple[int, int, int], angles: Angles | None) -> torch.Tensor:
    """A run's tokens ``[tokens, heads, head_dim]`` as ``[documents, heads, length, head_dim]``."""
    start, num_documents, length = run
    rows = slice(start, start + num_documents * length)
    heads = tokens[rows].view(num_documents, length, *tokens.shape[1:])
    moved = tokens.new_empty(num_documents, tokens.shape[1], length, tokens.shape[2])
    if angles is not None:
        angles = angles[0][rows], angles[1][rows]
    cpu_kernels.rotate(heads, moved.transpose(1, 2), angles)
    return moved


def _move_back(
    moved: torch.Tensor, tokens: torch.Tensor, run: tuple[int, int, int], angles: Angles | None
) -> None:
    """The opposite of `_move`, into ``tokens``."""
    start, num_documents, length = run
    rows = slice(start, start + num_documents * length)
    if angles is not None:
        angles = angles[0][rows], angles[1][rows]
    heads = tokens[rows].view(num_documents, length, *tokens.shape[1:])
    cpu_kernels.rotate(moved.transpose(1, 2), heads, angles, -1.0)


class _ComposedAttention(torch.autograd.Function):
    """Rotation and attention of all runs, with the gradients of queries, keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        angles: Angles,
        runs: Runs,
        scale: float,
    ) -> torch.Tensor:
        ctx.angles, ctx.runs, ctx.scale = angles, runs, scale
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        saved: list[torch.Tensor] = []
        for run in runs:
            q, k, v = _move(query, run, angles), _move(key, run, angles), _move(value, run, None)
            mixed = torch.empty_like(q)
            saved += (q, k, v)
            for block in _blocks(run[1], q.shape[1], run[2]):
                scores = torch.bmm(
                    block.query_heads(q, k.shape[1]), block.key_heads(k).transpose(1, 2)
                )
                probabilities = _softmax(scores, block, scale)
                part = torch.bmm(probabilities, block.key_heads(v))
                target = mixed[block.documents, :, block.queries]
                target.copy_(part.view(target.shape))
                saved.append(probabilities)
            _move_back(mixed, context, run, None)
        ctx.save_for_backward(*saved)
        return context

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None]:
        saved = iter(ctx.saved_tensors)
        num_tokens, num_heads, head_dim = gradient.shape
        gradients: tuple[torch.Tensor, ...] = ()
        for run in ctx.runs:
            q, k, v = next(saved), next(saved), next(saved)
            if not gradients:
                gradients = tuple(
                    gradient.new_empty(num_tokens, heads, head_dim)
                    for heads in (num_heads, k.shape[1], k.shape[1])
                )
            parts = _run_gradients(_move(gradient, run, None), q, k, v, saved, ctx.scale)
            for part, whole, angles in zip(
                parts, gradients, (ctx.angles, ctx.angles, None), strict=True
            ):
                _move_back(part, whole, run, angles)
        return (*gradients, None, None, None)  # type: ignore[return-value]


def _softmax(scores: torch.Tensor, block: _Block, scale: float) -> torch.Tensor:
    """Probabilities of a block's scores, in place; a group's heads are rows of one matrix."""
    num_queries = block.queries.stop - block.queries.start
    rows = scores.view(-1, num_queries, scores.shape[-1])
    return cpu_kernels.causal_softmax(rows, block.queries.start, scale).view(scores.shape)


def _softmax_backward(
    probabilities: torch.Tensor, gradient: torch.Tensor, block: _Block, scale: float
) -> torch.Tensor:
    shape = (-1, block.queries.stop - block.queries.start, gradient.shape[-1])
    cpu_kernels.causal_softmax_backward(
        probabilities.view(shape), gradient.view(shape), block.queries.start, scale
    )
    return gradient


def _run_gradients(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: Iterator[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a run's rotated queries and keys and of its values.

    Args:
        gradient: ``[documents, heads, length, head_dim]``, of the output.
        q: The same shape.
        k: ``[documents, groups, length, head_dim]``.
        v: The same shape.
        saved: Every block's probabilities, in the order of `_blocks`.
        scale: Factor on the scores.
    """
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    num_groups, length = k.shape[1], k.shape[2]
    scratch = q.new_empty(_largest_block(len(q), q.shape[1], length))
    # Blocks of queries add up in fp32. A document's first block has every key.
    grad_k = grad_v = torch.empty(0)
    for block in _blocks(len(q), q.shape[1], length):
        probabilities = next(saved)
        scores = scratch[: probabilities.numel()].view(probabilities.shape)
        queries = block.query_heads(q, num_groups)
        outputs = block.query_heads(gradient, num_groups)
        torch.bmm(outputs, block.key_heads(v).transpose(1, 2), out=scores)
        _softmax_backward(probabilities, scores, block, scale)
        target = gradients[0][block.documents, :, block.queries]
        target.copy_(torch.bmm(scores, block.key_heads(k)).view(target.shape))
        part_k = torch.bmm(scores.transpose(1, 2), queries)
        part_v = torch.bmm(probabilities.transpose(1, 2), outputs)
        if block.queries.stop == length:
            grad_k, grad_v = part_k.float(), part_v.float()
        else:
            grad_k[:, : block.queries.stop] += part_k
            grad_v[:, : block.queries.stop] += part_v
        if block.queries.start == 0:
            for whole, sums in zip(gradients[1:], (grad_k, grad_v), strict=True):
                target = whole[block.documents]
                target.copy_(sums.view(target.shape))
    return gradients


def composed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: Angles,
    runs: Runs,
    scale: float | None,
) -> torch.Tensor:
    """Rotates queries and keys and attends inside each document.

    Args:
        query: bf16 ``[tokens, heads, head_dim]``; each head dense, any other strides.
        key: bf16 ``[tokens, groups, head_dim]``.
        value: The same shape.
        angles: Cosines and sines, float32[tokens, head_dim / 2].
        runs: ``(start, num_documents, length)`` of documents of equal length.
        scale: Factor on the scores; ``head_dim ** -0.5`` if None.

    Returns:
        ``[tokens, heads, head_dim]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    context: torch.Tensor = _ComposedAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, angles, runs, scale
    )
    return context


MAX_HEAD_DIM = 256
"""Largest head of flash-attn 2 and 3 and of torch's kernels; flash-attn 4's is 128."""

# Distributions, and what of them a kernel needs.
_DISTRIBUTIONS = {
    "transformer_engine": "transformer-engine",
    "flash_attn_4": "flash-attn-4",
    "flash_attn_3": "flash-attn-3",
    "flash_attn_2": "flash-attn",
}
# flash-attn 4's betas before the fifth have no backward pass for segments on sm_90.
_OLDEST = {"transformer_engine": "2.0", "flash_attn_4": "4.0.0b5", "flash_attn_2": "2.6"}
# Where each has what is called.
_ENTRY_POINTS = {
    "transformer_engine": ("transformer_engine.pytorch", "DotProductAttention"),
    "flash_attn_4": ("flash_attn.cute", "flash_attn_varlen_func"),
    "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash_attn_2": ("flash_attn", "flash_attn_varlen_func"),
}


def _entry_point(name: str) -> Any:
    module, attribute = _ENTRY_POINTS[name]
    return getattr(import_module(module), attribute)


def import_error(name: str) -> str | None:
    """Why a library that is installed cannot be imported; None if it can.

    An installation says nothing about what the library itself needs, or was built for.
    """
    try:
        _entry_point(name)
    except Exception as error:  # a library may raise anything while it is imported
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return None


class Segments(NamedTuple):
    """Documents, or parts of them, as the kernels are told.

    Attributes:
        cu_queries: int32[num_segments + 1] on the device.
        cu_keys: The same of keys.
        longest_queries: Queries of the longest segment.
        longest_keys: Keys of the longest segment.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    longest_queries: int
    longest_keys: int


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        capability: Of the GPU; None without one.
        dtype: Of queries.
        head_dim: Size of a head.
        deterministic: Whether the backward pass has to give the same bits every time.
        installed: Version of each library of `_DISTRIBUTIONS` that is installed.
        has_cudnn: Whether torch has cuDNN.
        import_error: Says why a library cannot be imported, by its name here.
    """

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    deterministic: bool
    installed: dict[str, str]
    has_cudnn: bool
    import_error: Callable[[str], str | None] = import_error


def gather_facts(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, deterministic: bool
) -> Facts:
    """Looks at this machine."""
    installed = {}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            installed[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    is_cuda = device.type == "cuda"
    return Facts(
        capability=torch.cuda.get_device_capability(device) if is_cuda else None,
        dtype=dtype,
        head_dim=head_dim,
        deterministic=deterministic,
        installed=installed,
        has_cudnn=is_cuda and torch._C._has_cudnn,
    )


def _missing(name: str, facts: Facts) -> str | None:
    """Why a library cannot be used as far as its installation goes."""
    distribution = _DISTRIBUTIONS[name]
    if name not in facts.installed:
        return f"{distribution} is not installed"
    oldest = _OLDEST.get(name)
    if oldest is not None and Version(facts.installed[name]) < Version(oldest):
        return f"{distribution} {facts.installed[name]} is older than {oldest}"
    return None


def _unloadable(name: str, facts: Facts) -> str | None:
    """Why it cannot be used although it is installed; asked last, because asking imports it."""
    error = facts.import_error(name)
    return None if error is None else f"{_DISTRIBUTIONS[name]} cannot be imported ({error})"


def _unfit(
    facts: Facts, lowest: tuple[int, int], highest: tuple[int, int], head: int
) -> str | None:
    """Why kernels for these architectures and this largest head do not fit."""
    if facts.capability is None:
        return "there is no GPU"
    major, minor = facts.capability
    if not lowest <= facts.capability <= highest:
        return f"it has no kernel for sm_{major}{minor}"
    if facts.dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {facts.dtype} kernel"
    if facts.head_dim > head or facts.head_dim % 8:
        return f"it has no kernel for heads of {facts.head_dim}"
    return None


def obstacle(name: str, facts: Facts) -> str | None:
    """Why a run cannot use this back end; None if it can."""
    newest = (99, 9)
    if name in _DISTRIBUTIONS:
        lowest, highest, head = {
            "transformer_engine": ((8, 0), newest, MAX_HEAD_DIM),
            "flash_attn_4": ((9, 0), newest, 128),
            "flash_attn_3": ((9, 0), (9, 0), MAX_HEAD_DIM),
            "flash_attn_2": ((8, 0), newest, MAX_HEAD_DIM),
        }[name]
        reason = _missing(name, facts) or _unfit(facts, lowest, highest, head)
        if name == "flash_attn_4" and reason is None and facts.deterministic:
            assert facts.capability is not None
            if facts.capability[0] == 12:
                reason = "its backward pass is not deterministic on sm_12x"
        return reason or _unloadable(name, facts)
    if name == "cudnn":
        if not facts.has_cudnn:
            return "torch has no cuDNN here"
        if facts.deterministic:
            return "cuDNN's backward pass is not deterministic in torch"
        # On older GPUs torch's own flash kernel is the faster of the two.
        return _unfit(facts, (9, 0), newest, 128)
    if name == "flash":
        return _unfit(facts, (8, 0), newest, MAX_HEAD_DIM)
    assert name == "sdpa"
    return None


def preference(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """Back ends, the one to be taken first at the front."""
    is_hopper = capability is not None and capability[0] == 9
    # flash-attn 3 was written for Hopper, 4 for what came after.
    flash = ("flash_attn_3", "flash_attn_4") if is_hopper else ("flash_attn_4", "flash_attn_3")
    return ("transformer_engine", *flash, "flash_attn_2", "cudnn", "flash", "sdpa")


_TITLES = {
    "transformer_engine": "transformer-engine's DotProductAttention",
    "flash_attn_4": "flash-attn 4's variable-length kernel",
    "flash_attn_3": "flash-attn 3's variable-length kernel",
    "flash_attn_2": "flash-attn 2's variable-length kernel",
    "cudnn": "torch's cuDNN attention",
    "flash": "torch's flash attention",
    "sdpa": "torch's scaled_dot_product_attention",
}
BACKENDS = tuple(_TITLES)


def choose(facts: Facts, wanted: str = "auto") -> tuple[str, str]:
    """The back end of a run and the reason, for the log.

    Args:
        facts: What there is.
        wanted: ``auto``, or one of `BACKENDS`.

    Raises:
        UserError: The wanted one cannot be used.
    """
    if wanted != "auto":
        reason = obstacle(wanted, facts)
        if reason is not None:
            raise UserError(
                f"train.attention_backend: {wanted} cannot be used: {reason}; install what it "
                "needs, or leave the choice to auto"
            )
        return wanted, f"{_TITLES[wanted]}, as asked for"
    passed_over: list[str] = []
    for name in preference(facts.capability):
        reason = obstacle(name, facts)
        if reason is None:
            title = _TITLES[name]
            if name in facts.installed:
                title += f" ({_DISTRIBUTIONS[name]} {facts.installed[name]})"
            return name, "; ".join((title, *passed_over))
        passed_over.append(f"not {_TITLES[name]}: {reason}")
    raise AssertionError("torch's own attention is always there")


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Segments, float | None, bool], torch.Tensor
]
"""On queries, keys, values ``[tokens, heads, head_dim]``, segments, scale, determinism."""


def _first(result: Any) -> torch.Tensor:
    """The context alone: some releases put the softmax's logarithm beside it."""
    context: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return context


def flash_attn_2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    deterministic: bool,
) -> torch.Tensor:
    """The three flash-attn have the same arguments under different modules."""
    return _varlen("flash_attn_2", query, key, value, segments, scale, deterministic)


def flash_attn_3(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    deterministic: bool,
) -> torch.Tensor:
    """The kernels of flash-attention's folder ``hopper``."""
    return _varlen("flash_attn_3", query, key, value, segments, scale, deterministic)


def flash_attn_4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    deterministic: bool,
) -> torch.Tensor:
    """The kernels of the distribution ``flash-attn-4``."""
    return _varlen("flash_attn_4", query, key, value, segments, scale, deterministic)


def _varlen(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    deterministic: bool,
) -> torch.Tensor:
    return _first(
        _entry_point(name)(
            query,
            key,
            value,
            cu_seqlens_q=segments.cu_queries,
            cu_seqlens_k=segments.cu_keys,
            max_seqlen_q=segments.longest_queries,
            max_seqlen_k=segments.longest_keys,
            softmax_scale=scale,
            causal=True,
            deterministic=deterministic,
        )
    )


@functools.cache
def _transformer_engine_module(
    num_heads: int, num_groups: int, head_dim: int, scale: float | None
) -> Any:
    """Has neither weights nor state, so it stays out of the model and of its checkpoints."""
    return _entry_point("transformer_engine")(
        num_heads,
        head_dim,
        num_gqa_groups=num_groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )


def transformer_engine(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    deterministic: bool,
) -> torch.Tensor:
    """transformer-engine picks among cuDNN and the flash-attn that it finds.

    Determinism is asked of it by `runtime.determinism`, for the whole process.
    """
    module = _transformer_engine_module(query.shape[1], key.shape[1], query.shape[2], scale)
    is_square = segments.cu_queries is segments.cu_keys
    context: torch.Tensor = module(
        query,
        key,
        value,
        qkv_format="thd",
        cu_seqlens_q=segments.cu_queries,
        cu_seqlens_kv=segments.cu_keys,
        max_seqlen_q=segments.longest_queries,
        max_seqlen_kv=segments.longest_keys,
        attn_mask_type="padding_causal" if is_square else "padding_causal_bottom_right",
    )
    return context.view(query.shape)


KERNELS: dict[str, Kernel] = {
    "transformer_engine": transformer_engine,
    "flash_attn_4": flash_attn_4,
    "flash_attn_3": flash_attn_3,
    "flash_attn_2": flash_attn_2,
}
"""Back ends that take segments; the others are modes of torch's function."""
