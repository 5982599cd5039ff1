"""Read-only memory maps of whole files that hold no file descriptor.

`mmap.mmap`, and `numpy.memmap` on top of it, duplicate the descriptor and keep it for as long as
the map exists (only Python 3.13 can be told not to), so that a few hundred datasets exceed the
usual limit of 1,024 open files. The system itself needs no descriptor once a file is mapped, so
the system's `mmap` is called here directly.
"""

import ctypes
import mmap
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """Owns the mapped pages; the arrays made from it keep it alive."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self._unmap = _libc.munmap  # the module's names may be gone when the last array is
        self._num_bytes = num_bytes
        self._address = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if self._address == _MAP_FAILED:
            self._address = None
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """How NumPy sees the pages: bytes that are not to be written."""
        return {
            "version": 3,
            "shape": (self._num_bytes,),
            "typestr": "|u1",
            "data": (self._address, True),
        }

    def __del__(self) -> None:
        if self._address is not None:
            self._unmap(self._address, self._num_bytes)


def map_file(file: str | Path | IO[bytes]) -> npt.NDArray[np.uint8]:
    """Maps a file as it is now, read-only.

    The map outlives the file's name and the object that was given. It is undone when no array
    refers to it any more.

    Args:
        file: A path, or an open file whose bytes have been flushed.

    Returns:
        uint8[num_bytes], not writable.

    Raises:
        OSError: The file cannot be opened or mapped.
    """
    if isinstance(file, str | Path):
        with open(file, "rb", buffering=0) as opened:
            return map_file(opened)
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes == 0:  # which the system refuses to map
        return np.empty(0, np.uint8)
    return np.asarray(_Mapping(file.fileno(), num_bytes))


def release_pages(array: npt.NDArray[Any]) -> None:
    """Takes the mapped pages of an array out of this process's memory; a read brings them back.

    They stay in the system's page cache. An array of other memory is left alone.

    Args:
        array: A contiguous view of what `map_file` returned.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not isinstance(owner, _Mapping) or array.nbytes == 0:
        return  # what is no file's would be lost
    address = array.ctypes.data
    begin = address - address % mmap.PAGESIZE
    _libc.madvise(begin, address + array.nbytes - begin, mmap.MADV_DONTNEED)
