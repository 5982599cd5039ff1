"""Read-only memory maps of whole files that do not keep a file descriptor open.

`mmap.mmap`, and `numpy.memmap` on top of it, duplicate the descriptor and keep it as long as the
map exists (Python 3.13 added an option to avoid this). A few hundred datasets would then exceed the
usual limit of 1,024 open files. The operating system needs no descriptor once a file is mapped, so
this module calls the system's `mmap` directly.
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
    """Owns mapped pages. Arrays that are created from it keep a reference to it."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        # At interpreter exit, module globals may be deleted before the last array.
        self._unmap = _libc.munmap
        self._num_bytes = num_bytes
        self._address = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if self._address == _MAP_FAILED:
            self._address = None
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Describes the pages to NumPy as a read-only array of bytes."""
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
    """Maps a whole file read-only, at its current size, as uint8[num_bytes].

    The map stays valid after the file is deleted or the file object is closed. It is removed when
    no array refers to it any more. Data written to an open file must have been flushed.

    Raises:
        OSError: The file cannot be opened or mapped.
    """
    if isinstance(file, str | Path):
        with open(file, "rb", buffering=0) as opened:
            return map_file(opened)
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes == 0:  # the system cannot map an empty file
        return np.empty(0, np.uint8)
    return np.asarray(_Mapping(file.fileno(), num_bytes))


def release_pages(array: npt.NDArray[Any]) -> None:
    """Releases the mapped pages of an array from this process's resident memory.

    The pages stay in the system's page cache, and the next access maps them again. The array is a
    contiguous view of a result of `map_file`; other arrays are not changed.
    """
    owner: object = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if not isinstance(owner, _Mapping) or array.nbytes == 0:
        return  # MADV_DONTNEED would discard memory that no file backs
    address = array.ctypes.data
    begin = address - address % mmap.PAGESIZE
    _libc.madvise(begin, address + array.nbytes - begin, mmap.MADV_DONTNEED)
