"""The dispatch mode under which operators on the simulated GPU compute shapes instead of values.

CPU tensors stay real. A tensor on the GPU is a `FakeTensor`, and torch's own shape functions stand
for its kernels. A tensor that consists of others, such as one in FP8, consists of those. Whatever
brings a value from the GPU to the host makes the host wait on a real GPU: it is recorded, and the
host gets a made-up value. Values that the host itself has put into a small tensor are remembered,
so that flags which all ranks reduce come back as they were sent.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from megatron_chatflow.simulate.process_group import finished_work, record_collective
from megatron_chatflow.simulate.recorder import Recorder
from megatron_chatflow.simulate.shapes import ShapeCache, leaves_of

aten = torch.ops.aten
_MOST_REMEMBERED = 64  # elements of a tensor whose values are remembered
_DEVICE = torch.ops.prim.device.default
_COPIES = (aten._to_copy.default, aten.copy_.default)
_READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
# The sizes of their results depend on values, which the host has to read.
_DYNAMIC = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
)
# These return new tensors without a kernel.
_NO_LAUNCH = (
    *("empty", "new_empty", "prim::device", "detach", "alias", "lift_fresh", "set_"),
    "_unsafe_view",
)


@cache
def _is_launch(operator: Any) -> bool:
    """Returns whether an operator starts a kernel: it is no view and more than an allocation."""
    name = operator.name().partition("::")[2].partition(".")[0]
    if name.startswith(_NO_LAUNCH) or operator.namespace in ("c10d", "prim", "profiler"):
        return False
    returns = operator._schema.returns
    is_view = bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )
    return not is_view


@cache
def _written(operator: Any) -> tuple[int, ...]:
    """Returns the positions of the arguments that an operator writes to."""
    arguments = operator._schema.arguments
    return tuple(
        number
        for number, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


class SimulatedGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Executes operators on the simulated GPU, and accounts for them.

    Args:
        recorder: Where everything is accounted for.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder
        # Without a shape function, torch would run the operator's kernel on a tensor of zeros.
        self._shapes = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=False)
        self._shapes.static_shapes = True
        self._cache = ShapeCache(self._shapes)
        self._values: dict[int, torch.Tensor] = {}  # by the address of a storage

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Computes the result's shape, or runs an operator of CPU tensors as it is."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # it calls operators of the tensors that it consists of
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        leaves = leaves_of((args, kwargs))
        is_simulated = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        device = kwargs.get("device")
        if device is not None:
            device = torch.device("cuda", device) if isinstance(device, int) else device
            device = torch.device(device)
        if not is_simulated and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if func in _READS:
            return self._read(func, args)
        if func in _COPIES and self._is_to_host(func, args, device):
            return self._copy_to_host(func, args, kwargs)
        if func in _DYNAMIC or (func is aten.index.Tensor and _has_mask(args[1])):
            self._recorder.add_synchronization(f"{func.name()} (size depends on values)")
        real = [
            leaf
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
        ]
        given: torch.Tensor | None = None
        if real:
            given = self._note_host_tensors(func, args, kwargs, real)
            leaves, structure = tree_flatten((args, kwargs))
            args, kwargs = tree_unflatten([self._convert(leaf) for leaf in leaves], structure)
        if kwargs.get("generator") is not None:
            kwargs = {**kwargs, "generator": None}  # on the CPU, see `device.Generator`
        if func.namespace == "c10d":
            record_collective(self._recorder, func, args)
            # Collectives return their first argument, where they return a tensor, and the work.
            work = finished_work().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        self._forget_values(func, args)
        result, flops = self._cache.call(func, args, kwargs)
        self._account(func, result, flops)
        if given is not None and given.numel() <= _MOST_REMEMBERED:
            target = result if isinstance(result, torch.Tensor) else args[0]
            self._values[_address(target)] = given.detach().clone()
        return result

    def _convert(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        return self._shapes.from_tensor(leaf, static_shapes=True)

    def _account(self, func: Any, result: Any, flops: int) -> None:
        for leaf in leaves_of((result,)):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cuda":
                if self._recorder.see(leaf):
                    self._values.pop(_address(leaf), None)  # of freed memory at this address
        if not _is_launch(func):
            return
        self._recorder.add_launch(func.name())
        if flops:
            self._recorder.add_flops(func._opname, flops)

    # Between host and GPU.

    def _is_to_host(self, func: Any, args: Any, device: torch.device | None) -> bool:
        if func is aten.copy_.default:
            return not isinstance(args[0], FakeTensor)
        return device is not None and device.type == "cpu"

    def _read(self, func: Any, args: Any) -> bool | int | float:
        self._recorder.add_synchronization(func.name())
        if func is not aten._local_scalar_dense.default:
            return True
        tensor = args[0]
        known = self._values.get(_address(tensor))
        if known is not None and known.numel() == 1:
            value: bool | int | float = known.item()
            return value
        if tensor.dtype == torch.bool:
            return True
        return 1.0 if tensor.dtype.is_floating_point else 1

    def _copy_to_host(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        target: torch.Tensor | None = args[0] if func is aten.copy_.default else None
        source: torch.Tensor = args[0] if target is None else args[1]
        is_queued = kwargs.get("non_blocking") or (target is not None and args[2:3] == (True,))
        if not (is_queued and target is not None and target.is_pinned()):
            self._recorder.add_synchronization("copy to the host")
        known = self._values.get(_address(source))
        if known is not None and known.shape != source.shape:
            known = None
        if target is not None:
            return target if known is None else target.copy_(known)
        dtype = kwargs.get("dtype") or source.dtype
        if known is not None:
            return known.to(dtype, copy=True)
        return torch.ones(tuple(source.shape), dtype=dtype)

    def _note_host_tensors(
        self, func: Any, args: Any, kwargs: Any, real: list[torch.Tensor]
    ) -> torch.Tensor | None:
        """Records copies for which the host waits, and CPU tensors that are out of place.

        Returns:
            The tensor that is copied to the GPU; None if the operator is no copy.
        """
        if func not in _COPIES:
            if func is aten.index.Tensor and not isinstance(args[0], FakeTensor):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor "
                    "(cpu)"
                )
            # Tensors without axes are passed by value.
            if any(tensor.dim() for tensor in real):
                self._recorder.add_cpu_tensor(func.name())
            return None
        source = real[0]
        is_queued = kwargs.get("non_blocking") or args[2:3] == (True,)
        if source.numel() and not (is_queued and source.is_pinned()):
            self._recorder.add_synchronization("copy to the GPU")
        return source

    def _forget_values(self, func: Any, args: Any) -> None:
        for number in _written(func):
            if number < len(args):
                for tensor in leaves_of((args[number],)):
                    if isinstance(tensor, FakeTensor):
                        self._values.pop(_address(tensor), None)


def _address(tensor: torch.Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _has_mask(indices: Any) -> bool:
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
