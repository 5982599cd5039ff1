"""Shape functions of operators, evaluated once for every combination of argument shapes.

A step repeats the same few hundred calls in every layer and micro-batch. `FakeTensorMode` needs
about half a millisecond for each, even for those in its own cache; `ShapeCache` needs a tenth.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_UNCACHED_TAGS = frozenset(
    {
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
        torch.Tag.inplace_view,
    }
)
# Views whose arguments say where they begin in the storage.
_ABSOLUTE = (aten.as_strided.default, aten.as_strided_.default)
_UNCACHED_NAMESPACES = ("c10d", "_c10d_functional", "profiler")
_CONSTANTS = (type(None), bool, int, float)


def _cudnn_attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Describes cuDNN's attention, whose result has the layout of the query.

    torch 2.6 and 2.7 describe it as contiguous (https://github.com/pytorch/pytorch/pull/148921).
    """
    _, *others = aten._scaled_dot_product_cudnn_attention.default(query, *args, **kwargs)
    return torch.empty_like(query), *others


def _addmm_out(*_: Any, out: torch.Tensor, **__: Any) -> torch.Tensor:
    """Describes `torch.addmm` with ``out_dtype``, which torch 2.8 to 2.12 decompose wrongly."""
    return out


# Used instead of torch's own shape functions.
_SHAPES: dict[Any, Any] = {aten._scaled_dot_product_cudnn_attention.default: _cudnn_attention}
if hasattr(aten.addmm, "dtype_out"):  # since torch 2.8
    _SHAPES[aten.addmm.dtype_out] = _addmm_out

# Operators of attention: position of the query among the arguments, the key follows it, and number
# of matrix products, of which the backward pass computes the scores again.
_ATTENTION = {
    aten._scaled_dot_product_cudnn_attention: (0, 2),
    aten._scaled_dot_product_flash_attention: (0, 2),
    aten._scaled_dot_product_efficient_attention: (0, 2),
    aten._scaled_dot_product_cudnn_attention_backward: (1, 5),
    aten._scaled_dot_product_flash_attention_backward: (1, 5),
    aten._scaled_dot_product_efficient_attention_backward: (1, 5),
}


def _count_flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Returns an operator's floating-point operations; 0 where torch does not count them."""
    # The count of torch before 2.12 does not know keys with fewer heads than queries.
    attention = _ATTENTION.get(func._overloadpacket)
    if attention is not None:
        position, num_products = attention
        batch, heads, length, width = args[position].shape
        return int(2 * num_products * batch * heads * length * args[position + 1].shape[2] * width)
    count = flop_registry.get(func._overloadpacket)
    # The counter of `addmm` does not know its ``out_dtype``.
    counted = [arg for arg in args if not isinstance(arg, torch.dtype)]
    return 0 if count is None else int(count(*counted, **kwargs, out_val=result))


def leaves_of(values: Iterable[Any]) -> list[Any]:
    """Returns the arguments of an operator without the lists, tuples and dictionaries."""
    leaves: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            leaves += leaves_of(value)
        elif isinstance(value, dict):
            leaves += leaves_of(value.values())
        else:
            leaves.append(value)
    return leaves


@dataclass(frozen=True, slots=True)
class _Output:
    """How to create one of an operator's results.

    Attributes:
        argument: Position among the tensor arguments of the one that is returned, or of which the
            result is a view; -1 for a new tensor.
        is_argument: Whether the argument itself is returned.
        constant: The result, if it is no tensor.
        offset: Offset in the storage; that of a view is relative to the argument's.
    """

    argument: int = -1
    is_argument: bool = False
    constant: Any = None
    shape: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    outputs: tuple[_Output, ...]
    sequence: type | None  # list or tuple; None for a single result
    flops: int


