"""Compares `ShapeCache` with torch's shape functions, on a first and on a repeated call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_chatflow.simulate.shapes import ShapeCache, leaves_of


class Cached(TorchDispatchMode):
    """Evaluates every operator of fake tensors by a `ShapeCache`."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.cache = ShapeCache(mode)
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        result, flops = self.cache.call(func, args, kwargs or {})
        self.flops += flops
        return result


def described(result: Any, storages: set[int]) -> list[Any]:
    """Returns the layout of an operator's results, and which of them are views."""
    return [
        (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        + (value.untyped_storage()._cdata in storages, value.untyped_storage().nbytes())
        if isinstance(value, FakeTensor)
        else value
        for value in tree_leaves(result)
    ]


CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "matmul": lambda x: x @ x.t(),
    "view of a view": lambda x: x[1:].view(-1)[3:],
    "as_strided": lambda x: x[2:].as_strided((2, 2), (1, 2), 1),
    "as_strided from the beginning of a view": lambda x: x[2:].as_strided((2, 2), (1, 2)),
    "split": lambda x: x.split([1, 3]),
    "in place": lambda x: x.add_(1),
    "other dtype": lambda x: x.view(torch.int32),
    "conversion": lambda x: x.to(torch.bfloat16),
    "new tensor": lambda x: torch.zeros(3, device=x.device),
    "several new tensors": lambda x: x.max(dim=1),
    "concatenation": lambda x: torch.cat([x, x[:2]]),
    "no elements": lambda x: x[4:] * 2,
    "squeeze in place": lambda x: x[:1].squeeze_(0),
}


@pytest.mark.parametrize("name", CALLS)
def test_repeated_calls_have_the_same_results(name: str) -> None:
    call = CALLS[name]
    mode = FakeTensorMode()
    with mode:
        plain = torch.empty(4, 6)
        expected = described(call(plain), {plain.untyped_storage()._cdata})
    with Cached(mode):
        for _ in range(3):
            x = mode.from_tensor(torch.empty(4, 6))
            found = described(call(x), {x.untyped_storage()._cdata})
            assert found == expected


def test_views_begin_where_their_tensors_do() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.empty(8, 6))
    with Cached(mode):
        for row in range(4):
            assert x[row : row + 3].narrow(0, 1, 2).storage_offset() == 6 * (row + 1)
            assert x[row : row + 3].as_strided((2,), (1,)).storage_offset() == 6 * row
            assert x[row : row + 3].as_strided((2,), (1,), 3).storage_offset() == 3


def test_results_do_not_share_memory() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.empty(4, 6))
    with Cached(mode):
        results = [x + 1 for _ in range(3)]
    assert len({one.untyped_storage()._cdata for one in results}) == 3


def test_arguments_of_other_types_are_other_calls() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.empty(4, dtype=torch.int64))
    with Cached(mode):
        dtypes = [(x * factor).dtype for factor in (1, 1.0, True, 1)]
        assert dtypes == [torch.int64, torch.float32, torch.int64, torch.int64]
        torch.set_default_dtype(torch.float64)
        try:
            assert (x * 1.0).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_operations_are_counted_every_time() -> None:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.empty(4, 6))
    with Cached(mode) as cached:
        for number in range(1, 4):
            torch.mm(x, x.t())
            assert cached.flops == number * 2 * 4 * 6 * 4


def test_resized_tensors_keep_their_new_size() -> None:
    mode = FakeTensorMode()
    with Cached(mode):
        for _ in range(2):
            x = mode.from_tensor(torch.empty(4))
            assert x.resize_(9).shape == (9,)
            assert x.shape == (9,)
            x = torch.empty(0, device=x.device)
            torch.add(y := mode.from_tensor(torch.empty(4)), y, out=x)
            assert x.shape == (4,)


def test_leaves_are_in_order() -> None:
    assert leaves_of(([1, (2, [3])], {"a": 4, "b": [None]})) == [1, 2, 3, 4, None]
