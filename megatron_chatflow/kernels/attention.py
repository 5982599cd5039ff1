"""Attention of packed documents: choice of a back end, kernels of libraries, and a CPU kernel.

Query segment i attends causally to key segment i, with the last query aligned to the last key.
Segments are given by cumulative lengths (``cu_seqlens``); the number of query heads is a multiple
of the number of key heads. In a sliding window of ``window`` tokens, a token sees itself and the
``window - 1`` tokens before it (Beltagy et al. 2020, "Longformer", arXiv 2004.05150; Jiang et al.
2023, "Mistral 7B", arXiv 2310.06825), and the cost grows with the window instead of the length of
the document. `choose` selects a back end and gives the reason for the log. A library
is imported only if nothing else rules it out.

On CPUs in bf16, `composed_attention` combines oneDNN's batched matrix products with the compiled
softmax of `kernels.cpu`. Scores are computed in blocks, and blocks above the diagonal are skipped;
each block becomes probabilities while it is in the cache. PyTorch's flash kernel takes twice as
long on processors without AMX. The probabilities are kept for the backward pass, ``length / 2``
numbers for each query and head, so documents longer than `MAX_LENGTH` are left to PyTorch. With a
window, they are as many as the window's tokens, whatever the length.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
from packaging.version import Version

from megatron_chatflow.errors import UserError
from megatron_chatflow.kernels import cpu as cpu_kernels

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
    """Returns why an installed library cannot be imported; None if it can.

    An installed library may lack its own dependencies, or be built for another environment.
    """
    try:
        _entry_point(name)
    except Exception as error:  # a library may raise anything while it is imported
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return None


class Segments(NamedTuple):
    """Segments of a micro-batch: documents, or spans of them.

    Attributes:
        cu_queries: Cumulative numbers of queries, int32[num_segments + 1] on the device.
        cu_keys: Cumulative numbers of keys, int32[num_segments + 1] on the device.
        longest_queries: Number of queries of the longest segment.
        longest_keys: Number of keys of the longest segment.
    """

    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    longest_queries: int
    longest_keys: int


@dataclass(frozen=True)
class Facts:
    """The facts that the choice of a back end depends on.

    Attributes:
        capability: The GPU's compute capability; None without a GPU.
        dtype: The dtype of queries.
        head_dim: Size of a head.
        deterministic: Whether the backward pass must be deterministic.
        installed: Versions of the installed libraries of `_DISTRIBUTIONS`.
        has_cudnn: Whether torch has cuDNN.
        import_error: Returns why a library cannot be imported.
        window: The sliding window in tokens; None without one.
        cudnn_version: cuDNN's version as it states it, such as 90600 for 9.6; None if unknown.
    """

    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    deterministic: bool
    installed: dict[str, str]
    has_cudnn: bool
    import_error: Callable[[str], str | None] = import_error
    window: int | None = None
    cudnn_version: int | None = None


def gather_facts(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    deterministic: bool,
    window: int | None = None,
) -> Facts:
    """Collects the facts about this machine."""
    installed = {}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            installed[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    is_cuda = device.type == "cuda"
    cudnn_version = torch.backends.cudnn.version() if is_cuda else None  # type: ignore[no-untyped-call]
    return Facts(
        capability=torch.cuda.get_device_capability(device) if is_cuda else None,
        dtype=dtype,
        head_dim=head_dim,
        deterministic=deterministic,
        installed=installed,
        has_cudnn=is_cuda and torch._C._has_cudnn,
        window=window,
        cudnn_version=cudnn_version,
    )


def _missing(name: str, facts: Facts) -> str | None:
    """Returns why an installation does not provide a usable library; None if it does."""
    distribution = _DISTRIBUTIONS[name]
    if name not in facts.installed:
        return f"{distribution} is not installed"
    oldest = _OLDEST.get(name)
    if oldest is not None and Version(facts.installed[name]) < Version(oldest):
        return f"{distribution} {facts.installed[name]} is older than {oldest}"
    return None


def _unloadable(name: str, facts: Facts) -> str | None:
    """Returns why an installed library cannot be imported; called last, because it imports it."""
    error = facts.import_error(name)
    return None if error is None else f"{_DISTRIBUTIONS[name]} cannot be imported ({error})"


def unavailable(name: str, facts: Facts) -> str | None:
    """Returns why a library cannot be used on this machine; None if it is installed and works."""
    return _missing(name, facts) or _unloadable(name, facts)


def _unfit(
    facts: Facts, lowest: tuple[int, int], highest: tuple[int, int], head: int
) -> str | None:
    """Returns why kernels with these limits do not fit the run; None if they do."""
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
    """Returns why a run cannot use a back end; None if it can."""
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
    """Returns back ends in order of preference."""
    is_hopper = capability is not None and capability[0] == 9
    # flash-attn 3 was written for Hopper, 4 for what came after.
    flash = ("flash_attn_3", "flash_attn_4") if is_hopper else ("flash_attn_4", "flash_attn_3")
    return (*flash, "flash_attn_2", "cudnn", "flash", "sdpa")


_TITLES = {
    "flash_attn_4": "flash-attn 4's variable-length kernel",
    "flash_attn_3": "flash-attn 3's variable-length kernel",
    "flash_attn_2": "flash-attn 2's variable-length kernel",
    "cudnn": "torch's cuDNN attention",
    "flash": "torch's flash attention",
    "sdpa": "torch's scaled_dot_product_attention",
}
BACKENDS = tuple(_TITLES)


def _title(name: str, facts: Facts) -> str:
    if facts.window is not None and name in ("cudnn", "flash"):
        title = _TITLES["sdpa"]
        return f"{title} with a mask for the window, which torch's flash kernel does not take"
    return _TITLES[name]


def choose(facts: Facts, wanted: str = "auto") -> tuple[str, str]:
    """Returns the back end of a run, and the reason for the log.

    Args:
        facts: The facts about the machine and the run.
        wanted: ``auto``, or one of `BACKENDS`. transformer-engine's attention is a part of its
            layers, see `model.layer_spec`.

    Raises:
        UserError: The requested back end cannot be used.
    """
    if wanted != "auto":
        reason = obstacle(wanted, facts)
        if reason is not None:
            raise UserError(
                f"train.attention_backend: {wanted} cannot be used: {reason}; install what it "
                "needs, or use auto"
            )
        return wanted, f"{_title(wanted, facts)}, as requested"
    passed_over: list[str] = []
    for name in preference(facts.capability):
        reason = obstacle(name, facts)
        if reason is None:
            title = _title(name, facts)
            if name in facts.installed:
                title += f" ({_DISTRIBUTIONS[name]} {facts.installed[name]})"
            return name, "; ".join((title, *passed_over))
        passed_over.append(f"not {_TITLES[name]}: {reason}")
    raise AssertionError("torch's own attention is always there")


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Segments, float | None, bool, int | None],
    torch.Tensor,
]
"""Arguments: queries, keys, values ``[tokens, heads, head_dim]``, segments, scale, determinism,
and the window, None for none."""


def _first(result: Any) -> torch.Tensor:
    """Returns the context; some releases also return the logarithm of the softmax."""
    context: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return context


def _flash_attention(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scale: float | None,
    deterministic: bool,
    window: int | None,
) -> torch.Tensor:
    """Calls a version of flash-attn. All have the same arguments, in different modules."""
    # The numbers of keys before and behind the one that is aligned to the query.
    sliding = {} if window is None else {"window_size": (window - 1, 0)}
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
            **sliding,
        )
    )


KERNELS: dict[str, Kernel] = {
    name: partial(_flash_attention, name)
    for name in ("flash_attn_4", "flash_attn_3", "flash_attn_2")
}
"""Back ends that take segments; the others are modes of torch's function."""


