"""A CUDA device that is not there: its properties, streams, events and functions of `torch.cuda`.

`install` makes this process believe in the device. It cannot be undone, so only `worker` calls it,
in a process that ends with the simulation.
"""

import contextlib
import ctypes
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import fake_tensor

from megatron_chatflow.simulate.recorder import Recorder

DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class GpuModel:
    """A model of GPU.

    Attributes:
        name: Name that the driver gives it.
        capability: Its compute capability.
        memory_bytes: Size of its memory.
        num_multiprocessors: Number of streaming multiprocessors.
        l2_bytes: Size of the second-level cache.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    num_multiprocessors: int
    l2_bytes: int


# From NVIDIA's data sheets; the memory is what the driver reports to programs.
GPUS = {
    "a100-80": GpuModel("NVIDIA A100-SXM4-80GB", (8, 0), 84_974_239_744, 108, 40 << 20),
    "h100": GpuModel("NVIDIA H100 80GB HBM3", (9, 0), 85_024_112_640, 132, 50 << 20),
    "h200": GpuModel("NVIDIA H200", (9, 0), 150_109_880_320, 132, 50 << 20),
    "b200": GpuModel("NVIDIA B200", (10, 0), 191_495_831_552, 148, 126 << 20),
    "gb200": GpuModel("NVIDIA GB200", (10, 0), 198_642_237_440, 152, 126 << 20),
}


class Event:
    """An event on a stream that has nothing to wait for."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Does nothing."""

    def wait(self, stream: object = None) -> None:
        """Does nothing: the GPU waits, not the host."""

    def query(self) -> bool:
        """Returns that the event has happened."""
        return True

    def synchronize(self) -> None:
        """Records that the host waits."""
        _recorder().add_synchronization("torch.cuda.Event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        """Returns a made-up time in milliseconds."""
        return 1.0


class Stream:
    """A stream; all work is already in order."""

    device_type = 1  # torch's number of CUDA
    stream_id = cuda_stream = priority = 0

    def __init__(self, *_: object, **__: object) -> None:
        self.device_index = _current[0]
        self.device = torch.device("cuda", _current[0])

    def wait_stream(self, stream: object) -> None:
        """Does nothing: the GPU waits, not the host."""

    def wait_event(self, event: object) -> None:
        """Does nothing: the GPU waits, not the host."""

    def record_event(self, event: Event | None = None) -> Event:
        """Returns the event, or a new one."""
        return event or Event()

    def query(self) -> bool:
        """Returns that all work is done."""
        return True

    def synchronize(self) -> None:
        """Records that the host waits."""
        _recorder().add_synchronization("torch.cuda.Stream.synchronize")


class Generator(torch.Generator):
    """A generator on the CPU, whatever the device: values do not matter, seeds do."""

    def __new__(cls, device: object = "cpu") -> "Generator":
        """Creates the generator."""
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


_current = [0]  # the device of this process
_recorders: list[Recorder] = []


def _recorder() -> Recorder:
    return _recorders[0]


class _Context:
    """Replaces context managers that choose a device or a stream."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def _on_stream(_stream: object) -> Iterator[None]:
    yield


def install(gpu: GpuModel, recorder: Recorder, library: ctypes.CDLL) -> None:
    """Makes ``gpu`` appear as each of this node's GPUs, in this process and for good.

    It replaces the functions of `torch.cuda` that training and megatron-core call,
    ``torch.Generator``, and the methods ``Module.cuda`` and ``Tensor.record_stream``. Everything
    else that reaches CUDA is an operator and is handled by `mode`.

    Args:
        gpu: The model of the GPUs.
        recorder: Where everything is accounted for.
        library: The library of `shim`. The process must have loaded it before it imported torch,
            which asks for CUDA once, while it is imported, and remembers the answer.
    """
    assert torch._C._get_accelerator().type == "cuda", "the library was loaded after torch"
    library.register_guard()
    _recorders[:] = [recorder]

    def set_device(device: Any) -> None:
        _current[0] = device if isinstance(device, int) else torch.device(device).index or 0
        library.set_current_device(_current[0])

    properties = types.SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.num_multiprocessors,
        L2_cache_size=gpu.l2_bytes,
        warp_size=32,
    )
    stream = Stream()
    runtime = types.SimpleNamespace(
        cudaHostRegister=lambda *_: 0,
        cudaHostUnregister=lambda *_: 0,
        cudaProfilerStart=lambda: 0,
        cudaProfilerStop=lambda: 0,
    )
    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: recorder.phase != "start-up",
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: DEVICES_PER_NODE,
        "current_device": lambda: _current[0],
        "set_device": set_device,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: gpu.name,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "stream": _on_stream,
        "device": _Context,
        "Stream": Stream,
        "Event": Event,
        "cudart": lambda: runtime,
        "synchronize": lambda device=None: recorder.add_synchronization("torch.cuda.synchronize"),
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: recorder.reset_peak(),
        "memory_allocated": lambda device=None: recorder.live_bytes,
        "memory_reserved": lambda device=None: recorder.live_bytes,
        "max_memory_allocated": lambda device=None: recorder.peak_bytes,
        "max_memory_reserved": lambda device=None: recorder.peak_bytes,
        "memory_stats": lambda device=None: defaultdict(int),
        "mem_get_info": lambda device=None: (
            gpu.memory_bytes - recorder.live_bytes,
            gpu.memory_bytes,
        ),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "default_generators": [torch.default_generator] * DEVICES_PER_NODE,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, functions[name])
    internal: Any = torch._C
    internal._cuda_getDevice = lambda: _current[0]
    internal._cuda_getDeviceCount = lambda: DEVICES_PER_NODE
    internal._has_cudnn = True
    # It would allocate a tensor on the device.
    shape_functions: Any = fake_tensor
    shape_functions.init_gpu_context = lambda device: None
    # `torch.tensor(values, device="cuda")` must reach `mode` as a copy from the host.
    internal._set_only_lift_cpu_tensors(True)
    torch.Generator = Generator  # type: ignore[misc]
    modules: Any = torch.nn.Module
    modules.cuda = _move_module
    tensors: Any = torch.Tensor
    tensors.record_stream = lambda tensor, stream: None


def _move_module(module: torch.nn.Module, device: Any = None) -> torch.nn.Module:
    """Replaces ``Module.cuda``, whose swap of parameters needs values."""
    target = torch.device("cuda", _current[0])
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type != "cuda":
                    moved: Any = tensor.detach().to(target)
                    if isinstance(tensor, torch.nn.Parameter):
                        moved = torch.nn.Parameter(moved, tensor.requires_grad)
                        moved.__dict__.update(tensor.__dict__)
                    tensors[name] = moved
    return module
