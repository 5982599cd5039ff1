"""Tensor-parallel collectives of CPU runs through shared memory, for ranks on one machine.

After `share`, torch's `all_reduce`, `all_gather_into_tensor` and `reduce_scatter_tensor` over a
tensor-parallel group, as called by megatron-core and the loss, use a `SharedGroup` instead of
gloo's sockets. Other groups, dtypes and reductions are unaffected. If the ranks cannot share
memory, nothing changes and the log gives the reason.

Every rank gets the same bits: sums are computed in fp32 in the order of ranks and rounded once. The
memory is an anonymous file created by rank 0, which the other ranks open through ``/proc``; it is
freed when the last process ends. The C++ part is in `csrc/kernels/cpu/shared_group`.
"""

import contextlib
import functools
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.autograd.profiler import record_function
from torch.distributed import ProcessGroup, ReduceOp

from megatron_chatflow.kernels.cpu import extension

MAX_SIZE: int = getattr(extension, "MAX_GROUP_SIZE", 0)
"""Largest size of a group; 0 if the extension is not built or predates groups."""

_ELEMENTS: dict[torch.dtype, Any] = (
    {torch.bfloat16: extension.Element.BF16, torch.float32: extension.Element.FP32}
    if extension is not None and MAX_SIZE
    else {}
)


def num_bytes(size: int, lanes: int) -> int:
    """Returns the size in bytes of the memory of ``size`` processes with ``lanes`` threads each."""
    assert extension is not None
    return int(extension.SharedGroup.num_bytes(size, lanes))


def supports(*tensors: torch.Tensor) -> bool:
    """Returns whether the collectives support tensors; the same on every rank."""
    return all(tensor.device.type == "cpu" and tensor.dtype in _ELEMENTS for tensor in tensors)


class SharedGroup:
    """A process's handle of a group.

    Every process calls the same collectives in the same order. They raise RuntimeError if another
    process has ended, is late, or calls another collective.
    """

    def __init__(
        self, file: int, rank: int, size: int, lanes: int, *, timeout_seconds: float
    ) -> None:
        """Joins the group; all processes must join before the first collective.

        Args:
            file: Descriptor of a file of `num_bytes`, zeros at first; its bytes before 4096 are
                free. Closed with this object; nothing else in this process may open the file.
            rank: Of this process in the group.
            size: Processes of the group.
            lanes: Threads of each process; the same in all.
            timeout_seconds: How long to wait for a living process.

        Raises:
            RuntimeError: The file cannot be mapped or locked.
        """
        assert extension is not None
        self._group = extension.SharedGroup(file, rank, size, lanes, timeout_seconds)
        self._size = size

    def all_reduce(self, tensor: torch.Tensor, *, is_max: bool = False) -> None:
        """Overwrites ``tensor`` with the sum or the maximum over the group."""
        dense = tensor.contiguous()
        self._group.all_reduce(dense.data_ptr(), dense.numel(), *self._kind(dense, is_max))
        if dense is not tensor:
            tensor.copy_(dense)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        """Overwrites ``output`` with the concatenated tensors of all ranks."""
        self._check(output, tensor, whole=output)
        dense = tensor.contiguous()
        self._group.all_gather(
            dense.data_ptr(), output.data_ptr(), dense.numel() * dense.element_size()
        )

    def reduce_scatter(
        self, output: torch.Tensor, tensor: torch.Tensor, *, is_max: bool = False
    ) -> None:
        """Overwrites ``output`` with this rank's shard of the reduced tensors."""
        self._check(output, tensor, whole=tensor)
        dense = tensor.contiguous()
        self._group.reduce_scatter(
            dense.data_ptr(), output.data_ptr(), output.numel(), *self._kind(dense, is_max)
        )

    def _check(self, output: torch.Tensor, tensor: torch.Tensor, whole: torch.Tensor) -> None:
        part = tensor if whole is output else output
        if part.numel() * self._size != whole.numel() or part.dtype != whole.dtype:
            raise ValueError(
                f"shared memory: {tuple(part.shape)} of {part.dtype} is no {self._size}th part of "
                f"{tuple(whole.shape)} of {whole.dtype}"
            )
        if not output.is_contiguous():
            raise ValueError(f"shared memory: an output of strides {output.stride()} has gaps")

    def _kind(self, tensor: torch.Tensor, is_max: bool) -> tuple[Any, Any]:
        assert extension is not None
        reduction = extension.Reduction.MAX if is_max else extension.Reduction.SUM
        return _ELEMENTS[tensor.dtype], reduction


_FILE_NAME = "megatron_chatflow"
_NONCE_BYTES = 7  # an int64 holds it

# Groups that share memory; the memory is freed with the group.
_shared: WeakKeyDictionary[ProcessGroup, SharedGroup] = WeakKeyDictionary()


class _Done:
    """The handle of a collective that has already completed."""

    def wait(self, *_: Any) -> bool:
        """Returns at once."""
        return True

    def is_completed(self) -> bool:
        """Returns True."""
        return True


def share(group: ProcessGroup, *, timeout_seconds: float) -> str:
    """Makes the collectives of ``group`` use shared memory if possible; a collective itself.

    Args:
        group: Ranks on one machine or several.
        timeout_seconds: How long to wait for a living rank.

    Returns:
        A description for the log.
    """
    if group in _shared:
        return "shared memory"
    shared, obstacle = _connect(group, timeout_seconds)
    if shared is None:
        return f"gloo: {obstacle}"
    _shared[group] = shared
    _replace_functions()
    return "shared memory"


