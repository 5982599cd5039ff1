"""Which attention kernels a run uses, and the one call into each library that has them.

In: what is installed, the GPU, dtype and head size. Out: a name and the reason; and for each name a
function on packed tokens. Queries of segment i see keys of segment i, causally, the last query the
last key; segments are given by cumulative lengths (``cu_seqlens``), query heads are a multiple of
key heads. A library is imported when nothing else speaks against it, and not before.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, NamedTuple

import torch
from packaging.version import Version

from megatron_chatflow.errors import UserError

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
