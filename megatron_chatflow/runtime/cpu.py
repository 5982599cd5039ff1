"""Makes unmodified megatron-core run on CPUs over gloo.

In: nothing. Out: `install()` replaces, in this process, the CUDA entry points that megatron-core
calls on every path, and `device_mode()` is the context in which factory calls that name
``device="cuda"`` make CPU tensors. A CUDA run never imports this module.

What megatron-core 0.16 to 0.19 assumes, and what stands in for it here:

- ``torch.cuda.current_device`` as the device of new buffers: the CPU device;
- ``torch.cuda.set_device`` and ``synchronize``, and waiting for streams: nothing to do;
- the CUDA generator behind its random tracker: the CPU's default generator;
- ``Tensor.type()`` equal to ``torch.cuda.FloatTensor`` and the like when the distributed optimizer
  sorts parameters by dtype: the same name with the ``torch.cuda.`` prefix.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaNamesMeanCpu(TorchFunctionMode):
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
    """The context for megatron-core code that names CUDA as the device of a new tensor.

    It costs about a microsecond a torch call, so it surrounds construction, the optimizer's step
    and checkpoints, not the forward and backward passes, which need none of it.
    """
    return _CudaNamesMeanCpu()


class _OneStream:
    """The stream of a device that has one: everything on it comes in order."""

    def wait_stream(self, stream: object) -> None:
        """Has happened already."""

    def wait_event(self, event: object) -> None:
        """Has happened already."""

    def synchronize(self) -> None:
        """Has happened already."""


def install() -> None:
    """Replaces the CUDA entry points; calling it twice changes nothing more."""
    # `setattr` and not assignment: these names are typed as what they replace. Each name gets a
    # function of its own, because torch's compiler refuses one object under two names.
    replacements: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: _OneStream(),
        "default_stream": lambda device=None: _OneStream(),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
