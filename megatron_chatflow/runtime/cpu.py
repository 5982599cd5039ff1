"""Makes unmodified megatron-core run on CPUs over gloo.

`install` replaces the CUDA functions that megatron-core 0.16 to 0.19 calls unconditionally. In the
context `device_mode`, factory calls with ``device="cuda"`` create CPU tensors. A CUDA run never
imports this module.

- ``torch.cuda.current_device``, the device of new buffers: returns the CPU device;
- ``torch.cuda.set_device``, ``synchronize``, ``empty_cache`` and the stream functions: do nothing;
- ``torch.cuda.get_rng_state``, ``set_rng_state``, ``manual_seed`` and the functions
  ``_get_cuda_rng_state`` and ``_set_cuda_rng_state`` of ``megatron.core.tensor_parallel.random``,
  which its random tracker uses: act on the CPU's default generator;
- ``Tensor.type()``, by which the distributed optimizer sorts parameters: returns
  ``torch.cuda.FloatTensor`` and the like, only inside `device_mode`;
- ``Tensor.cuda()``: returns the tensor, only inside `device_mode`;
- ``HybridDeviceOptimizer._init_sub_optimizers``, which offloads the state of parameters whose
  ``is_cuda`` is true: they count as on a GPU, and their copies as in host memory;
- ``dist_all_gather_func`` of ``megatron.core.distributed.param_and_grad_buffer``: gathers bytes,
  because gloo converts weights of different dtypes that it gathers at once to one of them.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaToCpuMode(TorchFunctionMode):
    """Maps ``device="cuda"`` to the CPU and gives CPU tensors their CUDA type names."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def device_mode() -> TorchFunctionMode:
    """Returns the context for megatron-core code that creates tensors with ``device="cuda"``.

    It costs about a microsecond per torch call.
    """
    return _CudaToCpuMode()


class _HostCopyMode(TorchFunctionMode):
    """Lets tensors count as on a GPU, except copies by ``Tensor.cpu()`` and what is made of them.

    It is only for the optimizer that offloads its state, so that it can be tried on CPUs.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        is_copy = bool(args) and getattr(args[0], "is_host_copy", False)
        if getattr(func, "__self__", None) is torch.Tensor.is_cuda:
            return not is_copy
        if func is torch.Tensor.pin_memory:
            return args[0]
        result = args[0].clone() if func is torch.Tensor.cpu else func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and (is_copy or func is torch.Tensor.cpu):
            result.is_host_copy = True  # type: ignore[attr-defined]
        return result


class _CpuStream:
    """A stream of the CPU, and an event of it. All work is already in order."""

    def wait_stream(self, stream: object) -> None:
        """Does nothing."""

    def wait_event(self, event: object) -> None:
        """Does nothing."""

    def record_event(self) -> "_CpuStream":
        """Returns an event that has happened."""
        return self

    def wait(self, stream: object) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Does nothing."""


def install() -> None:
    """Replaces the CUDA functions; repeated calls have no further effect."""
    # `setattr` instead of assignment because of the names' types. Each name gets its own function,
    # because torch.compile refuses one object under two names.
    replacements: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: _CpuStream(),
        "default_stream": lambda device=None: _CpuStream(),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.tensor_parallel import random

    param_and_grad_buffer.dist_all_gather_func = _gather_bytes
    if not hasattr(HybridDeviceOptimizer._init_sub_optimizers, "__wrapped__"):
        HybridDeviceOptimizer._init_sub_optimizers = _with_host_copies(
            HybridDeviceOptimizer._init_sub_optimizers
        )

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _gather_bytes(whole: torch.Tensor, own: torch.Tensor, **options: Any) -> Any:
    parts = (tensor.view(torch.uint8) for tensor in (whole, own))
    return torch.distributed.all_gather_into_tensor(*parts, **options)


def _with_host_copies(function: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(function)
    def call(optimizer: Any) -> None:
        stream = torch.cuda.Stream
        setattr(torch.cuda, "Stream", _CpuStream)  # noqa: B010
        try:
            with _HostCopyMode():
                function(optimizer)
        finally:
            setattr(torch.cuda, "Stream", stream)  # noqa: B010

    return call