class ShapeCache:
    """Evaluates operators on tensors without values.

    Args:
        mode: The mode that knows torch's shape functions.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._entries: dict[tuple[Any, ...], _Entry | None] = {}  # None: not to be cached

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, int]:
        """Returns an operator's result, and its floating-point operations.

        Args:
            func: The operator.
            args: Its arguments, of which no tensor is a real one.
            kwargs: Its keyword arguments.
        """
        tensors: list[FakeTensor] = []
        key: list[Any] = [func, torch.get_default_dtype()]
        if func in _ABSOLUTE:
            key += [tensor.storage_offset() for tensor in args if isinstance(tensor, FakeTensor)]
        _extend(key, tensors, args)
        for name, value in kwargs.items():
            key.append(name)
            _extend(key, tensors, (value,))
        lookup = tuple(key)
        try:
            entry = self._entries.get(lookup)
            is_new = entry is None and lookup not in self._entries
        except TypeError:  # an argument that cannot be hashed
            entry, is_new = None, False
        if entry is not None:
            results = [self._create(output, tensors) for output in entry.outputs]
            result = results[0] if entry.sequence is None else entry.sequence(results)
            return result, entry.flops
        before = [_metadata(tensor) for tensor in tensors]
        with self._mode:
            result = _SHAPES.get(func, func)(*args, **kwargs)
        flops = _count_flops(func, args, kwargs, result)
        if is_new:
            is_cached = (
                _UNCACHED_TAGS.isdisjoint(func.tags)
                and func.namespace not in _UNCACHED_NAMESPACES
                and before == [_metadata(tensor) for tensor in tensors]
            )
            self._entries[lookup] = _entry(result, tensors, flops) if is_cached else None
        return result, flops

    def _create(self, output: _Output, tensors: list[FakeTensor]) -> Any:
        if output.shape is None:
            return output.constant
        if output.is_argument:
            return tensors[output.argument]
        meta = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
        if output.argument >= 0:
            base = tensors[output.argument]
            storage, offset = base.untyped_storage(), base.storage_offset() + output.offset
            with in_kernel_invocation_manager(self._mode):
                meta.set_(storage, offset, output.shape, output.stride)
        return FakeTensor(self._mode, meta, output.device)


def _extend(key: list[Any], tensors: list[FakeTensor], values: Iterable[Any]) -> None:
    """Appends what determines the shapes of an operator's results."""
    for value in values:
        if isinstance(value, FakeTensor):
            tensors.append(value)
            key += (value.shape, value.stride(), value.dtype, value.fake_device)
        elif isinstance(value, (list, tuple)):
            key += (type(value), len(value))
            _extend(key, tensors, value)
        else:
            key += (type(value), value)  # 1, 1.0 and True are equal


def _metadata(tensor: FakeTensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    layout = tensor.shape, tensor.stride(), tensor.storage_offset()
    return *layout, storage._cdata, storage.nbytes()


def _entry(result: Any, tensors: list[FakeTensor], flops: int) -> _Entry | None:
    """Returns how to create an operator's result again; None if that is not possible."""
    sequence = type(result) if isinstance(result, (list, tuple)) else None
    if sequence not in (None, list, tuple):
        return None
    outputs: list[_Output] = []
    new_storages: set[int] = set()
    for value in (result,) if sequence is None else result:
        if isinstance(value, _CONSTANTS):
            outputs.append(_Output(constant=value))
            continue
        if not isinstance(value, FakeTensor) or value.requires_grad or value.dtype.is_complex:
            return None
        address = value.untyped_storage()._cdata
        bases = [
            number
            for number, tensor in enumerate(tensors)
            if tensor.untyped_storage()._cdata == address
        ]
        base_offset = int(tensors[bases[0]].storage_offset()) if bases else 0
        output = _Output(
            shape=tuple(value.shape),
            stride=value.stride(),
            offset=int(value.storage_offset()) - base_offset,
            dtype=value.dtype,
            device=value.fake_device,
        )
        same = [number for number, tensor in enumerate(tensors) if tensor is value]
        if same:
            outputs.append(replace(output, argument=same[0], is_argument=True))
            continue
        if len(bases) == 1 and tensors[bases[0]].dtype == value.dtype:
            outputs.append(replace(output, argument=bases[0]))
            continue
        if bases or address in new_storages or value.storage_offset():
            return None
        new_storages.add(address)
        twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if twin.untyped_storage().nbytes() != value.untyped_storage().nbytes():
            return None
        outputs.append(output)
    return _Entry(tuple(outputs), sequence, flops)