def _connect(group: ProcessGroup, timeout_seconds: float) -> tuple[SharedGroup | None, str]:
    """Returns this rank's handle, or None and the reason; consistent on every rank."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    # The least number of threads, and whether every rank can take part.
    can = sys.platform == "linux" and size <= MAX_SIZE
    lanes, all_can = _lowest(group, torch.get_num_threads(), can)
    if not all_can:
        return None, "a rank has no csrc/kernels/cpu, or no Linux"
    file, offer = None, [0, 0, 0]
    if rank == 0:
        with contextlib.suppress(OSError):
            file, offer = _make_file(num_bytes(size, lanes))
    offered = torch.tensor(offer)
    dist.all_reduce(offered, group=group)
    if rank:
        file = _open_file(*offered.tolist())
    shared = None
    if file is not None:
        with contextlib.suppress(RuntimeError):
            shared = SharedGroup(file, rank, size, lanes, timeout_seconds=timeout_seconds)
    (all_have,) = _lowest(group, shared is not None)
    return (shared, "") if all_have else (None, "the ranks are on different machines")


def _lowest(group: ProcessGroup, *values: int) -> list[int]:
    """Returns the minimum of each value over the group."""
    lowest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(lowest, op=ReduceOp.MIN, group=group)
    return lowest.tolist()


def _make_file(num_bytes: int) -> tuple[int, list[int]]:
    """Creates a memory file; returns it and what other ranks need to find and recognize it."""
    file = os.memfd_create(_FILE_NAME)
    os.ftruncate(file, num_bytes)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    os.pwrite(file, nonce, 0)
    return file, [os.getpid(), file, int.from_bytes(nonce, "little")]


def _open_file(process: int, descriptor: int, nonce: int) -> int | None:
    """Opens the file of rank 0; None if rank 0 is on another machine or access is denied."""
    path = f"/proc/{process}/fd/{descriptor}"
    try:
        # On another machine the descriptor may be any file, which must not be opened.
        if not os.readlink(path).startswith(f"/memfd:{_FILE_NAME}"):
            return None
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if os.pread(file, _NONCE_BYTES, 0) == nonce.to_bytes(_NONCE_BYTES, "little"):
        return file
    os.close(file)
    return None


def _find(
    group: ProcessGroup | None, op: Any, *tensors: torch.Tensor
) -> tuple[SharedGroup | None, bool]:
    """The shared memory that does this collective, None if none does; and whether it is a MAX."""
    shared = _shared.get(group) if group is not None else None
    if shared is None or op not in (ReduceOp.SUM, ReduceOp.MAX):
        return None, False
    return (shared if supports(*tensors) else None), op == ReduceOp.MAX


def _replace_functions() -> None:
    """Puts ours before torch's functions, where megatron-core and others look for them."""
    if hasattr(dist.all_reduce, "_shares_memory"):
        return
    ours = {
        "all_reduce": _all_reduce(dist.all_reduce),
        "all_gather_into_tensor": _all_gather(dist.all_gather_into_tensor),
        "reduce_scatter_tensor": _reduce_scatter(dist.reduce_scatter_tensor),
    }
    replaced = {getattr(dist, name): function for name, function in ours.items()}
    for name, function in ours.items():
        function._shares_memory = True  # type: ignore[attr-defined]
        setattr(dist, name, function)
    # megatron-core keeps references to two of them.
    for module in [m for n, m in sys.modules.items() if n.startswith("megatron.core.tensor_par")]:
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
            known = getattr(module, name, None)
            if known in replaced:
                setattr(module, name, replaced[known])


Function = Callable[..., Any]


def _all_reduce(original: Function) -> Function:
    @functools.wraps(original)
    def all_reduce(
        tensor: torch.Tensor,
        op: Any = ReduceOp.SUM,
        group: ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        shared, is_max = _find(group, op, tensor)
        if shared is None:
            return original(tensor, op, group, async_op)
        with record_function("shared_memory::all_reduce"):
            shared.all_reduce(tensor.detach(), is_max=is_max)
        return _Done() if async_op else None

    return cast(Function, all_reduce)


def _all_gather(original: Function) -> Function:
    @functools.wraps(original)
    def all_gather_into_tensor(
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        shared, _ = _find(group, ReduceOp.SUM, output_tensor, input_tensor)
        if shared is None:
            return original(output_tensor, input_tensor, group, async_op)
        with record_function("shared_memory::all_gather"):
            shared.all_gather(output_tensor, input_tensor.detach())
        return _Done() if async_op else None

    return cast(Function, all_gather_into_tensor)


def _reduce_scatter(original: Function) -> Function:
    @functools.wraps(original)
    def reduce_scatter_tensor(
        output: torch.Tensor,
        input: torch.Tensor,
        op: Any = ReduceOp.SUM,
        group: ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        shared, is_max = _find(group, op, output, input)
        if shared is None:
            return original(output, input, op, group, async_op)
        with record_function("shared_memory::reduce_scatter"):
            shared.reduce_scatter(output, input.detach(), is_max=is_max)
        return _Done() if async_op else None

    return cast(Function, reduce_scatter_tensor)