# Most keys of a query; the probabilities of a document's last query and head are 4 kB.
MAX_LENGTH = 2048
# Queries of a block: fewer leave the products thin, more form many scores above the diagonal.
QUERY_CHUNK = 256
# Scores of a block, 8 MB: more leave the cache between two products, fewer cost more calls.
BLOCK_SCORES = 1 << 22

Runs = tuple[tuple[int, int, int], ...]
Angles = tuple[torch.Tensor, torch.Tensor]


def is_composed(query: torch.Tensor, longest: int, window: int | None = None) -> bool:
    """Returns whether `composed_attention` supports documents of up to ``longest`` tokens."""
    return cpu_kernels.is_available(query) and _num_keys(longest, window) <= MAX_LENGTH


def _num_keys(length: int, window: int | None) -> int:
    """Returns the largest number of keys that the queries of a block see."""
    if window is None:
        return length
    return min(length, min(QUERY_CHUNK, length) + window - 1)


@dataclass(frozen=True)
class _Block:
    """Some queries of some documents of a run, with all keys that one of them sees."""

    documents: slice
    queries: slice
    keys: slice
    window: int | None

    def query_heads(self, heads: torch.Tensor, num_groups: int) -> torch.Tensor:
        """``[documents * groups, heads of a group * queries, head_dim]`` of all the run's heads."""
        part = heads[self.documents, :, self.queries]
        return part.reshape(part.shape[0] * num_groups, -1, part.shape[-1])

    def key_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """``[documents * groups, keys, head_dim]``."""
        # Copied before it is transposed: copying the transposed tensor would be 20 times slower.
        return heads[self.documents, :, self.keys].flatten(0, 1).contiguous()

    def hide_before_window(self, scores: torch.Tensor) -> None:
        """Gives keys before a query's window the lowest score, in place.

        Args:
            scores: bf16 ``[rows, queries, keys]``.
        """
        if self.window is None:
            return
        # The last query hides the most keys. Key c of the block is hidden from its query r if
        # c - r is at most `last`.
        num_hidden = self.queries.stop - self.window - self.keys.start
        if num_hidden <= 0:
            return
        last = self.queries.start - self.window - self.keys.start
        hidden = torch.ones(scores.shape[1], num_hidden, dtype=torch.bool).tril(last)
        scores[..., :num_hidden].masked_fill_(hidden, torch.finfo(scores.dtype).min)


