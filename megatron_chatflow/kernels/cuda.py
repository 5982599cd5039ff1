"""Loads the library of CUDA kernels built by `csrc/kernels/build.sh` and launches its kernels.

The library is plain C on pointers, so that it works with any version of torch. Where it is not
built, `load_kernels` says so and torch's operations are used.
"""

import ctypes
import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libchatflow_kernels.so")

_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "fp32"}

# Arguments of each launcher before the stream: p is a pointer, n an int64.
SIGNATURES = {
    "softmax_statistics": "pppppnnn",
    "softmax_gradient": "pppppnnn",
}
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64}


class KernelLibrary:
    """The kernel launchers of a compiled library.

    Args:
        path: The library's file.

    Raises:
        OSError: The library cannot be loaded, or is of another version.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._launchers = {}
        for name, arguments in SIGNATURES.items():
            for dtype, suffix in _SUFFIXES.items():
                try:
                    launcher = getattr(library, f"chatflow_{name}_{suffix}")
                except AttributeError as error:
                    raise OSError(str(error)) from None
                launcher.argtypes = [_TYPES[kind] for kind in arguments + "p"]
                launcher.restype = ctypes.c_int
                self._launchers[name, dtype] = launcher

    def launch(self, name: str, dtype: torch.dtype, *arguments: torch.Tensor | int) -> None:
        """Queues a kernel on the current stream of its tensors' device.

        Args:
            name: One of `SIGNATURES`.
            dtype: The type T of the header.
            *arguments: In the header's order, without the stream.

        Raises:
            ValueError: The kernel does not support these sizes or addresses.
            RuntimeError: CUDA refused the launch.
        """
        first = arguments[0]
        assert isinstance(first, torch.Tensor)
        raw = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        if first.is_cuda:
            stream = torch.cuda.current_stream(first.device).cuda_stream
            with torch.cuda.device(first.device):
                error = self._launchers[name, dtype](*raw, stream)
        else:
            error = self._launchers[name, dtype](*raw, None)
        if error == 1:
            raise ValueError(
                f"{name}: the kernel does not support {tuple(first.shape)} of {dtype}; rows must "
                "be whole packs of 16 bytes, see csrc/kernels/kernels.h"
            )
        if error:
            raise RuntimeError(f"{name}: CUDA error {error} at the launch of the kernel")


@functools.cache
def load_kernels() -> tuple[KernelLibrary | None, str]:
    """Returns the library, or None, and a description or the reason for the log."""
    if not LIBRARY.exists():
        return None, "csrc/kernels is not built (MEGATRON_CHATFLOW_CUDA=1 builds it)"
    try:
        return KernelLibrary(LIBRARY), "csrc/kernels"
    except OSError as error:
        return None, f"csrc/kernels cannot be loaded ({error}); build it anew"


def kernels() -> KernelLibrary:
    """Returns the library.

    Raises:
        RuntimeError: It is not built.
    """
    library, reason = load_kernels()
    if library is None:
        raise RuntimeError(reason)
    return library


def is_whole_packs(size: int, dtype: torch.dtype) -> bool:
    """Returns whether the kernels support rows of ``size`` elements of a dtype."""
    return dtype in _SUFFIXES and size > 0 and size * dtype.itemsize % 16 == 0