def _blocks(
    num_documents: int, num_heads: int, length: int, window: int | None
) -> Iterator[_Block]:
    """Yields the blocks of a run; the last queries of each document, with the most keys, go first.

    Without a window, the first block of a document has every key.
    """
    chunk = min(QUERY_CHUNK, length)
    together = max(1, BLOCK_SCORES // (num_heads * chunk * _num_keys(length, window)))
    for first in range(0, num_documents, together):
        documents = slice(first, min(first + together, num_documents))
        for end in range(length, 0, -chunk):
            begin = max(0, end - chunk)
            first_key = 0 if window is None else max(0, begin - window + 1)
            yield _Block(documents, slice(begin, end), slice(first_key, end), window)


def _largest_block(num_documents: int, num_heads: int, length: int, window: int | None) -> int:
    """Returns the number of scores of a run's largest block, the first one."""
    first = next(_blocks(num_documents, num_heads, length, window))
    documents, queries = range(num_documents)[first.documents], range(length)[first.queries]
    return len(documents) * num_heads * len(queries) * len(range(length)[first.keys])


def _move(tokens: torch.Tensor, run: tuple[int, int, int], angles: Angles | None) -> torch.Tensor:
    """Rotates a run and transposes it to ``[documents, heads, length, head_dim]``."""
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
    """Writes the inverse of `_move` into ``tokens``."""
    start, num_documents, length = run
    rows = slice(start, start + num_documents * length)
    if angles is not None:
        angles = angles[0][rows], angles[1][rows]
    heads = tokens[rows].view(num_documents, length, *tokens.shape[1:])
    cpu_kernels.rotate(moved.transpose(1, 2), heads, angles, -1.0)


class _ComposedAttention(torch.autograd.Function):
    """Rotation and attention of all runs, with gradients of queries, keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        angles: Angles,
        runs: Runs,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        ctx.angles, ctx.runs, ctx.scale, ctx.window = angles, runs, scale, window
        context = torch.empty_like(query, memory_format=torch.contiguous_format)
        saved: list[torch.Tensor] = []
        for run in runs:
            q, k, v = _move(query, run, angles), _move(key, run, angles), _move(value, run, None)
            mixed = torch.empty_like(q)
            saved += (q, k, v)
            for block in _blocks(run[1], q.shape[1], run[2], window):
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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None, None, None]:
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
            moved = _move(gradient, run, None)
            parts = _run_gradients(moved, q, k, v, saved, ctx.scale, ctx.window)
            for part, whole, angles in zip(
                parts, gradients, (ctx.angles, ctx.angles, None), strict=True
            ):
                _move_back(part, whole, run, angles)
        return (*gradients, None, None, None, None)  # type: ignore[return-value]


def _softmax(scores: torch.Tensor, block: _Block, scale: float) -> torch.Tensor:
    """Computes a block's probabilities in place; the heads of a group are rows of one matrix."""
    num_queries = block.queries.stop - block.queries.start
    rows = scores.view(-1, num_queries, scores.shape[-1])
    block.hide_before_window(rows)
    first_query = block.queries.start - block.keys.start
    return cpu_kernels.causal_softmax(rows, first_query, scale).view(scores.shape)


def _softmax_backward(
    probabilities: torch.Tensor, gradient: torch.Tensor, block: _Block, scale: float
) -> torch.Tensor:
    shape = (-1, block.queries.stop - block.queries.start, gradient.shape[-1])
    first_query = block.queries.start - block.keys.start
    cpu_kernels.causal_softmax_backward(
        probabilities.view(shape), gradient.view(shape), first_query, scale
    )
    return gradient


def _run_gradients(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    saved: Iterator[torch.Tensor],
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of a run's rotated queries and keys and of its values.

    Args:
        gradient: Gradient of the output, ``[documents, heads, length, head_dim]``.
        q: Rotated queries of the same shape.
        k: Rotated keys, ``[documents, groups, length, head_dim]``.
        v: Values, ``[documents, groups, length, head_dim]``.
        saved: Probabilities of every block, in the order of `_blocks`.
        scale: Factor on the scores.
        window: Tokens of the sliding window; None for none.
    """
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    num_groups, length = k.shape[1], k.shape[2]
    scratch = q.new_empty(_largest_block(len(q), q.shape[1], length, window))
    # Blocks of queries are summed in fp32.
    grad_k = grad_v = torch.empty(0)
    for block in _blocks(len(q), q.shape[1], length, window):
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
        is_first = block.queries.stop == length
        if is_first and block.keys.start == 0:  # it has every key
            grad_k, grad_v = part_k.float(), part_v.float()
        else:
            if is_first:
                shape = (len(part_k), length, part_k.shape[2])
                grad_k, grad_v = (part_k.new_zeros(shape, dtype=torch.float32) for _ in range(2))
            grad_k[:, block.keys] += part_k
            grad_v[:, block.keys] += part_v
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
    window: int | None = None,
) -> torch.Tensor:
    """Rotates queries and keys and attends inside each document.

    Args:
        query: bf16 ``[tokens, heads, head_dim]``; each head dense, any other strides.
        key: bf16 ``[tokens, groups, head_dim]``.
        value: The same shape.
        angles: Cosines and sines, float32[tokens, head_dim / 2].
        runs: ``(start, num_documents, length)`` of documents of equal length.
        scale: Factor on the scores; ``head_dim ** -0.5`` if None.
        window: Number of tokens that a token sees, itself included; None for all before it.

    Returns:
        ``[tokens, heads, head_dim]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    context: torch.Tensor = _ComposedAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, angles, runs, scale, window
    )
    return context
